package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// notPosix are tests of go-fuse's suite that a real file system fails too, with
// the reason; each has a test of ours in its place.
var notPosix = map[string]string{
	"FcntlFlockLocksFile": "wants two descriptors of one process to exclude each other by F_SETLK; ext4 doesn't (fcntl(2): such locks belong to the process). TestLocks uses two processes",
}

// TestPosix is go-fuse's suite against the built program, with both kinds of
// names.
func TestPosix(t *testing.T) {
	for _, names := range []string{"encrypted", "plain"} {
		t.Run(names, func(t *testing.T) {
			v := local(t, "--names", names)
			for name, test := range posixtest.All {
				if notPosix[name] != "" {
					continue
				}
				t.Run(name, func(t *testing.T) {
					dir := v.Path(name)
					require.NoError(t, os.Mkdir(dir, 0o700))
					test(t, dir)
					require.NoError(t, os.RemoveAll(dir))
				})
			}
		})
	}
}

func init() { harness.Helper("try-lock", tryLock) }

// tryLock says whether another process may lock the first ten bytes of a file.
func tryLock(args []string) error {
	fd, err := unix.Open(args[0], unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	say := func(name string, err error) {
		_, _ = os.Stdout.WriteString(name + " " + unix.ErrnoName(errno(err)) + "\n")
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
	say("fcntl", unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &lock))
	_ = unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 10}) // or it excludes our own next one
	say("ofd", unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock))
	say("flock", unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB))
	return nil
}

func errno(err error) unix.Errno {
	e, _ := err.(unix.Errno)
	return e
}

// TestLocks: locks of all three kinds exclude other processes, and no longer
// than they are held.
func TestLocks(t *testing.T) {
	v := local(t)
	path := v.Path("file")
	require.NoError(t, os.WriteFile(path, harness.Noise(100), 0o600))
	others := func() string { return strings.Join(strings.Fields(v.Env.Help("try-lock", path)), " ") }
	require.Equal(t, "fcntl ofd flock", others())
	for kind, want := range map[int]string{
		unix.F_SETLK:     "fcntl EAGAIN ofd EAGAIN flock",
		unix.F_OFD_SETLK: "fcntl EAGAIN ofd EAGAIN flock",
	} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		require.NoError(t, unix.FcntlFlock(f.Fd(), kind, &unix.Flock_t{Type: unix.F_WRLCK, Start: 5, Len: 10}))
		require.Equal(t, want, others())
		require.NoError(t, f.Close())
		require.Equal(t, "fcntl ofd flock", others())
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	require.NoError(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	require.Equal(t, "fcntl ofd flock EAGAIN", others())
	require.NoError(t, f.Close())
	require.Equal(t, "fcntl ofd flock", others())
}

// TestTimesSurviveRemount: the times that a program saw are the times that the
// next mount shows, to the nanosecond, though the kernel keeps them while it
// holds back the writes.
func TestTimesSurviveRemount(t *testing.T) {
	v := local(t)
	for i := range 100 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), harness.Noise(100+i*100), 0o600))
	}
	for i := range 30 {
		harness.WriteAt(t, v.Path(fmt.Sprint(i)), 50, []byte("changed"))
		require.NoError(t, os.Truncate(v.Path(fmt.Sprint(i+30)), 10))
	}
	before := harness.Snapshot(t, v.Mnt)
	v.Remount()
	require.Empty(t, harness.Diff(before, harness.Snapshot(t, v.Mnt), 0))
}
