package keys

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"kmsfs/crypt"
)

// A Kind is what a failure of a key service means to whoever waits for the key.
type Kind uint8

// The kinds. DESIGN section 5 has the table of AWS's errors; codeKinds is it.
const (
	// KindUnavailable: throttled, failing, unreachable, or the key is in a
	// state that passes. Tried again until the deadline.
	KindUnavailable Kind = iota
	// KindTimeout: nothing answered at all.
	KindTimeout
	// KindLimit: a quota that waiting does not raise.
	KindLimit
	// KindDenied: the principal may not do this.
	KindDenied
	// KindCredentials: there are no valid credentials. Not a denial: it says
	// nothing about the key.
	KindCredentials
	// KindDisabled: the key is disabled, pending deletion or pending import.
	KindDisabled
	// KindNotFound: there is no such key, or not in this region.
	KindNotFound
	// KindRejected: the request can't succeed with this key: it is not
	// trusted, has another usage, or its name is malformed.
	KindRejected
	// KindIncorrectKey: the blob was wrapped by another key.
	KindIncorrectKey
	// KindBadBlob: the blob does not open: damaged, or of another context.
	KindBadBlob
	// KindInterrupted: the caller gave up.
	KindInterrupted
)

// kinds gives each kind its name and the sentinel that package fs makes an
// errno from.
var kinds = [...]struct {
	name     string
	sentinel error
}{
	KindUnavailable:  {"unavailable", crypt.ErrKeyUnavailable},
	KindTimeout:      {"timeout", crypt.ErrKeyTimeout},
	KindLimit:        {"limit", crypt.ErrKeyUnavailable},
	KindDenied:       {"denied", crypt.ErrKeyDenied},
	KindCredentials:  {"credentials", crypt.ErrKeyDenied},
	KindDisabled:     {"disabled", crypt.ErrKeyDisabled},
	KindNotFound:     {"not-found", crypt.ErrKeyNotFound},
	KindRejected:     {"rejected", crypt.ErrKeyRejected},
	KindIncorrectKey: {"incorrect-key", crypt.ErrKeyRejected},
	KindBadBlob:      {"bad-blob", crypt.ErrDamaged},
	KindInterrupted:  {"interrupted", crypt.ErrInterrupted},
}

func (k Kind) String() string {
	if int(k) < len(kinds) {
		return kinds[k].name
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// Sentinel is the error of package crypt that an Error of this kind unwraps to.
func (k Kind) Sentinel() error { return kinds[k].sentinel }

// Outage reports whether the failure says nothing about the key itself, so that
// another copy of a data key may be tried (DESIGN 6) and a lease goes on (7).
func (k Kind) Outage() bool {
	switch k {
	case KindUnavailable, KindTimeout, KindLimit, KindCredentials:
		return true
	}
	return false
}

// retryable reports whether the same request may succeed a moment later.
func (k Kind) retryable() bool { return k == KindUnavailable || k == KindTimeout }

// An Error is a failure of a key service: what was tried, on what, and why not.
// It unwraps to its kind's sentinel of package crypt and to the cause. No field
// ever holds bytes of a key.
type Error struct {
	Kind   Kind
	Op     string // "Decrypt", "GenerateDataKey", ...
	Key    string // ARN or "local:NAME" of the key that the failure is about
	Region string // the region that was called; "" for local keys
	Action string // the IAM action that Op needs, "kms:..."; "" for local keys
	Code   string // what the service calls the failure ("DisabledException"); "" if it said nothing
	State  string // the key's state, where it was asked for
	Err    error  // the cause
}

// Error says in one sentence what failed, on what, and why.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s with %s: %v", e.Op, e.Key, e.Kind.Sentinel())
	if e.State != "" {
		fmt.Fprintf(&b, " (state %s)", e.State)
	}
	if e.Err != nil && !errors.Is(e.Kind.Sentinel(), e.Err) {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

// Unwrap yields the sentinel and the cause, so errors.Is finds both.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind.Sentinel()}
	}
	return []error{e.Kind.Sentinel(), e.Err}
}

// newError makes an Error about a key of either service.
func newError(kind Kind, op, key string, cause error) *Error {
	e := &Error{Kind: kind, Op: op, Key: key, Err: cause}
	if !IsLocal(key) {
		e.Region, e.Action = regionOf(key), "kms:"+op
	}
	return e
}

// kindOf is the kind of any error of this package; errors that are not an
// *Error are not about a key, and count as rejected.
func kindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	for k := range kinds {
		if errors.Is(err, kinds[k].sentinel) {
			return Kind(k)
		}
	}
	return KindRejected
}

// contextError turns the end of a context into an Error: the caller gave up, or
// the deadline passed with no answer.
func contextError(ctx context.Context, op, key string) *Error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return newError(KindInterrupted, op, key, context.Canceled)
	}
	return newError(KindTimeout, op, key, context.DeadlineExceeded)
}
