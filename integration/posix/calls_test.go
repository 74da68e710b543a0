package posix

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

var vectorsDiffers = map[string]string{
	"(write|wrote|read) nowait":   "the kernel's FUSE knows no RWF_NOWAIT",
	"(write|wrote|read) uncached": "nor RWF_DONTCACHE",
}

// vectors writes and reads several pieces at once, with every flag that a single call
// can have.
func vectors(s *stage) {
	flags := []struct {
		name string
		bits int
	}{
		{"plainly", 0}, {"dsync", unix.RWF_DSYNC}, {"sync", unix.RWF_SYNC}, {"append", unix.RWF_APPEND}, {"noappend", unix.RWF_NOAPPEND},
		{"hipri", unix.RWF_HIPRI}, {"nowait", unix.RWF_NOWAIT}, {"uncached", unix.RWF_DONTCACHE}, {"atomic", unix.RWF_ATOMIC},
		{"both appends", unix.RWF_APPEND | unix.RWF_NOAPPEND}, {"nonsense", 1 << 20},
	}
	for _, open := range []struct {
		name string
		bits int
	}{{"plain", 0}, {"to append", unix.O_APPEND}} {
		for _, f := range flags {
			s.write("f", "some contents, and more")
			fd := s.open("f", unix.O_RDWR|open.bits, 0)
			what := fmt.Sprintf("%s, open %s", f.name, open.name)
			n, err := unix.Pwritev2(fd, [][]byte{[]byte("one"), {}, []byte("three")}, 5, f.bits)
			s.ends(fmt.Sprintf("write %s: %d", what, n), err)
			s.content("wrote "+f.name, "f")
			buf := [][]byte{make([]byte, 4), make([]byte, 40)}
			n, err = unix.Preadv2(fd, buf, 3, f.bits)
			s.ends(fmt.Sprintf("read %s: %d %q %q", what, n, buf[0], buf[1]), err)
			s.close(fd)
		}
	}
	fd := s.open("f", unix.O_RDWR|unix.O_TRUNC, 0)
	many := make([][]byte, 1024) // UIO_MAXIOV
	for i := range many {
		many[i] = []byte{byte(i)}
	}
	n, err := unix.Writev(fd, many)
	s.ends(fmt.Sprintf("many pieces: %d", n), err)
	n, err = unix.Writev(fd, append(many, []byte("x")))
	s.ends(fmt.Sprintf("too many: %d", n), err)
	n, err = unix.Pwritev(fd, many[:2], -1)
	s.ends(fmt.Sprintf("before the beginning: %d", n), err)
	s.content("pieces", "f")
	s.advise(fd)
}

