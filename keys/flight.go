package keys

import (
	"context"
	"fmt"
	"sync"
	"time"

	"kmsfs/crypt"
)

// flight is an opener that makes concurrent calls for the same header one. The
// call belongs to no caller: one who is interrupted leaves at once, the call
// goes on under its own deadline, and the others (or the cache beneath) get the
// result. Headers that differ in any byte fly apart, so that a freshly rekeyed
// header never shares the failure of the old one. What needs no call is passed on: nothing
// is waited for, and to share it costs more than the whole of it.
type flight struct {
	next     opener
	atHand   func(*crypt.Header) bool // needs no call
	base     context.Context          // ends with the ring
	deadline time.Duration

	mu     sync.Mutex
	calls  map[string]*flightCall // guarded by mu; by the header's bytes
	joined int64                  // guarded by mu; callers that needed no call of their own
}

type flightCall struct {
	done    chan struct{} // closed when result and err are set
	run     func()        // the call itself; set before it starts
	tries   *attempts     // set before the call starts
	ahead   bool          // a guess: its failure is nobody's
	late    bool          // its time is over; set before done is closed
	waiters int           // guarded by flight.mu; who still wants the result
	landed  bool          // guarded by flight.mu
	result  opened        // wiped with the last waiter
	err     error
}

func newFlight(base context.Context, next opener, deadline time.Duration) *flight {
	return &flight{next: next, atHand: onlyLocal, base: base, deadline: deadline, calls: map[string]*flightCall{}}
}

func (f *flight) open(ctx context.Context, h *crypt.Header) (opened, error) {
	if f.base.Err() != nil {
		return opened{}, newError(KindUnavailable, opDecrypt, h.Copies[0].Key, errClosed)
	}
	if f.atHand(h) {
		return f.next.open(ctx, h)
	}
	raw, err := h.Marshal()
	if err != nil {
		return opened{}, fmt.Errorf("a header that can't be stored: %v: %w", err, crypt.ErrDamaged)
	}
	for {
		c, started := f.join(string(raw), h)
		if started {
			go c.run()
		}
		o, err := f.wait(ctx, c, h)
		if err == nil || ctx.Err() != nil || f.base.Err() != nil || !c.ahead && (started || !c.late) {
			return o, err
		}
		// A guess that came to nothing, or somebody else's time was over, and ours is not:
		// now it is asked for in earnest.
	}
}

// wait returns what came of a call.
func (f *flight) wait(ctx context.Context, c *flightCall, h *crypt.Header) (opened, error) {
	defer f.leave(c)
	select {
	case <-c.done:
		return c.outcome()
	case <-ctx.Done():
		return opened{}, c.tries.left(contextError(ctx, opDecrypt, h.Copies[0].Key))
	}
}

// outcome is to be asked for when done is closed.
func (c *flightCall) outcome() (opened, error) {
	if c.err != nil {
		return opened{}, c.err
	}
	return c.result.clone()
}

// onlyLocal is whether no copy of a header needs a network.
func onlyLocal(h *crypt.Header) bool {
	for i := range h.Copies {
		if !IsLocal(h.Copies[i].Key) {
			return false
		}
	}
	return true
}

// join finds the call for a header, or prepares it, and then the caller has to run it.
func (f *flight) join(id string, h *crypt.Header) (c *flightCall, started bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.calls[id]; c != nil {
		c.waiters++
		f.joined++
		return c, false
	}
	return f.prepareLocked(id, h, false), true
}

// prepareLocked makes a call with one waiter. ahead is whether it is a guess.
func (f *flight) prepareLocked(id string, h *crypt.Header, ahead bool) *flightCall {
	base, tries := withAttempts(f.base)
	if ahead {
		base = withAhead(base)
	}
	c := &flightCall{done: make(chan struct{}), tries: tries, ahead: ahead, waiters: 1}
	f.calls[id] = c
	own := h.Clone()
	c.run = func() { f.run(base, id, c, own) }
	return c
}

func (f *flight) run(base context.Context, id string, c *flightCall, h *crypt.Header) {
	ctx, cancel := context.WithTimeout(base, f.deadline)
	defer cancel()
	result, err := f.next.open(ctx, h)
	end, _ := ctx.Deadline()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.calls, id)
	c.result, c.err, c.landed, c.late = result, err, true, !time.Now().Before(end)
	if c.waiters == 0 {
		c.result.secrets.Wipe()
	}
	close(c.done)
}

func (f *flight) leave(c *flightCall) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c.waiters--
	if c.waiters == 0 && c.landed {
		c.result.secrets.Wipe()
	}
}

func (f *flight) addTo(s *Stats) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Coalesced = f.joined
}
