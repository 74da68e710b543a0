package posix

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// TestFull fills the store to the last block. Whoever writes hears of it, at the
// latest from fsync; what was synced before stays whole, and once there is room
// everything goes on.
func TestFull(t *testing.T) {
	sizes := map[string]int64{"ext4": 64 << 20, "xfs": 320 << 20}
	for kind := range backings {
		t.Run(kind, func(t *testing.T) {
			e := harness.New(t)
			v := volumeOn(t, e, kind, sizes[kind])
			kept := harness.Noise(3<<20 + 17)
			require.NoError(t, os.WriteFile(v.Path("kept"), kept, 0o600))
			before := fillUp(t, v, unix.ENOSPC)
			require.NotZero(t, before, "nothing fitted")
			tail := appendUntilFull(t, v, unix.ENOSPC)
			v.Remount()
			got, err := os.ReadFile(v.Path("kept"))
			require.NoError(t, err)
			require.Equal(t, sha256.Sum256(kept), sha256.Sum256(got))
			got, err = os.ReadFile(v.Path("tail"))
			require.NoError(t, err)
			require.True(t, bytes.HasPrefix(got, tail), "what was synced is not there any more")
			require.NoError(t, os.Truncate(v.Path("tail"), 5000))
			for i := range before {
				require.NoError(t, os.Remove(v.Path(fmt.Sprint(i))))
			}
			require.NoError(t, os.WriteFile(v.Path("again"), kept, 0o600))
			require.NoError(t, syncFile(v.Path("again")))
		})
	}
}

// fillUp makes files until there is no room, which full says, and leaves those that are whole.
func fillUp(t *testing.T, v *harness.Volume, full error) (n int) {
	t.Helper()
	piece := harness.Noise(4 << 20)
	for ; ; n++ {
		name := v.Path(fmt.Sprint(n))
		if err := writeSynced(name, piece); err != nil {
			require.ErrorIs(t, err, full)
			require.NoError(t, os.Remove(name))
			return n
		}
	}
}

// appendUntilFull appends odd pieces, syncing each, and gives what was synced.
func appendUntilFull(t *testing.T, v *harness.Volume, full error) (synced []byte) {
	t.Helper()
	f, err := os.OpenFile(v.Path("tail"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	require.NoError(t, err)
	defer f.Close()
	piece := harness.Noise(77_777)
	for {
		_, err := f.Write(piece)
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			require.ErrorIs(t, err, full)
			return synced
		}
		synced = append(synced, piece...)
	}
}

// writeSynced makes a file and says how writing and syncing it ended; what close says
// after that is old news.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// TestManyOpenFiles: the daemon holds as many files open as its hard limit lets it,
// and says so with an errno, not by failing what is open already.
func TestManyOpenFiles(t *testing.T) {
	e := harness.New(t)
	e.Must("key", "create", "one")
	v := e.Init("volume", "--key", "local:one")
	e.Shell(`ulimit -Hn 300 -Sn 300; kmsfs mount "$1" "$2"`, v.Dir, v.Mnt)
	v.Adopt()
	var fds []int
	var err error
	for i := 0; err == nil; i++ {
		var fd int
		if fd, err = harness.Open(v.Path(fmt.Sprint(i)), unix.O_CREAT|unix.O_RDWR, 0o600); err == nil {
			fds = append(fds, fd)
		}
	}
	require.ErrorIs(t, err, unix.ENFILE)
	require.Greater(t, len(fds), 50)
	for i, fd := range fds {
		_, err := unix.Pwrite(fd, fmt.Append(nil, i), 0)
		require.NoError(t, err, "a file that is open")
		require.NoError(t, unix.Close(fd))
	}
	require.Eventually(t, func() bool { return os.WriteFile(v.Path("more"), []byte("x"), 0o600) == nil }, 5*time.Second, 50*time.Millisecond)
	got, err := os.ReadFile(v.Path("0"))
	require.NoError(t, err)
	require.Equal(t, "0", string(got))
}
