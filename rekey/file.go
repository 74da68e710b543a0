package rekey

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

const restarts = 8 // a header or kmsfs.toml that changes this often is not ours to win

// file deals with one file, and returns the header that it is left with.
func (j *job) file(ctx context.Context, it *volume.Item, f found, verifying bool) (Outcome, *crypt.Header, error) {
	out, h, err := j.contents(ctx, it, f, verifying)
	if f.empty && (out == Already || out == Bad || out == Strange || errors.Is(err, ErrLastCopy) || errors.Is(err, crypt.ErrDamaged)) {
		return Empty, h, nil // nothing depends on what it carries
	}
	return out, h, err
}

func (j *job) contents(ctx context.Context, it *volume.Item, f found, verifying bool) (Outcome, *crypt.Header, error) {
	for tries := 0; ; tries++ {
		e, out, err := j.edit(f.h)
		if out == Already && verifying && !f.empty && exact(f.h, j.o.Key) != nil {
			if err = j.verify(ctx, f.h); err != nil {
				out = Failed
			}
		}
		if out != "" {
			return out, f.h, err
		}
		next, err := j.change(ctx, it, f, e)
		switch {
		case err == nil:
			return Changed, next, nil
		case errors.Is(err, volume.ErrGone):
			return Gone, f.h, nil
		case !errors.Is(err, volume.ErrHeaderChanged) || tries == restarts:
			return Failed, f.h, err
		}
		if f = find(j.tree, new(linksSeen), it, true); f.out != "" {
			return f.out, f.h, f.err
		}
	}
}

// change carries out an edit: look whether the result fits, ask the key service,
// and replace the header if nobody else did.
func (j *job) change(ctx context.Context, it *volume.Item, f found, e edit) (*crypt.Header, error) {
	fd, err := openToWrite(it)
	if err != nil {
		return nil, fmt.Errorf("opening the file: %w", err)
	}
	defer unix.Close(fd)
	only, err := j.fits(fd, f, e)
	if err != nil {
		return nil, err
	}
	next, err := j.apply(ctx, f.h, e)
	if err != nil {
		return nil, err
	}
	raw, err := next.Marshal()
	if err != nil {
		return nil, fmt.Errorf("its new header: %w", err)
	}
	if err := j.at("file-rewrapped"); err != nil {
		return nil, err
	}
	if err := volume.ReplaceHeader(fd, f.raw, raw); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.E2BIG) {
			j.fitted.Store(0) // what has fitted before need not any more
		}
		return nil, fmt.Errorf("replacing its header: %w", err)
	}
	if only {
		j.fit(len(raw))
	}
	return next, nil
}

// openToWrite opens an item for its header to be written; a file that forbids it
// to us, by a path descriptor through which that can be mended.
func openToWrite(it *volume.Item) (int, error) {
	fd, err := it.Open(unix.O_RDWR)
	if errors.Is(err, unix.EACCES) {
		return it.Open(unix.O_PATH)
	}
	return fd, err
}

// fits refuses, before a call is paid for, a file whose header would not fit
// beside the user's own attributes. A copy under the new key is as long as the
// volume key's. only reports that there are no such attributes and the header
// grows: what fits on one file of that kind fits on all, so it is tried only until
// one has taken it.
func (j *job) fits(fd int, f found, e edit) (only bool, err error) {
	next := dropCopies(f.h, e.drop...)
	if j.o.Action != Remove {
		next = putCopy(next, crypt.Copy{Key: j.o.Key, Blob: make([]byte, max(j.blobSize, 1))})
	}
	probe, err := next.Marshal()
	if err != nil {
		return false, fmt.Errorf("its new header: %w", err)
	}
	if len(probe) <= len(f.raw) {
		return false, nil
	}
	only = volume.OnlyHeader(fd)
	if only && int64(len(probe)) <= j.fitted.Load() {
		return only, nil
	}
	if err := volume.HeaderFits(fd, len(probe)); err != nil {
		return only, fmt.Errorf("a header of %d bytes does not fit beside the file's other attributes: %w", len(probe), err)
	}
	return only, nil
}

// fit remembers that a header of so many bytes fits on a file without other
// attributes.
func (j *job) fit(size int) {
	for {
		known := j.fitted.Load()
		if int64(size) <= known || j.fitted.CompareAndSwap(known, int64(size)) {
			return
		}
	}
}
