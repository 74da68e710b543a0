package rekey

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kmsfs/crypt"
)

// A source is a copy to work from. The label is the header's own, which whoever
// writes the backing directory may have changed (a multi-Region key's label can
// name any region): it only finds the copy. The key is the client's name for it,
// and is what is routed by and called.
type source struct{ label, key string }

// An edit is what is to be done with one header.
type edit struct {
	from []source // copies to make the new one from, best first; of Remove those of which one must be proven
	drop []string // labels that leave
}

// edit decides by the header alone; no key service is asked, and whatever the
// header claims only selects from the trusted list. Nothing is to be done if there
// is an outcome.
func (j *job) edit(h *crypt.Header) (e edit, out Outcome, err error) {
	switch j.o.Action {
	case Add:
		return j.editAdd(h)
	case Remove:
		return j.editRemove(h)
	case Refresh:
		return j.editFrom(j.copyUnder(h, j.o.Key))
	}
	if j.o.From != "" {
		return j.editFrom(j.copyUnder(h, j.o.From))
	}
	return j.editOnly(h)
}

// editFrom replaces one copy.
func (j *job) editFrom(from source) (edit, Outcome, error) {
	if from.label == "" {
		return edit{}, Already, nil
	}
	return edit{from: []source{from}, drop: []string{from.label, j.o.Key}}, "", nil
}

// editOnly replaces the only copy that is not under the new key.
func (j *job) editOnly(h *crypt.Header) (edit, Outcome, error) {
	var others []string
	for _, c := range h.Copies {
		if c.Key != j.o.Key {
			others = append(others, c.Key)
		}
	}
	switch {
	case len(others) == 0:
		return edit{}, Already, nil
	case len(others) > 1:
		return edit{}, Failed, fmt.Errorf("its header has copies under %s: %w", strings.Join(others, " and "), ErrAmbiguous)
	}
	key := j.trusted(others[0])
	if key == "" {
		return edit{}, Strange, fmt.Errorf("its header is under %s: %w", others[0], ErrUntrusted)
	}
	return j.editFrom(source{others[0], key})
}

func (j *job) editAdd(h *crypt.Header) (edit, Outcome, error) {
	if exact(h, j.o.Key) != nil {
		return edit{}, Already, nil
	}
	from := j.sources(h)
	if len(from) == 0 {
		return edit{}, Strange, fmt.Errorf("its header is under %s: %w", labels(h), ErrUntrusted)
	}
	return edit{from: from}, "", nil
}

func (j *job) editRemove(h *crypt.Header) (e edit, out Outcome, err error) {
	for _, c := range h.Copies {
		if j.leaves(c.Key) {
			e.drop = append(e.drop, c.Key)
		}
	}
	if len(e.drop) == 0 {
		return e, Already, nil
	}
	e.from = j.sources(h)
	switch {
	case len(e.from) > 0:
		return e, "", nil
	case j.trusted(e.drop[0]) == "": // planted: it opens for nobody here, and keeps nothing
		return e, Strange, fmt.Errorf("its header is under %s: %w", labels(h), ErrUntrusted)
	}
	return e, Failed, fmt.Errorf("its header is under %s: %w", labels(h), ErrLastCopy)
}

// sources are the copies under trusted keys that stay, the one under --from first,
// then by what it costs to get a copy under Key from it. What is to make up for a copy
// that goes has to be under a key that others find in kmsfs.toml.
func (j *job) sources(h *crypt.Header) (list []source) {
	for _, c := range h.Copies {
		key := j.trusted(c.Key)
		if key == "" || j.leaves(c.Key) || c.Key == j.o.Key || j.o.Action == Remove && !j.lists(c.Key) {
			continue
		}
		list = append(list, source{c.Key, key})
	}
	slices.SortStableFunc(list, func(a, b source) int { return cmp.Compare(j.cost(a.key), j.cost(b.key)) })
	return list
}

// cost ranks the keys to work from.
func (j *job) cost(key string) int {
	if key == j.o.From {
		return -1
	}
	if j.o.Action == Remove { // any of them will do: as the client lists them
		return slices.Index(j.o.Trusted, key)
	}
	route, err := j.rw.Route(key, j.o.Key)
	switch {
	case err != nil:
		return 100
	case route.Plaintext:
		return 10 + route.Calls
	}
	return route.Calls
}

func labels(h *crypt.Header) string {
	var list []string
	for _, c := range h.Copies {
		list = append(list, c.Key)
	}
	return strings.Join(list, " and ")
}

// copyUnder finds the copy under key, the one with its own label before those
// labelled as a replica.
func (j *job) copyUnder(h *crypt.Header, key string) source {
	if exact(h, key) != nil {
		return source{key, key}
	}
	for _, c := range h.Copies {
		if (c.Key != j.o.Key) && j.trusted(c.Key) == key {
			return source{c.Key, key}
		}
	}
	return source{}
}

