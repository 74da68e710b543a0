package keys

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"kmsfs/crypt"
)

// A LeaseState is what may be done with the data keys that depend on a KMS key.
type LeaseState uint8

// The states of a lease.
const (
	LeaseValid   LeaseState = iota // the key service allowed it within the interval, or nobody uses it
	LeaseGrace                     // the key service does not answer; all goes on for a while
	LeaseRevoked                   // nothing may be done: it said no, or was silent for too long
)

func (s LeaseState) String() string { return [...]string{"valid", "grace", "revoked"}[s] }

// A Lease is what is known of one key's.
type Lease struct {
	Key       string
	State     LeaseState
	Idle      bool      // no data key depends on it now, so it is not renewed
	Confirmed time.Time // when the request was sent that the key service last granted
	Until     time.Time // when it ends if nothing is heard; zero if it is idle or has ended
	Checks    int64     // requests made only to renew it
	Err       error     // what is wrong, an *Error or a *LeaseError; nil if nothing is
}

// A LeaseError refuses the use of a data key because the lease has ended that it
// depends on. It is a crypt.ErrKeyDisabled whatever the cause; errors.As finds the
// cause, for advice.
type LeaseError struct {
	Key   string
	Cause *Error // what the key service said; or that it said nothing
}

// Error says which lease ended, and why.
func (e *LeaseError) Error() string {
	return fmt.Sprintf("the lease of %s has ended: %v", e.Key, e.Cause)
}

// Unwrap yields the sentinel alone: the cause's own would name another errno.
func (e *LeaseError) Unwrap() error { return crypt.ErrKeyDisabled }

// As lets errors.As find the cause.
func (e *LeaseError) As(target any) bool {
	t, ok := target.(**Error)
	if ok {
		*t = e.Cause
	}
	return ok
}

// ErrLocked refuses every data key while the ring is locked. It is a
// crypt.ErrKeyDisabled.
var ErrLocked error = lockedError{}

type lockedError struct{}

func (lockedError) Error() string { return "all keys are locked by \"kmsfs lock\"" }

// Is makes it the errno of a disabled key.
func (lockedError) Is(target error) bool { return target == crypt.ErrKeyDisabled }

// How soon leases are looked at again, at most; never later than the interval.
const (
	denialPause  = 5 * time.Second  // between two AccessDenied that make a denial
	retryPause   = 10 * time.Second // after an outage, and while revoked
	triggerPause = time.Second      // between checks that opens ask for
	tickPause    = 15 * time.Second // while the machine sleeps no timer runs
)

// A lease is the state machine of one key; all of it is guarded by leases.mu.
//
// Only a check denies: the Decrypt of a blob that is known to be good. What opens are
// refused may be about their files, under a policy that looks at the encryption
// context; so it brings the next check forward, and no more. Whoever was allowed to
// decrypt, in whatever call, has renewed the lease; GenerateDataKey says nothing of
// Decrypt.
type lease struct {
	key       string
	state     LeaseState
	idle      bool
	silent    bool // revoked by an outage, not by a denial
	denied    bool // AccessDenied once, and nothing better since
	checking  bool
	confirmed time.Time // what depends on it was allowed then, by this key or one that it stands in for
	woken     time.Time // when it was no longer idle
	asked     time.Time // the last check
	next      time.Time // the next check
	ended     time.Time // when it was last revoked: what was asked before is void
	checks    int64
	err       *Error
}

// elapsed is the time since t. The monotonic clock stands still while the machine
// sleeps, and the other one can be set back: the later of them counts.
func elapsed(now, t time.Time) time.Duration {
	return max(now.Sub(t), now.Round(0).Sub(t.Round(0)))
}

// renewAt is when a lease confirmed at t is renewed: well before it ends, so that a
// slow answer is in time, and not with every other mount in the world.
func renewAt(t time.Time, interval time.Duration) time.Time {
	return t.Add(interval * time.Duration(800+rand.IntN(100)) / 1000)
}

// confirm notes that the key service granted a request sent at start. It reports
// whether the state changed.
func (l *lease) confirm(o *LeaseOptions, start time.Time) (changed bool) {
	if !start.After(l.ended) || start.Before(l.confirmed) {
		return false // a yes from before the no
	}
	changed = l.state != LeaseValid
	l.state, l.idle, l.silent, l.denied, l.err = LeaseValid, false, false, false, nil
	l.confirmed, l.next = start, renewAt(start, o.Interval)
	return changed
}

// wake starts the clock of a lease that was idle, and reports whether it was: a data
// key depends on it now, whatever the key service had to say. granted is when the use of
// that was allowed last.
func (l *lease) wake(o *LeaseOptions, start, granted time.Time) bool {
	woke := l.idle
	if woke {
		l.idle, l.confirmed, l.woken, l.next = false, granted, start, renewAt(start, o.Interval)
	}
	return woke
}

