package kmstest

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
	"github.com/stretchr/testify/require"
)

var ctx = context.Background()

// client is the real SDK on a server.
func client(s *Server, region string, p Principal) *awskms.Client {
	return awskms.New(awskms.Options{Region: region, BaseEndpoint: aws.String(s.URL()), Credentials: p.Credentials(), Retryer: aws.NopRetryer{}})
}

func requireCode(t *testing.T, err error, code, message string) {
	t.Helper()
	var e smithy.APIError
	require.ErrorAs(t, err, &e)
	require.Equal(t, code, e.ErrorCode())
	require.Equal(t, message, e.ErrorMessage())
}

func encrypt(t *testing.T, c *awskms.Client, key string, ec map[string]string) []byte {
	t.Helper()
	out, err := c.Encrypt(ctx, &awskms.EncryptInput{KeyId: &key, Plaintext: bytes.Repeat([]byte{7}, 32), EncryptionContext: ec})
	require.NoError(t, err)
	return out.CiphertextBlob
}

func TestBlobs(t *testing.T) {
	s := New(t, nil)
	key, other := s.CreateKey("us-east-1"), s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	out, err := c.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{KeyId: &key, KeySpec: types.DataKeySpecAes256, EncryptionContext: map[string]string{"a": "b"}})
	require.NoError(t, err)
	require.Len(t, out.Plaintext, 32)
	require.Len(t, out.CiphertextBlob, 184, "AWS's size for a 32-byte plaintext")
	blob := out.CiphertextBlob
	dec := func(key *string, ec map[string]string, blob []byte) ([]byte, error) {
		out, err := c.Decrypt(ctx, &awskms.DecryptInput{KeyId: key, CiphertextBlob: blob, EncryptionContext: ec})
		if err != nil {
			return nil, err
		}
		return out.Plaintext, nil
	}
	for _, name := range []*string{&key, nil} {
		plain, err := dec(name, map[string]string{"a": "b"}, blob)
		require.NoError(t, err)
		require.Equal(t, out.Plaintext, plain)
	}
	for _, ec := range []map[string]string{nil, {"a": "B"}, {"a": "b", "c": "d"}, {"ab": ""}} {
		_, err = dec(&key, ec, blob)
		requireCode(t, err, "InvalidCiphertextException", "")
	}
	_, err = dec(&other, map[string]string{"a": "b"}, blob)
	requireCode(t, err, "IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
	for i := range blob {
		bad := bytes.Clone(blob)
		bad[i] ^= 1
		_, err = dec(&key, map[string]string{"a": "b"}, bad)
		requireCode(t, err, "InvalidCiphertextException", "")
	}
	_, err = dec(&key, nil, []byte("short"))
	requireCode(t, err, "InvalidCiphertextException", "")
}

func TestStatesAndWords(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	for state, want := range map[string][2]string{
		Disabled:               {"DisabledException", key + " is disabled."},
		PendingDeletion:        {"KMSInvalidStateException", key + " is pending deletion."},
		PendingReplicaDeletion: {"KMSInvalidStateException", key + " is pending replica deletion."},
		PendingImport:          {"KMSInvalidStateException", key + " is pending import."},
		Unavailable:            {"KMSInvalidStateException", key + " is unavailable."},
		Creating:               {"KMSInvalidStateException", key + " is creating."},
		Updating:               {"KMSInvalidStateException", key + " is updating."},
	} {
		s.SetState(key, state)
		_, err := c.Encrypt(ctx, &awskms.EncryptInput{KeyId: &key, Plaintext: []byte("x")})
		requireCode(t, err, want[0], want[1])
		d, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &key})
		require.NoError(t, err)
		require.Equal(t, state, string(d.KeyMetadata.KeyState))
	}
	sign := s.Create(KeySpec{Usage: "SIGN_VERIFY"})
	_, err := c.Encrypt(ctx, &awskms.EncryptInput{KeyId: &sign, Plaintext: []byte("x")})
	requireCode(t, err, "InvalidKeyUsageException", sign+" key usage is SIGN_VERIFY which is not valid for Encrypt.")
	for name, message := range map[string]string{
		"arn:aws:kms:us-east-1:111122223333:key/none": "Key 'arn:aws:kms:us-east-1:111122223333:key/none' does not exist",
		"none":       "Key 'arn:aws:kms:us-east-1:111122223333:key/none' does not exist",
		"alias/none": "Alias arn:aws:kms:us-east-1:111122223333:alias/none is not found.",
		"arn:aws:kms:eu-west-1:111122223333:key/x":     "Invalid arn eu-west-1",
		"arn:aws-cn:kms:us-east-1:111122223333:key/x":  "Invalid arn us-east-1",
		"arn:aws:kms:us-east-1:999999999999:key/other": "Key 'arn:aws:kms:us-east-1:999999999999:key/other' does not exist",
	} {
		_, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &name})
		requireCode(t, err, "NotFoundException", message)
	}
}

