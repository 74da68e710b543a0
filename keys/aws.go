package keys

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"kmsfs/crypt"
)

// AWS wraps data keys with AWS KMS. Each call goes to the region in the key's
// ARN, names its keys explicitly, and checks which key KMS says it used: a
// header's blob never decides under which key it is opened (the class of
// CVE-2020-8897). It is safe for concurrent use.
type AWS struct {
	clients  *clients
	deadline time.Duration
	pacer    *Pacer // nil = none

	mu    sync.Mutex
	calls map[string]int64 // guarded by mu; requests sent, by operation
}

// NewAWS makes a provider. It reads no configuration and opens no connection
// before the first call.
func NewAWS(opts AWSOptions) (*AWS, error) {
	if opts.Deadline < 0 {
		return nil, fmt.Errorf("the KMS deadline is %v; it can't be negative", opts.Deadline)
	}
	if opts.Deadline == 0 {
		opts.Deadline = defaultDeadline
	}
	return &AWS{clients: newClients(opts), deadline: opts.Deadline, pacer: opts.Pacer, calls: map[string]int64{}}, nil
}

// Requests is the number of requests sent so far, by operation, retries included.
func (a *AWS) Requests() map[string]int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make(map[string]int64, len(a.calls))
	for op, n := range a.calls {
		out[op] = n
	}
	return out
}

func (a *AWS) count(op string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls[op]++
}

// GenerateDataKey implements Provider.
func (a *AWS) GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (*crypt.Key, []byte, error) {
	if err := checkARN(opGenerate, key); err != nil {
		return nil, nil, err
	}
	var out *awskms.GenerateDataKeyOutput
	err := a.call(ctx, opGenerate, key, func(ctx context.Context, c *awskms.Client) (err error) {
		out, err = c.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{
			KeyId: aws.String(key), EncryptionContext: ec, KeySpec: types.DataKeySpecAes256})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	k, err := takePlaintext(opGenerate, key, out.KeyId, out.Plaintext)
	if err != nil {
		return nil, nil, err
	}
	if err := checkBlob(opGenerate, key, out.CiphertextBlob); err != nil {
		k.Wipe()
		return nil, nil, err
	}
	return k, out.CiphertextBlob, nil
}

// Decrypt implements Provider.
func (a *AWS) Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error) {
	if err := checkARN(opDecrypt, key); err != nil {
		return nil, err
	}
	var out *awskms.DecryptOutput
	err := a.call(ctx, opDecrypt, key, func(ctx context.Context, c *awskms.Client) (err error) {
		out, err = c.Decrypt(ctx, &awskms.DecryptInput{
			KeyId: aws.String(key), EncryptionContext: ec, CiphertextBlob: blob,
			EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault})
		return err
	})
	if err != nil {
		return nil, err
	}
	return takePlaintext(opDecrypt, key, out.KeyId, out.Plaintext)
}

