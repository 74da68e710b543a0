package keys

import (
	"context"
	"maps"
	"sync"
	"time"

	"kmsfs/crypt"
)

// counted is a Provider that counts what passes through it.
type counted struct {
	next Provider

	mu       sync.Mutex
	calls    map[string]int64 // guarded by mu; by operation
	failures map[string]int64 // guarded by mu; by kind
	waited   time.Duration    // guarded by mu; in calls, summed
}

func newCounted(next Provider) *counted {
	return &counted{next: next, calls: map[string]int64{}, failures: map[string]int64{}}
}

func (c *counted) note(op string, start time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[op]++
	c.waited += time.Since(start)
	if err != nil {
		c.failures[kindOf(err).String()]++
	}
}

func (c *counted) addTo(s *Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Calls, s.Failures, s.CallTime = maps.Clone(c.calls), maps.Clone(c.failures), c.waited
}

// GenerateDataKey implements Provider.
func (c *counted) GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (k *crypt.Key, blob []byte, err error) {
	defer func(start time.Time) { c.note(opGenerate, start, err) }(time.Now())
	return c.next.GenerateDataKey(ctx, key, ec)
}

// Decrypt implements Provider.
func (c *counted) Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (k *crypt.Key, err error) {
	defer func(start time.Time) { c.note(opDecrypt, start, err) }(time.Now())
	return c.next.Decrypt(ctx, key, ec, blob)
}

// Encrypt implements Provider.
func (c *counted) Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) (blob []byte, err error) {
	defer func(start time.Time) { c.note(opEncrypt, start, err) }(time.Now())
	return c.next.Encrypt(ctx, key, ec, k)
}

// ReEncrypt implements Provider.
func (c *counted) ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) (out []byte, err error) {
	defer func(start time.Time) { c.note(opReEncrypt, start, err) }(time.Now())
	return c.next.ReEncrypt(ctx, from, to, ec, blob)
}

// Describe implements Provider.
func (c *counted) Describe(ctx context.Context, key string) (d Description, err error) {
	defer func(start time.Time) { c.note(opDescribe, start, err) }(time.Now())
	return c.next.Describe(ctx, key)
}