func TestKeyLifeOverTheProtocol(t *testing.T) {
	s := New(t, nil)
	c := client(s, "eu-west-1", s.Admin())
	made, err := c.CreateKey(ctx, &awskms.CreateKeyInput{Description: aws.String("mine")})
	require.NoError(t, err)
	key := made.KeyMetadata.Arn
	require.Contains(t, *key, "arn:aws:kms:eu-west-1:111122223333:key/")
	blob := encrypt(t, c, *key, nil)
	_, err = c.DisableKey(ctx, &awskms.DisableKeyInput{KeyId: key})
	require.NoError(t, err)
	_, err = c.Decrypt(ctx, &awskms.DecryptInput{CiphertextBlob: blob})
	requireCode(t, err, "DisabledException", *key+" is disabled.")
	_, err = c.EnableKey(ctx, &awskms.EnableKeyInput{KeyId: key})
	require.NoError(t, err)
	_, err = c.ScheduleKeyDeletion(ctx, &awskms.ScheduleKeyDeletionInput{KeyId: key, PendingWindowInDays: aws.Int32(3)})
	require.Error(t, err)
	gone, err := c.ScheduleKeyDeletion(ctx, &awskms.ScheduleKeyDeletionInput{KeyId: key, PendingWindowInDays: aws.Int32(7)})
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().AddDate(0, 0, 7), *gone.DeletionDate, time.Minute)
	_, err = c.EnableKey(ctx, &awskms.EnableKeyInput{KeyId: key})
	requireCode(t, err, "KMSInvalidStateException", *key+" is pending deletion.")
	_, err = c.CancelKeyDeletion(ctx, &awskms.CancelKeyDeletionInput{KeyId: key})
	require.NoError(t, err)
	_, err = c.CancelKeyDeletion(ctx, &awskms.CancelKeyDeletionInput{KeyId: key})
	requireCode(t, err, "KMSInvalidStateException", *key+" is not pending deletion.")
	_, err = c.EnableKey(ctx, &awskms.EnableKeyInput{KeyId: key})
	require.NoError(t, err)

	_, err = c.RotateKeyOnDemand(ctx, &awskms.RotateKeyOnDemandInput{KeyId: key})
	require.NoError(t, err)
	plain, err := c.Decrypt(ctx, &awskms.DecryptInput{KeyId: key, CiphertextBlob: blob})
	require.NoError(t, err, "old material still opens")
	require.Len(t, plain.Plaintext, 32)
	require.NotEqual(t, blob[:40], encrypt(t, c, *key, nil)[:40], "new blobs are of the new material")

	_, err = c.CreateAlias(ctx, &awskms.CreateAliasInput{AliasName: aws.String("alias/a"), TargetKeyId: key})
	require.NoError(t, err)
	d, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: aws.String("alias/a")})
	require.NoError(t, err)
	require.Equal(t, *key, *d.KeyMetadata.Arn)
	aliases, err := c.ListAliases(ctx, &awskms.ListAliasesInput{})
	require.NoError(t, err)
	require.Len(t, aliases.Aliases, 1)
	keys, err := c.ListKeys(ctx, &awskms.ListKeysInput{})
	require.NoError(t, err)
	require.Equal(t, *key, *keys.Keys[0].KeyArn)
	without, err := c.GenerateDataKeyWithoutPlaintext(ctx, &awskms.GenerateDataKeyWithoutPlaintextInput{KeyId: key, NumberOfBytes: aws.Int32(16)})
	require.NoError(t, err)
	require.Len(t, without.CiphertextBlob, BlobOverhead+16)
	for range maxRotations - 1 {
		_, err = c.RotateKeyOnDemand(ctx, &awskms.RotateKeyOnDemandInput{KeyId: key})
		require.NoError(t, err)
	}
	_, err = c.RotateKeyOnDemand(ctx, &awskms.RotateKeyOnDemandInput{KeyId: key})
	var limit *types.LimitExceededException
	require.ErrorAs(t, err, &limit)
}

