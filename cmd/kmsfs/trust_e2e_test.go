package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/volume"
)

func volumeIDOf(t *testing.T, dir string) string {
	t.Helper()
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	return v.ID().String()
}

// pinOf is what the client remembers of the only volume it knows.
func (c *client) pinOf() config.Pin {
	c.t.Helper()
	pins, err := config.LoadPins(c.path("state/kmsfs/known_volumes.toml"))
	require.NoError(c.t, err)
	require.Len(c.t, pins, 1)
	for _, pin := range pins {
		return pin
	}
	return config.Pin{}
}

// mountKeys are the keys that the live mount goes by.
func (c *client) mountKeys(dir string) []string {
	c.t.Helper()
	c.t.Setenv("XDG_RUNTIME_DIR", c.path("run"))
	conn, _, err := dialControl(volumeIDOf(c.t, dir), 0)
	require.NoError(c.t, err)
	defer conn.Close()
	reply, err := request(c.t.Context(), conn, controlRequest{Op: "status"}, controlIdle)
	require.NoError(c.t, err)
	return reply.Keys
}

// keyOfFile is the key that a new file gets on the mount.
func (c *client) keyOfFile(dir, point string) string {
	c.t.Helper()
	before := snapshot(c.t, dir)
	c.write(filepath.Join(point, "probe"), "x")
	c.t.Cleanup(func() { _ = os.Remove(filepath.Join(point, "probe")) })
	for path := range snapshot(c.t, dir) {
		if in, err := inspectFile(path); err == nil && before[path] == "" && in.Use == "file" {
			return in.Copies[0].Key
		}
	}
	c.t.Fatal("no new file")
	return ""
}

// A key planted in kmsfs.toml beside configured ones must not reach the pin, nor a
// live mount, by way of a rekey.
func TestRekeyRefusesAPlantedKey(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	require.NoError(t, os.RemoveAll(c.path("state")))
	c.write(c.path("config/kmsfs/config.toml"), "[volume.\""+volumeIDOf(t, dir)+"\"]\nkeys = ['local:default']\n")
	c.mount(dir, point)
	listKey(t, dir, keyOther, []byte("forged"))
	before := snapshot(t, dir)
	c.bad(exitUsage, []string{"lists the key " + keyOther, "does not trust"}, "rekey", dir, "--from", "local:default", "--to", "local:next", "--yes")
	require.Equal(t, before, snapshot(t, dir))
	require.Equal(t, []string{"local:default"}, c.pinOf().Keys)
	require.Equal(t, []string{"local:default"}, c.mountKeys(dir))
	c.ok("umount", point)
}

// Planted while the rekey runs, it is not pinned either.
func TestRepinRefusesAStranger(t *testing.T) {
	c := newClient(t)
	dir, _ := c.volume()
	t.Setenv("XDG_STATE_HOME", c.path("state"))
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	require.ErrorContains(t, repin(v, s("local:next", "local:default", keyOther), s("local:default", "local:next", ""), rekeyFlags{}), keyOther)
	require.Equal(t, s("local:default"), c.pinOf().Keys)
	require.NoError(t, repin(v, s("local:next"), s("local:default", "local:next", ""), rekeyFlags{}))
	require.Equal(t, s("local:next"), c.pinOf().Keys)
	require.Equal(t, s("local:default"), c.pinOf().Retired)
}

func TestMountKeyIsTheCompleteList(t *testing.T) {
	c := newClient(t)
	c.ok("key", "create", "a")
	c.ok("key", "create", "b")
	c.ok("key", "create", "c")
	dir, point := c.volume("local:a", "local:b")

	c.mount(dir, point, "--key", "local:b", "--key", "local:a")
	require.Equal(t, s("local:b", "local:a"), c.mountKeys(dir))
	require.Equal(t, "local:b", c.keyOfFile(dir, point))
	require.NoError(t, os.Remove(filepath.Join(point, "probe")))
	c.ok("umount", point)

	c.mount(dir, point, "--key", "local:b") // the pin knows both
	require.Equal(t, s("local:b"), c.mountKeys(dir))
	// A rekey by this client reaches it, and nothing else of the pin does.
	c.ok("rekey", dir, "--from", "local:b", "--to", "local:c", "--yes")
	require.Equal(t, s("local:c"), c.mountKeys(dir))
	require.Equal(t, "local:c", c.keyOfFile(dir, point))
	c.ok("umount", point)

	require.NoError(t, os.RemoveAll(c.path("state")))
	c.mount(dir, point, "--key", "local:c") // no pin
	require.Equal(t, s("local:c"), c.mountKeys(dir))
	require.Equal(t, s("local:c"), c.pinOf().Keys)
	c.ok("umount", point)
}

// init remembers what it made, not what stands there when it is done.
func TestInitPinsWhatItMade(t *testing.T) {
	c := newClient(t)
	dir, _ := c.volume()
	made := c.pinOf()
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	own, header := v.Settings(), v.Header()
	listKey(t, dir, keyOther, []byte("forged"))
	require.NoError(t, os.RemoveAll(c.path("state")))
	t.Setenv("XDG_STATE_HOME", c.path("state"))
	p := &program{cfg: &config.Config{}, console: newConsole(nil, io.Discard, io.Discard)}
	require.NoError(t, p.initDone(dir, own, header))
	require.Equal(t, made, c.pinOf())
}

func mountsAt(t *testing.T, point string) []mountEntry {
	t.Helper()
	return slices.DeleteFunc(must(mounts()), func(m mountEntry) bool { return m.point != point })
}

// A signal takes away this mount, once, and never what lies under it.
func TestSecondSignalLeavesOtherMountsAlone(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	require.NoError(t, unix.Mount("none", point, "tmpfs", 0, ""))
	cmd := c.command("mount", "-f", dir, point)
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill() }()
	eventually(t, "mounted", func() bool { return mounted(t, point) })
	var busy *os.File
	eventually(t, "writable", func() (ok bool) {
		var err error
		busy, err = os.Create(filepath.Join(point, "busy"))
		return err == nil
	})
	defer busy.Close()

	// Somebody else's mount on top of it is not taken away.
	require.NoError(t, unix.Mount("none", point, "tmpfs", 0, ""))
	before := mountsAt(t, point)
	require.Len(t, before, 3)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	time.Sleep(500 * time.Millisecond)
	require.Equal(t, before, mountsAt(t, point))
	require.NoError(t, unix.Unmount(point, 0))

	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	eventually(t, "detached", func() bool { return !mounted(t, point) })
	time.Sleep(300 * time.Millisecond) // a signal that comes while it unmounts is one with the first
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	time.Sleep(500 * time.Millisecond)
	m, err := mountedAt(point)
	require.NoError(t, err)
	require.NotNil(t, m, "the mount below is gone")
	require.Equal(t, "tmpfs", m.kind)
	_, err = busy.WriteString("still served")
	require.NoError(t, err)
	require.NoError(t, busy.Close())
	require.NoError(t, cmd.Wait())
}
