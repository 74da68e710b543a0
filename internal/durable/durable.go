// Package durable writes small files so that a power cut leaves the old
// contents or the new, never a mixture: temporary file, fsync, rename, fsync of
// the directory. It is for settings, pins and keyrings, not for bulk data.
//
// The At forms work relative to a directory descriptor (O_PATH will do) and
// never follow a symlink that somebody planted under the name.
package durable

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrTooBig says that a file is larger than its reader accepts.
var ErrTooBig = errors.New("the file is too large")

// Replace writes the file path, replacing one that is there. Its directory must
// exist.
func Replace(path string, data []byte, perm fs.FileMode) error {
	return inDir(path, func(dirfd int, name string) error {
		return ReplaceAt(dirfd, name, data, perm)
	})
}

// Create writes the file path and fails with fs.ErrExist if there is one.
func Create(path string, data []byte, perm fs.FileMode) error {
	return inDir(path, func(dirfd int, name string) error {
		return CreateAt(dirfd, name, data, perm)
	})
}

func inDir(path string, f func(dirfd int, name string) error) error {
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	if err := f(fd, name); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// ReplaceAt writes the file name in the directory dirfd, replacing one that is
// there. The temporary file's name starts with name too.
func ReplaceAt(dirfd int, name string, data []byte, perm fs.FileMode) error {
	return place(dirfd, name, data, perm, func(tmp string) error {
		return unix.Renameat(dirfd, tmp, dirfd, name)
	})
}

// CreateAt is ReplaceAt, but fails with fs.ErrExist if there is a file (EEXIST
// is that to errors.Is).
func CreateAt(dirfd int, name string, data []byte, perm fs.FileMode) error {
	return place(dirfd, name, data, perm, func(tmp string) error {
		// A link refuses an existing name on every file system; renameat2's
		// NOREPLACE is not known to all of them.
		if err := unix.Linkat(dirfd, tmp, dirfd, name, 0); err != nil {
			return err
		}
		return unix.Unlinkat(dirfd, tmp, 0)
	})
}

func place(dirfd int, name string, data []byte, perm fs.FileMode, install func(tmp string) error) error {
	tmp, err := writeTemp(dirfd, name, data, perm)
	if err == nil {
		err = install(tmp)
	}
	if err == nil {
		return SyncDir(dirfd)
	}
	if tmp != "" {
		_ = unix.Unlinkat(dirfd, tmp, 0)
	}
	return err
}

// writeTemp leaves a synced file; its name is returned as soon as it exists.
func writeTemp(dirfd int, name string, data []byte, perm fs.FileMode) (string, error) {
	var salt [8]byte
	if _, err := rand.Read(salt[:]); err != nil {
		return "", err
	}
	tmp := name + ".tmp." + hex.EncodeToString(salt[:])
	fd, err := unix.Openat(dirfd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(perm.Perm()))
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), tmp)
	// The umask must not widen or narrow what the caller asked for.
	if err := f.Chmod(perm.Perm()); err != nil {
		return tmp, errors.Join(err, f.Close())
	}
	if _, err := f.Write(data); err != nil {
		return tmp, errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return tmp, errors.Join(err, f.Close())
	}
	return tmp, f.Close()
}

// SyncDir makes the entries of the directory dirfd durable.
func SyncDir(dirfd int) error {
	fd, err := unix.Openat(dirfd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the directory to sync it: %w", err)
	}
	defer unix.Close(fd)
	for {
		if err := unix.Fsync(fd); err != unix.EINTR {
			return err
		}
	}
}

// ReadAt reads the regular file name in the directory dirfd, at most limit
// bytes of it. A symlink, a FIFO or a device under the name is refused: it
// can't make the reader wait or look elsewhere.
func ReadAt(dirfd int, name string, limit int) ([]byte, error) {
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.Join(err, errors.New("not a regular file"))}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(data) > limit {
		err = &fs.PathError{Op: "read", Path: name, Err: ErrTooBig}
	}
	return data, err
}
