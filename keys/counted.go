package keys

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"kmsfs/crypt"
)

// LatencyBounds are the upper bounds of a Latency's buckets. KMS answers in 5 to 25 ms;
// local keys, and a loopback KMS, sooner; a call with its retries ends by the deadline.
var LatencyBounds = [...]time.Duration{
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// A Latency is how long calls took, retries and pauses between them included.
type Latency struct {
	Count int64
	Sum   time.Duration
	// Within counts the calls that took no longer than the bound at the same place
	// in LatencyBounds.
	Within [len(LatencyBounds)]int64
}

func (l *Latency) add(d time.Duration) {
	l.Count++
	l.Sum += d
	for i, bound := range LatencyBounds {
		if d <= bound {
			l.Within[i]++
		}
	}
}

// A CallCount is how often calls of one operation with one key came to one result.
type CallCount struct {
	Op     string // "Decrypt"
	Key    string // that was named; of a ReEncrypt the source
	Result string // "ok", or the Kind of the failure: "denied"
	N      int64
}

type callID struct{ op, key, result string }

// counted is a Provider that counts what passes through it.
type counted struct {
	next Provider

	mu      sync.Mutex
	calls   map[callID]int64    // guarded by mu
	latency map[string]*Latency // guarded by mu; by operation
}

func newCounted(next Provider) *counted {
	return &counted{next: next, calls: map[callID]int64{}, latency: map[string]*Latency{}}
}

func (c *counted) note(op, key string, start time.Time, err error) {
	id := callID{op, key, "ok"}
	if err != nil {
		id.result = kindOf(err).String()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[id]++
	if c.latency[op] == nil {
		c.latency[op] = &Latency{}
	}
	c.latency[op].add(time.Since(start))
}

func (c *counted) addTo(s *Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Calls, s.Failures, s.Latency = map[string]int64{}, map[string]int64{}, map[string]Latency{}
	for id, n := range c.calls {
		s.ByKey = append(s.ByKey, CallCount{id.op, id.key, id.result, n})
		s.Calls[id.op] += n
		if id.result != "ok" {
			s.Failures[id.result] += n
		}
	}
	slices.SortFunc(s.ByKey, func(a, b CallCount) int {
		return cmp.Or(cmp.Compare(a.Op, b.Op), cmp.Compare(a.Key, b.Key), cmp.Compare(a.Result, b.Result))
	})
	for op, l := range c.latency {
		s.Latency[op] = *l
		s.CallTime += l.Sum
	}
}

// GenerateDataKey implements Provider.
func (c *counted) GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (k *crypt.Key, blob []byte, err error) {
	defer func(start time.Time) { c.note(opGenerate, key, start, err) }(time.Now())
	return c.next.GenerateDataKey(ctx, key, ec)
}

// Decrypt implements Provider.
func (c *counted) Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (k *crypt.Key, err error) {
	defer func(start time.Time) { c.note(opDecrypt, key, start, err) }(time.Now())
	return c.next.Decrypt(ctx, key, ec, blob)
}

// Encrypt implements Provider.
func (c *counted) Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) (blob []byte, err error) {
	defer func(start time.Time) { c.note(opEncrypt, key, start, err) }(time.Now())
	return c.next.Encrypt(ctx, key, ec, k)
}

// ReEncrypt implements Provider.
func (c *counted) ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) (out []byte, err error) {
	defer func(start time.Time) { c.note(opReEncrypt, from, start, err) }(time.Now())
	return c.next.ReEncrypt(ctx, from, to, ec, blob)
}

// Describe implements Provider.
func (c *counted) Describe(ctx context.Context, key string) (d Description, err error) {
	defer func(start time.Time) { c.note(opDescribe, key, start, err) }(time.Now())
	return c.next.Describe(ctx, key)
}
