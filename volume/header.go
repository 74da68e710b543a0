package volume

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// What can go wrong with replacing a header, besides the errno.
var (
	// ErrHeaderChanged: the header is no longer what the caller's work is based on.
	ErrHeaderChanged = errors.New("the header was changed by somebody else meanwhile")
	// ErrHeaderBusy: another process held the header's lock for too long.
	ErrHeaderBusy = fmt.Errorf("another process is changing the header: %w", unix.EAGAIN)
)

// ReadHeader reads the header's bytes through any descriptor of a file; nil if
// there is none.
func ReadHeader(fd int) ([]byte, error) {
	return readXattr(fd, crypt.HeaderXattr, crypt.MaxHeader)
}

// readXattr reads one of our attributes; nil if it is missing, damage if it is
// longer than limit.
func readXattr(fd int, name string, limit int) ([]byte, error) {
	return readValue(name, limit, func(dest []byte) (int, error) { return getxattr(fd, name, dest) })
}

// readXattrAt reads the header of what stands at a name in a directory, without
// opening it and without following a symlink.
func readXattrAt(dirfd int, name string) ([]byte, error) {
	at := procPath(dirfd) + "/" + name
	return readValue(crypt.HeaderXattr, crypt.MaxHeader, func(dest []byte) (int, error) { return unix.Lgetxattr(at, crypt.HeaderXattr, dest) })
}

// valueBufs hold a header with two copies.
var valueBufs = sync.Pool{New: func() any { return new([600]byte) }}

func readValue(name string, limit int, get func(dest []byte) (int, error)) ([]byte, error) {
	small := valueBufs.Get().(*[600]byte)
	defer valueBufs.Put(small)
	n, err := get(small[:min(len(small), limit)])
	if err == nil {
		return bytes.Clone(small[:n]), nil
	}
	if err == unix.ERANGE && limit > len(small) {
		big := make([]byte, limit)
		if n, err = get(big); err == nil {
			return big[:n:n], nil
		}
	}
	switch err {
	case unix.ENODATA:
		return nil, nil
	case unix.ERANGE, unix.E2BIG:
		return nil, fmt.Errorf("attribute %s has more than %d bytes: %w", name, limit, crypt.ErrDamaged)
	}
	return nil, err
}

// ParseHeader decodes a file's header and checks that it is one of this volume:
// crypt.ErrNoHeader, crypt.ErrForeign or crypt.ErrDamaged if not. It proves
// nothing about the key; that is crypt.Unlock's.
func (v *Volume) ParseHeader(raw []byte) (*crypt.Header, error) {
	if len(raw) == 0 {
		return nil, crypt.ErrNoHeader
	}
	h, err := crypt.ParseHeader(raw)
	switch {
	case err != nil:
		return nil, err
	case h.Volume != v.fixed.ID:
		return nil, crypt.ErrForeign
	case h.Use != crypt.UseFile:
		return nil, fmt.Errorf("a %s key's header on a file: %w", h.Use, crypt.ErrDamaged)
	case h.Shared != v.fixed.Shared:
		return nil, fmt.Errorf("a header for another envelope: %w", crypt.ErrDamaged)
	case h.BlockLog2 != v.fixed.BlockLog2():
		return nil, fmt.Errorf("a header for another block size: %w", crypt.ErrDamaged)
	}
	return h, nil
}

// SetHeader installs a header, whatever was there, under the header's lock. The
// old one stays if the new one doesn't fit (ENOSPC, E2BIG: the user's own
// attributes share the space). fd may be of any kind; the caller holds the
// inode's lock if fd is shared.
func SetHeader(fd int, raw []byte) error {
	return lockedHeader(fd, func(fd int) error {
		return setHeader(fd, raw, 0)
	})
}

func setHeader(fd int, raw []byte, flags int) error {
	err := withAccess(fd, accessFile, func() error {
		return setxattr(fd, crypt.HeaderXattr, raw, flags)
	})
	if err != nil {
		return fmt.Errorf("setting the header: %w", err)
	}
	return nil
}

