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

// resolve decides which keys of the volume are to leave, before anything is asked
// of a key service.
func (j *job) resolve() error {
	if err := j.resolveKey(); err != nil {
		return err
	}
	others, err := j.listed(j.tree.Settings().Keys)
	if err != nil {
		return err
	}
	switch j.o.Action {
	case Remove:
		j.old = []string{j.o.Key}
		if len(others) == 0 {
			err = fmt.Errorf("the volume is under %s alone: %w", j.o.Key, ErrLastCopy)
		}
		return err
	case Move:
		if err := j.resolveMove(others); err != nil {
			return err
		}
	}
	for _, k := range j.old {
		if _, err := j.rw.Route(k, j.o.Key); err != nil {
			return fmt.Errorf("moving from %s to %s: %w", k, j.o.Key, err)
		}
	}
	return nil
}

// resolveKey checks the key that was named; a refresh may leave it to us.
func (j *job) resolveKey() error {
	listed := j.tree.Settings().Keys
	if j.o.Action == Refresh {
		if j.o.Key == "" {
			if len(listed) > 1 {
				return fmt.Errorf("the volume is under %s: %w", strings.Join(listed, " and "), ErrAmbiguous)
			}
			j.o.Key = listed[0]
		}
		if !slices.Contains(listed, j.o.Key) {
			return fmt.Errorf("%s: %w", j.o.Key, ErrNotListed)
		}
		if !slices.Contains(j.o.Trusted, j.o.Key) {
			return fmt.Errorf("%s: %w", j.o.Key, ErrUntrusted)
		}
	}
	if err := crypt.CheckKeyName(j.o.Key); err != nil {
		return fmt.Errorf("the key: %w", err)
	}
	if j.o.From == j.o.Key && j.o.Action != Refresh {
		return fmt.Errorf("%s: %w", j.o.Key, ErrSameKey)
	}
	return nil
}

func (j *job) resolveMove(others []string) error {
	switch {
	case j.o.From != "":
		j.old = []string{j.o.From}
	case len(others) > 1:
		return fmt.Errorf("the volume is under %s: %w", strings.Join(others, " and "), ErrAmbiguous)
	default:
		j.old = others
	}
	return nil
}

// trusted is the client's own name for a key that a header or kmsfs.toml names: the
// same, or that of the replica which the client trusts. "" if it trusts neither. To
// name a key for removal is not to trust it.
func (j *job) trusted(name string) string {
	list := append([]string{j.o.From, j.o.Key}, j.o.Trusted...)
	if j.o.Action == Remove {
		list = append([]string{j.o.From}, j.o.Trusted...)
	}
	if slices.Contains(list, name) {
		return name
	}
	i := slices.IndexFunc(list, func(t string) bool { return crypt.SameKey(t, name) })
	if i < 0 {
		return ""
	}
	return list[i]
}

