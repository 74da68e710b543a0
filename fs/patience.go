package fs

import (
	"context"
	"sync"
	"time"
)

// within bounds how long a request may wait for Keys. Signals end it too; they
// are ignored for everything local (Go programs send themselves many).
//
// Most requests find their key at hand and never wait. A context of package context
// would start a timer and, over go-fuse's contexts, a goroutine, for each of them:
// two wake-ups of another thread for every create and open. This one does so when
// somebody waits.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	p := &patience{request: ctx, end: time.Now().Add(d)}
	return p, p.over
}

// heeding is ctx; or, without signals, what is left of it: for a key on this machine,
// which is local I/O.
func heeding(ctx context.Context, signals bool) (context.Context, context.CancelFunc) {
	if signals {
		return ctx, func() {}
	}
	end, has := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if !has {
		return ctx, func() {}
	}
	p := &patience{request: ctx, end: end}
	return p, p.over
}

// patience is a request's context with a deadline.
type patience struct {
	request context.Context
	end     time.Time

	mu     sync.Mutex
	real   context.Context    // guarded by mu; nil until somebody waits
	cancel context.CancelFunc // guarded by mu, like real
	ended  bool               // guarded by mu; the request is done
}

// waiting is the context to wait with.
func (p *patience) waiting() context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.real == nil {
		p.real, p.cancel = context.WithDeadline(p.request, p.end)
		if p.ended {
			p.cancel()
		}
	}
	return p.real
}

// over ends it with its request.
func (p *patience) over() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	if p.real != nil {
		p.cancel()
	}
}

func (p *patience) Deadline() (time.Time, bool) {
	if t, has := p.request.Deadline(); has && t.Before(p.end) {
		return t, true
	}
	return p.end, true
}

func (p *patience) Done() <-chan struct{} { return p.waiting().Done() }

func (p *patience) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.real != nil:
		return p.real.Err()
	case p.ended:
		return context.Canceled
	case p.request.Err() == nil && !time.Now().Before(p.end):
		return context.DeadlineExceeded
	}
	return p.request.Err()
}

func (p *patience) Value(key any) any {
	p.mu.Lock()
	real := p.real
	p.mu.Unlock()
	if real != nil {
		return real.Value(key) // package context finds its own context by it
	}
	return p.request.Value(key)
}