func TestRegionsAndReplicas(t *testing.T) {
	s := New(t, nil)
	east, west := client(s, "us-east-1", s.Admin()), client(s, "us-west-2", s.Admin())
	made, err := east.CreateKey(ctx, &awskms.CreateKeyInput{MultiRegion: aws.Bool(true)})
	require.NoError(t, err)
	blob := encrypt(t, east, *made.KeyMetadata.Arn, nil)
	_, err = west.Decrypt(ctx, &awskms.DecryptInput{CiphertextBlob: blob})
	var denied *smithy.GenericAPIError
	require.True(t, errors.As(err, &denied) && denied.Code == "AccessDeniedException", "%v", err)
	rep, err := east.ReplicateKey(ctx, &awskms.ReplicateKeyInput{KeyId: made.KeyMetadata.Arn, ReplicaRegion: aws.String("us-west-2")})
	require.NoError(t, err)
	require.Equal(t, *made.KeyMetadata.KeyId, *rep.ReplicaKeyMetadata.KeyId)
	out, err := west.Decrypt(ctx, &awskms.DecryptInput{KeyId: rep.ReplicaKeyMetadata.Arn, CiphertextBlob: blob})
	require.NoError(t, err)
	require.Equal(t, *rep.ReplicaKeyMetadata.Arn, *out.KeyId)
	require.Equal(t, s.MaterialOf(blob), *out.KeyMaterialId)
	_, err = east.ReplicateKey(ctx, &awskms.ReplicateKeyInput{KeyId: made.KeyMetadata.Arn, ReplicaRegion: aws.String("us-west-2")})
	require.Error(t, err)
	single := s.CreateKey("us-east-1")
	_, err = east.ReplicateKey(ctx, &awskms.ReplicateKeyInput{KeyId: &single, ReplicaRegion: aws.String("us-west-2")})
	var unsupported *types.UnsupportedOperationException
	require.ErrorAs(t, err, &unsupported)
	s.Delete(*rep.ReplicaKeyMetadata.Arn)
	_, err = west.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: rep.ReplicaKeyMetadata.Arn})
	require.Error(t, err)
}

// TestRotationReachesReplicas: a family has one current material, which only the
// primary rotates; every member opens what any of them ever wrapped.
func TestRotationReachesReplicas(t *testing.T) {
	s := New(t, nil)
	primary := s.Create(KeySpec{MultiRegion: true})
	replica := s.Replicate(primary, "us-west-2")
	east, west := client(s, "us-east-1", s.Admin()), client(s, "us-west-2", s.Admin())
	old := encrypt(t, west, replica, nil)
	before := s.CurrentMaterial(primary)
	require.Equal(t, before, s.MaterialOf(old))
	_, err := west.RotateKeyOnDemand(ctx, &awskms.RotateKeyOnDemandInput{KeyId: &replica})
	var unsupported *types.UnsupportedOperationException
	require.ErrorAs(t, err, &unsupported)
	_, err = east.RotateKeyOnDemand(ctx, &awskms.RotateKeyOnDemandInput{KeyId: &primary})
	require.NoError(t, err)
	require.NotEqual(t, before, s.CurrentMaterial(replica))
	d, err := west.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &replica})
	require.NoError(t, err)
	require.Equal(t, s.CurrentMaterial(primary), *d.KeyMetadata.CurrentKeyMaterialId)

	out, err := east.ReEncrypt(ctx, &awskms.ReEncryptInput{SourceKeyId: &primary, DestinationKeyId: &primary, CiphertextBlob: old})
	require.NoError(t, err)
	require.Equal(t, before, *out.SourceKeyMaterialId)
	require.Equal(t, s.CurrentMaterial(primary), *out.DestinationKeyMaterialId)
	require.Equal(t, s.CurrentMaterial(primary), s.MaterialOf(out.CiphertextBlob))
	made, err := west.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{KeyId: &replica, KeySpec: types.DataKeySpecAes256})
	require.NoError(t, err)
	require.Equal(t, s.CurrentMaterial(primary), *made.KeyMaterialId)
	for _, blob := range [][]byte{old, out.CiphertextBlob, made.CiphertextBlob} {
		_, err = east.Decrypt(ctx, &awskms.DecryptInput{KeyId: &primary, CiphertextBlob: blob})
		require.NoError(t, err)
	}
	require.Empty(t, s.MaterialOf([]byte("no blob")))
}