// listed are the keys of kmsfs.toml but the one that was named, by the client's names.
// One that the client does not trust was planted, or belongs to a change that this
// client has not seen: writing it back would sign it off for every reader.
func (j *job) listed(list []string) ([]string, error) {
	var out []string
	for _, k := range list {
		if k == j.o.Key || j.leaves(k) && j.o.Action == Remove {
			continue
		}
		t := j.trusted(k)
		if t == "" {
			return nil, fmt.Errorf("%s lists %s: %w", volume.SettingsFile, k, ErrUntrusted)
		}
		if t != j.o.Key && !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out, nil
}

// lists reports whether kmsfs.toml lists a key, or a replica of it.
func (j *job) lists(label string) bool {
	return slices.ContainsFunc(j.tree.Settings().Keys, func(k string) bool { return crypt.SameKey(k, label) })
}

// leaves reports whether a label is that of an old key, or the new key's under
// another region's name.
func (j *job) leaves(label string) bool {
	t := j.trusted(label)
	switch j.o.Action {
	case Move:
		return label != j.o.Key && (t == j.o.Key || slices.Contains(j.old, t))
	case Remove:
		return label == j.o.Key || t == j.o.Key || t == "" && crypt.SameKey(label, j.o.Key)
	}
	return false
}

// errAgain: kmsfs.toml changed while the key service was asked.
var errAgain = errors.New("kmsfs.toml was changed by another process meanwhile")

// prepare is step 1, in one rename: the new key's copy of the volume key, and the
// new key in first place; of Remove, the key that goes in last place.
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
	keys, err := j.order(s.Keys)
	if err != nil {
		return err
	}
	if h, err = j.prepareHeader(ctx, h); err != nil {
		return err
	}
	raw, err := h.Marshal()
	if err != nil {
		return fmt.Errorf("the volume key's new header: %w", err)
	}
	j.measure(h)
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

// measure notes how long a copy under the new key is.
func (j *job) measure(h *crypt.Header) {
	if c := exact(h, j.o.Key); c != nil {
		j.blobSize = len(c.Blob)
	}
}

// order is the list of keys for the time of the sweep. A key that was listed
// already keeps its place when it is added once more, to complete what is missing.
func (j *job) order(list []string) ([]string, error) {
	if _, err := j.listed(list); err != nil {
		return nil, err
	}
	has := slices.Contains(list, j.o.Key)
	switch {
	case j.o.Action == Refresh, j.o.Action == Add && has, j.o.Action == Remove && !has:
		return slices.Clone(list), nil
	case j.o.Action == Remove:
		return append(j.others(list), j.o.Key), nil
	}
	keys := append([]string{j.o.Key}, j.others(list)...)
	if len(keys) > crypt.MaxCopies {
		return nil, ErrTooMany
	}
	return keys, nil
}

// others are the listed keys but the one that was named. Those that stay keep their
// names: by which region's name others call them is not for this client to say.
func (j *job) others(list []string) (out []string) {
	for _, k := range list {
		t := j.trusted(k)
		switch {
		case k == j.o.Key || t == j.o.Key:
			continue
		case j.leaves(k):
			k = t
		}
		if !slices.Contains(out, k) {
			out = append(out, k)
		}
	}
	return out
}

// prepareHeader is the volume key's header for the time of the sweep. The new copy
// is made afresh even if there is one: what stands there was not proven, and the
// last step will rely on it.
func (j *job) prepareHeader(ctx context.Context, h *crypt.Header) (*crypt.Header, error) {
	if j.o.Action == Remove {
		from := j.sources(h)
		if len(from) == 0 {
			return nil, fmt.Errorf("the volume key: %w", ErrLastCopy)
		}
		good, err := j.proveOne(ctx, h, from)
		if err != nil {
			return nil, fmt.Errorf("the volume key: %w", err)
		}
		j.proven = *exact(h, good.label)
		return h, nil
	}
	from := j.volumeSources(h)
	if len(h.Copies) == crypt.MaxCopies && exact(h, j.o.Key) == nil {
		return nil, ErrTooMany
	}
	if len(from) == 0 {
		if exact(h, j.o.Key) == nil {
			return nil, fmt.Errorf("the volume key has no copy under a trusted key: %w", ErrUntrusted)
		}
		return h, nil
	}
	c, used, err := j.rewrapFrom(ctx, h, from)
	if err != nil {
		return nil, fmt.Errorf("the volume key: %w", err)
	}
	next := putCopy(h, c, j.o.Key) // the old copy stays until step 5
	return next, j.proveNew(ctx, next, used)
}

// proveNew opens the new copy where that was asked for, and where no key service has
// made it, from a multi-Region key to its replica: one that is not there would be
// noticed when the old key is gone.
func (j *job) proveNew(ctx context.Context, h *crypt.Header, from source) error {
	route, err := j.rw.Route(from.key, j.o.Key)
	if err != nil || route.Calls > 0 && !j.relabels(from) && !j.o.Verify {
		return err
	}
	test := j.rw.Prove
	if j.o.Verify {
		test = j.rw.Verify
	}
	only := h.Clone()
	only.Copies = []crypt.Copy{*exact(h, j.o.Key)}
	err = j.ask(func() error { return test(ctx, only, j.o.Key) })
	if err != nil {
		return fmt.Errorf("opening the volume key under %s: %w", j.o.Key, err)
	}
	return nil
}

// volumeSources are the copies that the volume key's new copy can be made from,
// the one that is to leave first; none if there is only the new key's.
func (j *job) volumeSources(h *crypt.Header) (list []source) {
	leaving := append(slices.Clone(j.old), j.o.From)
	if j.o.Action == Refresh {
		leaving = []string{j.o.Key}
	}
	for _, k := range leaving {
		from := j.copyUnder(h, k)
		if from.label != "" && (from.label != j.o.Key || j.o.Action == Refresh) {
			list = append(list, from)
		}
	}
	if j.o.Action == Refresh {
		return list
	}
	for _, c := range h.Copies { // the new key by the name of another region
		if c.Key != j.o.Key && j.trusted(c.Key) == j.o.Key {
			list = append(list, source{c.Key, j.o.Key})
		}
	}
	return append(list, j.sources(h)...)
}

// prepared checks that step 1 was done by another run.
func (j *job) prepared() error {
	list, h := j.tree.Settings().Keys, j.tree.Header()
	i := slices.Index(list, j.o.Key)
	done := i >= 0 && exact(h, j.o.Key) != nil
	switch j.o.Action {
	case Move:
		done = done && i == 0
	case Remove:
		done = i != 0
	}
	if !done {
		return fmt.Errorf("%s: %w", j.o.Key, ErrNotPrepared)
	}
	j.measure(h)
	return nil
}

// close is step 5: the old keys leave kmsfs.toml together with their copies of
// the volume key.
func (j *job) close() error {
	return j.tree.Update(func(now *volume.Settings) error {
		h, err := crypt.ParseHeader(now.Header)
		if err != nil {
			return fmt.Errorf("the volume key's header: %w", err)
		}
		if !j.stands(now, h) {
			return ErrOvertaken
		}
		if _, err := j.listed(now.Keys); err != nil { // one may have been planted since step 1
			return err
		}
		h.Copies = slices.DeleteFunc(slices.Clone(h.Copies), func(c crypt.Copy) bool { return j.leaves(c.Key) })
		now.Keys = slices.DeleteFunc(slices.Clone(now.Keys), j.leaves)
		if len(now.Keys) == 0 || len(h.Copies) == 0 {
			return fmt.Errorf("the volume key: %w", ErrLastCopy)
		}
		now.Header, err = h.Marshal()
		return err
	})
}

// stands reports whether what step 1 has made, or relied on, is still there: another
// run, on a host that shares no locks with this one, may have gone the other way.
func (j *job) stands(now *volume.Settings, h *crypt.Header) bool {
	switch j.o.Action {
	case Move: // if it is not the key of new files, those are under another one again
		return exact(h, j.o.Key) != nil && now.Keys[0] == j.o.Key
	case Add:
		return exact(h, j.o.Key) != nil && slices.Contains(now.Keys, j.o.Key)
	case Remove: // what has made up for the volume key's copy that goes
		c := exact(h, j.proven.Key)
		return c != nil && bytes.Equal(c.Blob, j.proven.Blob) && now.Keys[0] != j.o.Key
	}
	return true
}

// added checks at the end of an Add that it still is so.
func (j *job) added() error {
	if _, err := j.tree.Reload(); err != nil {
		return err
	}
	now := j.tree.Settings()
	if !j.stands(&now, j.tree.Header()) {
		return ErrOvertaken
	}
	return nil
}
