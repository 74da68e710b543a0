package keys

import (
	"context"
	"fmt"
	"sync/atomic"

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
	// ReEncryptVia: from region to region by way of a multi-Region key, whose
	// replicas share their key material. No plaintext key leaves KMS.
	ReEncryptVia
)

func (m Method) String() string {
	switch m {
	case ReEncrypt:
		return "re-encrypt"
	case DecryptEncrypt:
		return "decrypt and encrypt"
	case Relabel:
		return "relabel"
	case ReEncryptVia:
		return "re-encrypt via a multi-Region key"
	}
	return fmt.Sprintf("method-%d", uint8(m))
}

// A Route is the way from one key to another, for the plan that a person sees
// before anything is changed.
type Route struct {
	From, To  string
	Via       string // of ReEncryptVia: the multi-Region key, by any of its regions' names
	Method    Method
	Calls     int  // of KMS, per file
	Plaintext bool // the data key passes through this process, briefly
}

// Name is the method and, where there is one, the key in between.
func (r Route) Name() string {
	if r.Method == ReEncryptVia {
		return "re-encrypt via " + r.Via
	}
	return r.Method.String()
}

func (r Route) String() string {
	s := fmt.Sprintf("%s -> %s: %s, %d KMS calls per file", r.From, r.To, r.Name(), r.Calls)
	if r.Plaintext {
		s += ", plaintext data keys pass through this process"
	}
	return s
}

// A hop is one ReEncrypt: both keys are in one region.
type hop struct{ from, to string }

// hops are the ReEncrypts of a route. A key that is itself of the family in
// between needs none on its side: the replica opens its blobs, or it opens the
// replica's.
func (r Route) hops() []hop {
	if r.Method == ReEncrypt {
		return []hop{{r.From, r.To}}
	}
	var out []hop
	if !crypt.SameKey(r.From, r.Via) {
		out = append(out, hop{r.From, inRegionOf(r.From, r.Via)})
	}
	if !crypt.SameKey(r.To, r.Via) {
		out = append(out, hop{inRegionOf(r.To, r.Via), r.To})
	}
	return out
}

// inRegionOf is the name that a multi-Region key has in the region of another key.
func inRegionOf(key, multi string) string {
	a, err := crypt.ParseARN(multi)
	if err != nil {
		return multi
	}
	a.Region = regionOf(key)
	return a.String()
}

// A Rewrapper moves data keys of one volume from key to key. It trusts the keys
// it is given: whoever calls it has checked them against the trusted list
// (DESIGN 3.6), or a forged header would be laundered into the new key. It sets
// no deadline of its own: a provider bounds each call, and how long a call waits
// for its turn under a rate limit is no failure of it.
//
// Files that share an intermediate key share what is made of it: one copy that is like
// another, byte for byte, is rewrapped once for all of them. Every file is still checked
// against its own commitment where the key passes through this process; for that such
// keys are kept until Close.
type Rewrapper struct {
	provider Provider
	volume   crypt.VolumeID
	via      string // a multi-Region key, or ""
	calls    atomic.Int64

	held  *memo[*crypt.Key] // intermediate keys
	blobs *memo[[]byte]     // of intermediate keys
}

// What a Rewrapper remembers: about 200 bytes for a key, 600 for a blob. Files that share
// an intermediate key were made together and stand together in the order of inodes, so a
// few would do.
const (
	rewrapKeys  = 4096
	rewrapBlobs = 16384
)

// NewRewrapper makes a Rewrapper for one volume.
func NewRewrapper(provider Provider, volume crypt.VolumeID) *Rewrapper {
	return NewRewrapperVia(provider, volume, "")
}

// NewRewrapperVia makes a Rewrapper that goes from region to region by way of a
// multi-Region key with a replica in both; via is its name in any region, or "".
// Where both keys are in one region, or one is local, via plays no part.
func NewRewrapperVia(provider Provider, volume crypt.VolumeID, via string) *Rewrapper {
	return &Rewrapper{provider: provider, volume: volume, via: via, held: newKeyMemo(rewrapKeys, 0), blobs: newBlobMemo(rewrapBlobs)}
}

