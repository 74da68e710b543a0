package rekey

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// look reads an item's header and says which copy, if any, is to be replaced.
// No key service is asked, and whatever the header claims only selects from the
// trusted list.
func (j *job) look(fd int) (raw []byte, h *crypt.Header, from source, out Outcome, err error) {
	raw, err = volume.ReadHeader(fd)
	if err != nil && !errors.Is(err, crypt.ErrDamaged) {
		return nil, nil, from, Failed, fmt.Errorf("reading the header: %w", err)
	}
	if err == nil {
		h, err = j.tree.ParseHeader(raw)
	}
	if err != nil {
		return nil, nil, from, Bad, err
	}
	from, out, err = j.source(h)
	return raw, h, from, out, err
}

// A source is the copy to replace. The label is the header's own, which whoever
// writes the backing directory may have changed (a multi-Region key's label can
// name any region): it only finds the copy. The key is the client's name for it,
// and is what is routed by and called.
type source struct{ label, key string }

// source picks the copy to replace: the one under --from, or the only one.
func (j *job) source(h *crypt.Header) (source, Outcome, error) {
	if j.o.From != "" {
		if s := j.copyUnder(h, j.o.From); s.label != "" {
			return s, "", nil
		}
		return source{}, Already, nil
	}
	var others []string
	for _, c := range h.Copies {
		if c.Key != j.o.To {
			others = append(others, c.Key)
		}
	}
	switch {
	case len(others) == 0:
		return source{}, Already, nil
	case len(others) > 1:
		return source{}, Failed, fmt.Errorf("its header has copies under %s: %w", strings.Join(others, " and "), ErrAmbiguous)
	}
	key := j.trusted(others[0])
	if key == "" {
		return source{}, Bad, fmt.Errorf("its header is under %s: %w", others[0], ErrUntrusted)
	}
	return source{others[0], key}, "", nil
}

// copyUnder finds the copy that is to leave for key, the one with its own label
// before those labelled as a replica.
func (j *job) copyUnder(h *crypt.Header, key string) source {
	if key != j.o.To && exact(h, key) != nil {
		return source{key, key}
	}
	for _, c := range h.Copies {
		if c.Key != j.o.To && j.trusted(c.Key) == key {
			return source{c.Key, key}
		}
	}
	return source{}
}

// file moves one file to the new key.
func (j *job) file(ctx context.Context, it *volume.Item) (Outcome, error) {
	fd, out, err := open(it)
	if fd < 0 {
		return out, err
	}
	defer unix.Close(fd)
	for range restarts {
		out, err = j.fileOnce(ctx, fd)
		if !errors.Is(err, volume.ErrHeaderChanged) {
			break
		}
	}
	return out, err
}

// open opens an item without needing a permission of its file. fd is -1 if the
// outcome is settled already.
func open(it *volume.Item) (fd int, out Outcome, err error) {
	if it.Stat.Size == 0 {
		return -1, Empty, nil
	}
	fd, err = it.Open(unix.O_PATH)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
		// Deleted, renamed or replaced since it was listed. If it was renamed, to a
		// place that this pass has behind it, only another pass meets it.
		return -1, Gone, nil
	}
	if err != nil {
		return -1, Failed, fmt.Errorf("opening the file: %w", err)
	}
	return fd, "", nil
}

func (j *job) fileOnce(ctx context.Context, fd int) (Outcome, error) {
	raw, h, from, out, err := j.look(fd)
	if from.label == "" {
		return out, err
	}
	if err := j.fits(fd, raw, h, from.label); err != nil {
		return Failed, err
	}
	c, err := j.rewrap(ctx, h, from)
	if err != nil {
		return Failed, fmt.Errorf("rewrapping its key from %s to %s: %w", from.key, j.o.To, err)
	}
	next, err := replaceCopy(h, c, from.label, j.o.To).Marshal()
	if err != nil {
		return Failed, fmt.Errorf("its new header: %w", err)
	}
	if err := j.at("file-rewrapped"); err != nil {
		return Failed, err
	}
	if err := volume.ReplaceHeader(fd, raw, next); err != nil {
		return Failed, fmt.Errorf("replacing its header: %w", err)
	}
	return Rewrapped, nil
}

// fits refuses, before a call is paid for, a file whose header would not fit
// beside the user's own attributes. A copy under the new key is as long as the
// volume key's.
func (j *job) fits(fd int, raw []byte, h *crypt.Header, label string) error {
	probe := replaceCopy(h, crypt.Copy{Key: j.o.To, Blob: make([]byte, max(j.blobSize, 1))}, label, j.o.To)
	size, err := probe.Marshal()
	if err != nil {
		return fmt.Errorf("its new header: %w", err)
	}
	if len(size) <= len(raw) {
		return nil
	}
	if err := volume.HeaderFits(fd, len(size)); err != nil {
		return fmt.Errorf("a header of %d bytes does not fit beside the file's other attributes: %w", len(size), err)
	}
	return nil
}

// rewrap is the one place that asks the key service.
func (j *job) rewrap(ctx context.Context, h *crypt.Header, from source) (crypt.Copy, error) {
	route, err := j.rw.Route(from.key, j.o.To)
	if err != nil {
		return crypt.Copy{}, err
	}
	for range route.Calls {
		if err := j.limit.Wait(ctx); err != nil {
			return crypt.Copy{}, err
		}
	}
	j.calls.Add(int64(route.Calls))
	only := h.Clone() // two labels may mean one key: leave no choice of the copy
	only.Copies = []crypt.Copy{*exact(h, from.label)}
	c, err := j.rw.Rewrap(ctx, only, from.key, j.o.To)
	if err != nil {
		j.failures.Add(1)
		return c, err
	}
	j.failures.Store(0)
	if c.Key != j.o.To {
		return c, fmt.Errorf("the key service answered for %s: %w", c.Key, crypt.ErrKeyRejected)
	}
	return c, nil
}
