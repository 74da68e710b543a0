package rekey

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// resolve decides which keys of the volume are to be replaced, before anything
// is asked of a key service.
func (j *job) resolve() error {
	if err := crypt.CheckKeyName(j.o.To); err != nil {
		return fmt.Errorf("the new key: %w", err)
	}
	others := without(j.tree.Settings().Keys, j.o.To)
	switch {
	case j.o.From == j.o.To:
		return fmt.Errorf("%s: %w", j.o.To, ErrSameKey)
	case j.o.From != "":
		j.old = []string{j.o.From}
	case len(others) > 1:
		return fmt.Errorf("the volume is under %s: %w", strings.Join(others, " and "), ErrAmbiguous)
	default:
		j.old = others
	}
	for _, k := range j.old {
		if !j.trusts(k) {
			return fmt.Errorf("%s: %w", k, ErrUntrusted)
		}
		if _, err := j.rw.Route(k, j.o.To); err != nil {
			return fmt.Errorf("moving from %s to %s: %w", k, j.o.To, err)
		}
	}
	return nil
}

func (j *job) trusts(key string) bool {
	return key == j.o.From || slices.ContainsFunc(j.o.Trusted, func(t string) bool { return crypt.SameKey(t, key) })
}

func without(keys []string, drop ...string) []string {
	return slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return slices.Contains(drop, k) })
}

// errAgain: kmsfs.toml changed while the key service was asked.
var errAgain = errors.New("kmsfs.toml was changed by another process meanwhile")

const restarts = 8 // a header or kmsfs.toml that changes this often is not ours to win

// prepare is step 1: the new key's copy of the volume key and the new key in
// first place, in one rename. The copy is made afresh even if kmsfs.toml already
// has one: what stands there was not proven, and step 5 will rely on it.
func (j *job) prepare(ctx context.Context) error {
	var err error
	for range restarts {
		if err = j.prepareOnce(ctx); !errors.Is(err, errAgain) {
			break
		}
	}
	return err
}

func (j *job) prepareOnce(ctx context.Context) error {
	s := j.tree.Settings()
	h, err := crypt.ParseHeader(s.Header)
	if err != nil {
		return fmt.Errorf("the volume key's header: %w", err)
	}
	source, err := j.volumeSource(h)
	if err != nil {
		return err
	}
	if source != "" {
		if h, err = j.rewrapVolumeKey(ctx, h, source); err != nil {
			return err
		}
	}
	raw, err := h.Marshal()
	if err != nil {
		return fmt.Errorf("the volume key's new header: %w", err)
	}
	j.blobSize = len(exact(h, j.o.To).Blob)
	keys := append([]string{j.o.To}, without(s.Keys, j.o.To)...)
	if bytes.Equal(raw, s.Header) && slices.Equal(keys, s.Keys) {
		return nil
	}
	return j.tree.Update(func(now *volume.Settings) error {
		if !bytes.Equal(now.Header, s.Header) || !slices.Equal(now.Keys, s.Keys) {
			return errAgain
		}
		now.Keys, now.Header = keys, raw
		return nil
	})
}

// volumeSource is the key whose copy of the volume key is rewrapped; "" if only
// the new key's copy is left.
func (j *job) volumeSource(h *crypt.Header) (string, error) {
	for _, k := range append(slices.Clone(j.old), j.o.Trusted...) {
		if k != j.o.To && exact(h, k) != nil {
			return k, nil
		}
	}
	if exact(h, j.o.To) == nil {
		return "", fmt.Errorf("the volume key has no copy under a trusted key: %w", ErrUntrusted)
	}
	return "", nil
}

func (j *job) rewrapVolumeKey(ctx context.Context, h *crypt.Header, source string) (*crypt.Header, error) {
	c, err := j.rewrap(ctx, h, source)
	if err != nil {
		return nil, fmt.Errorf("rewrapping the volume key from %s to %s: %w", source, j.o.To, err)
	}
	// The old copy stays until step 5.
	return replaceCopy(h, c, j.o.To), nil
}

// close is step 5: the old keys leave kmsfs.toml together with their copies of
// the volume key.
func (j *job) close() error {
	return j.tree.Update(func(now *volume.Settings) error {
		h, err := crypt.ParseHeader(now.Header)
		if err != nil {
			return fmt.Errorf("the volume key's header: %w", err)
		}
		if exact(h, j.o.To) == nil || !slices.Contains(now.Keys, j.o.To) {
			return fmt.Errorf("another process took %s out of kmsfs.toml meanwhile: %w", j.o.To, errAgain)
		}
		h.Copies = slices.DeleteFunc(slices.Clone(h.Copies), func(c crypt.Copy) bool { return slices.Contains(j.old, c.Key) })
		now.Keys = without(now.Keys, j.old...)
		now.Header, err = h.Marshal()
		return err
	})
}

// exact finds the copy labelled key and no other: two replicas of a multi-Region
// key are one key to readers, but a rekey moves from one label to another.
func exact(h *crypt.Header, key string) *crypt.Copy {
	for i := range h.Copies {
		if h.Copies[i].Key == key {
			return &h.Copies[i]
		}
	}
	return nil
}

// replaceCopy puts c first and drops the copies labelled drop.
func replaceCopy(h *crypt.Header, c crypt.Copy, drop ...string) *crypt.Header {
	n := h.Clone()
	n.Copies = []crypt.Copy{c}
	for _, old := range h.Copies {
		if !slices.Contains(drop, old.Key) {
			n.Copies = append(n.Copies, old)
		}
	}
	n.Padding = 0
	return n
}