// Close wipes what is remembered.
func (w *Rewrapper) Close() {
	w.held.close()
	w.blobs.close()
}

// Calls is how many requests were sent that KMS bills; attempts at one count once.
func (w *Rewrapper) Calls() int { return int(w.calls.Load()) }

// bill counts a request with a key.
func (w *Rewrapper) bill(key string) {
	if !IsLocal(key) {
		w.calls.Add(1)
	}
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
	case w.via != "":
		if err := w.checkVia(from, to); err != nil {
			return Route{}, err
		}
		r.Method, r.Via, r.Plaintext = ReEncryptVia, w.via, false
		r.Calls = len(r.hops())
	default:
		r.Calls = 2
	}
	return r, nil
}

// checkVia says why the key in between can't serve a route between two regions.
func (w *Rewrapper) checkVia(from, to string) error {
	via, err := crypt.ParseARN(w.via)
	if err != nil || !via.IsMultiRegion() {
		return newError(KindRejected, opReEncrypt, w.via, fmt.Errorf("only a multi-Region key of KMS (key/mrk-...) can carry a data key between regions"))
	}
	for _, key := range []string{from, to} {
		if a, err := crypt.ParseARN(key); err != nil || a.Partition != via.Partition {
			return newError(KindRejected, opReEncrypt, w.via, fmt.Errorf("a multi-Region key has no replica in another partition, and %s is in one", key))
		}
	}
	return nil
}

func sameRegion(a, b string) bool {
	x, errX := crypt.ParseARN(a)
	y, errY := crypt.ParseARN(b)
	return errX == nil && errY == nil && x.Partition == y.Partition && x.Region == y.Region
}

// Rewrap wraps the data key of h, as the copy under from has it, with to, and
// returns the new copy. From is the trusted list's name and decides which region
// is called; the copy may be labelled as a replica of it. The header is not
// changed. A header of another volume is refused without a call; where the data
// key passes through this process, it is checked against the commitment before
// it is wrapped.
func (w *Rewrapper) Rewrap(ctx context.Context, h *crypt.Header, from, to string) (crypt.Copy, error) {
	old, err := w.pick(opReEncrypt, h, from)
	if err != nil {
		return crypt.Copy{}, err
	}
	route, err := w.Route(from, to)
	if err != nil {
		return crypt.Copy{}, err
	}
	blob, err := w.follow(ctx, route, h, old.Blob)
	if err != nil {
		return crypt.Copy{}, fmt.Errorf("rewrapping a data key: %w", err)
	}
	return crypt.Copy{Key: to, Blob: blob}, nil
}

// pick finds the copy under a trusted key: the one with its own label, else the
// one labelled as a replica of it.
func (w *Rewrapper) pick(op string, h *crypt.Header, key string) (crypt.Copy, error) {
	if h.Volume != w.volume {
		return crypt.Copy{}, fmt.Errorf("the header names volume %s, this is %s: %w", h.Volume, w.volume, crypt.ErrForeign)
	}
	for _, c := range h.Copies {
		if c.Key == key {
			return c, nil
		}
	}
	if c := h.Find(key); c != nil {
		return *c, nil
	}
	return crypt.Copy{}, newError(KindRejected, op, key, fmt.Errorf("the header has no copy under this key"))
}

func (w *Rewrapper) follow(ctx context.Context, route Route, h *crypt.Header, blob []byte) ([]byte, error) {
	switch {
	case route.Method == Relabel:
		return blob, nil
	case !route.Plaintext:
		return w.hop(ctx, route.hops(), h, blob)
	}
	k, err := w.unwrap(ctx, h, route.From, blob)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	return w.share(ctx, h, ask{op: opEncrypt, key: route.From, to: route.To, blob: string(blob)}, func() ([]byte, error) {
		w.bill(route.To)
		return w.provider.Encrypt(ctx, route.To, h.EncryptionContext(w.volume), k)
	})
}

