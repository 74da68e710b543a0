package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// TestRecoveryHasALimit: after a kill many files have bad ends, and KMS is slow. The mount
// asks for many keys at once and waits no longer than it was told; what it has not come to
// is not lost, not cut by a later write, and put right by the mounts that follow, each of
// which goes on where the last one ended.
func TestRecoveryHasALimit(t *testing.T) {
	const (
		files   = 160
		latency = time.Second
		atOnce  = 32
	)
	e := harness.New(t)
	kms := e.KMS()
	v := e.Init("volume", "--key", kms.NewKey())
	v.Damaged()
	v.Mount("--prefetch", "0")
	good := harness.Noise(block)
	name := func(i int) string { return fmt.Sprint("f", i) }
	var stored []string
	for i := range files {
		require.NoError(t, os.WriteFile(v.Path(name(i)), append(good[:block:block], "more"...), 0o600))
	}
	e.Do("sync", v.Path(name(0)))
	e.Shell(`cd "$1"; sync *`, v.Mnt)
	for i := range files {
		stored = append(stored, v.Stored(name(i)))
	}
	v.Kill()
	e.Must("umount", v.Mnt)
	for _, path := range stored {
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.NoError(t, os.Truncate(path, info.Size()-1))
	}

	lift := kms.SetLatency(latency)
	start := time.Now()
	v.Mount("-o", "recover_limit=3s", "--prefetch", "0")
	took := time.Since(start)
	lift()
	require.Less(t, took, 30*time.Second, "one after the other would take minutes")
	log, err := os.ReadFile(filepath.Join(e.Root, "state", "kmsfs", "kmsfs.log"))
	require.NoError(t, err)
	said := regexp.MustCompile(`recovered=(\d+) files_left=(\d+) tails_left=0 limit=3s next="unmount and mount again[^\n]*fsck --data --cut-ends [^\n]*"`).FindAllSubmatch(log, -1)
	require.Len(t, said, 1, "one line says it all:\n%s", log)
	recovered, err := strconv.Atoi(string(said[0][1]))
	require.NoError(t, err)
	left, err := strconv.Atoi(string(said[0][2]))
	require.NoError(t, err)
	require.Equal(t, files, recovered+left)
	require.GreaterOrEqual(t, recovered, atOnce, "they are asked for at once")
	require.Positive(t, left, "nothing was left: this tests nothing")

	cut := 0
	for i := range files {
		f, err := os.OpenFile(v.Path(name(i)), os.O_RDWR|os.O_APPEND, 0)
		require.NoError(t, err)
		info, err := f.Stat()
		require.NoError(t, err)
		got := make([]byte, info.Size())
		_, err = f.ReadAt(got, 0)
		if info.Size() == block {
			cut++
			require.NoError(t, err)
			require.Equal(t, good, got)
		} else {
			require.ErrorIs(t, err, unix.EBADMSG)
			_, err = f.ReadAt(got[:block], 0)
			require.NoError(t, err)
			require.Equal(t, good, got[:block])
			_, err = f.Write([]byte("x"))
			if err == nil {
				err = f.Sync()
			}
			require.ErrorIs(t, err, unix.EBADMSG, "a write would hide the bad end")
		}
		_ = f.Close()
	}
	require.Equal(t, recovered, cut)

	// The marker has moved on, the list of what is left has not gone. A mount that comes to
	// none of them loses none.
	v.Umount()
	lift = kms.SetLatency(latency)
	v.Mount("-o", "recover_limit=500ms")
	lift()
	require.Contains(t, e.Must("status", v.Dir), fmt.Sprintf(`%d files not put right`, left))
	v.Remount()
	for i := range files {
		got, err := os.ReadFile(v.Path(name(i)))
		require.NoError(t, err)
		require.Equal(t, good, got)
	}
	calls := kms.During(func() { v.Remount("--prefetch", "0") })
	require.Less(t, len(calls), 10, "nothing is left to be looked at")
	require.NotContains(t, e.Must("status", v.Dir), "uncleanly")
}
