package kmstest

import (
	"crypto/rand"
	"encoding/hex"
	"slices"
	"sync"
	"time"
)

// A Call is one request that reached the server.
type Call struct {
	Time               time.Time
	Took               time.Duration
	Op                 string
	Region             string
	Key                string            // ARN, or what the caller named it by if it was not found
	Source             string            // of ReEncrypt
	Context            map[string]string // of ReEncrypt: the source's
	DestinationContext map[string]string // of ReEncrypt: the destination's
	Principal          string            // ARN; "" if not recognised
	AccessKey          string
	DryRun             bool
	Error              string // exception, or "hang", "reset"; "" if it succeeded
}

type callLog struct {
	mu     sync.Mutex
	calls  []Call         // guarded by mu
	counts map[string]int // guarded by mu; by operation, failures included
}

func (l *callLog) add(c *Call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.counts == nil {
		l.counts = map[string]int{}
	}
	l.calls = append(l.calls, *c)
	l.counts[c.Op]++
}

// Calls are the calls since the start or the last Reset, in the order in which
// they ended; one that hangs is not in it yet.
func (s *Server) Calls() []Call {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return slices.Clone(s.log.calls)
}

// Count is the number of calls of the operations given, of all if none is.
func (s *Server) Count(ops ...string) int {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	n := 0
	for op, c := range s.log.counts {
		if len(ops) == 0 || slices.Contains(ops, op) {
			n += c
		}
	}
	return n
}

// Reset forgets the calls so far.
func (s *Server) Reset() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.calls, s.log.counts = nil, nil
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return b
}

func hexID(id [materialIDSize]byte) string { return hex.EncodeToString(id[:]) }

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
