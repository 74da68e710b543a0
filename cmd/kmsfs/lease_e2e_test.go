package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func readable(f *os.File) error {
	_, err := f.ReadAt(make([]byte, 1), 0)
	return err
}

// TestLockAndUnlock: all is closed when lock returns, and goes on after unlock.
func TestLockAndUnlock(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	path := filepath.Join(point, "a")
	c.write(path, "contents")
	open, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer open.Close()
	_, err = open.WriteString("CON")
	require.NoError(t, err)

	c.ok("lock", point)
	require.ErrorIs(t, readable(open), unix.EKEYREVOKED)
	_, err = os.ReadFile(path)
	require.ErrorIs(t, err, unix.EKEYREVOKED)
	require.ErrorIs(t, os.WriteFile(filepath.Join(point, "b"), []byte("x"), 0o644), unix.EKEYREVOKED)
	require.NoError(t, os.Rename(path, path+"2"), "names go on")
	require.Contains(t, c.ok("status", dir).out, "LOCKED")
	var r volumeReport
	require.NoError(t, json.Unmarshal([]byte(c.ok("status", "--json", dir).out), &r))
	require.True(t, r.Live.Locked)
	require.EqualValues(t, 1, r.Live.Wiped)
	c.ok("lock", point) // again

	c.ok("unlock", point)
	eventually(t, "the open file goes on", func() bool { return readable(open) == nil })
	c.reads(path+"2", "CONtents")
	require.NotContains(t, c.ok("status", dir).out, "LOCKED")
	require.NoError(t, open.Close())
	c.ok("umount", point)
	c.mount(dir, point)
	c.reads(path+"2", "CONtents")
	c.ok("umount", point)
	c.bad(exitMount, []string{"not a kmsfs mountpoint"}, "lock", point)
	c.bad(exitMount, []string{"not a kmsfs mountpoint"}, "unlock", point)
}

// TestLocalKeyHasALease: a local key that is taken away closes what is open, and the
// log says so once, with advice.
func TestLocalKeyHasALease(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point, "--lease", "200ms", "--grace", "0", "--log-file", c.path("log"))
	path := filepath.Join(point, "a")
	c.write(path, "contents")
	open, err := os.Open(path)
	require.NoError(t, err)
	defer open.Close()
	key := c.path("config/kmsfs/keys/default.key")
	require.Contains(t, c.ok("status", dir).out, "lease valid")

	require.NoError(t, os.Rename(key, key+".away"))
	eventually(t, "the open file is closed", func() bool { return readable(open) != nil })
	require.ErrorIs(t, readable(open), unix.EKEYREVOKED)
	require.Contains(t, c.ok("status", dir).out, "lease revoked")
	time.Sleep(time.Second) // the key is asked about some more times
	require.NoError(t, os.Rename(key+".away", key))
	eventually(t, "it goes on", func() bool { return readable(open) == nil })
	require.NoError(t, open.Close())
	c.ok("umount", point)
	log := string(must(os.ReadFile(c.path("log"))))
	require.Equal(t, 1, strings.Count(log, "lease=revoked"), "%s", log)
	require.Contains(t, log, "next=\"restore the key file")
	require.Contains(t, log, "valid again")
}

// TestIdleUnmount: a mount that is used stays, one that is not goes.
func TestIdleUnmount(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point, "--idle-unmount", "2s")
	c.write(filepath.Join(point, "a"), "x")
	open, err := os.Open(filepath.Join(point, "a"))
	require.NoError(t, err)
	pid := daemonOf(t, dir)
	time.Sleep(3 * time.Second)
	require.True(t, mounted(t, point), "a file is open")
	require.NoError(t, open.Close())
	eventually(t, "the daemon is gone", func() bool { return !alive(pid) && !mounted(t, point) })
	c.mount(dir, point)
	c.reads(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
}
