package volume

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func look(t *testing.T, v *Volume) Sighting {
	t.Helper()
	s, err := v.Look()
	require.NoError(t, err)
	return s
}

// reopen is what another process has of the volume.
func reopen(t *testing.T, v *Volume) *Volume {
	t.Helper()
	w, err := Open(v.Path())
	require.NoError(t, err)
	t.Cleanup(func() { w.Close() })
	return w
}

func TestLookTellsWhoCameAndWent(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	w := reopen(t, v)
	path := filepath.Join(v.Path(), LockFile)
	require.Equal(t, Sighting{}, look(t, v))
	require.NoFileExists(t, path, "looking leaves no trace")

	seen := map[string]bool{"": true}
	isNew := func(s Sighting) {
		t.Helper()
		require.False(t, seen[s.Session], "%q again", s.Session)
		seen[s.Session] = true
	}
	require.NoError(t, v.Lock("mount on /mnt"))
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	held := look(t, w)
	isNew(held)
	require.Equal(t, "mount on /mnt", held.Holder.Owner)
	require.Equal(t, os.Getpid(), held.Holder.PID)
	require.Equal(t, held, look(t, v), "its own")
	require.Equal(t, held, look(t, w))
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))

	v.lock.release()
	require.Equal(t, Sighting{Session: held.Session}, look(t, w), "over, and nobody since")
	for range 3 { // comes and goes unseen
		require.NoError(t, v.Lock("x"))
		v.lock.release()
		isNew(look(t, w))
	}

	// It dies, as after kill -9: the lock is free, the text stays.
	require.NoError(t, v.Lock("dies"))
	v.lock.mu.Lock()
	require.NoError(t, v.lock.file.Close())
	v.lock.file = nil
	v.lock.mu.Unlock()
	died := look(t, w)
	require.Nil(t, died.Holder)
	isNew(died)
	require.NoError(t, w.Lock("next"))
	isNew(look(t, v))
	w.lock.release()

	// Whoever kept no sessions, or failed half-way, leaves another trace.
	for _, text := range []string{"", "junk", `{"pid":1,"host":"h"}`} {
		time.Sleep(15 * time.Millisecond) // the file system's clock ticks
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		s := look(t, w)
		isNew(s)
		require.Nil(t, s.Holder)
		require.Equal(t, s, look(t, w))
	}
}

// Many look at once, again and again: whoever wants the lock gets it, and who has
// it is told.
func TestLookKeepsNobodyOut(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	var stop atomic.Bool
	var lookers sync.WaitGroup
	defer lookers.Wait()
	defer stop.Store(true)
	for range 4 {
		w := reopen(t, v)
		lookers.Go(func() {
			for ; !stop.Load(); time.Sleep(time.Millisecond) {
				if s, err := w.Look(); err != nil || s.Holder != nil && s.Holder.Owner != "mount" {
					t.Errorf("%+v, %v", s, err)
					return
				}
			}
		})
	}
	w := reopen(t, v)
	for range 200 {
		require.NoError(t, v.Lock("mount"))
		var held *LockedError
		require.ErrorAs(t, w.Lock("other"), &held)
		require.NotNil(t, held.Holder)
		v.lock.release()
	}
}

// A lock that says nothing of its holder is waited for, then reported.
func TestLookAtALockWithoutAName(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, v.Lock("x"))
	require.NoError(t, os.Truncate(filepath.Join(v.Path(), LockFile), 0))
	var held *LockedError
	_, err := reopen(t, v).Look()
	require.ErrorAs(t, err, &held)
	require.Nil(t, held.Holder)
}

// Who lets go of the lock has taken its name out of the file a moment before: whoever
// comes then gets the lock.
func TestLockWaitsForWhoLetsGo(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, v.Lock("mount"))
	require.NoError(t, (&lockText{Session: "over"}).write(v.lock.file))
	gone := time.AfterFunc(100*time.Millisecond, v.lock.release)
	require.NoError(t, reopen(t, v).Lock("next"))
	require.False(t, gone.Stop(), "it was not waited for")
}

// A mount in another process, killed.
func TestLookAcrossProcesses(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, os.WriteFile(filepath.Join(v.Path(), LockFile), nil, 0o600))
	cmd := exec.Command("flock", "-x", filepath.Join(v.Path(), LockFile), "sh", "-c",
		fmt.Sprintf(`echo '{"pid":4711,"host":"h","session":"s"}' >%s; echo; exec sleep 60`, LockFile))
	cmd.Dir = v.Path()
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	_, err = out.Read(make([]byte, 1))
	require.NoError(t, err)
	require.Equal(t, Sighting{Holder: &Holder{PID: 4711, Host: "h"}, Session: "s"}, look(t, v))
	var held *LockedError
	require.ErrorAs(t, v.Lock("x"), &held)
	require.Equal(t, 4711, held.Holder.PID)
}

func TestLookDoesNotFollow(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(v.Path(), LockFile)))
	_, err := v.Look()
	require.ErrorIs(t, err, unix.ELOOP)
	require.NoError(t, os.Remove(filepath.Join(v.Path(), LockFile)))
	require.NoError(t, unix.Mkfifo(filepath.Join(v.Path(), LockFile), 0o600))
	_, err = v.Look()
	require.ErrorIs(t, err, unix.ESTALE)
}
