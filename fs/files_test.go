package fs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// everyMode runs a test with and without the writeback cache.
func everyMode(t *testing.T, test func(t *testing.T, w *world)) {
	for name, writeback := range map[string]bool{"writeback": true, "through": false} {
		t.Run(name, func(t *testing.T) {
			test(t, newWorld(t, func(s *setup) { s.opts.Writeback = writeback }))
		})
	}
}

func TestHardLinksShareOneFile(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		w.write("a", []byte("first"))
		require.NoError(t, os.Mkdir(w.path("d"), 0o755))
		require.NoError(t, os.Link(w.path("a"), w.path("d/b")))
		fa, err := os.OpenFile(w.path("a"), os.O_RDWR, 0)
		require.NoError(t, err)
		fb, err := os.OpenFile(w.path("d/b"), os.O_RDWR|os.O_APPEND, 0)
		require.NoError(t, err)
		_, err = fb.WriteString(" second")
		require.NoError(t, err)
		require.Equal(t, 1, w.srv.fs.files.len(), "two files for one inode")
		got := make([]byte, 12)
		_, err = fa.ReadAt(got, 0)
		require.NoError(t, err)
		require.Equal(t, "first second", string(got))
		require.NoError(t, os.Remove(w.path("a")))
		require.NoError(t, fa.Close())
		require.NoError(t, fb.Close())
		var st unix.Stat_t
		require.NoError(t, unix.Stat(w.path("d/b"), &st))
		require.EqualValues(t, 1, st.Nlink)
		w.remount()
		require.Equal(t, "first second", string(w.read("d/b")))
	})
}

func TestUnlinkedOpenFile(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		f, err := os.OpenFile(w.path("gone"), os.O_RDWR|os.O_CREATE, 0o600)
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, os.Remove(w.path("gone")))
		data := randomBytes(30_000)
		_, err = f.Write(data)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		require.NoError(t, f.Truncate(20_000))
		require.NoError(t, f.Chmod(0o640))
		require.NoError(t, f.Chown(7, 8))
		when := time.Unix(1_600_000_000, 5000)
		require.NoError(t, unix.Futimes(int(f.Fd()), []unix.Timeval{{Sec: when.Unix()}, {Sec: when.Unix()}}))
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(int(f.Fd()), &st))
		require.EqualValues(t, 0, st.Nlink)
		require.EqualValues(t, 20_000, st.Size)
		require.EqualValues(t, 0o640, st.Mode&0o7777)
		require.EqualValues(t, 7, st.Uid)
		require.Equal(t, when.Unix(), st.Mtim.Sec)
		got := make([]byte, 20_000)
		_, err = f.ReadAt(got, 0)
		require.NoError(t, err)
		require.Equal(t, data[:20_000], got)
	})
}

func TestRenameOverOpenFile(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		w.write("old", []byte("old contents"))
		w.write("new", []byte("new"))
		f, err := os.Open(w.path("old"))
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, os.Rename(w.path("new"), w.path("old")))
		require.Equal(t, "new", string(w.read("old")))
		got, err := io.ReadAll(f)
		require.NoError(t, err)
		require.Equal(t, "old contents", string(got))
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(int(f.Fd()), &st))
		require.Zero(t, st.Nlink)
	})
}

// A reader must never see ENOENT while a writer replaces the file atomically.
func TestAtomicReplaceNeverMissing(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		w.write("f", []byte("0"))
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 3 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					select {
					case <-stop:
						return
					default:
					}
					data, err := os.ReadFile(w.path("f"))
					if err != nil || len(data) == 0 {
						t.Errorf("reading during a replace: %q, %v", data, err)
						return
					}
					if _, err := os.Stat(w.path("f")); err != nil {
						t.Errorf("stat during a replace: %v", err)
						return
					}
				}
			}()
		}
		for i := range 150 {
			tmp := fmt.Sprintf("tmp%d", i%3)
			w.write(tmp, []byte(fmt.Sprint(i)))
			require.NoError(t, os.Rename(w.path(tmp), w.path("f")))
		}
		close(stop)
		wg.Wait()
	})
}

