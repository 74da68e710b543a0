package posix

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

var scenes = []scene{
	{name: "renames", play: renames},
	{name: "moved", play: movedBeneath},
	{name: "unlinked", play: unlinked},
	{name: "tmpfile", play: tmpfile},
	{name: "links", play: links},
	{name: "numbers", play: numbers},
	{name: "listing", play: listing},
	{name: "names", play: names},
	{name: "open", play: openFlags},
	{name: "allocate", play: allocate, differs: allocateDiffers},
	{name: "holes", play: holes},
	{name: "mapping", play: mapping, differs: mappingDiffers},
	{name: "append", play: appending},
	{name: "copying", play: copying},
	{name: "limits", play: limits},
	{name: "leases", play: leases},
	{name: "record locks", play: recordLocks},
	{name: "whole locks", play: wholeLocks},
	{name: "broken leases", play: brokenLeases},
	{name: "together", play: together},
	{name: "times", play: times, differs: timesDiffers},
	{name: "xattrs", play: xattrs, differs: xattrsDiffers},
	{name: "strangers' xattrs", play: strangersXattrs, root: true},
	{name: "acls", play: acls, root: true},
	{name: "modes", play: modes, alone: modesAlone},
	{name: "users", play: users, root: true},
	{name: "privileges", play: privileges, differs: privilegesDiffer, root: true},
	{name: "special", play: special, root: true},
	{name: "notify", play: notify},
	{name: "vectors", play: vectors, differs: vectorsDiffers},
	{name: "far", play: far, differs: farDiffers},
	{name: "ioctls", play: ioctls, differs: ioctlsDiffer},
	{name: "statx", play: statxes, differs: statxDiffers},
	{name: "standing", play: standing},
	{name: "namespaces", play: namespaces, root: true},
}

// kinds are what a rename may meet, each with the way to make it.
var kinds = []struct {
	name string
	mk   func(path string) error
}{
	{"nothing", func(string) error { return nil }},
	{"file", func(p string) error { return os.WriteFile(p, []byte(p[len(p)-1:]), 0o640) }},
	{"directory", func(p string) error { return os.Mkdir(p, 0o750) }},
	{"full", func(p string) error { return os.MkdirAll(p+"/inner", 0o750) }},
	{"symlink", func(p string) error { return os.Symlink("somewhere", p) }},
	{"fifo", func(p string) error { return unix.Mkfifo(p, 0o600) }},
}

var renameFlags = map[string]uint{
	"plainly": 0, "noreplace": unix.RENAME_NOREPLACE, "exchange": unix.RENAME_EXCHANGE, "whiteout": unix.RENAME_WHITEOUT,
	"both": unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE, "noreplace whiteout": unix.RENAME_NOREPLACE | unix.RENAME_WHITEOUT,
}

// renames tries every kind against every other, with every flag, with short and
// with long names, while the source is open.
func renames(s *stage) {
	long := strings.Repeat("long", 60)
	for _, flag := range []string{"plainly", "noreplace", "exchange", "whiteout", "both", "noreplace whiteout"} {
		for _, from := range kinds {
			for _, to := range kinds {
				for _, pair := range [][2]string{{"a", "b"}, {long + "a", long + "b"}} {
					what := fmt.Sprintf("%s %s over %s %d", flag, from.name, to.name, len(pair[0]))
					s.rename(what, from.mk, to.mk, pair, renameFlags[flag])
				}
			}
		}
	}
	require.NoError(s.t, os.MkdirAll(s.path("up", "down"), 0o755))
	s.ends("into itself", unix.Rename(s.path("up"), s.path("up", "down", "up")))
	s.ends("over its parent", unix.Rename(s.path("up", "down"), s.path("up")))
	s.ends("to itself", unix.Rename(s.path("up"), s.path("up")))
	s.ends("exchange of parent and child", unix.Renameat2(unix.AT_FDCWD, s.path("up"), unix.AT_FDCWD, s.path("up", "down"), unix.RENAME_EXCHANGE))
}

func (s *stage) rename(what string, from, to func(string) error, pair [2]string, flags uint) {
	dir := "r" + fmt.Sprint(len(s.log))
	a, b := s.path(dir, pair[0]), s.path(dir, "d", pair[1])
	require.NoError(s.t, os.MkdirAll(s.path(dir, "d"), 0o755))
	require.NoError(s.t, from(a))
	require.NoError(s.t, to(b))
	s.ends(what, unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, flags))
	for _, p := range []string{a, b} {
		var st unix.Stat_t
		s.ends(what+" stat", unix.Lstat(p, &st))
		s.say("%s is %o nlink %d rdev %d size %d", what, st.Mode, st.Nlink, st.Rdev, sizeOf(&st))
	}
	require.NoError(s.t, os.RemoveAll(s.path(dir)))
}

