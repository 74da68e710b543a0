package durable

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A File is written under a temporary name beside its own, for what is too large
// for Replace and Create. Nobody sees it before Commit; Discard drops it.
type File struct {
	f         *os.File
	dirfd     int
	tmp, name string
	path      string
}

// NewFile starts the file path, whose directory must exist.
func NewFile(path string, perm fs.FileMode) (*File, error) {
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	dirfd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	var salt [8]byte
	_, _ = rand.Read(salt[:]) // never fails
	tmp := name + ".tmp." + hex.EncodeToString(salt[:])
	fd, err := unix.Openat(dirfd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(perm.Perm()))
	if err != nil {
		unix.Close(dirfd)
		return nil, &fs.PathError{Op: "create", Path: path, Err: err}
	}
	out := &File{f: os.NewFile(uintptr(fd), tmp), dirfd: dirfd, tmp: tmp, name: name, path: path}
	if err := out.f.Chmod(perm.Perm()); err != nil { // the umask must not narrow it
		out.Discard()
		return nil, err
	}
	return out, nil
}

// Write implements io.Writer.
func (f *File) Write(p []byte) (int, error) { return f.f.Write(p) }

// Commit makes the contents durable and gives the file its name; whatever becomes
// of it, the File is spent. A file that is there is replaced only if replace is
// set, else it is fs.ErrExist.
func (f *File) Commit(replace bool) error {
	err := f.f.Sync()
	if err == nil {
		err = f.install(replace)
	}
	if err == nil {
		err = SyncDir(f.dirfd)
	}
	if err != nil {
		f.Discard()
		return &fs.PathError{Op: "write", Path: f.path, Err: err}
	}
	err = f.f.Close()
	unix.Close(f.dirfd)
	return err
}

func (f *File) install(replace bool) error {
	if replace {
		return unix.Renameat(f.dirfd, f.tmp, f.dirfd, f.name)
	}
	err := unix.Renameat2(f.dirfd, f.tmp, f.dirfd, f.name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not known to every file system
		if err = unix.Linkat(f.dirfd, f.tmp, f.dirfd, f.name, 0); err == nil {
			err = unix.Unlinkat(f.dirfd, f.tmp, 0)
		}
	}
	return err
}

// Discard removes what was written.
func (f *File) Discard() {
	f.f.Close()
	_ = unix.Unlinkat(f.dirfd, f.tmp, 0)
	unix.Close(f.dirfd)
}
