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
	others, err := j.listed(j.tree.Settings().Keys)
	if err != nil {
		return err
	}
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
		if _, err := j.rw.Route(k, j.o.To); err != nil {
			return fmt.Errorf("moving from %s to %s: %w", k, j.o.To, err)
		}
	}
	return nil
}

// trusted is the client's own name for a key that a header or kmsfs.toml names: the
// same, or that of the replica which the client trusts. "" if it trusts neither.
func (j *job) trusted(name string) string {
	list := append([]string{j.o.From, j.o.To}, j.o.Trusted...)
	if slices.Contains(list, name) {
		return name
	}
	i := slices.IndexFunc(list, func(t string) bool { return crypt.SameKey(t, name) })
	if i < 0 {
		return ""
	}
	return list[i]
}

// listed are the keys of kmsfs.toml but the new one, by the client's names. One
// that the client does not trust was planted, or belongs to a change that this
// client has not seen: writing it back would sign it off for every reader.
func (j *job) listed(list []string) ([]string, error) {
	var out []string
	for _, k := range list {
		t := j.trusted(k)
		if t == "" {
			return nil, fmt.Errorf("%s lists %s: %w", volume.SettingsFile, k, ErrUntrusted)
		}
		if t != j.o.To && !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out, nil
}

// leaves reports whether a label is that of an old key, or the new key's under
// another region's name.
func (j *job) leaves(label string) bool {
	t := j.trusted(label)
	return label != j.o.To && (t == j.o.To || slices.Contains(j.old, t))
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
	others, err := j.listed(s.Keys)
	if err != nil {
		return err
	}
	from, err := j.volumeSource(h)
	if err != nil {
		return err
	}
	if from.label != "" {
		if h, err = j.rewrapVolumeKey(ctx, h, from); err != nil {
			return err
		}
	}
	raw, err := h.Marshal()
	if err != nil {
		return fmt.Errorf("the volume key's new header: %w", err)
	}
	j.blobSize = len(exact(h, j.o.To).Blob)
	keys := append([]string{j.o.To}, others...)
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

// volumeSource is the copy of the volume key that is rewrapped; none if only the
// new key's copy is left.
func (j *job) volumeSource(h *crypt.Header) (source, error) {
	for _, k := range append(append(slices.Clone(j.old), j.o.Trusted...), j.o.To) {
		if from := j.copyUnder(h, k); from.label != "" {
			return from, nil
		}
	}
	if exact(h, j.o.To) == nil {
		return source{}, fmt.Errorf("the volume key has no copy under a trusted key: %w", ErrUntrusted)
	}
	return source{}, nil
}

func (j *job) rewrapVolumeKey(ctx context.Context, h *crypt.Header, from source) (*crypt.Header, error) {
	c, err := j.rewrap(ctx, h, from)
	if err != nil {
		return nil, fmt.Errorf("rewrapping the volume key from %s to %s: %w", from.key, j.o.To, err)
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
		if _, err := j.listed(now.Keys); err != nil { // one may have been planted since step 1
			return err
		}
		h.Copies = slices.DeleteFunc(slices.Clone(h.Copies), func(c crypt.Copy) bool { return j.leaves(c.Key) })
		now.Keys = slices.DeleteFunc(slices.Clone(now.Keys), j.leaves)
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
