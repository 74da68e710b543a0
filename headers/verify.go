package headers

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Keys opens the data key of a header; *keys.Ring does. It asks only keys that
// this client trusts.
type Keys interface {
	Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error)
}

var (
	// ErrMismatch: the contents were not sealed under the header's data key.
	ErrMismatch = errors.New("the header in the export does not belong to the contents of the file")
	// ErrGaveUp: the key service failed so often in a row that going on would only
	// burn calls.
	ErrGaveUp = errors.New("the key service failed for many files in a row")
)

// Refusals of the key service in a row after which nothing more is asked of it,
// and after which an import that may not go on unverified ends.
const (
	stopAsking = 8
	giveUp     = 100
)

// Unreachable reports whether an error means that a key can't be had now, by this
// client. It says nothing about header and contents.
func Unreachable(err error) bool {
	for _, is := range []error{crypt.ErrKeyDenied, crypt.ErrKeyDisabled, crypt.ErrKeyNotFound, crypt.ErrKeyUnavailable, crypt.ErrKeyTimeout} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

// verify says whether the header h belongs to the file fd (O_PATH). A key that
// can't be had leaves it unverified, unless verification is required.
func (j *job) verify(ctx context.Context, fd int, size int64, h *crypt.Header) (verified bool, err error) {
	if j.o.Keys == nil || !j.o.Require && j.refusals.Load() >= stopAsking {
		return false, nil
	}
	s, err := j.o.Keys.Open(ctx, h)
	if err != nil {
		return false, j.unopened(err)
	}
	j.refusals.Store(0)
	contents, err := volume.OpenContents(fd)
	if err != nil {
		s.Wipe()
		return false, err
	}
	defer unix.Close(contents)
	return true, belongs(contents, size, s)
}

// unopened judges why a data key was not opened; nil if that may pass.
func (j *job) unopened(err error) error {
	if errors.Is(err, crypt.ErrDamaged) {
		return fmt.Errorf("%w: %w", ErrMismatch, err)
	}
	if !Unreachable(err) {
		return err
	}
	j.noteUnreachable(err)
	if j.o.Require {
		return err
	}
	return nil
}

// belongs returns nil if a block of the stored file opens under s, which it owns:
// the end, or where that was torn, the beginning. A hole opens under any key that
// the mark names, so none is read here.
func belongs(fd int, size int64, s *crypt.Secrets) error {
	id := s.Identity()
	f, err := crypt.NewFile(unmarked{volume.NewBacking(fd)}, id.BlockSize(), size, s)
	if err != nil {
		return err
	}
	defer f.Close()
	end := f.EndErr()
	if end == nil {
		return nil
	}
	n, err := f.ReadAt(make([]byte, 1), 0)
	switch {
	case n > 0:
		return nil
	case !errors.Is(end, crypt.ErrDamaged): // the store failed, not the contents
		return end
	case err != nil && !errors.Is(err, crypt.ErrDamaged) && err != io.EOF:
		return err
	}
	return ErrMismatch
}

// unmarked is a stored file without the mark that permits holes.
type unmarked struct{ *volume.Stored }

func (unmarked) SparseMark() ([]byte, error) { return nil, nil }
