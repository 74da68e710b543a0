package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A mountEntry is one line of /proc/self/mountinfo.
type mountEntry struct {
	point, kind, source string
	device              string // major:minor, of this mount's file system alone
}

func (m *mountEntry) isKmsfs() bool { return m.kind == "fuse.kmsfs" }

// mounts lists what is mounted, the latest last.
func mounts() ([]mountEntry, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("listing mounts: %w", err)
	}
	return parseMountinfo(string(text)), nil
}

// parseMountinfo reads the format of proc_pid_mountinfo(5): six fields, optional
// ones up to a lone "-", then type, source and options.
func parseMountinfo(text string) (list []mountEntry) {
	for _, line := range strings.Split(text, "\n") {
		head, tail, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(head), strings.Fields(tail)
		if !ok || len(f) < 6 || len(g) < 2 {
			continue
		}
		list = append(list, mountEntry{point: unescape(f[4]), kind: g[0], source: unescape(g[1]), device: f[2]})
	}
	return list
}

// unescape turns the kernel's \040 and the like back into bytes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		var c byte
		if s[i] == '\\' && i+4 <= len(s) {
			if _, err := fmt.Sscanf(s[i+1:i+4], "%03o", &c); err == nil {
				b.WriteByte(c)
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountOf is the mount that path lies on.
func mountOf(path string) (*mountEntry, error) {
	path, err := realPath(path)
	if err != nil {
		return nil, err
	}
	list, err := mounts()
	if err != nil {
		return nil, err
	}
	var best *mountEntry
	for i, m := range list {
		if inside(path, m.point) && (best == nil || len(m.point) >= len(best.point)) {
			best = &list[i]
		}
	}
	if best == nil {
		return nil, fmt.Errorf("%s lies on no mount", path)
	}
	return best, nil
}

// mountedAt is the topmost mount on exactly this path, or nil. It does not touch
// the path, which would hang or fail if its daemon is gone.
func mountedAt(point string) (*mountEntry, error) {
	list, err := mounts()
	if err != nil {
		return nil, err
	}
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].point == point {
			return &list[i], nil
		}
	}
	return nil, nil
}

// deviceOf is the device of the latest kmsfs mount on point, covered or not.
func deviceOf(point string) (string, error) {
	list, err := mounts()
	if err != nil {
		return "", err
	}
	for i := len(list) - 1; i >= 0; i-- {
		if m := &list[i]; m.point == point && m.isKmsfs() {
			return m.device, nil
		}
	}
	return "", fmt.Errorf("the mount on %s was taken away at once", point)
}

// inside reports whether path is dir or lies below it; both are clean and
// absolute.
func inside(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// pointPath makes a mountpoint absolute through its parent: the mountpoint itself
// may be stale.
func pointPath(point string) (string, error) {
	abs, err := filepath.Abs(point)
	if err != nil || abs == "/" {
		return abs, err
	}
	if full, err := filepath.EvalSymlinks(abs); err == nil {
		return full, nil
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	return filepath.Join(parent, filepath.Base(abs)), err
}

// checkMountpoint refuses what can't or shouldn't be mounted on. dir is the
// backing directory, both real paths.
func checkMountpoint(dir, point string, nonEmpty bool) error {
	if inside(point, dir) {
		return usage("the mountpoint %s lies inside the backing directory %s; mount it somewhere else", point, dir)
	}
	if inside(dir, point) {
		return usage("the backing directory %s lies inside the mountpoint %s and would be hidden; mount it somewhere else", dir, point)
	}
	m, err := mountedAt(point)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Stat(point, &st)
	switch {
	case errors.Is(err, unix.ENOTCONN):
		return fail(exitMount, "run: "+commandLine("kmsfs", "umount", point), "the mountpoint %s is left over from a daemon that died", point)
	case err != nil:
		return fail(exitMount, "make it", "the mountpoint %s can't be used: %w", point, err)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fail(exitMount, "name a directory", "the mountpoint %s is not a directory", point)
	case m != nil && m.isKmsfs():
		return fail(exitMount, "run: "+commandLine("kmsfs", "umount", point), "on %s the volume %s is mounted already", point, m.source)
	}
	return checkEmpty(point, nonEmpty)
}

func checkEmpty(point string, nonEmpty bool) error {
	d, err := os.Open(point)
	if err != nil {
		return fail(exitMount, "", "the mountpoint can't be used: %w", err)
	}
	defer d.Close()
	if names, _ := d.Readdirnames(1); len(names) > 0 && !nonEmpty {
		return fail(exitMount, "empty it, or hide its contents with -o nonempty", "the mountpoint %s is not empty", point)
	}
	return nil
}
