package volume

import (
	"io"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// Stored is a backing file as crypt.File sees it, over an open descriptor. It
// holds no state of its own and does not own the descriptor.
type Stored struct {
	fd int
}

var _ crypt.Backing = (*Stored)(nil)

// NewBacking wraps fd, which must be open for reading, and for writing if it is
// to be written.
func NewBacking(fd int) *Stored { return &Stored{fd: fd} }

// Fd is the descriptor. It stays its owner's.
func (s *Stored) Fd() int { return s.fd }

// ReadAt implements io.ReaderAt.
func (s *Stored) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pread(s.fd, p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, err
		case m == 0:
			return n, io.EOF
		default:
			n += m
		}
	}
	return n, nil
}

// WriteAt implements io.WriterAt; after a short write it says how much is there.
func (s *Stored) WriteAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pwrite(s.fd, p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, err
		case m == 0:
			return n, io.ErrShortWrite
		default:
			n += m
		}
	}
	return n, nil
}

// Truncate sets the stored size.
func (s *Stored) Truncate(stored int64) error {
	return retry(func() error { return unix.Ftruncate(s.fd, stored) })
}

// Sync makes contents and size durable; a header set before the last growth goes
// with them.
func (s *Stored) Sync() error {
	return retry(func() error { return unix.Fdatasync(s.fd) })
}

// SetHeader installs the header of a new generation. A mark that permits holes
// belongs to the old one: it goes first, for its room.
func (s *Stored) SetHeader(raw []byte) error {
	return lockedHeader(s.fd, func(fd int) error {
		err := withAccess(fd, accessFile, func() error { return removexattr(fd, crypt.SparseXattr) })
		if err != nil && err != unix.ENODATA {
			return err
		}
		return setHeader(fd, raw, 0)
	})
}

// FirstHeader is SetHeader on a file that was made just now, which has neither header
// nor mark: one call, which does nothing if there is a header, and so needs no lock.
func (s *Stored) FirstHeader(raw []byte) error {
	if setxattr(s.fd, crypt.HeaderXattr, raw, unix.XATTR_CREATE) == nil {
		return nil
	}
	return s.SetHeader(raw)
}

// SparseMark reads the mark that permits holes; nil if there is none.
func (s *Stored) SparseMark() (mark []byte, err error) {
	err = withAccess(s.fd, accessFile, func() error {
		mark, err = readXattr(s.fd, crypt.SparseXattr, 512)
		return err
	})
	return mark, err
}

// SetSparseMark installs the mark that permits holes.
func (s *Stored) SetSparseMark(mark []byte) error {
	return withAccess(s.fd, accessFile, func() error {
		return setxattr(s.fd, crypt.SparseXattr, mark, 0)
	})
}

// PunchHole deallocates a range, which then reads as zeros. Where the backing
// store can't, the error is errors.ErrUnsupported to errors.Is (EOPNOTSUPP).
func (s *Stored) PunchHole(off, n int64) error {
	return retry(func() error {
		return unix.Fallocate(s.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// Allocate reserves space and leaves the size; unsupported as PunchHole.
func (s *Stored) Allocate(off, n int64) error {
	return retry(func() error {
		return unix.Fallocate(s.fd, unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// SeekData finds the next data at or after off; ENXIO past the last.
func (s *Stored) SeekData(off int64) (int64, error) {
	return unix.Seek(s.fd, off, unix.SEEK_DATA)
}

// SeekHole finds the next hole at or after off; ENXIO past the end.
func (s *Stored) SeekHole(off int64) (int64, error) {
	return unix.Seek(s.fd, off, unix.SEEK_HOLE)
}
