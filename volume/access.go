package volume

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// procPath names what fd refers to, for the calls that don't take an O_PATH
// descriptor. The kernel jumps straight to the inode: no path is walked, and a
// symlink behind fd is not followed.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// retry repeats a call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// getxattr, setxattr, listxattr and removexattr take any descriptor; f*xattr(2)
// refuse O_PATH ones with EBADF.

func getxattr(fd int, name string, dest []byte) (int, error) {
	n, err := unix.Fgetxattr(fd, name, dest)
	if err == unix.EBADF {
		n, err = unix.Getxattr(procPath(fd), name, dest)
	}
	return n, err
}

func setxattr(fd int, name string, value []byte, flags int) error {
	err := unix.Fsetxattr(fd, name, value, flags)
	if err == unix.EBADF {
		err = unix.Setxattr(procPath(fd), name, value, flags)
	}
	return err
}

func listxattr(fd int, dest []byte) (int, error) {
	n, err := unix.Flistxattr(fd, dest)
	if err == unix.EBADF {
		n, err = unix.Listxattr(procPath(fd), dest)
	}
	return n, err
}

func removexattr(fd int, name string) error {
	err := unix.Fremovexattr(fd, name)
	if err == unix.EBADF {
		err = unix.Removexattr(procPath(fd), name)
	}
	return err
}

// Chmod changes the mode of what fd (O_PATH will do) refers to. A symlink's mode
// can't be changed: EOPNOTSUPP.
func Chmod(fd int, mode uint32) error {
	err := unix.Fchmod(fd, mode)
	if err == unix.EBADF {
		err = unix.Chmod(procPath(fd), mode)
	}
	return err
}

// Chown changes the owner of what fd (O_PATH will do) refers to, of a symlink
// itself; -1 leaves an id as it is.
func Chown(fd, uid, gid int) error {
	return unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
}

// Utimens changes the times of what fd (O_PATH will do) refers to; unix.UTIME_NOW
// and unix.UTIME_OMIT are understood, nil means now.
func Utimens(fd int, ts *[2]unix.Timespec) error {
	var list []unix.Timespec
	if ts != nil {
		list = ts[:]
	}
	err := unix.UtimesNanoAt(fd, "", list, unix.AT_EMPTY_PATH)
	if err == unix.EINVAL || err == unix.ENOENT { // before Linux 5.8 there was no AT_EMPTY_PATH here
		err = unix.UtimesNanoAt(unix.AT_FDCWD, procPath(fd), list, 0)
	}
	return err
}

// withAccess calls op again with more permission if it fails with EACCES. User
// xattrs obey a file's mode even on an open read-write descriptor, so a daemon
// without CAP_DAC_OVERRIDE can't give a 0444 file of its own a header (git
// creates its objects so). Bits are added to the mode for the moment, and the
// mode is restored if nobody changed it meanwhile. If the file isn't ours, the
// EACCES of op stands. The caller holds the inode's lock against other chmods.
func withAccess(fd int, bits uint32, op func() error) error {
	first := op()
	if !errors.Is(first, unix.EACCES) {
		return first
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return first
	}
	mode := st.Mode & 0o7777
	// chmod by an owner outside the file's group drops the setgid bit (chmod(2)),
	// and we could not put it back.
	if mode&bits == bits || mode&unix.S_ISGID != 0 && !inGroup(st.Gid) {
		return first
	}
	if Chmod(fd, mode|bits) != nil {
		return first
	}
	err := op()
	if unix.Fstat(fd, &st) == nil && st.Mode&0o7777 == mode|bits {
		if back := Chmod(fd, mode); err == nil {
			err = back
		}
	}
	return err
}

// OpenAnyway opens the regular file behind fd (O_PATH will do) for reading and
// writing, whether its mode lets its owner do both or not. What the mode is for is the
// caller's to ask, as is keeping other chmods out. EACCES: the file isn't ours.
func OpenAnyway(fd int) (rw int, err error) {
	if err := checkRegular(fd); err != nil { // opening a device has effects
		return -1, err
	}
	rw = -1
	err = withAccess(fd, accessFile, func() error {
		return retry(func() (err error) {
			rw, err = unix.Open(procPath(fd), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			return err
		})
	})
	if err != nil && rw >= 0 { // the mode could not be put back
		unix.Close(rw)
		rw = -1
	}
	return rw, err
}

const (
	accessFile = 0o600
	accessDir  = 0o700
)

func inGroup(gid uint32) bool {
	if uint32(unix.Getegid()) == gid {
		return true
	}
	groups, _ := unix.Getgroups()
	for _, g := range groups {
		if uint32(g) == gid {
			return true
		}
	}
	return false
}

// checkRegular refuses whatever is not a regular file: only those were opened
// for their contents, so anything else was planted under the name.
func checkRegular(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return nil
	case unix.S_IFDIR:
		return unix.EISDIR
	}
	return unix.ESTALE
}