// What the kernel still refers to can be used when its last name is gone, as on any
// file system: O_PATH descriptors, and a directory one stands in.
func TestOrphans(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	require.NoError(t, os.Mkdir(w.path("d"), 0o755))
	fd, err := unix.Open(w.path("f"), unix.O_PATH, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	dir, err := unix.Open(w.path("d"), unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer unix.Close(dir)
	require.NoError(t, os.Remove(w.path("f")))
	require.NoError(t, os.Remove(w.path("d")))
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(fd, &st))
	require.Zero(t, st.Nlink)
	require.NoError(t, unix.Fstat(dir, &st))
	data, err := os.ReadFile(procPath(fd))
	require.NoError(t, err)
	require.Equal(t, "contents", string(data))
	_, err = unix.Openat(dir, "x", unix.O_CREAT|unix.O_WRONLY, 0o600)
	require.Equal(t, unix.ENOENT, err)
}

func TestTmpfile(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		fd, err := unix.Open(w.mnt, unix.O_TMPFILE|unix.O_RDWR, 0o604)
		require.NoError(t, err)
		f := os.NewFile(uintptr(fd), "tmpfile")
		_, err = f.WriteString("nameless")
		require.NoError(t, err)
		require.NoError(t, unix.Linkat(unix.AT_FDCWD, procPath(fd), unix.AT_FDCWD, w.path("named"), unix.AT_SYMLINK_FOLLOW))
		require.NoError(t, f.Close())
		w.remount()
		require.Equal(t, "nameless", string(w.read("named")))
		info, err := os.Stat(w.path("named"))
		require.NoError(t, err)
		require.EqualValues(t, 0o604, info.Mode().Perm())
	})
}

func TestOpenFlags(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		w.write("f", []byte("0123456789"))
		// O_TRUNC makes a new generation.
		before, err := unixGetxattr(w.stored("f"), crypt.HeaderXattr)
		require.NoError(t, err)
		w.write("f", []byte("abc"))
		after, err := unixGetxattr(w.stored("f"), crypt.HeaderXattr)
		require.NoError(t, err)
		require.NotEqual(t, before, after)
		// O_APPEND of two handles never overwrites.
		var wg sync.WaitGroup
		for i := range 2 {
			f, err := os.OpenFile(w.path("f"), os.O_WRONLY|os.O_APPEND, 0)
			require.NoError(t, err)
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer f.Close()
				for range 200 {
					f.WriteString(strings.Repeat(fmt.Sprint(i), 10))
				}
			}()
		}
		wg.Wait()
		require.Len(t, w.read("f"), 3+2*200*10)
		// O_WRONLY in the middle of a block: the kernel reads through it.
		f, err := os.OpenFile(w.path("f"), os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("XYZ"), 100)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		require.Equal(t, "XYZ", string(w.read("f")[100:103]))
		_, err = os.OpenFile(w.path("f"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
		require.ErrorIs(t, err, syscall.EEXIST)
		_, err = unix.Open(w.mnt, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CREAT, 0o644)
		require.Equal(t, unix.EISDIR, err)
		// O_DIRECT is served without ever reaching the backing file.
		fd, err := unix.Open(w.path("f"), unix.O_RDONLY|unix.O_DIRECT, 0)
		require.NoError(t, err)
		buf := make([]byte, 4096)
		n, err := unix.Pread(fd, buf, 0)
		require.NoError(t, err)
		require.Positive(t, n)
		require.NoError(t, unix.Close(fd))
	})
}

func unixGetxattr(path, attr string) ([]byte, error) {
	buf := make([]byte, 8192)
	n, err := unix.Lgetxattr(path, attr, buf)
	return buf[:max(n, 0)], err
}

