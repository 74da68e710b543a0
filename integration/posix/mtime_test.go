package posix

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// TestTimesOutlastRemount: what changes a file on the store right after the kernel has
// sent its time, within one tick of the kernel's clock, moves the store's time but not
// the kernel's, which is therefore not sent again. What stat(2) said must hold after a
// remount all the same.
func TestTimesOutlastRemount(t *testing.T) {
	e := harness.New(t)
	v := volume(t, e, "volume")
	ops := map[string]func(fd int) error{
		"allocate": func(fd int) error { return unix.Fallocate(fd, 0, 0, 9000) },
		"keep":     func(fd int) error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 100_000) },
		"punch": func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 10, 50)
		},
		"zero": func(fd int) error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 10, 5000) },
		"copy": func(fd int) error {
			in, out := int64(0), int64(4096)
			_, err := unix.CopyFileRange(fd, &in, fd, &out, 50, 0)
			return err
		},
	}
	page := alignedPages(1)
	ops["direct"] = func(fd int) error { _, err := unix.Pwrite(fd, page, 0); return err }
	for name, op := range sorted(ops) {
		for i := range 50 {
			fd, err := harness.Open(v.Path(fmt.Sprint(name, i)), unix.O_RDWR|unix.O_CREAT, 0o600)
			require.NoError(t, err)
			_, err = unix.Pwrite(fd, make([]byte, 100), 0)
			require.NoError(t, err)
			require.NoError(t, unix.Fsync(fd))
			if name == "direct" {
				_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_DIRECT)
				require.NoError(t, err)
			}
			require.NoError(t, op(fd), name)
			require.NoError(t, unix.Close(fd))
		}
	}
	holdsOverRemount(t, v)
}

// TestTimesOfReopened: what is opened anew within that tick, to write or to be emptied,
// keeps the kernel's time as well.
func TestTimesOfReopened(t *testing.T) {
	e := harness.New(t)
	v := volume(t, e, "volume")
	page := alignedPages(1)
	ops := map[string]func(path string) error{
		"written": func(path string) error { return writeAgain(path, unix.O_WRONLY, []byte("x")) },
		"direct":  func(path string) error { return writeAgain(path, unix.O_WRONLY|unix.O_DIRECT, page) },
		"emptied": func(path string) error { return writeAgain(path, unix.O_RDONLY|unix.O_TRUNC, nil) },
		"anew":    func(path string) error { return writeAgain(path, unix.O_WRONLY|unix.O_TRUNC, nil) },
	}
	for name, op := range sorted(ops) {
		for i := range 200 {
			path := v.Path(fmt.Sprint(name, i))
			require.NoError(t, writeAgain(path, unix.O_WRONLY|unix.O_CREAT, []byte("some")))
			require.NoError(t, op(path), name)
		}
	}
	holdsOverRemount(t, v)
}

// writeAgain opens a file, writes what there is to write, and closes it.
func writeAgain(path string, flags int, data []byte) error {
	fd, err := harness.Open(path, flags, 0o600)
	if err != nil {
		return err
	}
	if data != nil {
		_, err = unix.Pwrite(fd, data, 0)
	}
	return errors.Join(err, unix.Close(fd))
}

func holdsOverRemount(t *testing.T, v *harness.Volume) {
	t.Helper()
	before := harness.Snapshot(t, v.Mnt)
	v.Remount()
	before.Holds(t, v.Mnt)
}

// TestTimeOfMappingWithoutCache: where the kernel keeps no times, what a mapping stored
// moves the mtime when it is written out, and the end of the handle does not undo that.
func TestTimeOfMappingWithoutCache(t *testing.T) {
	e := harness.New(t)
	e.Must("key", "create", "one")
	v := e.Init("volume", "--key", "local:one")
	v.Options("-o", "writeback=off")
	v.Mount()
	fd, err := harness.Open(v.Path("file"), unix.O_RDWR|unix.O_CREAT, 0o600)
	require.NoError(t, err)
	_, err = unix.Pwrite(fd, make([]byte, 4096), 0)
	require.NoError(t, err)
	var before, after unix.Stat_t
	require.NoError(t, unix.Stat(v.Stored("file"), &before))
	m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	time.Sleep(20 * time.Millisecond) // longer than a tick
	m[0] = 'x'
	require.NoError(t, errors.Join(unix.Munmap(m), unix.Close(fd)))
	require.True(t, harness.Eventually(10*time.Second, func() bool {
		require.NoError(t, unix.Stat(v.Stored("file"), &after))
		return after.Mtim.Nano() > before.Mtim.Nano()
	}), "the time of the store was lost: %v, before it %v", after.Mtim, before.Mtim)
}