func TestPermissions(t *testing.T) {
	s := New(t, nil)
	key, other := s.CreateKey("us-east-1"), s.CreateKey("us-east-1")
	p := s.AddPrincipal("reader", Rule{Actions: []string{"Decrypt"}, Keys: []string{key}, Regions: []string{"us-east-1"}})
	c := client(s, "us-east-1", p)
	blob := encrypt(t, client(s, "us-east-1", s.Admin()), key, nil)
	_, err := c.Decrypt(ctx, &awskms.DecryptInput{KeyId: &key, CiphertextBlob: blob})
	require.NoError(t, err)
	_, err = c.Encrypt(ctx, &awskms.EncryptInput{KeyId: &key, Plaintext: []byte("x")})
	requireCode(t, err, "AccessDeniedException", "User: arn:aws:iam::111122223333:user/reader is not authorized to perform: kms:Encrypt on resource: "+key+" because no identity-based policy allows the kms:Encrypt action")
	_, err = c.Decrypt(ctx, &awskms.DecryptInput{KeyId: &other, CiphertextBlob: blob})
	require.Error(t, err)
	_, err = c.CreateKey(ctx, &awskms.CreateKeyInput{})
	require.Error(t, err)
	s.SetRules(p, Rule{Actions: []string{"ReEncryptFrom"}})
	_, err = c.ReEncrypt(ctx, &awskms.ReEncryptInput{SourceKeyId: &key, DestinationKeyId: &other, CiphertextBlob: blob})
	require.ErrorContains(t, err, "kms:ReEncryptTo on resource: "+other)
}

func TestSignatures(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	try := func(p Principal) error {
		_, err := client(s, "us-east-1", p).DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &key})
		return err
	}
	require.NoError(t, try(s.Admin()))
	wrong := s.Admin()
	wrong.SecretKey = "another-secret-of-some-length"
	require.ErrorContains(t, try(wrong), "InvalidSignatureException")
	wrong.AccessKey = "AKIAUNKNOWN"
	requireCode(t, try(wrong), "UnrecognizedClientException", "The security token included in the request is invalid.")
	s.Expire(s.Admin(), true)
	requireCode(t, try(s.Admin()), "ExpiredTokenException", "The security token included in the request is expired")
	s.Expire(s.Admin(), false)
	s.SetSkew(-time.Hour)
	require.ErrorContains(t, try(s.Admin()), "Signature not yet current")
	s.SetSkew(time.Hour)
	require.ErrorContains(t, try(s.Admin()), "Signature expired")
	s.SetSkew(0)
	r, err := http.Post(s.URL(), "application/x-amz-json-1.1", nil)
	require.NoError(t, err)
	require.NoError(t, r.Body.Close())
	require.Equal(t, http.StatusBadRequest, r.StatusCode)

	loose := New(t, &Options{AnyKey: true, Account: "444455556666"})
	_, err = client(loose, "us-east-1", wrong).CreateKey(ctx, &awskms.CreateKeyInput{})
	require.NoError(t, err)
}