func TestSparse(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		f, err := os.OpenFile(w.path("sparse"), os.O_RDWR|os.O_CREATE, 0o644)
		require.NoError(t, err)
		const size = 64 << 20
		require.NoError(t, f.Truncate(size))
		_, err = f.WriteAt([]byte("island"), 32<<20)
		require.NoError(t, err)
		// While it may be written, everything is data, up to the kernel's end.
		_, err = f.WriteAt([]byte("end"), size)
		require.NoError(t, err)
		at, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE)
		require.NoError(t, err)
		require.EqualValues(t, size+3, at)
		require.NoError(t, f.Close())

		f, err = os.Open(w.path("sparse"))
		require.NoError(t, err)
		defer f.Close()
		require.Eventually(t, func() bool { // RELEASE of the writer is not waited for
			at, err = unix.Seek(int(f.Fd()), 4096, unix.SEEK_DATA)
			return err == nil && at > 4096
		}, 5*time.Second, 5*time.Millisecond)
		require.LessOrEqual(t, at, int64(32<<20))
		require.Greater(t, at, int64(31<<20))
		at, err = unix.Seek(int(f.Fd()), 32<<20, unix.SEEK_HOLE)
		require.NoError(t, err)
		require.Less(t, at, int64(33<<20))
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(int(f.Fd()), &st))
		require.Less(t, st.Blocks*512, int64(1<<20))
		require.NoError(t, f.Close())
		out, err := exec.Command("cp", "--sparse=always", w.path("sparse"), w.path("copy")).CombinedOutput()
		require.NoError(t, err, "%s", out)
		out, err = exec.Command("cmp", w.path("sparse"), w.path("copy")).CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
}

func TestFallocate(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		data := randomBytes(200_000)
		w.write("f", data)
		f, err := os.OpenFile(w.path("f"), os.O_RDWR, 0)
		require.NoError(t, err)
		defer f.Close()
		fd := int(f.Fd())
		require.NoError(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 5000, 100_000))
		clear(data[5000:105_000])
		require.NoError(t, unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 190_000, 20_000))
		clear(data[190_000:])
		data = append(data, make([]byte, 10_000)...)
		require.NoError(t, unix.Fallocate(fd, 0, 0, 300_000))
		data = append(data, make([]byte, 90_000)...)
		require.NoError(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 1_000_000))
		require.ErrorIs(t, unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096), unix.EOPNOTSUPP)
		require.Equal(t, data, w.read("f"))
		require.NoError(t, f.Close())
		w.remount()
		require.Equal(t, data, w.read("f"))
	})
}

// A copy that a signal has come for already still copies something: nothing would be the
// end of the file, and the copy cut short without an error.
func TestSignalIsNoEndOfFile(t *testing.T) {
	w := newWorld(t)
	data := randomBytes(3 * copyChunk)
	w.write("from", data)
	w.write("to", []byte("x"))
	nodes, handles := map[string]*node{}, map[string]fusefs.FileHandle{}
	for _, name := range []string{"from", "to"} {
		n := w.srv.fs.root.GetChild(name).Operations().(*node)
		fh, _, errno := n.Open(context.Background(), syscall.O_RDWR)
		require.Equal(t, ok, errno)
		defer n.Release(context.Background(), fh)
		nodes[name], handles[name] = n, fh
	}
	came := make(chan struct{})
	close(came)
	done, errno := nodes["from"].CopyFileRange(&fuse.Context{Cancel: came}, handles["from"], 0, nil, handles["to"], 0, uint64(len(data)), 0)
	require.Equal(t, ok, errno)
	require.EqualValues(t, copyChunk, done, "and ends then")
	done, errno = nodes["from"].CopyFileRange(&fuse.Context{Cancel: came}, handles["from"], uint64(len(data)), nil, handles["to"], 0, 1, 0)
	require.Equal(t, ok, errno)
	require.Zero(t, done, "the end of the file")
}

