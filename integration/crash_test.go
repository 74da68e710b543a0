package integration

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

// TestKillWhileWriting kills the daemon in the middle of creates, appends and
// overwrites. What a writer was told is durable is there after the next mount,
// which works at once, and nothing hangs.
func TestKillWhileWriting(t *testing.T) {
	rounds := 5
	if testing.Short() {
		rounds = 1
	}
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Damaged() // what was not synced may be gone
	acknowledged := map[string]int{}
	for round := range rounds {
		v.Mount()
		writer := e.Helper("synced-writer", v.Mnt, strconv.Itoa(round))
		out, err := writer.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, writer.Start())
		go func() {
			time.Sleep(time.Duration(300+150*round) * time.Millisecond)
			v.Kill()
		}()
		for lines := bufio.NewScanner(out); lines.Scan(); {
			name, n, ok := strings.Cut(lines.Text(), " ")
			require.True(t, ok, lines.Text())
			acknowledged[name], err = strconv.Atoi(n)
			require.NoError(t, err)
		}
		_ = writer.Wait() // it fails when the mount is gone
		require.NotEmpty(t, acknowledged, "the writer got nothing done")
		afterKill(t, v)
		for name, n := range acknowledged {
			content, err := os.ReadFile(v.Path(name))
			require.NoError(t, err, "%s, of which %d bytes were synced", name, n)
			require.GreaterOrEqual(t, len(content), n, name)
			require.Equal(t, syncedBytes(name, n), content[:n], name)
		}
		e.Shell(`ls -lR "$1" >/dev/null`, v.Mnt)
		v.Umount()
	}
	v.Mount()
	e.Shell(`rm -r "$1"/*; test -z "$(ls -A "$1")"`, v.Mnt)
}

// afterKill mounts over what a killed daemon left. The dead mountpoint is taken
// away by mount itself, or named with the command that does it.
func afterKill(t *testing.T, v *harness.Volume) {
	t.Helper()
	r := v.TryMount()
	if r.Status == 0 {
		return
	}
	require.Equal(t, statusFUSE, r.Status, "%v", r)
	require.Contains(t, r.Stderr, v.Mnt)
	require.Contains(t, r.Stderr, "kmsfs umount")
	v.Env.Must("umount", v.Mnt)
	v.Mount()
}

func init() { harness.Helper("synced-writer", syncedWriter) }

// syncedWriter appends to files and says on stdout how many bytes of which file
// are durable, until the mount dies under it.
func syncedWriter(args []string) error {
	for i := 0; ; i++ {
		name := fmt.Sprintf("round%s-%d", args[1], i%7)
		path := filepath.Join(args[0], name)
		info, err := os.Stat(path)
		size := 0
		if err == nil {
			size = int(info.Size())
		} else if !os.IsNotExist(err) {
			return err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		next := size + 1 + i*37%9000
		if _, err := f.Write(syncedBytes(name, next)[size:]); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		fmt.Println(name, next)
		if err := f.Close(); err != nil {
			return err
		}
	}
}

// syncedBytes are the first n bytes that belong into the file name.
func syncedBytes(name string, n int) []byte {
	all := harness.Noise(n)
	for i := range all {
		all[i] ^= name[i%len(name)]
	}
	return all
}

// TestKillIdle: the lock of a killed daemon is free, and its files are whole.
func TestKillIdle(t *testing.T) {
	v := local(t)
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	v.Env.Do("cp", "-a", tree, v.Path("tree"))
	v.Env.Shell(`find "$1" -type f -exec sync {} +`, v.Mnt)
	v.Kill()
	_, err := os.Stat(v.Path("tree"))
	require.Error(t, err)
	afterKill(t, v)
	harness.Same(t, tree, v.Path("tree"))
}

// TestSignals: SIGTERM and SIGINT unmount cleanly, in the background and in the
// foreground.
func TestSignals(t *testing.T) {
	for _, sig := range []string{"TERM", "INT"} {
		t.Run(sig, func(t *testing.T) {
			v := local(t)
			content := harness.Noise(3<<20 + 5)
			require.NoError(t, os.WriteFile(v.Path("file"), content, 0o600))
			pid := v.Daemons()[0]
			v.Env.Shell(`kill -`+sig+` "$1"`, strconv.Itoa(pid))
			require.True(t, harness.Eventually(10*time.Second, func() bool { return !v.IsMounted() && len(v.Daemons()) == 0 }))
			v.Mount()
			got, err := os.ReadFile(v.Path("file"))
			require.NoError(t, err)
			require.Equal(t, content, got)
		})
	}
	t.Run("foreground", func(t *testing.T) {
		v := local(t)
		v.Umount()
		cmd := v.Env.Command("kmsfs", "mount", v.Dir, v.Mnt, "-f")
		require.NoError(t, cmd.Start())
		require.True(t, harness.Eventually(10*time.Second, v.IsMounted))
		require.NoError(t, os.WriteFile(v.Path("file"), []byte("x"), 0o600))
		require.NoError(t, cmd.Process.Signal(os.Interrupt))
		require.NoError(t, cmd.Wait(), "a clean end is status 0")
		require.False(t, v.IsMounted())
		v.Mount()
		require.Equal(t, "x", string(harness.ReadAt(t, v.Path("file"), 0, 9)))
	})
}

// TestMountLetsGoOfPipes: "kmsfs mount ... | cat" ends, though the daemon runs.
func TestMountLetsGoOfPipes(t *testing.T) {
	v := local(t)
	v.Umount()
	start := time.Now()
	v.Env.Shell(`timeout 20 bash -c 'kmsfs mount "$1" "$2" 2>&1 | cat' bash "$1" "$2"`, v.Dir, v.Mnt)
	require.Less(t, time.Since(start), 10*time.Second, "the daemon keeps its parent's pipe open")
	require.True(t, v.IsMounted())
	v.Adopt()
}

// TestLockFileIsRemoved: a mount whose kmsfs.lock somebody removed, or put another one in
// place of, is the only one all the same, and keeps its shared memory.
func TestLockFileIsRemoved(t *testing.T) {
	for name, harm := range map[string]func(path string) error{
		"removed":  os.Remove,
		"replaced": func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			e := harness.New(t)
			v := e.Init("volume", "--key", localKey(e, "one"))
			v.Mount()
			require.NoError(t, harm(filepath.Join(v.Dir, "kmsfs.lock")))
			other := e.Mkdir("other")
			for _, args := range [][]string{{"mount", v.Dir, other}, {"mount", "--read-only", v.Dir, other}, {"fsck", "--repair", v.Dir},
				{"rekey", v.Dir, "--to", localKey(e, "two"+name), "--yes"}} { // which has to tell the mount
				r := e.Kmsfs(args...)
				require.Equal(t, 6, r.Status, "%v", r)
				require.Contains(t, r.Stderr, "is mounted by another kmsfs process", "%v", r)
			}
			slots, err := filepath.Glob("/dev/shm/kmsfs-*" + backingName(t, v))
			require.NoError(t, err)
			require.Len(t, slots, 1)
			require.NoError(t, os.WriteFile(v.Path("f"), []byte("x"), 0o600))
			v.Kill()
			e.Must("umount", v.Mnt)
			v.Mount() // its memory tells that it is dead
			require.FileExists(t, v.Path("f"))
		})
	}
}