// ReplaceHeader installs new in place of old (nil: there must be none): under the
// header's lock it reads the header again, gives up with ErrHeaderChanged if it
// isn't old, sets new, and reads it back. It is not durable yet: a power cut leaves
// old or new, so who replaces many syncs once (Sync), before anything relies on new.
func ReplaceHeader(fd int, old, new []byte) error {
	return lockedHeader(fd, func(fd int) error {
		if err := expectHeader(fd, old); err != nil {
			return err
		}
		flags := unix.XATTR_REPLACE
		if old == nil {
			flags = unix.XATTR_CREATE
		}
		if err := setHeader(fd, new, flags); err != nil {
			return err
		}
		if err := expectHeader(fd, new); err != nil {
			return fmt.Errorf("reading the new header back: %w", err)
		}
		return nil
	})
}

func expectHeader(fd int, want []byte) error {
	got, err := readOwnHeader(fd)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) || (got == nil) != (want == nil) {
		return ErrHeaderChanged
	}
	return nil
}

// readOwnHeader reads the header of a file of ours even if its mode forbids it.
func readOwnHeader(fd int) (raw []byte, err error) {
	err = withAccess(fd, accessFile, func() error {
		raw, err = ReadHeader(fd)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the header: %w", err)
	}
	return raw, nil
}

// OnlyHeader reports whether a file carries no attribute but its header, so that
// what fits on another such file of the volume fits on it.
func OnlyHeader(fd int) bool {
	var small [256]byte
	n, err := listxattr(fd, small[:])
	if err != nil {
		return false
	}
	for name := range strings.SplitSeq(string(small[:n]), "\x00") {
		if name != "" && name != crypt.HeaderXattr {
			return false
		}
	}
	return true
}

// HeaderFits says whether a header of size bytes would fit beside the user's own
// attributes: the file's header is padded to that size (readers ignore padding)
// and put back. So a rekey can refuse before it has called KMS.
func HeaderFits(fd, size int) error {
	if size > crypt.MaxHeader {
		return fmt.Errorf("a header of %d bytes: %w", size, unix.E2BIG)
	}
	return lockedHeader(fd, func(fd int) error {
		raw, err := readOwnHeader(fd)
		if err != nil {
			return err
		}
		if len(raw) == 0 {
			return crypt.ErrNoHeader
		}
		if size <= len(raw) {
			return nil
		}
		h, err := crypt.ParseHeader(raw)
		if err != nil {
			return err
		}
		h.Padding += size - len(raw)
		padded, err := h.Marshal()
		if err != nil {
			return err
		}
		if err := setHeader(fd, padded, unix.XATTR_REPLACE); err != nil {
			return err
		}
		return setHeader(fd, raw, unix.XATTR_REPLACE)
	})
}

// The header's lock is an open-file-description lock on one byte that no file
// reaches. Every header writer takes it, in this process and in others, but the one that
// sets a file's first header in a call that does nothing if there is one (FirstHeader); it is
// never held over a call to KMS.
const (
	headerLockStart = 1 << 62
	headerLockWait  = 5 * time.Second
)

// lockedHeader calls op under the header's lock, with a descriptor that is open.
// Write locks need a descriptor open for writing; if fd is not, the file is
// opened once more through it.
func lockedHeader(fd int, op func(fd int) error) error {
	err := lockHeader(fd)
	if err == unix.EBADF {
		return lockedReopened(fd, op)
	}
	if err != nil {
		return err
	}
	defer unlockHeader(fd)
	return op(fd)
}

func lockedReopened(fd int, op func(fd int) error) error {
	rw, err := OpenAnyway(fd)
	if err != nil {
		return fmt.Errorf("opening the file to write its header: %w", err)
	}
	defer unix.Close(rw) // and with it goes the lock
	if err := lockHeader(rw); err != nil {
		return err
	}
	return op(rw)
}

func lockHeader(fd int) error {
	for deadline := time.Now().Add(headerLockWait); ; time.Sleep(2 * time.Millisecond) {
		err := setHeaderLock(fd, unix.F_WRLCK)
		if err == nil || err != unix.EAGAIN && err != unix.EACCES && err != unix.EINTR {
			return err
		}
		if time.Now().After(deadline) {
			return ErrHeaderBusy
		}
	}
}

func unlockHeader(fd int) { _ = setHeaderLock(fd, unix.F_UNLCK) }

func setHeaderLock(fd int, kind int16) error {
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: headerLockStart, Len: 1})
}