// advise gives hints about what is read, which change nothing that is seen.
func (s *stage) advise(fd int) {
	for _, hint := range []int{unix.FADV_NORMAL, unix.FADV_RANDOM, unix.FADV_SEQUENTIAL, unix.FADV_WILLNEED, unix.FADV_DONTNEED, unix.FADV_NOREUSE, 99} {
		s.ends(fmt.Sprint("hint ", hint), unix.Fadvise(fd, 0, 5000, hint))
	}
	s.ends("part to the disk", unix.SyncFileRange(fd, 0, 1000, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER))
	s.ends("nonsense to the disk", unix.SyncFileRange(fd, 0, 1000, 1<<10))
	s.ends("part of nothing to the disk", unix.SyncFileRange(fd, -1, 10, 0))
	_, _, errno := unix.Syscall(unix.SYS_READAHEAD, uintptr(fd), 0, 5000)
	s.say("read ahead: %s", errnoOf(errno))
	m, err := unix.Mmap(fd, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(s.t, err)
	for name, hint := range sorted(map[string]int{"dontneed": unix.MADV_DONTNEED, "willneed": unix.MADV_WILLNEED, "populate": unix.MADV_POPULATE_WRITE, "cold": unix.MADV_COLD, "pageout": unix.MADV_PAGEOUT}) {
		m[0]++
		s.ends("memory "+name, unix.Madvise(m, hint))
		s.say("after %s: %d", name, m[0])
	}
	s.ends("locked in memory", unix.Mlock(m))
	require.NoError(s.t, unix.Munmap(m))
	_, err = unix.Mmap(fd, 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED_VALIDATE|unix.MAP_SYNC)
	s.ends("mapped to a device's own memory", err)
	s.content("advised", "f")
}

var farDiffers = map[string]string{
	".* at (4611686018427387904|9223372036854775806|9223372036854775807)$": "the kernel caches what is written and knows no largest file of ours",
}

// far writes and cuts at the edges of what sizes and offsets can be.
func far(s *stage) {
	for _, at := range []int64{1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 40, 15 << 40, 1 << 62, 1<<63 - 2, 1<<63 - 1, -1, -1 << 63} {
		s.write("f", "near")
		fd, err := harness.Open(s.path("f"), unix.O_RDWR, 0)
		require.NoError(s.t, err)
		ends := func(what string, err error) { s.say("%s: %s at %d", what, errnoOf(err), at) }
		n, err := unix.Pwrite(fd, []byte("f"), at)
		ends(fmt.Sprint("write of ", n), err)
		buf := make([]byte, 10)
		n, err = unix.Pread(fd, buf, at)
		ends(fmt.Sprintf("read of %d %q", n, buf), err)
		ends("cut", unix.Ftruncate(fd, at))
		ends("hole", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, 4096))
		got, err := unix.Seek(fd, at, unix.SEEK_SET)
		ends(fmt.Sprintf("seek to %d", got), err)
		n, err = unix.Write(fd, []byte("g"))
		ends(fmt.Sprintf("write of %d where it stands", n), err)
		var st unix.Stat_t
		ends("stat", unix.Fstat(fd, &st))
		ends(fmt.Sprint("its size ", st.Size), nil)
		n, err = unix.Pread(fd, buf, 0)
		ends(fmt.Sprintf("the beginning, %d of it %q", n, buf[:4]), err)
		ends("close", unix.Close(fd))
		ends("gone", unix.Unlink(s.path("f")))
	}
}

// TestBeyondTheStore writes where the store has no room for any file's end. The kernel
// takes it, and fsync(2) says so; what was there before is whole, and all that is there
// after a remount.
func TestBeyondTheStore(t *testing.T) {
	for kind, beyond := range map[string]int64{"ext4": 16 << 40, "xfs": 1<<63 - 1<<20} {
		t.Run(kind, func(t *testing.T) {
			e := harness.New(t)
			v := volumeOn(t, e, kind, 512<<20)
			kept := harness.Noise(100_000)
			require.NoError(t, os.WriteFile(v.Path("f"), kept, 0o600))
			fd, err := harness.Open(v.Path("f"), unix.O_RDWR, 0)
			require.NoError(t, err)
			n, err := unix.Pwrite(fd, []byte("too far"), beyond)
			if err == nil {
				require.Equal(t, 7, n)
				err = unix.Fsync(fd)
			}
			require.ErrorIs(t, err, unix.EFBIG)
			require.ErrorIs(t, unix.Ftruncate(fd, beyond), unix.EFBIG)
			_, err = unix.Pwrite(fd, kept[:100], 50) // it goes on
			require.NoError(t, err)
			copy(kept[50:], kept[:100])
			_ = unix.Close(fd) // it may tell the old news again
			v.Remount()
			got, err := os.ReadFile(v.Path("f"))
			require.NoError(t, err)
			require.Equal(t, kept, got)
			v.Umount()
			e.Must("fsck", "--data", v.Dir)
		})
	}
}

var ioctlsDiffer = map[string]string{
	"flags of": "ioctls don't reach the backing file",
}

