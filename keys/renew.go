package keys

import (
	"context"
	"fmt"

	"kmsfs/crypt"
)

// Renew returns the header that a file whose data key is s ought to have, or nil if
// h, the one it has, will do: like a new file's, with one copy under the first
// trusted key. A header will do if it has a copy under that key and none under a key
// that is no longer trusted. It is for files that a rekey's sweep does not meet,
// having no name; so the copy is made here, by Encrypt, from the data key that this
// process has anyway; an intermediate key, which it may have wiped, from the header's
// copies. The caller still owns s.
func (r *Ring) Renew(ctx context.Context, h *crypt.Header, s *crypt.Secrets) (*crypt.Header, error) {
	if h.Volume != r.core.volume {
		return nil, crypt.ErrForeign
	}
	if h.Identity != s.Identity() {
		return nil, fmt.Errorf("the data key is not this header's: %w", crypt.ErrDamaged)
	}
	if err := r.leases.ended(nil); err != nil {
		return nil, err // locked
	}
	trusted := r.core.keys()
	if len(trusted) == 0 || current(h, trusted) {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.deadline)
	defer cancel()
	blob, err := r.rewrap(ctx, h, s, trusted[0])
	if err != nil {
		return nil, fmt.Errorf("wrapping a data key again: %w", err)
	}
	return &crypt.Header{Identity: h.Identity, Copies: []crypt.Copy{{Key: trusted[0], Blob: blob}}}, nil
}

// rewrap wraps what the copies of h hold with key.
func (r *Ring) rewrap(ctx context.Context, h *crypt.Header, s *crypt.Secrets, key string) ([]byte, error) {
	if !h.Shared {
		return r.counted.Encrypt(ctx, key, h.EncryptionContext(r.core.volume), s.DataKey())
	}
	o, err := r.core.open(ctx, h)
	if err != nil {
		return nil, err
	}
	o.secrets.Wipe()
	c := o.from
	// Files that share it share the outcome. It hangs on the blob that was opened, not on
	// the id alone.
	a := ask{op: opEncrypt, key: c.key, to: key, id: h.Wrapped(), blob: string(c.blob)}
	blob, _, err := r.renewed.get(ctx, a, func() ([]byte, error) {
		k, _, err := r.core.unwrap(ctx, h, c)
		if err != nil {
			return nil, err
		}
		defer k.Wipe()
		return r.counted.Encrypt(ctx, key, h.EncryptionContext(r.core.volume), k)
	})
	return blob, err
}

// current reports whether a header is as a rekey leaves them. A replica's label is
// not that of the key itself: a rekey would change it.
func current(h *crypt.Header, trusted []string) bool {
	first := false
	for _, c := range h.Copies {
		if !trusts(trusted, c.Key) {
			return false
		}
		first = first || c.Key == trusted[0]
	}
	return first
}