// sleep stops the clock: nothing depends on it. It is looked at again in case that
// was seen while a data key was on its way.
func (l *lease) sleep(o *LeaseOptions, now time.Time) {
	l.state, l.idle, l.denied, l.err = LeaseValid, true, false, nil
	l.next = now.Add(o.Interval)
}

// hurry brings the next check forward. That a lease has ended is known: a refusal more
// is no news.
func (l *lease) hurry(now time.Time, pause time.Duration) {
	if l.state == LeaseRevoked {
		return
	}
	at := now
	if soonest := l.asked.Add(pause); soonest.After(at) {
		at = soonest
	}
	if at.Before(l.next) {
		l.next = at
	}
}

// settle notes the outcome of a check.
func (l *lease) settle(o *LeaseOptions, start, now time.Time, err error) (changed bool) {
	if err == nil {
		return l.confirm(o, start)
	}
	if start.Before(l.confirmed) {
		return false // an open was granted later
	}
	e := asError(l.key, err)
	l.next = now.Add(min(retryPause, o.Interval))
	switch e.Kind {
	case KindInterrupted:
		return false
	case KindDisabled, KindNotFound:
		return l.revoke(now, e, false)
	case KindDenied:
		if l.denied {
			return l.revoke(now, e, false)
		}
		l.denied, l.err, l.next = true, e, now.Add(min(denialPause, o.Interval))
		return false
	}
	return l.outage(e)
}

// outage notes that the key service gave no answer that counts.
func (l *lease) outage(e *Error) (changed bool) {
	if l.state == LeaseRevoked {
		return false
	}
	changed = l.state == LeaseValid
	l.state, l.err = LeaseGrace, e
	return changed
}

// revoke ends the lease.
func (l *lease) revoke(now time.Time, e *Error, silent bool) (changed bool) {
	changed = l.state != LeaseRevoked || l.silent != silent
	l.state, l.silent, l.denied, l.err = LeaseRevoked, silent, false, e
	if changed {
		l.ended = now
	}
	return changed
}

// age moves the lease on when nothing was heard for too long. It does not end before
// the key service had a chance: a machine that wakes up asks first.
func (l *lease) age(o *LeaseOptions, now time.Time) (changed bool) {
	silence := elapsed(now, l.confirmed)
	if l.state == LeaseRevoked || silence < o.Interval {
		return false
	}
	asked := l.err != nil || l.checking && elapsed(now, l.asked) >= o.Interval/10
	if !asked && elapsed(now, l.woken) < o.Interval {
		return false // it stands in, and is being asked
	}
	e := l.err
	if e == nil {
		e = l.silence()
	}
	if asked && silence >= o.Interval+o.Grace {
		return l.revoke(now, e, true)
	}
	if l.state == LeaseValid {
		l.hurry(now, min(triggerPause, o.Interval))
		l.state, changed = LeaseGrace, true
	}
	return changed
}

// silence is what is wrong while a check has no outcome yet.
func (l *lease) silence() *Error {
	return newError(KindTimeout, opDecrypt, l.key, errors.New("its lease could not be renewed in time"))
}

// wait is how long nothing is to be done about it.
func (l *lease) wait(o *LeaseOptions, now time.Time) time.Duration {
	wait := l.next.Sub(now)
	if l.checking {
		wait = o.Interval // the outcome comes by itself
	}
	if l.idle || l.state == LeaseRevoked {
		return wait
	}
	silence := elapsed(now, l.confirmed)
	left := o.Interval + o.Grace - silence
	if l.checking && l.err == nil {
		left = max(left, o.Interval/10-elapsed(now, l.asked))
	}
	if l.state == LeaseValid {
		left = min(left, o.Interval-min(silence, elapsed(now, l.woken)))
	}
	return min(wait, left, tickPause)
}

// view is what others may know.
func (l *lease) view(o *LeaseOptions) Lease {
	v := Lease{Key: l.key, State: l.state, Idle: l.idle, Confirmed: l.confirmed, Checks: l.checks}
	switch {
	case l.state == LeaseRevoked:
		v.Err = &LeaseError{l.key, l.err}
	case l.err != nil:
		v.Err = l.err
	case l.state == LeaseGrace:
		v.Err = l.silence()
	}
	if !l.idle && l.state != LeaseRevoked {
		v.Until = l.confirmed.Add(o.Interval + o.Grace)
	}
	return v
}

// asError makes an *Error of what a provider returned.
func asError(key string, err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return newError(KindUnavailable, opDecrypt, key, err)
}