// Encrypt implements Provider. The plaintext key passes through buffers of the
// SDK, which can't be wiped.
func (a *AWS) Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) ([]byte, error) {
	if err := checkARN(opEncrypt, key); err != nil {
		return nil, err
	}
	// A copy, so that the key is not locked against wiping during the call.
	raw := make([]byte, crypt.KeySize)
	defer clear(raw)
	if err := k.Use(func(b []byte) error { copy(raw, b); return nil }); err != nil {
		return nil, newError(KindRejected, opEncrypt, key, err)
	}
	var out *awskms.EncryptOutput
	err := a.call(ctx, opEncrypt, key, func(ctx context.Context, c *awskms.Client) (err error) {
		out, err = c.Encrypt(ctx, &awskms.EncryptInput{
			KeyId: aws.String(key), EncryptionContext: ec, Plaintext: raw,
			EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault})
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := checkAnswer(opEncrypt, key, out.KeyId); err != nil {
		return nil, err
	}
	return out.CiphertextBlob, checkBlob(opEncrypt, key, out.CiphertextBlob)
}

// ReEncrypt implements Provider: it runs wholly inside KMS.
func (a *AWS) ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) ([]byte, error) {
	if err := errors.Join(checkARN(opReEncrypt, from), checkARN(opReEncrypt, to)); err != nil {
		return nil, err
	}
	if regionOf(from) != regionOf(to) {
		return nil, newError(KindRejected, opReEncrypt, to, fmt.Errorf("ReEncrypt works inside one region, and %s is in another", from))
	}
	var out *awskms.ReEncryptOutput
	err := a.call(ctx, opReEncrypt, from, func(ctx context.Context, c *awskms.Client) (err error) {
		out, err = c.ReEncrypt(ctx, &awskms.ReEncryptInput{
			SourceKeyId: aws.String(from), SourceEncryptionContext: ec, CiphertextBlob: blob,
			DestinationKeyId: aws.String(to), DestinationEncryptionContext: ec,
			SourceEncryptionAlgorithm:      types.EncryptionAlgorithmSpecSymmetricDefault,
			DestinationEncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault})
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkAnswer(opReEncrypt, from, out.SourceKeyId), checkAnswer(opReEncrypt, to, out.KeyId)); err != nil {
		return nil, err
	}
	return out.CiphertextBlob, checkBlob(opReEncrypt, to, out.CiphertextBlob)
}

// Describe implements Provider. It takes alias ARNs too.
func (a *AWS) Describe(ctx context.Context, key string) (Description, error) {
	if _, err := crypt.ParseARN(key); err != nil {
		return Description{}, newError(KindRejected, opDescribe, key, err)
	}
	var d Description
	err := a.call(ctx, opDescribe, key, func(ctx context.Context, c *awskms.Client) (err error) {
		d, err = describe(ctx, c, key)
		return err
	})
	if err != nil {
		return Description{}, err
	}
	asked, _ := crypt.ParseARN(key)
	if !asked.IsAlias() {
		return d, checkAnswer(opDescribe, key, &d.Key)
	}
	if err := crypt.CheckKeyName(d.Key); err != nil {
		return Description{}, newError(KindRejected, opDescribe, key, err)
	}
	return d, nil
}

func describe(ctx context.Context, c *awskms.Client, key string) (Description, error) {
	out, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: aws.String(key)})
	if err != nil {
		return Description{}, err
	}
	m := out.KeyMetadata
	if m == nil {
		return Description{}, errors.New("the KMS endpoint described no key")
	}
	d := Description{Key: aws.ToString(m.Arn), State: string(m.KeyState), MultiRegion: aws.ToBool(m.MultiRegion)}
	if r := m.MultiRegionConfiguration; r != nil {
		if r.PrimaryKey != nil {
			d.Primary = aws.ToString(r.PrimaryKey.Arn)
		}
		for _, k := range r.ReplicaKeys {
			d.Replicas = append(d.Replicas, aws.ToString(k.Arn))
		}
	}
	return d, nil
}

// Probe implements Prober with KMS's DryRun, which reports that a call would
// have succeeded as an error of its own. ReEncrypt is tried from key to itself.
func (a *AWS) Probe(ctx context.Context, key, op string) error {
	if err := checkARN(op, key); err != nil {
		return err
	}
	return a.call(ctx, op, key, func(ctx context.Context, c *awskms.Client) error {
		err := dryRun(ctx, c, key, op)
		var dry *types.DryRunOperationException
		if errors.As(err, &dry) {
			return nil
		}
		return err
	})
}

func dryRun(ctx context.Context, c *awskms.Client, key, op string) (err error) {
	id, dry := aws.String(key), aws.Bool(true)
	anyBlob := []types.DryRunModifierType{types.DryRunModifierTypeIgnoreCiphertext}
	switch op {
	case opGenerate:
		_, err = c.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{KeyId: id, KeySpec: types.DataKeySpecAes256, DryRun: dry})
	case opEncrypt:
		_, err = c.Encrypt(ctx, &awskms.EncryptInput{KeyId: id, Plaintext: make([]byte, crypt.KeySize), DryRun: dry})
	case opDecrypt:
		_, err = c.Decrypt(ctx, &awskms.DecryptInput{KeyId: id, DryRun: dry, DryRunModifiers: anyBlob})
	case opReEncrypt:
		_, err = c.ReEncrypt(ctx, &awskms.ReEncryptInput{SourceKeyId: id, DestinationKeyId: id, DryRun: dry, DryRunModifiers: anyBlob})
	case opDescribe:
		_, err = describe(ctx, c, key)
	default:
		err = &smithy.GenericAPIError{Code: "ValidationException", Message: "there is no dry run of " + op}
	}
	return err
}

// takePlaintext moves a plaintext key from the SDK into locked memory.
func takePlaintext(op, key string, answered *string, plain []byte) (*crypt.Key, error) {
	if err := checkAnswer(op, key, answered); err != nil {
		clear(plain)
		return nil, err
	}
	k, err := crypt.NewKey(plain)
	if err != nil {
		return nil, newError(KindRejected, op, key, err)
	}
	return k, nil
}

// checkBlob bounds what goes into a header.
func checkBlob(op, key string, blob []byte) error {
	if len(blob) == 0 || len(blob) > crypt.MaxBlob {
		return newError(KindRejected, op, key, fmt.Errorf("KMS wrapped a data key in %d bytes; a header holds 1 to %d", len(blob), crypt.MaxBlob))
	}
	return nil
}
