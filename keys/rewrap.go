package keys

import (
	"context"
	"fmt"
	"time"

	"kmsfs/crypt"
)

// A Method is how a data key gets from one key to another.
type Method uint8

// The methods of DESIGN section 6.
const (
	// ReEncrypt: one call; with KMS, no plaintext key leaves it.
	ReEncrypt Method = iota + 1
	// DecryptEncrypt: unwrapped by one key and wrapped by the other, in this process.
	DecryptEncrypt
	// Relabel: the keys share their key material; only the label changes.
	Relabel
)

func (m Method) String() string {
	switch m {
	case ReEncrypt:
		return "re-encrypt"
	case DecryptEncrypt:
		return "decrypt and encrypt"
	case Relabel:
		return "relabel"
	}
	return fmt.Sprintf("method-%d", uint8(m))
}

// A Route is the way from one key to another, for the plan that a person sees
// before anything is changed.
type Route struct {
	From, To  string
	Method    Method
	Calls     int  // of KMS, per file
	Plaintext bool // the data key passes through this process, briefly
}

func (r Route) String() string {
	s := fmt.Sprintf("%s -> %s: %s, %d KMS calls per file", r.From, r.To, r.Method, r.Calls)
	if r.Plaintext {
		s += ", plaintext data keys pass through this process"
	}
	return s
}

// A Rewrapper moves data keys of one volume from key to key. It trusts the keys
// it is given: whoever calls it has checked them against the trusted list
// (DESIGN 3.6), or a forged header would be laundered into the new key.
type Rewrapper struct {
	provider Provider
	volume   crypt.VolumeID
	deadline time.Duration
}

// NewRewrapper makes a Rewrapper for one volume.
func NewRewrapper(provider Provider, volume crypt.VolumeID) *Rewrapper {
	return &Rewrapper{provider: provider, volume: volume, deadline: defaultDeadline}
}

// Route chooses the way from the names alone; it calls nobody. From and to may
// be the same key: its newest material then wraps the data key again.
func (w *Rewrapper) Route(from, to string) (Route, error) {
	for _, key := range []string{from, to} {
		if err := crypt.CheckKeyName(key); err != nil {
			return Route{}, newError(KindRejected, opReEncrypt, key, err)
		}
	}
	r := Route{From: from, To: to, Method: DecryptEncrypt, Plaintext: true}
	switch {
	case from != to && crypt.SameKey(from, to):
		r.Method, r.Plaintext = Relabel, false
	case IsLocal(from) && IsLocal(to):
		r.Method = ReEncrypt
	case IsLocal(from) || IsLocal(to):
		r.Calls = 1
	case sameRegion(from, to):
		r.Method, r.Calls, r.Plaintext = ReEncrypt, 1, false
	default:
		r.Calls = 2
	}
	return r, nil
}

func sameRegion(a, b string) bool {
	x, errX := crypt.ParseARN(a)
	y, errY := crypt.ParseARN(b)
	return errX == nil && errY == nil && x.Partition == y.Partition && x.Region == y.Region
}

// Rewrap wraps the data key of h, as the copy under from has it, with to, and
// returns the new copy. From is the trusted list's name and decides which region
// is called; the copy may be labelled as a replica of it. The header is not changed. A header of another volume
// is refused without a call; where the data key passes through this process, it
// is checked against the commitment before it is wrapped.
func (w *Rewrapper) Rewrap(ctx context.Context, h *crypt.Header, from, to string) (crypt.Copy, error) {
	if h.Volume != w.volume {
		return crypt.Copy{}, fmt.Errorf("the header names volume %s, this is %s: %w", h.Volume, w.volume, crypt.ErrForeign)
	}
	route, err := w.Route(from, to)
	if err != nil {
		return crypt.Copy{}, err
	}
	old := h.Find(from)
	if old == nil {
		return crypt.Copy{}, newError(KindRejected, opReEncrypt, from, fmt.Errorf("the header has no copy under this key"))
	}
	ctx, cancel := context.WithTimeout(ctx, w.deadline)
	defer cancel()
	blob, err := w.follow(ctx, route, h, old.Blob)
	if err != nil {
		return crypt.Copy{}, fmt.Errorf("rewrapping a data key: %w", err)
	}
	return crypt.Copy{Key: to, Blob: blob}, nil
}

func (w *Rewrapper) follow(ctx context.Context, route Route, h *crypt.Header, blob []byte) ([]byte, error) {
	ec := h.EncryptionContext(w.volume)
	switch {
	case route.Method == Relabel:
		return blob, nil
	case route.Method == ReEncrypt && !route.Plaintext:
		return w.provider.ReEncrypt(ctx, route.From, route.To, ec, blob)
	}
	k, err := w.provider.Decrypt(ctx, route.From, ec, blob)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	s, err := crypt.Unlock(h.Identity, k)
	if err != nil {
		return nil, newError(KindBadBlob, opDecrypt, route.From, err)
	}
	s.Wipe()
	return w.provider.Encrypt(ctx, route.To, ec, k)
}