func TestCopyFileRange(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		data := randomBytes(3_000_000)
		w.write("from", data)
		from, err := os.Open(w.path("from"))
		require.NoError(t, err)
		defer from.Close()
		to, err := os.OpenFile(w.path("to"), os.O_RDWR|os.O_CREATE, 0o644)
		require.NoError(t, err)
		defer to.Close()
		in, out := int64(1000), int64(70_000)
		for left := 2_500_000; left > 0; {
			n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, left, 0)
			require.NoError(t, err)
			require.Positive(t, n)
			left -= n
		}
		want := append(make([]byte, 70_000), data[1000:2_501_000]...)
		require.True(t, bytes.Equal(want, w.read("to")))
		// Two copies in opposite directions must not wait for each other.
		var wg sync.WaitGroup
		for range 2 {
			wg.Add(2)
			for _, pair := range [][2]string{{"from", "to"}, {"to", "from"}} {
				go func() {
					defer wg.Done()
					a, _ := os.OpenFile(w.path(pair[0]), os.O_RDWR, 0)
					b, _ := os.OpenFile(w.path(pair[1]), os.O_RDWR, 0)
					defer a.Close()
					defer b.Close()
					for range 10 {
						i, o := int64(0), int64(0)
						if _, err := unix.CopyFileRange(int(a.Fd()), &i, int(b.Fd()), &o, 1<<20, 0); err != nil {
							t.Error(err)
						}
					}
				}()
			}
		}
		wg.Wait()
	})
}

func TestSharedMmap(t *testing.T) {
	w := newWorld(t)
	w.write("m", make([]byte, 16<<10))
	mapped := func() []byte {
		f, err := os.OpenFile(w.path("m"), os.O_RDWR, 0)
		require.NoError(t, err)
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 16<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		require.NoError(t, err)
		return m
	}
	a, b := mapped(), mapped()
	copy(a[5000:], "through a mapping")
	require.Equal(t, "through a mapping", string(b[5000:5017]))
	// Another process sees it through read(2).
	out, err := exec.Command("dd", "if="+w.path("m"), "bs=1", "skip=5000", "count=17", "status=none").Output()
	require.NoError(t, err)
	require.Equal(t, "through a mapping", string(out))
	require.NoError(t, unix.Msync(a, unix.MS_SYNC))
	require.NoError(t, unix.Munmap(a))
	require.NoError(t, unix.Munmap(b))
	w.remount()
	require.Equal(t, "through a mapping", string(w.read("m")[5000:5017]))
}

// someCaps is cap_net_bind_service+e, in revision 2 of vfs_cap_data.
var someCaps = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

func TestXattrs(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("x"))
	p := w.path("f")
	require.NoError(t, unix.Setxattr(p, "user.colour", []byte("red"), 0))
	got, err := unixGetxattr(p, "user.colour")
	require.NoError(t, err)
	require.Equal(t, "red", string(got))
	list := make([]byte, 1000)
	n, err := unix.Listxattr(p, list)
	require.NoError(t, err)
	require.Equal(t, "user.colour\x00", string(list[:n]), "ours are hidden")
	_, err = unixGetxattr(p, crypt.HeaderXattr)
	require.Equal(t, unix.ENODATA, err)
	require.Equal(t, unix.EPERM, unix.Setxattr(p, crypt.HeaderXattr, []byte("x"), 0))
	_, err = unixGetxattr(p, "security.selinux")
	require.Equal(t, unix.EOPNOTSUPP, err)
	_, err = unixGetxattr(p, "system.posix_acl_access")
	require.Equal(t, unix.EOPNOTSUPP, err)
	_, err = unixGetxattr(p, "security.capability")
	require.Equal(t, unix.ENODATA, err)
	require.NoError(t, unix.Setxattr(p, "security.capability", someCaps, 0))
	_, err = unixGetxattr(p, "security.capability")
	require.NoError(t, err)
	require.NoError(t, unix.Removexattr(p, "user.colour"))
	_, err = unixGetxattr(p, "user.colour")
	require.Equal(t, unix.ENODATA, err)
}

