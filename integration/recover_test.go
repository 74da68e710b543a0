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

// TestRecoveryKeepsTimes: a file whose end was kept when the mount was killed has its mtime
// afterwards, though its last record is written once more; and so has one that was synced.
func TestRecoveryKeepsTimes(t *testing.T) {
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Mount()
	was := time.Now().Add(-time.Hour).Truncate(time.Microsecond)
	want := map[string]time.Time{}
	for _, name := range []string{"kept", "synced", "touched"} {
		f, err := os.Create(v.Path(name))
		require.NoError(t, err)
		_, err = f.WriteString("synced")
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		if name != "synced" {
			_, err = f.WriteString(", not synced")
			require.NoError(t, err)
			require.NoError(t, syncRange(f)) // it is with the daemon now, and the end before it is kept
		}
		if name != "synced" {
			require.NoError(t, os.Chtimes(v.Path(name), was, was))
		}
		info, err := os.Stat(v.Path(name))
		require.NoError(t, err)
		want[name] = info.ModTime()
		defer f.Close()
	}
	v.Kill()
	e.Must("umount", v.Mnt)
	v.Mount()
	log, err := os.ReadFile(filepath.Join(e.Root, "state", "kmsfs", "kmsfs.log"))
	require.NoError(t, err)
	require.Regexp(t, `ends of files were kept when the last mount ended" found=2 put_back=0`, string(log), "this tests nothing")
	for name, mtime := range want {
		info, err := os.Stat(v.Path(name))
		require.NoError(t, err)
		require.True(t, mtime.Equal(info.ModTime()), "%s: %v is %v", name, mtime, info.ModTime())
	}
}

// TestReplayedMarkerCutsNothing: who writes the backing directory keeps the mark of a mount
// and puts it back when the mount has ended well, to have a file that he cut end where he
// likes, as if it had always been so short. It stays damaged; and a mount that really ends
// uncleanly is recovered from all the same.
func TestReplayedMarkerCutsNothing(t *testing.T) {
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Damaged()
	v.Mount()
	require.NoError(t, os.WriteFile(v.Path("f"), harness.Noise(5*block+100), 0o600))
	marker := filepath.Join(v.Dir, "kmsfs.unclean")
	old, err := os.ReadFile(marker)
	require.NoError(t, err)
	stored := v.Stored("f")
	v.Umount()
	require.NoError(t, os.Truncate(stored, 3*(block+32)))
	require.NoError(t, os.WriteFile(marker, old, 0o600))
	for range 2 {
		v.Mount()
		info, err := os.Stat(stored)
		require.NoError(t, err)
		require.EqualValues(t, 3*(block+32), info.Size(), "it was cut, or given an end")
		_, err = os.ReadFile(v.Path("f"))
		require.ErrorIs(t, err, unix.EBADMSG)
		v.Umount()
	}

	v.Mount()
	require.NoError(t, os.Remove(v.Path("f")))
	want := harness.Noise(block + 100)
	require.NoError(t, os.WriteFile(v.Path("g"), want, 0o600))
	e.Do("sync", v.Path("g"))
	stored = v.Stored("g")
	v.Kill()
	e.Must("umount", v.Mnt)
	require.NoError(t, os.Truncate(stored, block+32+50))
	v.Mount()
	require.Contains(t, e.Must("status", v.Dir), "1 bad ends cut off")
	got, err := os.ReadFile(v.Path("g"))
	require.NoError(t, err)
	require.Equal(t, want[:block], got)
}