// apply asks the key service and returns the header as it shall be.
func (j *job) apply(ctx context.Context, h *crypt.Header, e edit) (*crypt.Header, error) {
	if j.o.Action == Remove {
		if err := j.prove(ctx, h, e.from); err != nil {
			return nil, err
		}
		return dropCopies(h, e.drop...), nil
	}
	if next, err := j.shortcut(ctx, h, e); next != nil || err != nil {
		return next, err
	}
	c, _, err := j.rewrapFrom(ctx, h, e.from)
	if err != nil {
		return nil, err
	}
	next := putCopy(h, c, e.drop...)
	if j.o.Verify {
		if err := j.verify(ctx, next); err != nil {
			return nil, err
		}
	}
	return next, nil
}

// shortcut is for a header that has a copy under the new key already: if it is good,
// the old one only has to go. It must not be replaced unseen, by a relabelled copy say
// that nobody has opened: only one that is bad is made anew.
func (j *job) shortcut(ctx context.Context, h *crypt.Header, e edit) (*crypt.Header, error) {
	if j.o.Action != Move || exact(h, j.o.Key) == nil {
		return nil, nil
	}
	err := j.prove(ctx, h, []source{{j.o.Key, j.o.Key}})
	switch {
	case errors.Is(err, crypt.ErrDamaged):
		return nil, nil
	case err != nil:
		return nil, err
	}
	if j.o.Verify {
		j.verified.Add(1)
	}
	return dropCopies(h, e.from[0].label), nil
}

// relabels reports whether a copy becomes one under Key by its label alone.
func (j *job) relabels(s source) bool {
	return j.o.Action != Refresh && s.label != j.o.Key && crypt.SameKey(s.label, j.o.Key)
}

// rewrapFrom makes the new copy from the first of the sources that can.
func (j *job) rewrapFrom(ctx context.Context, h *crypt.Header, from []source) (c crypt.Copy, used source, first error) {
	for _, s := range from {
		c, err := j.rewrap(ctx, h, s)
		if err == nil {
			return c, s, nil
		}
		if first == nil {
			first = fmt.Errorf("rewrapping its key from %s to %s: %w", s.key, j.o.Key, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return c, used, first
}

// rewrap is the one place that makes copies.
func (j *job) rewrap(ctx context.Context, h *crypt.Header, from source) (c crypt.Copy, err error) {
	if j.relabels(from) {
		return crypt.Copy{Key: j.o.Key, Blob: exact(h, from.label).Blob}, nil
	}
	only := h.Clone() // two labels may mean one key: leave no choice of the copy
	only.Copies = []crypt.Copy{*exact(h, from.label)}
	err = j.ask(func() error {
		c, err = j.rw.Rewrap(ctx, only, from.key, j.o.Key)
		return err
	})
	if err == nil && c.Key != j.o.Key {
		err = fmt.Errorf("the key service answered for %s: %w", c.Key, crypt.ErrKeyRejected)
	}
	return c, err
}

// verify decrypts the copy under the new key.
func (j *job) verify(ctx context.Context, h *crypt.Header) error {
	err := j.ask(func() error { return j.rw.Verify(ctx, h, j.o.Key) })
	if err != nil {
		return fmt.Errorf("verifying its copy under %s: %w", j.o.Key, err)
	}
	j.verified.Add(1)
	return nil
}

// prove finds one of the copies to be good, so that another may go.
func (j *job) prove(ctx context.Context, h *crypt.Header, from []source) error {
	_, err := j.proveOne(ctx, h, from)
	return err
}

// proveOne says which it was.
func (j *job) proveOne(ctx context.Context, h *crypt.Header, from []source) (source, error) {
	test := j.rw.Prove
	if j.o.Verify {
		test = j.rw.Verify
	}
	var first error
	for _, s := range from {
		only := h.Clone()
		only.Copies = []crypt.Copy{*exact(h, s.label)}
		err := j.ask(func() error { return test(ctx, only, s.key) })
		if err == nil {
			return s, nil
		}
		if first == nil {
			first = fmt.Errorf("proving its copy under %s, before the one under %s goes: %w", s.key, strings.Join(j.old, " and "), err)
		}
	}
	return source{}, first
}

// ask counts refusals of the key service in a row: a copy that is damaged is not one.
func (j *job) ask(f func() error) error {
	err := f()
	switch {
	case err == nil:
		j.failures.Store(0)
	case !errors.Is(err, crypt.ErrDamaged):
		j.failures.Add(1)
	}
	return err
}

// billed is the number of requests that one operation under a key costs.
func billed(key string) int {
	if strings.HasPrefix(key, crypt.LocalPrefix) {
		return 0
	}
	return 1
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

// putCopy puts c first and drops the copies labelled drop.
func putCopy(h *crypt.Header, c crypt.Copy, drop ...string) *crypt.Header {
	n := dropCopies(h, drop...)
	n.Copies = append([]crypt.Copy{c}, n.Copies...)
	return n
}

// dropCopies is the header without the copies labelled drop, and without padding.
func dropCopies(h *crypt.Header, drop ...string) *crypt.Header {
	n := h.Clone()
	n.Copies = slices.DeleteFunc(n.Copies, func(c crypt.Copy) bool { return slices.Contains(drop, c.Key) })
	n.Padding = 0
	return n
}
