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
// process has anyway. The caller still owns s.
func (r *Ring) Renew(ctx context.Context, h *crypt.Header, s *crypt.Secrets) (*crypt.Header, error) {
	if h.Volume != r.core.volume {
		return nil, crypt.ErrForeign
	}
	if h.Identity != s.Identity() {
		return nil, fmt.Errorf("the data key is not this header's: %w", crypt.ErrDamaged)
	}
	trusted := r.core.keys()
	if len(trusted) == 0 || current(h, trusted) {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.deadline)
	defer cancel()
	blob, err := r.counted.Encrypt(ctx, trusted[0], h.EncryptionContext(r.core.volume), s.DataKey())
	if err != nil {
		return nil, fmt.Errorf("wrapping a data key again: %w", err)
	}
	return &crypt.Header{Identity: h.Identity, Copies: []crypt.Copy{{Key: trusted[0], Blob: blob}}}, nil
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
