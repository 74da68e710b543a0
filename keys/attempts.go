package keys

import (
	"context"
	"sync"
)

// attempts is where a call that is still being retried says what its attempts
// came to, for who stops waiting before it ends: "no answer" and "an answer, but
// not the key" are different errors (DESIGN 5). It travels in the call's context,
// past every Provider that does not care.
type attempts struct {
	mu       sync.Mutex
	answered *Error    // guarded by mu; the last attempt that was answered, as KindUnavailable
	joined   *attempts // guarded by mu; another's call, whose outcome is waited for
}

type attemptsKey struct{}

func withAttempts(ctx context.Context) (context.Context, *attempts) {
	a := &attempts{}
	return context.WithValue(ctx, attemptsKey{}, a), a
}

func attemptsOf(ctx context.Context) *attempts {
	a, _ := ctx.Value(attemptsKey{}).(*attempts)
	return a
}

// joinAttempts says that the call in ctx waits for another one, so that what that one's
// attempts came to counts for it too.
func joinAttempts(ctx context.Context, other *attempts) {
	if a := attemptsOf(ctx); a != nil && a != other {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.joined = other
	}
}

// noteAttempt records one failed attempt that will be made again. Silence, and
// what is final and thus about to be the call's own result, is not recorded.
func noteAttempt(ctx context.Context, e *Error) {
	a := attemptsOf(ctx)
	if a == nil || e.Kind != KindUnavailable {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answered = e
}

// left is the error of a caller who leaves, where end is how its waiting ended.
func (a *attempts) left(end *Error) *Error {
	if end.Kind != KindTimeout {
		return end // interrupted: that is what the caller has to hear
	}
	answered, joined := a.last()
	if answered == nil && joined != nil {
		answered, _ = joined.last()
	}
	if answered != nil {
		return answered
	}
	return end
}

func (a *attempts) last() (answered *Error, joined *attempts) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.answered, a.joined
}