func TestRenameFlags(t *testing.T) {
	w := newWorld(t)
	long := strings.Repeat("n", 250)
	w.write("a", []byte("A"))
	w.write(long, []byte("B"))
	at := unix.AT_FDCWD
	require.Equal(t, unix.EEXIST, unix.Renameat2(at, w.path("a"), at, w.path(long), unix.RENAME_NOREPLACE))
	require.NoError(t, unix.Renameat2(at, w.path("a"), at, w.path(long), unix.RENAME_EXCHANGE))
	require.Equal(t, "B", string(w.read("a")))
	require.Equal(t, "A", string(w.read(long)))
	require.NoError(t, unix.Renameat2(at, w.path("a"), at, w.path("c"), unix.RENAME_WHITEOUT))
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(w.path("a"), &st))
	require.EqualValues(t, unix.S_IFCHR, st.Mode&unix.S_IFMT)
	require.Zero(t, st.Rdev)
	require.Equal(t, "B", string(w.read("c")))
	require.NoError(t, os.Mkdir(w.path("dir"), 0o755))
	w.write("dir/inner", []byte("I"))
	f, err := os.Open(w.path("dir/inner"))
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, os.Rename(w.path("dir"), w.path("moved")))
	require.Equal(t, "I", string(w.read("moved/inner")))
	require.NoError(t, f.Chmod(0o600))
	require.NoError(t, os.Remove(w.path("moved/inner")))
	require.NoError(t, os.Remove(w.path("moved")))
}