func TestDryRun(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	blob := encrypt(t, c, key, nil)
	dry := aws.Bool(true)
	for name, call := range map[string]func() error{
		"generate": func() error {
			_, err := c.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{KeyId: &key, KeySpec: types.DataKeySpecAes256, DryRun: dry})
			return err
		},
		"encrypt": func() error {
			_, err := c.Encrypt(ctx, &awskms.EncryptInput{KeyId: &key, Plaintext: []byte("x"), DryRun: dry})
			return err
		},
		"decrypt": func() error {
			_, err := c.Decrypt(ctx, &awskms.DecryptInput{KeyId: &key, CiphertextBlob: blob, DryRun: dry})
			return err
		},
		"re-encrypt": func() error {
			_, err := c.ReEncrypt(ctx, &awskms.ReEncryptInput{DestinationKeyId: &key, CiphertextBlob: blob, DryRun: dry})
			return err
		},
	} {
		var e *types.DryRunOperationException
		require.ErrorAs(t, call(), &e, name)
	}
	_, err := c.Decrypt(ctx, &awskms.DecryptInput{KeyId: &key, CiphertextBlob: []byte("no blob"), DryRun: dry})
	requireCode(t, err, "InvalidCiphertextException", "")
}

func TestBadRequests(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	for _, in := range []*awskms.GenerateDataKeyInput{
		{KeyId: &key}, {KeyId: &key, KeySpec: "AES_512"}, {KeyId: &key, NumberOfBytes: aws.Int32(2000)},
		{KeyId: &key, KeySpec: types.DataKeySpecAes128, NumberOfBytes: aws.Int32(1)},
	} {
		_, err := c.GenerateDataKey(ctx, in)
		require.ErrorContains(t, err, "ValidationException")
	}
	_, err := c.Encrypt(ctx, &awskms.EncryptInput{KeyId: &key, Plaintext: make([]byte, 5000)})
	require.ErrorContains(t, err, "ValidationException")
	_, err = c.Decrypt(ctx, &awskms.DecryptInput{KeyId: &key, CiphertextBlob: make([]byte, 7000)})
	require.ErrorContains(t, err, "ValidationException")
	_, err = c.GenerateRandom(ctx, &awskms.GenerateRandomInput{NumberOfBytes: aws.Int32(1)})
	require.ErrorContains(t, err, "UnknownOperationException")
}

func TestFaultsStrikeWhereToldTo(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	describe := func() error {
		_, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &key})
		return err
	}
	s.Inject(Fault{Op: "Decrypt", Code: "KMSInternalException"})
	s.Inject(Fault{Region: "eu-west-1", Reset: true})
	s.Inject(Fault{Key: "another", Reset: true})
	s.Inject(Fault{AccessKey: "another", Reset: true})
	require.NoError(t, describe())
	s.Inject(Fault{Key: key, Code: "ThrottlingException", Times: 2})
	require.ErrorContains(t, describe(), "ThrottlingException")
	require.ErrorContains(t, describe(), "ThrottlingException")
	require.NoError(t, describe())
	lift := s.Inject(Fault{Status: 503})
	require.ErrorContains(t, describe(), "503")
	lift()
	s.SetDown("us-east-1", true)
	require.ErrorContains(t, describe(), "connection reset")
	s.SetDown("us-east-1", false)
	s.SetLatency(50 * time.Millisecond)
	start := time.Now()
	require.NoError(t, describe())
	require.GreaterOrEqual(t, time.Since(start), 50*time.Millisecond)

	s.Reset()
	s.Inject(Fault{Op: "DisableKey", Reset: true, Late: true, Times: 1})
	_, err := c.DisableKey(ctx, &awskms.DisableKeyInput{KeyId: &key})
	require.Error(t, err)
	require.Equal(t, Disabled, s.State(key), "it happened, and the caller does not know")
}

func TestThrottle(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	s.Throttle(5)
	refused := 0
	for range 20 {
		_, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &key})
		if err != nil {
			requireCode(t, err, "ThrottlingException", "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.")
			refused++
		}
	}
	require.Greater(t, refused, 5)
	s.Throttle(0)
	_, err := c.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &key})
	require.NoError(t, err)
}