// share makes one request of those for files that share a blob.
func (w *Rewrapper) share(ctx context.Context, h *crypt.Header, a ask, request func() ([]byte, error)) ([]byte, error) {
	if !h.Shared {
		return request()
	}
	a.id = h.Wrapped()
	blob, _, err := w.blobs.get(ctx, a, request)
	return blob, err
}

func (w *Rewrapper) hop(ctx context.Context, hops []hop, h *crypt.Header, blob []byte) (_ []byte, err error) {
	for _, s := range hops {
		from := blob
		blob, err = w.share(ctx, h, ask{op: opReEncrypt, key: s.from, to: s.to, blob: string(from)}, func() ([]byte, error) {
			return w.reEncrypt(ctx, h, s.from, s.to, from)
		})
		if err != nil {
			return nil, err
		}
	}
	return blob, nil
}

func (w *Rewrapper) reEncrypt(ctx context.Context, h *crypt.Header, from, to string, blob []byte) ([]byte, error) {
	w.bill(from)
	return w.provider.ReEncrypt(ctx, from, to, h.EncryptionContext(w.volume), blob)
}

// decrypt is what a copy holds. The caller wipes it.
func (w *Rewrapper) decrypt(ctx context.Context, h *crypt.Header, key string, blob []byte) (*crypt.Key, error) {
	request := func() (*crypt.Key, error) {
		w.bill(key)
		return w.provider.Decrypt(ctx, key, h.EncryptionContext(w.volume), blob)
	}
	if !h.Shared {
		return request()
	}
	k, _, err := w.held.get(ctx, ask{op: opDecrypt, key: key, id: h.Wrapped(), blob: string(blob)}, request)
	return k, err
}

// unwrap opens a copy and proves it against the commitment. The caller wipes the key.
func (w *Rewrapper) unwrap(ctx context.Context, h *crypt.Header, key string, blob []byte) (*crypt.Key, error) {
	k, err := w.decrypt(ctx, h, key, blob)
	if err != nil {
		return nil, err
	}
	s, err := crypt.Unlock(h.Identity, k)
	if err != nil {
		k.Wipe()
		return nil, newError(KindBadBlob, opDecrypt, key, err)
	}
	s.Wipe()
	return k, nil
}

// Verify opens the copy of h under a trusted key and checks that it is the data
// key that the header commits to.
func (w *Rewrapper) Verify(ctx context.Context, h *crypt.Header, key string) error {
	c, err := w.pick(opDecrypt, h, key)
	if err != nil {
		return err
	}
	k, err := w.unwrap(ctx, h, key, c.Blob)
	if err != nil {
		return fmt.Errorf("verifying a copy of a data key: %w", err)
	}
	k.Wipe()
	return nil
}

// Prove is Verify for an operator who may not be able to read: if Decrypt is
// denied, the copy is re-encrypted to its own key, and the result thrown away.
// That shows what KMS can show without giving the key away: the blob opens under
// this key, for this file of this volume. It does not show the commitment.
func (w *Rewrapper) Prove(ctx context.Context, h *crypt.Header, key string) error {
	err := w.Verify(ctx, h, key)
	if err == nil || kindOf(err) != KindDenied {
		return err
	}
	c, err := w.pick(opDecrypt, h, key)
	if err != nil {
		return err
	}
	_, err = w.share(ctx, h, ask{op: opReEncrypt, key: key, to: key, blob: string(c.Blob)}, func() ([]byte, error) {
		return w.reEncrypt(ctx, h, key, key, c.Blob)
	})
	if err != nil {
		return fmt.Errorf("proving a copy of a data key by ReEncrypt, for Decrypt was denied: %w", err)
	}
	return nil
}