func TestSpecialFiles(t *testing.T) {
	w := newWorld(t, func(s *setup) { s.opts.Dev = true })
	require.NoError(t, unix.Mkfifo(w.path("fifo"), 0o640))
	require.NoError(t, unix.Mknod(w.path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	require.NoError(t, unix.Mknod(w.path("plain"), unix.S_IFREG|0o600, 0))
	target := strings.Repeat("t", 3000)
	require.NoError(t, os.Symlink(target, w.path("link")))
	got, err := os.Readlink(w.path("link"))
	require.NoError(t, err)
	require.Equal(t, target, got)
	info, err := os.Lstat(w.path("link"))
	require.NoError(t, err)
	require.EqualValues(t, len(target), info.Size())
	require.NoError(t, os.WriteFile(w.path("null"), []byte("x"), 0))
	w.write("plain", []byte("now with contents"))
	require.Equal(t, "now with contents", string(w.read("plain")))
	var names []string
	entries, err := os.ReadDir(w.mnt)
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	require.Equal(t, []string{"fifo", "link", "null", "plain"}, names)
	var stx unix.Statx_t
	require.NoError(t, unix.Statx(unix.AT_FDCWD, w.path("plain"), 0, unix.STATX_BTIME|unix.STATX_SIZE, &stx))
	require.NotZero(t, stx.Mask&unix.STATX_BTIME)
	require.WithinDuration(t, time.Now(), time.Unix(stx.Btime.Sec, 0), time.Minute)
	var sfs unix.Statfs_t
	require.NoError(t, unix.Statfs(w.mnt, &sfs))
	require.EqualValues(t, 255, sfs.Namelen)
	require.NotZero(t, sfs.Blocks)
}

// Locks are the kernel's own: between processes, and between open file
// descriptions.
func TestLocks(t *testing.T) {
	w := newWorld(t)
	w.write("l", nil)
	a, err := os.OpenFile(w.path("l"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer a.Close()
	b, err := os.OpenFile(w.path("l"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer b.Close()
	lk := func() *unix.Flock_t { return &unix.Flock_t{Type: unix.F_WRLCK} }
	require.NoError(t, unix.FcntlFlock(a.Fd(), unix.F_OFD_SETLK, lk()))
	require.Equal(t, unix.EAGAIN, unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, lk()))
	require.NoError(t, unix.Flock(int(a.Fd()), unix.LOCK_EX))
	require.Equal(t, unix.EWOULDBLOCK, unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	out, err := exec.Command("flock", "-n", w.path("l"), "true").CombinedOutput()
	require.Error(t, err, "%s", out)
}

// ENOTTY, whatever is asked: a privileged daemon must not run ioctls for others.
func TestIoctlsStayOutside(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("x"))
	f, err := os.Open(w.path("f"))
	require.NoError(t, err)
	defer f.Close()
	_, err = unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	require.Equal(t, unix.ENOTTY, err)
}

func TestTimesAndModes(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		w.write("f", randomBytes(10_000))
		at, mt := time.Unix(1_500_000_000, 123_456_789), time.Unix(1_400_000_000, 987_654_321)
		require.NoError(t, os.Chtimes(w.path("f"), at, mt))
		require.NoError(t, os.Chmod(w.path("f"), 0o4751))
		require.NoError(t, os.Chown(w.path("f"), 12, 34))
		check := func() {
			var st unix.Stat_t
			require.NoError(t, unix.Stat(w.path("f"), &st))
			require.Equal(t, unix.NsecToTimespec(mt.UnixNano()), st.Mtim)
			require.Equal(t, unix.NsecToTimespec(at.UnixNano()), st.Atim)
			require.EqualValues(t, 0o751, st.Mode&0o7777, "chown clears setuid")
			require.EqualValues(t, 12, st.Uid)
			require.EqualValues(t, 34, st.Gid)
			require.EqualValues(t, 10_000, st.Size)
		}
		check()
		w.remount()
		check()
		// Gaps that are settled at the close leave the times alone.
		f, err := os.OpenFile(w.path("gaps"), os.O_RDWR|os.O_CREATE, 0o644)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("x"), 500_000)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		require.NoError(t, os.Chtimes(w.path("gaps"), at, mt))
		w.remount()
		info, err := os.Stat(w.path("gaps"))
		require.NoError(t, err)
		require.True(t, info.ModTime().Equal(mt))
		require.Equal(t, append(make([]byte, 500_000), 'x'), w.read("gaps"))
	})
}

func TestManyDirectories(t *testing.T) {
	w := newWorld(t)
	w.srv.fs.dirs.mu.Lock()
	w.srv.fs.dirs.max = 4 // the LRU must reopen through parents
	w.srv.fs.dirs.mu.Unlock()
	deep := "a"
	for i := range 12 {
		deep = filepath.Join(deep, fmt.Sprint(i))
	}
	require.NoError(t, os.MkdirAll(w.path(deep), 0o755))
	for i := range 30 {
		name := fmt.Sprintf("%s/%d", deep, i)
		w.write(name, []byte(name))
		require.NoError(t, os.MkdirAll(w.path(fmt.Sprintf("side%d/x", i)), 0o755))
	}
	require.LessOrEqual(t, w.srv.fs.dirs.len(), 5)
	for i := range 30 {
		name := fmt.Sprintf("%s/%d", deep, i)
		require.Equal(t, name, string(w.read(name)))
		require.NoError(t, os.Chmod(w.path(name), 0o600))
	}
	require.NoError(t, os.RemoveAll(w.path("a")))
}

func TestListingIsStable(t *testing.T) {
	w := newWorld(t)
	want := make(map[string]bool)
	for i := range 3000 {
		name := fmt.Sprintf("entry-%04d", i)
		want[name] = true
		require.NoError(t, unix.Mknod(w.path(name), unix.S_IFREG|0o600, 0))
	}
	d, err := os.Open(w.mnt)
	require.NoError(t, err)
	defer d.Close()
	seen := make(map[string]bool)
	for {
		names, err := d.Readdirnames(100)
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		for _, n := range names {
			require.False(t, seen[n], "%s listed twice", n)
			seen[n] = true
			if want[n] && n[len(n)-1] == '7' { // entries come and go meanwhile
				require.NoError(t, os.Remove(w.path(n)))
				require.NoError(t, unix.Mknod(w.path("late-"+n), unix.S_IFREG|0o600, 0))
			}
		}
	}
	for name := range want {
		require.True(t, seen[name], "%s was never listed", name)
	}
}

// TestConcurrent has many programs at the same few files at once; each writer owns
// a stripe and its bytes must be there in the end.
func TestConcurrent(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		const workers, stripe = 8, 70_001
		var wg sync.WaitGroup
		stripes := make([][]byte, workers)
		for i := range workers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				r := rand.New(rand.NewPCG(1, uint64(i)))
				stripes[i] = make([]byte, stripe)
				for range 30 {
					f, err := os.OpenFile(w.path("shared"), os.O_RDWR|os.O_CREATE, 0o644)
					if err != nil {
						t.Error(err)
						return
					}
					at := r.IntN(stripe)
					n := 1 + r.IntN(stripe-at)
					piece := randomBytes(n)
					copy(stripes[i][at:], piece)
					if _, err := f.WriteAt(piece, int64(i*stripe+at)); err != nil {
						t.Error(err)
					}
					if r.IntN(4) == 0 {
						if err := f.Sync(); err != nil {
							t.Error(err)
						}
					}
					got := make([]byte, n)
					if _, err := f.ReadAt(got, int64(i*stripe+at)); err != nil || !bytes.Equal(got, piece) {
						t.Errorf("worker %d read back something else (%v)", i, err)
					}
					_ = f.Close()
					own := fmt.Sprintf("own-%d", i)
					_ = os.WriteFile(w.path(own), piece, 0o600)
					_ = os.Rename(w.path(own), w.path(own+"-moved"))
					_, _ = os.ReadDir(w.mnt)
					_ = os.Remove(w.path(own + "-moved"))
				}
			}()
		}
		wg.Wait()
		want := bytes.TrimRight(slices.Concat(stripes...), "\x00")
		w.remount()
		require.Equal(t, want, bytes.TrimRight(w.read("shared"), "\x00"))
	})
}