// movedBeneath renames directories under an open file, an open directory and a directory
// in them that others stand in, and goes on with each.
func movedBeneath(s *stage) {
	require.NoError(s.t, os.MkdirAll(s.path("a", "b", "c"), 0o755))
	require.NoError(s.t, os.MkdirAll(s.path("other", "b"), 0o755))
	s.write("a/b/c/f", "before")
	file, dir := s.open("a/b/c/f", unix.O_RDWR|unix.O_APPEND, 0), s.open("a/b/c", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	before := s.ino("a/b/c/f")
	for i, move := range []struct {
		from, to string
		flags    uint
	}{{"a", "z", 0}, {"z/b", "other/moved", 0}, {"other/moved", "z", unix.RENAME_EXCHANGE}, {"z/c", strings.Repeat("long", 60), 0}} {
		what := fmt.Sprintf("move %d", i)
		s.ends(what, unix.Renameat2(unix.AT_FDCWD, s.path(move.from), unix.AT_FDCWD, s.path(move.to), move.flags))
		_, err := unix.Write(file, fmt.Append(nil, i))
		s.ends(what+" write", err)
		s.ends(what+" new beside it", unix.Mkdirat(dir, fmt.Sprint("new", i), 0o755))
		s.ends(what+" link", unix.Linkat(dir, "f", dir, fmt.Sprint("link", i), 0))
		s.ends(what+" rename up", unix.Renameat(dir, fmt.Sprint("link", i), dir, "../up"))
		s.ends(what+" unlink up", unix.Unlinkat(dir, "../up", 0))
		var st unix.Stat_t
		s.ends(what+" stat", unix.Fstatat(dir, "f", &st, 0))
		s.say("%s: the same %v, size %d", what, st.Ino == before, st.Size)
		s.ends(what+" by the old name", unix.Lstat(s.path("a", "b", "c", "f"), &st))
	}
	s.stat("the file", file)
	s.tree("in the end")
}

// unlinked does all that can be done with what has no name any more.
func unlinked(s *stage) {
	for _, how := range []string{"removed", "replaced"} {
		fd := s.open(how, unix.O_RDWR|unix.O_CREAT, 0o600)
		_, err := unix.Write(fd, []byte("before"))
		require.NoError(s.t, err)
		s.lose(how)
		s.withoutName(how, fd)
		s.close(fd)
	}
	require.NoError(s.t, os.Mkdir(s.path("dir"), 0o755))
	dir := s.open("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	require.NoError(s.t, unix.Rmdir(s.path("dir")))
	s.stat("a removed directory", dir)
	_, err := unix.Openat(dir, "new", unix.O_CREAT|unix.O_WRONLY, 0o600)
	s.ends("a new file in it", err)
	s.ends("a new directory in it", unix.Mkdirat(dir, "new", 0o700))
	n, err := unix.ReadDirent(dir, make([]byte, 4096))
	s.ends("listing it", err)
	s.say("%d bytes of entries", n)
	s.ends("its mode", unix.Fchmod(dir, 0o700))
	s.ends("its owner", unix.Fchown(dir, 1, 2))
	s.ends("syncing it", unix.Fsync(dir))
	s.stat("after that", dir)
}

func (s *stage) lose(name string) {
	if name == "removed" {
		require.NoError(s.t, unix.Unlink(s.path(name)))
		return
	}
	s.write("other", "other")
	require.NoError(s.t, unix.Rename(s.path("other"), s.path(name)))
}

func (s *stage) withoutName(how string, fd int) {
	s.stat(how, fd)
	_, err := unix.Pwrite(fd, []byte("after"), 10_000)
	s.ends(how+" write", err)
	s.ends(how+" chmod", unix.Fchmod(fd, 0o640))
	s.ends(how+" chown", unix.Fchown(fd, 11, 12))
	s.ends(how+" truncate", unix.Ftruncate(fd, 10_003))
	s.ends(how+" allocate", unix.Fallocate(fd, 0, 0, 20_000))
	s.ends(how+" sync", unix.Fsync(fd))
	s.ends(how+" datasync", unix.Fdatasync(fd))
	s.ends(how+" times", unix.UtimesNanoAt(unix.AT_FDCWD, fdPath(fd), []unix.Timespec{{Sec: 1, Nsec: 2}, {Sec: 3, Nsec: 4}}, 0))
	s.ends(how+" setxattr", unix.Fsetxattr(fd, "user.x", []byte("y"), 0))
	n, err := unix.Fgetxattr(fd, "user.x", make([]byte, 10))
	s.ends(fmt.Sprintf("%s getxattr of %d", how, n), err)
	s.ends(how+" link", unix.Linkat(unix.AT_FDCWD, fdPath(fd), unix.AT_FDCWD, s.path("back"), unix.AT_SYMLINK_FOLLOW))
	again, err := unix.Open(fdPath(fd), unix.O_RDONLY, 0)
	s.ends(how+" open again", err)
	buf := make([]byte, 30_000)
	n, err = unix.Pread(again, buf, 0)
	s.ends(how+" read", err)
	s.say("%s %d bytes, first %q, then %q", how, n, buf[:6], buf[10_000:10_005])
	_ = unix.Close(again)
	var st unix.Stat_t
	require.NoError(s.t, unix.Fstat(fd, &st))
	s.say("%s mtime %v, read since: %v", how, st.Mtim, st.Atim.Sec > 1)
	s.stat(how+" in the end", fd)
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// tmpfile makes files without a name and gives them one, or can't.
func tmpfile(s *stage) {
	require.NoError(s.t, os.Mkdir(s.path("d"), 0o755))
	for _, excl := range []int{0, unix.O_EXCL} {
		what := fmt.Sprintf("excl %v", excl != 0)
		fd := s.open("d", unix.O_TMPFILE|unix.O_RDWR|excl, 0o640)
		s.stat(what, fd)
		_, err := unix.Write(fd, []byte("nameless"))
		s.ends(what+" write", err)
		s.ends(what+" link", unix.Linkat(unix.AT_FDCWD, fdPath(fd), unix.AT_FDCWD, s.path("named"+what), unix.AT_SYMLINK_FOLLOW))
		s.ends(what+" link, again", unix.Linkat(unix.AT_FDCWD, fdPath(fd), unix.AT_FDCWD, s.path("named"+what), unix.AT_SYMLINK_FOLLOW))
		s.ends(what+" link, elsewhere", unix.Linkat(fd, "", unix.AT_FDCWD, s.path("d", "second"), unix.AT_EMPTY_PATH))
		_, err = unix.Write(fd, []byte(" no more"))
		s.ends(what+" write on", err)
		s.stat(what+" in the end", fd)
		s.close(fd)
	}
	_, err := harness.Open(s.path("d"), unix.O_TMPFILE|unix.O_RDONLY, 0o600)
	s.ends("read-only", err)
	_, err = harness.Open(s.path("nowhere"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
	s.ends("in no directory", err)
	s.write("f", "")
	_, err = harness.Open(s.path("f"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
	s.ends("in a file", err)
	s.tree("left")
}

// links has one file under several names, in several directories.
func links(s *stage) {
	require.NoError(s.t, os.MkdirAll(s.path("x", "y"), 0o755))
	s.write("a", "content")
	for _, name := range []string{"b", "x/c", "x/y/d", "x/y/" + strings.Repeat("d", 250)} {
		s.ends("link "+name, unix.Link(s.path("a"), s.path(name)))
	}
	s.ends("link over another", unix.Link(s.path("a"), s.path("b")))
	s.ends("link of a directory", unix.Link(s.path("x"), s.path("z")))
	s.ends("link of nothing", unix.Link(s.path("nothing"), s.path("z")))
	s.ends("link into nothing", unix.Link(s.path("a"), s.path("nothing", "z")))
	require.NoError(s.t, unix.Symlink("a", s.path("s")))
	s.ends("link of a symlink", unix.Link(s.path("s"), s.path("s2")))
	s.ends("link through a symlink", unix.Linkat(unix.AT_FDCWD, s.path("s"), unix.AT_FDCWD, s.path("s3"), unix.AT_SYMLINK_FOLLOW))
	s.ends("rename of one over the other", unix.Rename(s.path("a"), s.path("b")))
	fd := s.open("x/c", unix.O_RDWR|unix.O_APPEND, 0)
	_, err := unix.Write(fd, []byte(" more"))
	s.ends("append by one name", err)
	s.ends("remove another", unix.Unlink(s.path("a")))
	s.ends("move it across", unix.Rename(s.path("x", "c"), s.path("c")))
	s.stat("open", fd)
	s.tree("links")
}

// numbers follows inode numbers: the same for as long as anybody could tell.
func numbers(s *stage) {
	s.write("a", "1")
	fd := s.open("a", unix.O_RDONLY, 0)
	before := s.ino("a")
	require.NoError(s.t, unix.Rename(s.path("a"), s.path("b")))
	s.say("renamed, the same: %v", s.ino("b") == before)
	require.NoError(s.t, unix.Link(s.path("b"), s.path("c")))
	s.say("linked, the same: %v", s.ino("c") == before)
	entries, err := os.ReadDir(s.dir)
	require.NoError(s.t, err)
	for _, e := range entries {
		s.say("listed as %s, the same as stat's: %v", e.Name(), inoListed(s, e.Name()) == s.ino(e.Name()))
	}
	require.NoError(s.t, unix.Unlink(s.path("b")))
	require.NoError(s.t, unix.Unlink(s.path("c")))
	reused := false
	for i := range 200 {
		s.write(fmt.Sprint(i), "x")
		reused = reused || s.ino(fmt.Sprint(i)) == before
	}
	s.say("reused while open: %v", reused)
	var st unix.Stat_t
	require.NoError(s.t, unix.Fstat(fd, &st))
	s.say("open, the same: %v", st.Ino == before)
	require.NoError(s.t, os.Mkdir(s.path("d"), 0o755))
	require.NoError(s.t, os.Mkdir(s.path("d", "e"), 0o755))
	s.say("dot-dot is the parent: %v", s.ino("d/e/..") == s.ino("d"))
	s.say("links of the directory: %d", linksOf(s, "d"))
}

func (s *stage) ino(name string) uint64 {
	var st unix.Stat_t
	require.NoError(s.t, unix.Lstat(s.path(name), &st))
	return st.Ino
}

func linksOf(s *stage, name string) uint64 {
	var st unix.Stat_t
	require.NoError(s.t, unix.Lstat(s.path(name), &st))
	return st.Nlink
}

// An entry of a directory as getdents64(2) gives it.
type dirent struct {
	name string
	ino  uint64
	off  int64 // of the next one
}

// list reads a directory from where it stands, a few entries a call.
func list(s *stage, fd int) (all []dirent) {
	buf := make([]byte, 400)
	for {
		n, err := unix.Getdents(fd, buf)
		require.NoError(s.t, err)
		if n == 0 {
			return all
		}
		all = append(all, parse(buf[:n])...)
	}
}

func parse(b []byte) (all []dirent) {
	for len(b) > 0 {
		size := int(le(b[16:18]))
		name, _, _ := strings.Cut(string(b[19:size]), "\x00")
		all = append(all, dirent{name, le(b[0:8]), int64(le(b[8:16]))})
		b = b[size:]
	}
	return all
}

func le(b []byte) (v uint64) {
	for i := len(b) - 1; i >= 0; i-- {
		v = v<<8 | uint64(b[i])
	}
	return v
}

func inoListed(s *stage, name string) uint64 {
	fd := s.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	defer s.close(fd)
	for _, e := range list(s, fd) {
		if e.name == name {
			return e.ino
		}
	}
	return 0
}

// listing seeks to every offset that a listing gave, in this handle and in another
// one, and lists while entries come and go.
func listing(s *stage) {
	const count = 300
	for i := range count {
		s.write(fmt.Sprintf("entry %d", i), "")
	}
	fd := s.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	whole := list(s, fd)
	s.say("%d entries", len(whole))
	other := s.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	good := 0
	for i, e := range whole[:len(whole)-1] {
		for _, h := range []int{fd, other} {
			_, err := unix.Seek(h, e.off, unix.SEEK_SET)
			require.NoError(s.t, err)
			buf := make([]byte, 400)
			n, err := unix.Getdents(h, buf)
			require.NoError(s.t, err)
			if next := parse(buf[:n]); len(next) > 0 && next[0] == whole[i+1] {
				good++
			}
		}
	}
	s.say("%d of %d offsets lead to the next entry", good, 2*(len(whole)-1))
	_, err := unix.Seek(fd, 0, unix.SEEK_SET)
	s.ends("rewind", err)
	s.say("again the same: %v", slices.Equal(list(s, fd), whole))
	s.listInOtherPieces()
	s.listWhileChanging()
}

// listInOtherPieces reads much of a directory at once, goes back, and reads little at a
// time. Its end was not read before: the kernel has nothing to answer from.
func (s *stage) listInOtherPieces() {
	s.ends("mkdir", unix.Mkdir(s.path("pieces"), 0o755))
	for i := range 300 {
		s.write(fmt.Sprintf("pieces/entry %d", i), "")
	}
	fd := s.open("pieces", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	buf := make([]byte, 256<<10)
	n, err := unix.Getdents(fd, buf)
	require.NoError(s.t, err)
	whole := parse(buf[:n])
	for _, at := range []int{0, 1, 150, 1, 299, 300} {
		_, err = unix.Seek(fd, whole[at].off, unix.SEEK_SET)
		require.NoError(s.t, err)
		s.say("behind entry %d: the rest is the same: %v", at, slices.Equal(list(s, fd), whole[at+1:]))
	}
}

// listWhileChanging: what is there all the time is listed once; the rest may be.
func (s *stage) listWhileChanging() {
	fd := s.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	buf, seen := make([]byte, 400), map[string]int{}
	for round := 0; ; round++ {
		n, err := unix.Getdents(fd, buf)
		require.NoError(s.t, err)
		if n == 0 {
			break
		}
		for _, e := range parse(buf[:n]) {
			seen[e.name]++
		}
		require.NoError(s.t, unix.Rename(s.path(fmt.Sprintf("entry %d", round*2)), s.path(fmt.Sprintf("moved %d", round*2))))
		s.write(fmt.Sprintf("late %d", round), "")
	}
	missed, twice := 0, 0
	for i := 1; i < 300; i += 2 { // these stayed
		switch seen[fmt.Sprintf("entry %d", i)] {
		case 0:
			missed++
		case 1:
		default:
			twice++
		}
	}
	s.say("of what stayed, missed %d, listed twice %d", missed, twice)
	_, err := unix.Seek(fd, 0, unix.SEEK_SET)
	require.NoError(s.t, err)
	entries, err := os.ReadDir(s.dir)
	require.NoError(s.t, err)
	s.say("after a rewind all is listed: %v", len(list(s, fd)) == len(entries)+len([]string{".", ".."}))
}

// names tries names and paths at their limits.
func names(s *stage) {
	for _, n := range []int{1, 100, 142, 143, 144, 170, 175, 176, 177, 190, 191, 192, 254, 255, 256, 300} {
		name := strings.Repeat("n", n)
		s.ends(fmt.Sprintf("mkdir of %d", n), unix.Mkdir(s.path(name), 0o755))
		s.ends(fmt.Sprintf("create in %d", n), createIn(s.path(name, name)))
		s.ends(fmt.Sprintf("symlink of %d", n), unix.Symlink(name, s.path(name, "link")))
	}
	for _, name := range []string{"\xff\xfe", "new\nline", " ", "...", "a\tb", "-rf", "*", "\\", "kmsfs.toml ", "ü"} {
		s.ends(fmt.Sprintf("create %q", name), createIn(s.path(name)))
	}
	s.write("file", "x")
	for _, path := range []string{"file/", "file/x", "nothing/", "nothing/x", ".", "..", "./", "file/.", ""} {
		var st unix.Stat_t
		s.ends(fmt.Sprintf("stat %q", path), unix.Lstat(s.dir+"/"+path, &st))
		s.ends(fmt.Sprintf("mkdir %q", path), unix.Mkdir(s.dir+"/"+path, 0o755))
		s.ends(fmt.Sprintf("rmdir %q", path), unix.Rmdir(s.dir+"/"+path))
		s.ends(fmt.Sprintf("unlink %q", path), unix.Unlink(s.dir+"/"+path))
	}
	require.NoError(s.t, unix.Symlink("loop", s.path("loop")))
	s.ends("a loop", createIn(s.path("loop")))
	s.deep()
}

// deep goes down further than a path can say.
func (s *stage) deep() {
	require.NoError(s.t, os.Mkdir(s.path("deep"), 0o755))
	fd, err := harness.Open(s.path("deep"), unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(s.t, err)
	name := strings.Repeat("d", 240)
	for range 30 {
		require.NoError(s.t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(s.t, err)
		require.NoError(s.t, unix.Close(fd))
		fd = next
	}
	file, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_RDWR, 0o600)
	s.ends("a file beyond PATH_MAX", err)
	_, err = unix.Write(file, []byte("deep"))
	s.ends("its contents", err)
	s.stat("it", file)
	s.ends("closing it", unix.Close(file))
	s.ends("its mode", unix.Fchmodat(fd, "file", 0o640, 0))
	s.ends("its new name", unix.Renameat(fd, "file", fd, "renamed"))
	s.ends("its removal", unix.Unlinkat(fd, "renamed", 0))
	s.ends("closing", unix.Close(fd))
	s.ends("removing all", os.RemoveAll(s.path("deep")))
}

func createIn(path string) error {
	fd, err := harness.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}
