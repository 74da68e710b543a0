package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"kmsfs/crypt"
)

// opened is a data key that was proved to be the one a header commits to, and
// the copy that opened.
type opened struct {
	secrets *crypt.Secrets
	from    candidate
	born    time.Time // when the key service gave it, or the intermediate key it comes from
}

func (o opened) clone() (opened, error) {
	s, err := o.secrets.Clone()
	return opened{s, o.from, o.born}, err
}

// An opener turns a header into its data key. The ring's decorators are openers
// over openers. Whoever gets an opened value wipes its secrets.
type opener interface {
	open(ctx context.Context, h *crypt.Header) (opened, error)
}

// A maker makes data keys that no file uses yet.
type maker interface {
	make(ctx context.Context, use crypt.Use) (*crypt.Fresh, error)
}

// outageMemory is how long a key whose service did not answer is tried after all
// others, so that a dead region does not cost every open its patience. It is also
// how long an outage can hide a denial: until it ends, a key that was disabled
// while its region could not be reached does not close what another copy opens.
// So it stays short. outageChance is how long the one open that then finds out
// waits for an answer.
const (
	outageMemory = 30 * time.Second
	outageChance = time.Second
)

// A wrapper is the core of a ring: it calls the provider, and only ever with
// keys of the trusted list.
type wrapper struct {
	provider  Provider
	volume    crypt.VolumeID
	blockLog2 uint8
	shared    bool              // the volume's data keys are derived from intermediate keys
	held      *memo[*crypt.Key] // intermediate keys

	mu      sync.Mutex
	trusted []string             // guarded by mu; never changed in place; the order is the client's preference
	outages map[string]time.Time // guarded by mu; by key: until when it is tried last

	leases *leases // hear of every answer
}

func newWrapper(p Provider, volume crypt.VolumeID, blockLog2 uint8, trusted []string) *wrapper {
	return &wrapper{provider: p, volume: volume, blockLog2: blockLog2,
		trusted: append([]string(nil), trusted...), outages: map[string]time.Time{}, held: newKeyMemo(0, 0),
		leases: newLeases(p, volume, defaultDeadline)}
}

func (w *wrapper) keys() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.trusted
}

// first is the key for new data keys, for messages.
func (w *wrapper) first() string {
	if keys := w.keys(); len(keys) > 0 {
		return keys[0]
	}
	return "no key"
}

func (w *wrapper) setTrusted(keys []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trusted = append([]string(nil), keys...)
}

// A candidate is a copy of a header and the trusted key to open it with.
type candidate struct {
	key  string // from the trusted list; decides which key in which region is called
	blob []byte
}

// candidates lists the copies that may be tried, in the client's order. A
// header's label only selects from the trusted list.
func candidates(trusted []string, h *crypt.Header) []candidate {
	var out []candidate
	for _, key := range trusted {
		for _, exact := range []bool{true, false} { // a replica's own label before its siblings'
			for _, c := range h.Copies {
				if (c.Key == key) == exact && crypt.SameKey(c.Key, key) {
					out = append(out, candidate{key, c.Blob})
				}
			}
		}
	}
	return out
}

// governing lists the keys of candidates, each once: the first is the one whose
// denial is final.
func governing(list []candidate) (keys []string) {
	for _, c := range list {
		if !slices.Contains(keys, c.key) {
			keys = append(keys, c.key)
		}
	}
	return keys
}

// check refuses a header that must not reach the provider.
func (w *wrapper) check(h *crypt.Header) ([]candidate, error) {
	if h.Volume != w.volume {
		return nil, fmt.Errorf("the header names volume %s, this is %s: %w", h.Volume, w.volume, crypt.ErrForeign)
	}
	if h.BlockLog2 != w.blockLog2 {
		return nil, fmt.Errorf("the header says blocks of %d bytes, the volume has %d: %w", h.BlockSize(), 1<<w.blockLog2, crypt.ErrDamaged)
	}
	if h.Use == crypt.UseFile && h.Shared != w.shared {
		return nil, fmt.Errorf("the header is one of a volume with another envelope: %w", crypt.ErrDamaged)
	}
	c := candidates(w.keys(), h)
	if len(c) == 0 {
		names := make([]string, len(h.Copies))
		for i := range h.Copies {
			names[i] = h.Copies[i].Key
		}
		return nil, newError(KindRejected, opDecrypt, strings.Join(names, ", "), errUntrusted)
	}
	return c, nil
}