// ioctls asks for what the kernel answers by itself for every file, and for what only
// a file system can.
func ioctls(s *stage) {
	require.NoError(s.t, os.Mkdir(s.path("dir"), 0o755))
	s.write("file", "ten bytes.")
	for _, name := range []string{"file", "dir"} {
		fd := s.open(name, unix.O_RDONLY, 0)
		_, err := unix.Seek(fd, 0, unix.SEEK_SET)
		require.NoError(s.t, err)
		for what, request := range sorted(map[string]uint{"left of": unix.TIOCINQ, "nonsense of": 0x5a5a, "terminal of": unix.TIOCGPGRP, "flags of": unix.FS_IOC_GETFLAGS}) {
			v, err := unix.IoctlGetInt(fd, request)
			if what == "flags of" {
				v = 0 // which there are is the file system's own affair
			}
			s.ends(fmt.Sprintf("%s %s: %d", what, name, v), err)
		}
		for what, value := range sorted(map[string]int{"nonblocking": 1, "blocking": 0}) {
			s.ends(what+" "+name, unix.IoctlSetPointerInt(fd, 0x5421, value))
		}
		s.close(fd)
	}
	from, to := s.open("file", unix.O_RDONLY, 0), s.open("clone", unix.O_WRONLY|unix.O_CREAT, 0o600)
	s.ends("a clone", unix.IoctlFileClone(to, from))
	s.ends("a clone of itself", unix.IoctlFileClone(from, from))
	s.content("the clone", "clone")
}

var statxDiffers = map[string]string{
	"(dir|file|fifo) cached: has": "the kernel's FUSE keeps no time of birth until it was asked for, and says so",
}

// statxes asks for all there is to know of each kind of file.
func statxes(s *stage) {
	s.script(`mkdir dir; echo x >file; ln -s file link; mkfifo fifo`)
	const all = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID
	for _, name := range []string{"dir", "file", "link", "fifo", "nothing", "file/x"} {
		for how, flags := range sorted(map[string]int{"plainly": 0, "nofollow": unix.AT_SYMLINK_NOFOLLOW, "synced": unix.AT_STATX_FORCE_SYNC,
			"cached": unix.AT_STATX_DONT_SYNC, "both": unix.AT_STATX_FORCE_SYNC | unix.AT_STATX_DONT_SYNC, "nonsense": 1 << 20}) {
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, s.path(name), flags, all, &st)
			s.ends(fmt.Sprintf("%s %s", name, how), err)
			if err == nil {
				s.say("%s %s: has %#x, mode %o, nlink %d, owner %d:%d, born %v, attributes %#x", name, how, st.Mask&all, st.Mode, st.Nlink, st.Uid, st.Gid, st.Btime.Sec > 0, st.Attributes&unix.STATX_ATTR_MOUNT_ROOT)
			}
		}
	}
	fd := s.open("file", unix.O_PATH, 0)
	var st unix.Statx_t
	s.ends("by a path's descriptor", unix.Statx(fd, "", unix.AT_EMPTY_PATH, all, &st))
	var fs unix.Statfs_t
	s.ends("its file system", unix.Fstatfs(fd, &fs))
	s.say("names have up to %d bytes", fs.Namelen)
	s.resolve()
}

// resolve opens paths under every rule of openat2(2).
func (s *stage) resolve() {
	require.NoError(s.t, unix.Symlink("/", s.path("dir", "root")))
	require.NoError(s.t, unix.Symlink("../file", s.path("dir", "up")))
	dir := s.open("dir", unix.O_PATH|unix.O_DIRECTORY, 0)
	for rule, bits := range sorted(map[string]uint64{"none": 0, "beneath": unix.RESOLVE_BENEATH, "root": unix.RESOLVE_IN_ROOT, "no symlinks": unix.RESOLVE_NO_SYMLINKS,
		"no mounts": unix.RESOLVE_NO_XDEV, "no magic": unix.RESOLVE_NO_MAGICLINKS}) {
		for _, path := range []string{".", "..", "../file", "up", "root", "root/nothing", "nothing"} {
			fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NONBLOCK, Resolve: bits})
			s.ends(fmt.Sprintf("%s by the rule %s", path, rule), err)
			_ = unix.Close(fd)
		}
	}
}