// TestThrottleRegion: one region's quota is not another's.
func TestThrottleRegion(t *testing.T) {
	s := New(t, nil)
	refused := func(region string) (n int) {
		c := client(s, region, s.Admin())
		for range 20 {
			if _, err := c.ListKeys(ctx, &awskms.ListKeysInput{}); err != nil {
				require.ErrorContains(t, err, "ThrottlingException")
				n++
			}
		}
		return n
	}
	s.ThrottleRegion("us-east-1", 2)
	require.Greater(t, refused("us-east-1"), 10)
	require.Zero(t, refused("us-west-2"))
	s.Throttle(3)
	s.ThrottleRegion("us-east-1", 0)
	require.Zero(t, refused("us-east-1"))
	require.Greater(t, refused("us-west-2"), 10)
	s.Throttle(0)
	require.Zero(t, refused("us-west-2"))
}

// TestDownInMidCall: a region that goes down takes the calls with it that were
// waiting for their answer; the other regions go on, and so does it afterwards.
func TestDownInMidCall(t *testing.T) {
	s := New(t, nil)
	key, other := s.CreateKey("us-east-1"), s.CreateKey("us-west-2")
	disable := func(region, key string) error {
		_, err := client(s, region, s.Admin()).DisableKey(ctx, &awskms.DisableKeyInput{KeyId: &key})
		return err
	}
	lift := s.Inject(Fault{Region: "us-east-1", Delay: 100 * time.Millisecond})
	time.AfterFunc(20*time.Millisecond, func() { s.SetDown("us-east-1", true) })
	require.ErrorContains(t, disable("us-east-1", key), "connection reset")
	require.Equal(t, Enabled, s.State(key))
	require.NoError(t, disable("us-west-2", other))
	lift()
	s.SetDown("us-east-1", false)
	require.NoError(t, disable("us-east-1", key))
	require.Equal(t, "reset", s.Calls()[0].Error)
}

// TestCloseEndsHangingCalls: a test that ends does not wait for its faults.
func TestCloseEndsHangingCalls(t *testing.T) {
	s := New(t, nil)
	s.Inject(Fault{Hang: true})
	done := make(chan error)
	go func() {
		_, err := client(s, "us-east-1", s.Admin()).ListKeys(ctx, &awskms.ListKeysInput{})
		done <- err
	}()
	time.Sleep(50 * time.Millisecond)
	s.Close()
	require.Error(t, <-done)
}

func TestLog(t *testing.T) {
	s := New(t, nil)
	key, other := s.CreateKey("us-east-1"), s.CreateKey("us-east-1")
	c := client(s, "us-east-1", s.Admin())
	blob := encrypt(t, c, key, map[string]string{"a": "b"})
	_, err := c.ReEncrypt(ctx, &awskms.ReEncryptInput{SourceKeyId: &key, DestinationKeyId: &other, CiphertextBlob: blob,
		SourceEncryptionContext: map[string]string{"a": "c"}, DestinationEncryptionContext: map[string]string{"d": "e"}})
	require.Error(t, err)
	calls := s.Calls()
	require.Len(t, calls, 2)
	require.Equal(t, "Encrypt", calls[0].Op)
	require.Equal(t, key, calls[0].Key)
	require.Equal(t, map[string]string{"a": "b"}, calls[0].Context)
	require.Equal(t, s.Admin().ARN, calls[0].Principal)
	require.Empty(t, calls[0].Error)
	require.Equal(t, key, calls[1].Source)
	require.Equal(t, map[string]string{"a": "c"}, calls[1].Context)
	require.Equal(t, map[string]string{"d": "e"}, calls[1].DestinationContext)
	require.Equal(t, other, calls[1].Key)
	require.Equal(t, "InvalidCiphertextException", calls[1].Error)
	require.Equal(t, 2, s.Count())
	require.Equal(t, 1, s.Count("Encrypt"))
	s.Reset()
	require.Zero(t, s.Count())
}

func TestParallelCalls(t *testing.T) {
	s := New(t, nil)
	key := s.CreateKey("us-east-1")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c := client(s, "us-east-1", s.Admin())
			for range 20 {
				_, err := c.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{KeyId: &key, KeySpec: types.DataKeySpecAes256})
				if err != nil {
					t.Error(err)
				}
				s.SetState(key, Enabled)
			}
		})
	}
	wg.Wait()
	require.Equal(t, 160, s.Count("GenerateDataKey"))
}
