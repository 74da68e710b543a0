package harness

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// An Entry is all that a program can see of one file but its inode number, and
// the times that reading changes.
type Entry struct {
	Mode   uint32 // type and permissions
	UID    uint32
	GID    uint32
	Size   int64 // of regular files and symlinks
	Rdev   uint64
	Mtime  int64  // nanoseconds
	Links  uint64 // of anything but directories
	First  string // for a hard link, the first path of the same inode
	Target string
	Sum    string // SHA-256 of the contents
	Xattrs map[string]string
}

// A Tree is what lies beneath a directory, by relative path.
type Tree map[string]Entry

// Ignore says what Diff leaves out.
type Ignore uint

// What a comparison may leave out.
const (
	Mtime Ignore = 1 << iota
	Owner
)

// Snapshot reads a whole tree: every byte and every attribute. It reads several
// files at once: on a mount each first open waits for KMS.
func Snapshot(t testing.TB, dir string) Tree {
	t.Helper()
	type file struct {
		path, rel string
		st        unix.Stat_t
	}
	var files []file
	walk(t, dir, func(path string, st *unix.Stat_t) {
		rel, err := filepath.Rel(dir, path)
		require.NoError(t, err)
		files = append(files, file{path, rel, *st})
	})
	entries := make([]Entry, len(files))
	var g errgroup.Group
	g.SetLimit(8)
	for i := range files {
		g.Go(func() (err error) {
			if entries[i], err = look(files[i].path, &files[i].st); err != nil {
				err = fmt.Errorf("reading %s: %w", files[i].path, err)
			}
			return err
		})
	}
	require.NoError(t, g.Wait())
	tree, first := Tree{}, map[uint64]string{}
	for i, f := range files {
		if f.st.Nlink > 1 && f.st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if first[f.st.Ino] == "" {
				first[f.st.Ino] = f.rel
			}
			entries[i].First = first[f.st.Ino]
		}
		tree[f.rel] = entries[i]
	}
	return tree
}

func look(path string, st *unix.Stat_t) (entry Entry, err error) {
	entry = Entry{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Mtime: st.Mtim.Nano()}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR {
		entry.Links = st.Nlink
	}
	switch kind {
	case unix.S_IFLNK:
		entry.Size = st.Size
		entry.Target, err = os.Readlink(path)
	case unix.S_IFREG:
		entry.Size = st.Size
		entry.Sum, err = sum(path)
	}
	if err == nil && (kind == unix.S_IFREG || kind == unix.S_IFDIR) {
		entry.Xattrs, err = xattrs(path)
	}
	return entry, err
}

func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Xattrs are all extended attributes of a file.
func Xattrs(t testing.TB, path string) map[string]string {
	t.Helper()
	all, err := xattrs(path)
	require.NoError(t, err)
	return all
}

func xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return nil, err
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value, err := getxattr(path, name)
		if err != nil {
			return nil, fmt.Errorf("xattr %s: %w", name, err)
		}
		all[name] = string(value)
	}
	return all, nil
}

func getxattr(path, name string) ([]byte, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, buf)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// Diff lists the differences of two trees, a line each.
func Diff(a, b Tree, ignore Ignore) (diff []string) {
	for _, path := range slices.Sorted(maps.Keys(a)) {
		x := a[path]
		y, ok := b[path]
		if !ok {
			diff = append(diff, path+": missing")
			continue
		}
		diff = append(diff, differ(path, x, y, ignore)...)
	}
	for _, path := range slices.Sorted(maps.Keys(b)) {
		if _, ok := a[path]; !ok {
			diff = append(diff, path+": unexpected")
		}
	}
	return diff
}

func differ(path string, x, y Entry, ignore Ignore) (diff []string) {
	note := func(what string, a, b any) {
		if a != b {
			diff = append(diff, fmt.Sprintf("%s: %s was %v, is %v", path, what, a, b))
		}
	}
	note("mode", fmt.Sprintf("%o", x.Mode), fmt.Sprintf("%o", y.Mode))
	if ignore&Owner == 0 {
		note("owner", x.UID, y.UID)
		note("group", x.GID, y.GID)
	}
	if ignore&Mtime == 0 {
		note("mtime", x.Mtime, y.Mtime)
	}
	note("size", x.Size, y.Size)
	note("device", x.Rdev, y.Rdev)
	note("links", x.Links, y.Links)
	note("hard link", x.First, y.First)
	note("target", x.Target, y.Target)
	note("contents", x.Sum, y.Sum)
	note("xattrs", fmt.Sprintf("%q", x.Xattrs), fmt.Sprintf("%q", y.Xattrs))
	return diff
}

// Same requires two trees to be the same to the last byte and attribute.
func Same(t testing.TB, a, b string) {
	t.Helper()
	Snapshot(t, a).Holds(t, b)
}

// Holds requires a directory to hold exactly this tree.
func (tree Tree) Holds(t testing.TB, dir string) {
	t.Helper()
	require.NotEmpty(t, tree, "nothing to compare")
	diff := Diff(tree, Snapshot(t, dir), 0)
	require.Empty(t, diff, "%s is not the same:\n%s", dir, lines(diff))
}

// Unchanged remembers what lies in a backing directory, and returns the function
// that requires it to be still the same. What every mount writes, and the times of the
// directory that holds it, are left out.
func Unchanged(t testing.TB, dir string) func() {
	t.Helper()
	before := backing(t, dir)
	return func() {
		t.Helper()
		diff := Diff(before, backing(t, dir), 0)
		require.Empty(t, diff, "%s was changed:\n%s", dir, lines(diff))
	}
}

func backing(t testing.TB, dir string) Tree {
	t.Helper()
	tree := Snapshot(t, dir)
	for _, own := range []string{"kmsfs.lock", "kmsfs.tails", "kmsfs.unclean"} { // every mount writes there
		delete(tree, own)
	}
	root := tree["."]
	root.Mtime = 0
	tree["."] = root
	return tree
}

func lines(diff []string) string {
	if len(diff) > 40 {
		diff = append(diff[:40:40], fmt.Sprintf("... and %d more", len(diff)-40))
	}
	return strings.Join(diff, "\n")
}

// walk calls f for dir and all beneath it, in the order of names.
func walk(t testing.TB, dir string, f func(path string, st *unix.Stat_t)) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("lstat %s: %w", path, err)
		}
		f(path, &st)
		return nil
	})
	require.NoError(t, err)
}