// namespaces has users act in user namespaces of their own: with another user's
// number there, as root there, and with files of whom the namespace knows nothing.
func namespaces(s *stage) {
	s.script(`
		show() { stat -c '%n %A %u:%g' "$@"; }
		umask 022; mkdir pub; chmod 1777 pub; echo secret >pub/roots; chmod 600 pub/roots; echo open >pub/open
		ns() { u 30001:30001 unshare --user --map-root-user sh -c "$1"; }
		ns 'id -u; echo mine >pub/mine; mkdir pub/d; chmod 4755 pub/mine; mkfifo pub/p; stat -c "%n %A %u:%g" pub/*'; show pub/*
		how ns 'cat pub/open'; how ns 'cat pub/roots'; how ns 'chown 1:1 pub/mine'; how ns 'chown 0:0 pub/mine'; how ns 'rm -f pub/roots'; how ns 'chmod 777 pub/roots'
		how ns 'mknod pub/null c 1 3'; how ns 'setfattr -n user.a -v b pub/mine'; how ns 'setfattr -n trusted.a -v b pub/mine'; how ns 'setfacl -m u:0:rw pub/mine'; show pub/mine
		how ns 'echo x >>pub/roots'; how ns 'ln pub/roots pub/stolen'; how ns 'mv pub/roots pub/moved'; how ns 'cat pub/mine'; how ns 'truncate -s 0 pub/roots'
		u 30001:30001 unshare --user --mount --map-root-user sh -c 'mount --bind pub/d pub && echo in >pub/bound && stat -c "%u %n" pub/bound'; show pub/d/bound
		u 30001:30001 unshare --user --mount --map-root-user sh -c 'mkdir pub/d/l pub/d/w pub/d/u pub/d/m; echo low >pub/d/l/f; mount -t overlay overlay -o userxattr,lowerdir=pub/d/l,upperdir=pub/d/u,workdir=pub/d/w pub/d/m && echo up >>pub/d/m/f && cat pub/d/m/f; rm pub/d/m/f; ls -A pub/d/m'
		u 30001:30001 unshare --user --map-user=5 --map-group=7 sh -c 'echo x >pub/two; stat -c %u:%g pub/two pub/open; chown 5:7 pub/two && chown 6 pub/two || echo "nobody here"'; show pub/two`)
}

// standing is what a thread sees of the directory that it stands in, while that is
// moved and removed.
func standing(s *stage) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends, or if it is the process's first, sleeps
		s.ends("own directory", unix.Unshare(unix.CLONE_FS))
		require.NoError(s.t, os.MkdirAll(s.path("a", "b", "c"), 0o755))
		s.ends("into it", unix.Chdir(s.path("a", "b", "c")))
		s.write("a/b/c/file", "text")
		s.here("before")
		s.ends("moved", unix.Rename(s.path("a", "b"), s.path("moved")))
		s.here("moved")
		s.ends("file gone", unix.Unlink("file"))
		s.ends("removed", os.RemoveAll(s.path("moved")))
		s.here("removed")
		s.ends("up from nowhere", unix.Chdir(".."))
		s.ends("new file nowhere", createIn("new"))
		s.ends("back", unix.Chdir(s.dir))
		s.here("back")
		require.NoError(s.t, unix.Chdir("/")) // out of the mount
	}()
	<-done
}

func (s *stage) here(what string) {
	buf := make([]byte, 4096)
	n, err := unix.Getcwd(buf)
	s.ends(what+" is a place", err)
	s.say("%s: %s", what, strings.TrimPrefix(strings.TrimRight(string(buf[:max(n, 0)]), "\x00"), s.dir))
	var st unix.Stat_t
	s.ends(what+" stat", unix.Lstat(".", &st))
	s.say("%s: nlink %d", what, st.Nlink)
	s.ends(what+" file", unix.Lstat("file", &st))
}
