package volume

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// inTime fails instead of hanging: a planted FIFO makes a careless open wait.
func inTime(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("hung")
	}
}

func TestSymlinkPlantedInPlaceOfADirectory(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := root(t, v)
		outside := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(outside, "f"), []byte("outside"), 0o600))
		mkdir(t, d, "d").Close()
		path := storedPath(t, d, "d")
		require.NoError(t, os.Remove(path))
		require.NoError(t, os.Symlink(outside, path))
		_, err := d.OpenDir("d")
		require.ErrorIs(t, err, unix.ENOTDIR)
		_, err = d.Open("d", unix.O_RDONLY)
		require.ErrorIs(t, err, unix.ELOOP)
		_, err = d.Create("d", unix.O_RDWR, 0o600)
		require.Error(t, err)
		require.NoError(t, d.Chown("d", 1, 1))
		require.NoError(t, d.Utimens("d", &[2]unix.Timespec{{Sec: 1}, {Sec: 1}}))
		require.ErrorIs(t, d.Chmod("d", 0o777), unix.EOPNOTSUPP)
		fi, err := os.Stat(outside)
		require.NoError(t, err)
		require.NotEqual(t, int64(1), fi.ModTime().Unix())
		fd, err := d.OpenPath("d")
		require.NoError(t, err)
		defer unix.Close(fd)
		require.Error(t, Chmod(fd, 0o777))
		require.NoError(t, Chown(fd, 2, 2))
		require.NoError(t, Utimens(fd, &[2]unix.Timespec{{Sec: 2}, {Sec: 2}}))
		var st unix.Stat_t
		require.NoError(t, d.Lstat("d", &st))
		require.EqualValues(t, 2, st.Uid)
		require.EqualValues(t, 2, st.Mtim.Sec)
		require.NoError(t, unix.Stat(outside, &st))
		require.EqualValues(t, 0, st.Uid)
		require.NoError(t, d.Unlink("d"))
		require.FileExists(t, filepath.Join(outside, "f"))
	}
}

func TestThingsPlantedInPlaceOfAFile(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	for name, plant := range map[string]func(path string) error{
		"fifo":    func(p string) error { return unix.Mkfifo(p, 0o666) },
		"device":  func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) },
		"socket":  func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o666, 0) },
		"dir":     func(p string) error { return os.Mkdir(p, 0o777) },
		"symlink": func(p string) error { return os.Symlink("/etc/passwd", p) },
	} {
		touch(t, d, name, "x")
		path := storedPath(t, d, name)
		require.NoError(t, os.Remove(path))
		require.NoError(t, plant(path))
		fds := openFDs(t)
		inTime(t, func() {
			for _, flags := range []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR} {
				_, err := d.Open(name, flags)
				require.Error(t, err, name)
				_, err = d.Create(name, flags, 0o600)
				require.Error(t, err, name)
			}
		})
		require.Equal(t, fds, openFDs(t), "%s: a descriptor leaked", name)
		if d.Unlink(name) != nil {
			require.NoError(t, d.Rmdir(name))
		}
	}
}

func TestOpenNeverCutsOrAppends(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	d := root(t, v)
	touch(t, d, "f", "stored")
	for _, open := range []func() (int, error){
		func() (int, error) { return d.Open("f", unix.O_RDWR|unix.O_TRUNC|unix.O_APPEND|unix.O_DIRECT) },
		func() (int, error) { return d.Create("f", unix.O_RDWR|unix.O_TRUNC|unix.O_APPEND|unix.O_DIRECT, 0o600) },
	} {
		fd, err := open()
		require.NoError(t, err)
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		require.NoError(t, err)
		require.Zero(t, flags&(unix.O_APPEND|unix.O_DIRECT))
		unix.Close(fd)
		got, _ := content(t, d, "f")
		require.Equal(t, "stored", got)
	}
	_, err := d.Create("f", unix.O_RDWR|unix.O_EXCL, 0o600)
	require.ErrorIs(t, err, unix.EEXIST)
	_, err = d.Open("new", unix.O_RDWR|unix.O_CREAT)
	require.ErrorIs(t, err, unix.ENOENT)
}

func TestStatShowsPlaintextSizes(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := root(t, v)
		touch(t, d, "f", strings.Repeat("s", 32+100))
		require.NoError(t, d.Symlink("some/target", "l"))
		var st unix.Stat_t
		var stx unix.Statx_t
		for name, size := range map[string]int64{"f": 100, "l": int64(len("some/target"))} {
			require.NoError(t, d.Lstat(name, &st))
			require.Equal(t, size, st.Size, name)
			require.NoError(t, d.Statx(name, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &stx))
			require.EqualValues(t, size, stx.Size, name)
			require.NotZero(t, stx.Btime.Sec)
			require.Equal(t, st.Ino, stx.Ino)
		}
	}
}

