package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// TestKMSCalls counts: listing, attributes, names and writes cost no KMS call; a
// create or a first open costs at most one.
func TestKMSCalls(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	v := e.Init("volume", "--key", kms.NewKey())
	v.Mount()
	const files = 200
	for i := range files {
		dir := v.Path(fmt.Sprintf("dir%d", i%10))
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("file%d", i)), harness.Noise(5000), 0o644))
	}
	v.Remount() // every cache is empty
	kms.Quiet()

	t.Run("none", func(t *testing.T) {
		for _, step := range []struct{ name, script string }{
			{"ls -lR", `ls -lR "$1"`},
			{"stat", `find "$1" -exec stat {} + ; find "$1" -size +4k -newermt 2001-01-01`},
			{"du", `du -a "$1"`},
			{"chmod, chown, touch", `cd "$1/dir0"; chmod 600 *; chown 1:1 *; touch -c -d 2020-02-02 *`},
			{"rename", `cd "$1"; mv dir0 renamed; for f in dir1/*; do mv "$f" "$f.new"; done; mv dir2/file2 dir1/file21.new`},
			{"hard link, symlink", `cd "$1"; ln renamed/file10 link; ln -s renamed/file10 symlink; readlink symlink`},
			{"mkdir, rmdir", `cd "$1"; mkdir -p a/b/c; rmdir -p a/b/c`},
			{"unlink", `rm "$1"/dir3/*`},
		} {
			calls := kms.During(func() { e.Shell(step.script, v.Mnt) })
			require.Empty(t, calls, "KMS calls for %s", step.name)
		}
	})
	t.Run("one per first open", func(t *testing.T) {
		calls := kms.During(func() { e.Shell(`cat "$1"/dir4/* >/dev/null`, v.Mnt) })
		require.LessOrEqual(t, len(calls), files/10, "%v", calls)
		again := kms.During(func() { e.Shell(`cat "$1"/dir4/* >/dev/null`, v.Mnt) })
		require.Empty(t, again, "the second open of the same files")
	})
	t.Run("none per write", func(t *testing.T) {
		f, err := os.OpenFile(v.Path("dir5", "file5"), os.O_RDWR, 0)
		require.NoError(t, err)
		defer f.Close()
		calls := kms.During(func() {
			for i := range int64(50) {
				_, err := f.WriteAt(harness.Noise(3000), i*70001)
				require.NoError(t, err)
				if i%10 == 0 {
					require.NoError(t, f.Sync())
				}
			}
			require.NoError(t, f.Truncate(12345))
			_, err = f.ReadAt(make([]byte, 12345), 0)
			require.NoError(t, err)
			require.NoError(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 4096))
			require.NoError(t, f.Sync())
		})
		require.Empty(t, calls)
	})
	t.Run("one per create", func(t *testing.T) {
		const creates = 300
		pooled := 64 // keys that the pool may hold in stock, before and after
		calls := kms.During(func() {
			for i := range creates {
				require.NoError(t, os.WriteFile(v.Path(fmt.Sprintf("new%d", i)), []byte("new"), 0o600))
			}
		})
		require.LessOrEqual(t, len(calls), creates+pooled)
		for _, op := range calls {
			require.Equal(t, "GenerateDataKey", op)
		}
		for i := range creates {
			require.NoError(t, os.Remove(v.Path(fmt.Sprintf("new%d", i))))
		}
	})
}

// TestCreatesDoNotWaitForKMS: with a KMS that takes 25 ms for each call, a
// thousand creates don't take 25 s, for keys are fetched ahead and in parallel.
func TestCreatesDoNotWaitForKMS(t *testing.T) {
	t.Parallel()
	heavy(t)
	e := harness.New(t)
	kms := e.KMS()
	v := e.Init("volume", "--key", kms.NewKey())
	lift := kms.SetLatency(25 * time.Millisecond)
	v.Mount()
	start := time.Now()
	for i := range 1000 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), []byte("x"), 0o600))
	}
	require.Less(t, time.Since(start), 15*time.Second)
	lift()
}