var errUntrusted = errors.New("this client does not trust the key for this volume")

// open implements opener. The copy whose key stands first in the client's order
// governs: if that key refuses, the header stays closed, whatever other copies
// there are. Only its outage, or a blob that fails, tries the next. While an
// outage of it is remembered its turn comes last, but what it says then is final.
func (w *wrapper) open(ctx context.Context, h *crypt.Header) (opened, error) {
	list, err := w.check(h)
	if err != nil {
		return opened{}, err
	}
	if isAhead(ctx) {
		return w.openAhead(ctx, h, list)
	}
	said := make([]error, len(list))
	for tried, i := range w.turns(list) {
		c := list[i]
		o, err := w.openCopy(ctx, h, c, len(list)-tried)
		if err == nil {
			o.secrets.SetUnder(governing(list))
			return o, nil
		}
		said[i] = err
		kind := kindOf(err)
		if ctx.Err() != nil || kind == KindInterrupted {
			break
		}
		badBlob := kind == KindBadBlob || kind == KindIncorrectKey
		if c.key == list[0].key && !kind.Outage() && !badBlob {
			return opened{}, err
		}
	}
	return opened{}, verdict(said)
}

// turns is the order in which copies are tried, as indices into list: the
// client's, but keys whose outage is remembered go last. When that memory has
// ended, this open tries the key in its own place again, with the short chance of
// budget; the others go on as before until it knows, or is given up for lost.
func (w *wrapper) turns(list []candidate) []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	out := map[string]bool{}
	for _, c := range list {
		until, remembered := w.outages[c.key]
		if _, seen := out[c.key]; seen || !remembered || list[0].key == list[len(list)-1].key {
			continue // known already, or no other key to put first
		}
		out[c.key] = now.Before(until)
		if !out[c.key] {
			w.outages[c.key] = now.Add(2 * outageChance)
		}
	}
	var first, last []int
	for i, c := range list {
		if out[c.key] {
			last = append(last, i)
		} else {
			first = append(first, i)
		}
	}
	return append(first, last...)
}

// verdict is which of the copies' failures is reported, in the client's order
// whatever order they were tried in: the governing copy's, unless that was a bad
// blob and another copy may open once an outage is over, when EBADMSG would be
// premature.
func verdict(said []error) (v error) {
	for _, err := range said {
		switch {
		case err == nil: // was not tried
		case v == nil, errors.Is(v, crypt.ErrDamaged) && kindOf(err).Outage():
			v = err
		}
	}
	return v
}

// openCopy unwraps one copy and proves it against the commitment.
func (w *wrapper) openCopy(ctx context.Context, h *crypt.Header, c candidate, left int) (opened, error) {
	if !IsLocal(c.key) { // which waits for nothing
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, w.budget(ctx, c.key, left))
		defer cancel()
	}
	k, born, err := w.unwrap(ctx, h, c)
	if err != nil {
		return opened{}, err
	}
	defer k.Wipe()
	s, err := crypt.Unlock(h.Identity, k)
	if err != nil {
		return opened{}, newError(KindBadBlob, opDecrypt, c.key, err)
	}
	return opened{s, c, born}, nil
}