func TestSymlinkTargets(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := root(t, v)
		longest := 4095
		if mode == NamesEncrypted {
			longest = 4062
		}
		for _, target := range []string{"x", "/etc/passwd", "../..", "\xff\n\x01", strings.Repeat("t", 255), strings.Repeat("t", longest)} {
			require.NoError(t, d.Symlink(target, "l"))
			got, err := d.Readlink("l")
			require.NoError(t, err)
			require.Equal(t, target, got)
			fd, err := d.OpenPath("l")
			require.NoError(t, err)
			got, err = v.ReadlinkFd(fd)
			require.NoError(t, err)
			require.Equal(t, target, got)
			require.NoError(t, d.Link(fd, "hard"))
			got, err = d.Readlink("hard")
			require.NoError(t, err)
			require.Equal(t, target, got)
			unix.Close(fd)
			require.NoError(t, d.Unlink("l"))
			require.NoError(t, d.Unlink("hard"))
		}
		require.ErrorIs(t, d.Symlink(strings.Repeat("t", longest+1), "l"), unix.ENAMETOOLONG)
		require.ErrorIs(t, d.Symlink("", "l"), unix.ENOENT)
		require.NoError(t, d.Symlink("target", "l"))
		_, err := d.Readlink("none")
		require.ErrorIs(t, err, unix.ENOENT)
		touch(t, d, "f", "")
		_, err = d.Readlink("f")
		require.ErrorIs(t, err, unix.EINVAL)
		if mode == NamesEncrypted {
			path := storedPath(t, d, "l")
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Symlink("forged", path))
			_, err = d.Readlink("l")
			require.ErrorIs(t, err, crypt.ErrDamaged)
			require.NoError(t, d.Unlink("l"))
		}
	}
}

func TestTmpfileAndLink(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := mkdir(t, root(t, v), "d")
		fd, err := d.Tmpfile(unix.O_RDWR, 0o640)
		require.NoError(t, err)
		defer unix.Close(fd)
		require.Empty(t, stored(t, d))
		_, err = unix.Write(fd, []byte("body"))
		require.NoError(t, err)
		for _, name := range []string{"short", longName("l")} {
			require.NoError(t, d.Link(fd, name))
			require.ErrorIs(t, d.Link(fd, name), unix.EEXIST)
			got, _ := content(t, d, name)
			require.Equal(t, "body", got)
		}
		consistent(t, d)
		only, err := d.Tmpfile(unix.O_RDWR|unix.O_EXCL, 0o600)
		require.NoError(t, err)
		defer unix.Close(only)
		require.Error(t, d.Link(only, "never"))
	}
}

func TestOtherKindsOfNodes(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	kinds := map[string]uint32{"fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK, "char": unix.S_IFCHR, "block": unix.S_IFBLK, "reg": unix.S_IFREG}
	var st unix.Stat_t
	for name, kind := range kinds {
		require.NoError(t, d.Mknod(name, kind|0o640, int(unix.Mkdev(1, 3))))
		require.NoError(t, d.Lstat(name, &st))
		require.Equal(t, kind|0o640, st.Mode)
		require.NoError(t, d.Chmod(name, 0o4701))
		require.NoError(t, d.Chown(name, 3, -1))
		require.NoError(t, d.Access(name, unix.R_OK))
		require.NoError(t, d.Lstat(name, &st))
		require.Equal(t, kind|0o701, st.Mode&^0o7000, "chown clears setuid")
		require.EqualValues(t, 3, st.Uid)
	}
	require.NoError(t, d.Stat(&st))
	require.Equal(t, d.Ino(), st.Ino)
	require.Equal(t, d.Dev(), st.Dev)
	require.NoError(t, d.Sync())
	var sfs unix.Statfs_t
	require.NoError(t, d.Statfs(&sfs))
	require.EqualValues(t, 255, sfs.Namelen)
	require.ErrorIs(t, d.Access("none", unix.F_OK), unix.ENOENT)
}

func TestSetgidDirectoriesPassOn(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := mkdir(t, root(t, v), "d")
	require.NoError(t, Chown(d.Fd(), -1, 77))
	require.NoError(t, Chmod(d.Fd(), 0o2775))
	require.NoError(t, d.Mkdir("sub", 0o1755))
	var st unix.Stat_t
	require.NoError(t, d.Lstat("sub", &st))
	require.EqualValues(t, 77, st.Gid)
	require.EqualValues(t, unix.S_IFDIR|0o3755, st.Mode)
}

func TestEntriesOffsets(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := mkdir(t, root(t, v), "d")
	for i := range 3000 { // more than one buffer
		require.NoError(t, d.Mknod(fmt.Sprintf("%0*d", 4+i%100, i), unix.S_IFREG|0o600, 0))
	}
	e, err := d.Entries()
	require.NoError(t, err)
	defer e.Close()
	var all []Entry
	var entry Entry
	for {
		ok, err := e.Next(&entry)
		require.NoError(t, err)
		if !ok {
			break
		}
		all = append(all, entry)
	}
	require.Equal(t, len(list(t, d))+2, len(all), "dot and dot-dot are part of it")
	for _, i := range []int{len(all) / 2, 0, len(all) - 2, 1} {
		require.NoError(t, e.SeekTo(all[i].Off))
		ok, err := e.Next(&entry)
		require.NoError(t, err)
		require.True(t, ok)
		require.Equal(t, all[i+1], entry)
	}
	require.NoError(t, e.SeekTo(0))
	ok, err := e.Next(&entry)
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, all[0], entry)
	for _, one := range all {
		require.Equal(t, isDot(one.Name), one.Type == unix.DT_DIR)
	}
}
