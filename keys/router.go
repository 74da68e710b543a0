package keys

import (
	"context"
	"fmt"

	"kmsfs/crypt"
)

// router sends each call to the service that the key's name means.
type router struct{ aws, local Provider }

// NewRouter makes one Provider of two. Either may be nil: its keys are then
// refused (a configuration with require_kms has no local provider). The Provider has
// a method Requests, as AWS does, to be found by assertion.
func NewRouter(aws, local Provider) Provider { return &router{aws: aws, local: local} }

// Requests is the number of requests sent to AWS KMS so far, by operation, retries
// included: what KMS bills, and counts against its quota.
func (r *router) Requests() map[string]int64 {
	if a, ok := r.aws.(interface{ Requests() map[string]int64 }); ok {
		return a.Requests()
	}
	return nil
}

// Forget wipes what a service keeps of its keys.
func (r *router) Forget() {
	for _, p := range []Provider{r.aws, r.local} {
		forget(p)
	}
}

// forget has a Provider wipe what it keeps, if it keeps anything: one that does has a
// method Forget.
func forget(p Provider) {
	if f, keeps := p.(interface{ Forget() }); keeps {
		f.Forget()
	}
}

func (r *router) pick(op, key string) (Provider, error) {
	p, what := r.aws, "AWS KMS"
	if IsLocal(key) {
		p, what = r.local, "local keys"
	}
	if p == nil {
		return nil, newError(KindRejected, op, key, fmt.Errorf("this client is configured not to use %s", what))
	}
	return p, nil
}

// GenerateDataKey implements Provider.
func (r *router) GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (*crypt.Key, []byte, error) {
	p, err := r.pick(opGenerate, key)
	if err != nil {
		return nil, nil, err
	}
	return p.GenerateDataKey(ctx, key, ec)
}

// Decrypt implements Provider.
func (r *router) Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error) {
	p, err := r.pick(opDecrypt, key)
	if err != nil {
		return nil, err
	}
	return p.Decrypt(ctx, key, ec, blob)
}

// Encrypt implements Provider.
func (r *router) Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) ([]byte, error) {
	p, err := r.pick(opEncrypt, key)
	if err != nil {
		return nil, err
	}
	return p.Encrypt(ctx, key, ec, k)
}

// ReEncrypt implements Provider. It does not cross from one service to the
// other: a Rewrapper does.
func (r *router) ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) ([]byte, error) {
	p, err := r.pick(opReEncrypt, from)
	if err != nil {
		return nil, err
	}
	if IsLocal(from) != IsLocal(to) {
		return nil, newError(KindRejected, opReEncrypt, to, fmt.Errorf("ReEncrypt works inside one key service, and %s is in another", from))
	}
	return p.ReEncrypt(ctx, from, to, ec, blob)
}

// Describe implements Provider.
func (r *router) Describe(ctx context.Context, key string) (Description, error) {
	p, err := r.pick(opDescribe, key)
	if err != nil {
		return Description{}, err
	}
	return p.Describe(ctx, key)
}

// Probe implements Prober. A provider that can't probe is described instead.
func (r *router) Probe(ctx context.Context, key, op string) error {
	p, err := r.pick(op, key)
	if err != nil {
		return err
	}
	if q, ok := p.(Prober); ok {
		return q.Probe(ctx, key, op)
	}
	d, err := p.Describe(ctx, key)
	if err == nil && !d.Enabled() {
		err = newError(KindDisabled, op, key, fmt.Errorf("%s is in state %s", key, d.State))
	}
	return err
}
