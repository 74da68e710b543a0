package volume

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// checkBackingStore refuses a directory that can't carry a volume: one on a
// kmsfs mount (headers would be hidden from us, and the daemon would wait for
// itself), or on a file system without user xattrs. It only reads.
func checkBackingStore(fd int) error {
	on, err := onKmsfs(fd)
	if err != nil {
		return err
	}
	if on {
		return ErrIsMount
	}
	_, err = getxattr(fd, crypt.HeaderXattr, nil)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return ErrNoXattrs
	}
	return nil
}

// probeXattrs sets and removes an attribute: some file systems read "no such
// attribute" and yet can't write one.
func probeXattrs(fd int) error {
	const probe = crypt.XattrPrefix + ".probe"
	if err := setxattr(fd, probe, make([]byte, 512), 0); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return ErrNoXattrs
		}
		return fmt.Errorf("setting an extended attribute: %w", err)
	}
	if err := removexattr(fd, probe); err != nil {
		return fmt.Errorf("removing an extended attribute: %w", err)
	}
	return nil
}

// onKmsfs reports whether fd lies on a kmsfs mount. statfs(2) knows only that it
// is FUSE; the mount table knows which.
func onKmsfs(fd int) (bool, error) {
	var fsst unix.Statfs_t
	if err := unix.Fstatfs(fd, &fsst); err != nil {
		return false, fmt.Errorf("asking for its file system: %w", err)
	}
	if fsst.Type != unix.FUSE_SUPER_MAGIC {
		return false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, fmt.Errorf("reading its attributes: %w", err)
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, fmt.Errorf("reading the mount table: %w", err)
	}
	defer f.Close()
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if d, fstype := mountOf(lines.Text()); d == dev && fstype == "fuse.kmsfs" {
			return true, nil
		}
	}
	return false, lines.Err()
}

// mountOf takes device and file system type from a line of mountinfo, proc(5):
// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
func mountOf(line string) (dev, fstype string) {
	before, after, _ := strings.Cut(line, " - ")
	f, g := strings.Fields(before), strings.Fields(after)
	if len(f) < 3 || len(g) < 1 {
		return "", ""
	}
	return f[2], g[0]
}