// Of two writers that close at once, one settles the gap: else it would read as
// damage once the file is opened anew.
func TestWritersLeaveTogether(t *testing.T) {
	w := newWorld(t, func(s *setup) { s.opts.Writeback = false })
	for i := range 150 {
		name := w.path(fmt.Sprint(i))
		var fds [2]int
		for j := range fds {
			fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT, 0o600)
			require.NoError(t, err)
			fds[j] = fd
		}
		_, err := unix.Pwrite(fds[0], []byte("end"), 40_000)
		require.NoError(t, err)
		for _, fd := range fds {
			require.NoError(t, unix.Close(fd))
		}
		require.Eventually(t, func() bool { return w.srv.fs.files.len() == 0 }, 5*time.Second, 100*time.Microsecond)
		require.Equal(t, append(make([]byte, 40_000), "end"...), w.read(fmt.Sprint(i)))
	}
}

// Files stop being opened before descriptors run out: those that are left are for
// getting keys and for letting go. Who has a file open already may open it again.
func TestTooManyOpenFiles(t *testing.T) {
	w := newWorld(t)
	w.srv.fs.files.mu.Lock()
	w.srv.fs.files.max = 5
	w.srv.fs.files.mu.Unlock()
	w.write("open", []byte("x"))
	var files []*os.File
	for i := range 5 {
		f, err := os.Create(w.path(fmt.Sprint(i)))
		require.NoError(t, err)
		files = append(files, f)
	}
	_, err := os.Create(w.path("more"))
	require.ErrorIs(t, err, unix.ENFILE)
	_, err = os.Open(w.path("open"))
	require.ErrorIs(t, err, unix.ENFILE)
	again, err := os.Open(w.path("0"))
	require.NoError(t, err)
	for _, f := range append(files, again) {
		require.NoError(t, f.Close())
	}
	require.Eventually(t, func() bool { return w.srv.fs.files.len() == 0 }, 5*time.Second, time.Millisecond)
	require.Equal(t, "x", string(w.read("open")))
}