// unwrap is what a copy holds, and since when that is known: if other files share it,
// perhaps from memory. The caller wipes it.
func (w *wrapper) unwrap(ctx context.Context, h *crypt.Header, c candidate) (*crypt.Key, time.Time, error) {
	request := func() (*crypt.Key, error) { return w.decrypt(ctx, h, c) }
	if !h.Shared {
		k, err := request()
		return k, time.Now(), err
	}
	return w.held.get(ctx, askFor(h, c), request) // where nothing is whose lease has ended
}

// askFor is the request for the intermediate key that a copy holds.
func askFor(h *crypt.Header, c candidate) ask {
	return ask{op: opDecrypt, key: c.key, id: h.Wrapped(), blob: string(c.blob)}
}

// atHand reports whether a header opens without a call of a key service over a network:
// all its copies are under local keys, or the intermediate key of the governing one is
// remembered.
func (w *wrapper) atHand(h *crypt.Header) bool {
	if onlyLocal(h) {
		return true
	}
	if !h.Shared {
		return false
	}
	list, err := w.check(h)
	return err == nil && w.held.has(askFor(h, list[0]))
}

// decrypt asks the key service.
func (w *wrapper) decrypt(ctx context.Context, h *crypt.Header, c candidate) (*crypt.Key, error) {
	start, ec := time.Now(), h.EncryptionContext(w.volume)
	k, err := w.provider.Decrypt(ctx, c.key, ec, c.blob)
	if err == nil || !isAhead(ctx) { // one attempt says little of a service
		w.remember(c.key, err)
	}
	w.leases.heard(opDecrypt, c.key, witness{ec, c.blob}, start, err)
	return k, err
}

// budget is how long one of the copies left to try may take: most of the time
// if there are others, so that they still get a turn before the deadline.
func (w *wrapper) budget(ctx context.Context, key string, left int) time.Duration {
	remaining := defaultDeadline
	if end, ok := ctx.Deadline(); ok {
		remaining = time.Until(end)
	}
	if left <= 1 {
		return remaining
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, out := w.outages[key]; out {
		return min(outageChance, remaining/2)
	}
	return remaining * 6 / 10
}

// remember notes whether a key's service answers.
func (w *wrapper) remember(key string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch kindOf(err) {
	case KindUnavailable, KindTimeout:
		w.outages[key] = time.Now().Add(outageMemory)
	case KindInterrupted: // says nothing
	default: // success, or a refusal: it is there
		delete(w.outages, key)
	}
}

// make implements maker: file id and data key together, so that the encryption
// context is right, under the first trusted key.
func (w *wrapper) make(ctx context.Context, use crypt.Use) (*crypt.Fresh, error) {
	id, err := crypt.NewIdentity(w.volume, use, w.blockLog2)
	if err != nil {
		return nil, err
	}
	k, c, err := w.generate(ctx, &id)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	return newFresh(id, k, c)
}

// generate makes the key that id names, under the first trusted key. The caller wipes it.
func (w *wrapper) generate(ctx context.Context, id *crypt.Identity) (*crypt.Key, crypt.Copy, error) {
	trusted := w.keys()
	if len(trusted) == 0 {
		return nil, crypt.Copy{}, newError(KindRejected, opGenerate, "no key", errors.New("this client trusts no key for this volume"))
	}
	start, ec := time.Now(), id.EncryptionContext(w.volume)
	k, blob, err := w.provider.GenerateDataKey(ctx, trusted[0], ec)
	w.leases.heard(opGenerate, trusted[0], witness{ec, blob}, start, err)
	return k, crypt.Copy{Key: trusted[0], Blob: blob}, err
}

// newFresh makes a new file's key and header of what its only copy holds.
func newFresh(id crypt.Identity, held *crypt.Key, c crypt.Copy) (*crypt.Fresh, error) {
	s, err := crypt.Commit(&id, held)
	if err != nil {
		return nil, fmt.Errorf("committing to a fresh data key: %w", err)
	}
	s.SetUnder([]string{c.Key})
	return &crypt.Fresh{Header: &crypt.Header{Identity: id, Copies: []crypt.Copy{c}}, Secrets: s}, nil
}
