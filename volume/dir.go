package volume

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// A Dir is an open directory of the backing store: the one door from plain names
// to the disk. All its methods but Close may be called at once. Names are plain
// names of one component.
type Dir struct {
	v        *Volume
	fd       int // O_PATH, owned, until Close
	root     bool
	dev, ino uint64
	id       crypt.DirID // zero with plain names
	entered  bool        // id is in the registry
	bad      error       // why no name in it can be translated, or nil
	last     atomic.Pointer[named]
}

// named is a name that was translated last: who lists a directory looks each name up
// at once, and who looks one up opens it.
type named struct{ plain, stored string }

// newDir takes over fd.
func (v *Volume) newDir(fd int, root bool) (*Dir, error) {
	d := &Dir{v: v, fd: fd, root: root}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	d.dev, d.ino = st.Dev, st.Ino
	if err := d.identify(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return d, nil
}

// identify finds the directory's id. Damage does not keep anybody out: the
// entries of a damaged directory must still be listed and removed, as
// kmsfs.damaged.*.
func (d *Dir) identify() (err error) {
	if !d.v.encrypted() {
		return nil
	}
	if d.root {
		d.id = d.v.rootID
	} else if d.id, err = d.v.dirID(d.fd); err != nil {
		if !errors.Is(err, crypt.ErrDamaged) {
			return err
		}
		d.bad = err
		return nil
	}
	if d.entered = d.v.ids.enter(d.id, d.dev, d.ino); !d.entered {
		d.bad = errTwin
	}
	return nil
}

var errTwin = fmt.Errorf("another directory has the same id: %w", crypt.ErrDamaged)

// Fd is the directory's O_PATH descriptor. It stays the Dir's.
func (d *Dir) Fd() int { return d.fd }

// Dev and Ino identify the directory on the backing store.
func (d *Dir) Dev() uint64 { return d.dev }

// Ino is the directory's inode number on the backing store.
func (d *Dir) Ino() uint64 { return d.ino }

// Err says why names in this directory can't be translated (its id is missing,
// forged, or another directory's), or nil.
func (d *Dir) Err() error { return d.bad }

// Close gives the descriptor back. No other method may be running.
func (d *Dir) Close() {
	if d.fd < 0 {
		return
	}
	if d.entered {
		d.v.ids.leave(d.id)
	}
	unix.Close(d.fd)
	d.fd = -1
}

// Stat reads the attributes of the directory itself.
func (d *Dir) Stat(st *unix.Stat_t) error { return unix.Fstat(d.fd, st) }

// Sync makes the directory's entries durable.
func (d *Dir) Sync() error { return durable.SyncDir(d.fd) }

// Statfs describes the backing file system. Names may have 255 bytes whatever
// their stored form.
func (d *Dir) Statfs(st *unix.Statfs_t) error {
	if err := retry(func() error { return unix.Fstatfs(d.fd, st) }); err != nil {
		return err
	}
	if d.v.encrypted() {
		st.Namelen = crypt.MaxName
	}
	return nil
}

// OpenDir opens the directory name. A symlink there is ENOTDIR.
func (d *Dir) OpenDir(name string) (*Dir, error) {
	stored, err := d.existing(name)
	if err != nil {
		return nil, err
	}
	fd, err := d.openat(stored, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return d.v.newDir(fd, false)
}

// openat is the one place that opens anything by name: one component, never
// through a symlink, never waiting for the other end of a planted FIFO.
func (d *Dir) openat(stored string, flags int, mode uint32) (fd int, err error) {
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC
	if flags&unix.O_PATH == 0 {
		flags |= unix.O_NONBLOCK
	}
	err = retry(func() (err error) {
		fd, err = unix.Openat(d.fd, stored, flags, mode)
		return err
	})
	return fd, err
}

// openFlags are the flags of open(2) that reach the backing file. The others
// would cut it (O_TRUNC: only after a fresh key is at hand), move our writes
// (O_APPEND) or demand alignment (O_DIRECT).
const openFlags = unix.O_ACCMODE | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME

// Open opens the regular file name. Only the access mode, O_SYNC, O_DSYNC and
// O_NOATIME of flags count. What is not a regular file was not there when the
// kernel looked it up: ESTALE (EISDIR for a directory, ELOOP for a symlink).
func (d *Dir) Open(name string, flags int) (int, error) {
	stored, err := d.existing(name)
	if err != nil {
		return -1, err
	}
	return d.openRegular(stored, flags&openFlags, 0)
}

func (d *Dir) openRegular(stored string, flags int, mode uint32) (int, error) {
	fd, err := d.openat(stored, flags, mode)
	if err != nil {
		return -1, err
	}
	if flags&(unix.O_CREAT|unix.O_EXCL) == unix.O_CREAT|unix.O_EXCL {
		return fd, nil // it is new
	}
	if err := checkRegular(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// OpenPath opens whatever is at name with O_PATH, a symlink itself.
func (d *Dir) OpenPath(name string) (int, error) {
	stored, err := d.existing(name)
	if err != nil {
		return -1, err
	}
	return d.openat(stored, unix.O_PATH, 0)
}

// Create makes and opens the regular file name. Of flags, O_EXCL counts besides
// what Open takes; without it a file that is there is opened.
func (d *Dir) Create(name string, flags int, mode uint32) (fd int, err error) {
	err = d.making(name, func(stored string) error {
		fd, err = d.openRegular(stored, flags&(openFlags|unix.O_EXCL)|unix.O_CREAT, mode)
		return err
	})
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// Tmpfile makes and opens a regular file without a name in this directory; Link
// gives it one, unless flags hold O_EXCL.
func (d *Dir) Tmpfile(flags int, mode uint32) (fd int, err error) {
	flags = flags&(openFlags|unix.O_EXCL) | unix.O_TMPFILE | unix.O_CLOEXEC
	err = retry(func() error {
		fd, err = unix.Openat(d.fd, ".", flags, mode)
		return err
	})
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// Mkdir makes the directory name, its id with it.
func (d *Dir) Mkdir(name string, mode uint32) error {
	return d.making(name, func(stored string) error {
		if err := unix.Mkdirat(d.fd, stored, mode); err != nil {
			return err
		}
		if !d.v.encrypted() {
			return nil
		}
		if err := d.giveID(stored); err != nil {
			_ = unix.Unlinkat(d.fd, stored, unix.AT_REMOVEDIR)
			return err
		}
		return nil
	})
}

func (d *Dir) giveID(stored string) error {
	fd, err := d.openat(stored, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err == unix.ENOENT {
		return nil // it was made, and somebody has removed it already
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = d.v.setDirID(fd)
	return err
}

// Mknod makes the special or empty regular file name.
func (d *Dir) Mknod(name string, mode uint32, dev int) error {
	return d.making(name, func(stored string) error {
		return unix.Mknodat(d.fd, stored, mode, dev)
	})
}

// Symlink makes the symlink name to target. Encrypted targets grow; one that no
// longer fits the backing store's symlinks is ENAMETOOLONG.
func (d *Dir) Symlink(target, name string) error {
	if d.v.encrypted() {
		if target == "" {
			return unix.ENOENT
		}
		target = string(d.v.names.EncryptTarget(target))
	}
	return d.making(name, func(stored string) error {
		return unix.Symlinkat(target, d.fd, stored)
	})
}

// Readlink reads the target of the symlink name.
func (d *Dir) Readlink(name string) (string, error) {
	stored, err := d.existing(name)
	if err != nil {
		return "", err
	}
	raw, err := readlinkat(d.fd, stored)
	if err != nil || !d.v.encrypted() {
		return string(raw), err
	}
	return d.v.names.DecryptTarget(raw)
}

// ReadlinkFd is Readlink of the symlink that the O_PATH descriptor fd refers to.
func (v *Volume) ReadlinkFd(fd int) (string, error) {
	raw, err := readlinkat(fd, "")
	if err != nil || !v.encrypted() {
		return string(raw), err
	}
	if !v.Unlocked() {
		return "", ErrLocked
	}
	return v.names.DecryptTarget(raw)
}

func readlinkat(dirfd int, name string) ([]byte, error) {
	for size := 512; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(dirfd, name, buf)
		if err != nil || n < size {
			return buf[:max(n, 0)], err
		}
	}
}

// Link gives what fd refers to (O_PATH, open, or from Tmpfile) the additional
// name.
func (d *Dir) Link(fd int, name string) error {
	// AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH; linkat(2) names this way.
	return d.making(name, func(stored string) error {
		return unix.Linkat(unix.AT_FDCWD, procPath(fd), d.fd, stored, unix.AT_SYMLINK_FOLLOW)
	})
}

// Unlink removes the name of anything but a directory. It needs no key of the
// file, and works on damaged ones.
func (d *Dir) Unlink(name string) error {
	return d.removing(name, func(stored string) error {
		return unix.Unlinkat(d.fd, stored, 0)
	})
}

// Rmdir removes the empty directory name, and with it the sidecars of long names
// that a crash left in it.
func (d *Dir) Rmdir(name string) error {
	var entry string
	rmdir := func(stored string) error {
		entry = stored
		return unix.Unlinkat(d.fd, stored, unix.AT_REMOVEDIR)
	}
	err := d.removing(name, rmdir)
	if isNotEmpty(err) && d.clearOrphans(entry) {
		err = d.removing(name, rmdir)
	}
	return err
}

func isNotEmpty(err error) bool { return err == unix.ENOTEMPTY || err == unix.EEXIST }

// Lstat reads the attributes of name itself; the size of regular files and
// symlinks is that of the plaintext.
func (d *Dir) Lstat(name string, st *unix.Stat_t) error {
	stored, err := d.existing(name)
	if err != nil {
		return err
	}
	if err := unix.Fstatat(d.fd, stored, st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	d.v.StatToPlain(st)
	return nil
}

// Statx is Lstat with more, birth time for one; mask as in statx(2).
func (d *Dir) Statx(name string, mask int, stx *unix.Statx_t) error {
	stored, err := d.existing(name)
	if err != nil {
		return err
	}
	err = unix.Statx(d.fd, stored, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_SYNC_AS_STAT, mask|unix.STATX_TYPE|unix.STATX_SIZE, stx)
	if err != nil {
		return err
	}
	d.v.StatxToPlain(stx)
	return nil
}

// StatToPlain replaces the stored size by the plaintext's.
func (v *Volume) StatToPlain(st *unix.Stat_t) {
	st.Size = v.plainSize(st.Mode, st.Size)
}

// StatxToPlain replaces the stored size by the plaintext's.
func (v *Volume) StatxToPlain(stx *unix.Statx_t) {
	stx.Size = uint64(v.plainSize(uint32(stx.Mode), int64(stx.Size)))
}

func (v *Volume) plainSize(mode uint32, stored int64) int64 {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return crypt.PlainSize(stored, v.fixed.BlockSize)
	case unix.S_IFLNK:
		if v.encrypted() {
			return crypt.PlainTargetLen(stored)
		}
	}
	return stored
}

// Chmod changes the mode of name. A symlink's can't be changed: EOPNOTSUPP.
func (d *Dir) Chmod(name string, mode uint32) error {
	stored, err := d.existing(name)
	if err != nil {
		return err
	}
	err = unix.Fchmodat(d.fd, stored, mode, unix.AT_SYMLINK_NOFOLLOW)
	if err != unix.EOPNOTSUPP && err != unix.ENOSYS {
		return err
	}
	fd, err := d.openat(stored, unix.O_PATH, 0) // before Linux 6.6
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return Chmod(fd, mode)
}

// Chown changes the owner of name, of a symlink itself; -1 leaves an id as it is.
func (d *Dir) Chown(name string, uid, gid int) error {
	stored, err := d.existing(name)
	if err != nil {
		return err
	}
	return unix.Fchownat(d.fd, stored, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
}

// Utimens changes the times of name, of a symlink itself; nil means now.
func (d *Dir) Utimens(name string, ts *[2]unix.Timespec) error {
	stored, err := d.existing(name)
	if err != nil {
		return err
	}
	var list []unix.Timespec
	if ts != nil {
		list = ts[:]
	}
	return unix.UtimesNanoAt(d.fd, stored, list, unix.AT_SYMLINK_NOFOLLOW)
}

// Access asks whether this process may use name, as access(2) with the effective
// ids; of a symlink itself.
func (d *Dir) Access(name string, mode uint32) error {
	stored, err := d.existing(name)
	if err != nil {
		return err
	}
	return unix.Faccessat2(d.fd, stored, mode, unix.AT_EACCESS|unix.AT_SYMLINK_NOFOLLOW)
}
