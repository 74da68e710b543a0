package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Between --prepare and the closing run (days, with workers) a host starts its mount
// again, as its unit file says: with --key OLD, or with that first. It would make files
// under OLD behind the sweep, so it is not swept at all.
func TestMountWithTheOldKeyAfterPrepare(t *testing.T) {
	for name, named := range map[string][]string{"alone": {"--key", "local:default"}, "first": {"--key", "local:default", "--key", "local:next"}} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t)
			dir, point := c.volume()
			c.ok("key", "create", "next")
			c.ok("rekey", dir, "--to", "local:next", "--prepare", "--yes")
			c.mount(dir, point, named...)
			c.write(filepath.Join(point, "before"), "x")
			c.bad(exitMount, []string{"is to leave", "without --key"}, "rekey", dir, "--to", "local:next", "--yes")
			c.write(filepath.Join(point, "after"), "x")
			v, err := volume.Open(dir)
			require.NoError(t, err)
			defer v.Close()
			require.Equal(t, s("local:next", "local:default"), v.Settings().Keys)
			c.ok("umount", point)
			c.ok("rekey", dir, "--to", "local:next", "--yes")
			require.NotContains(t, c.ok("status", dir).out, "local:default")
		})
	}
}

// somebody planted a key in kmsfs.toml, and one file whose header names it
// alone. Whoever wants it out names it with --remove, and by that trusts it: the run
// can't finish (the "last copy"), and leaves the planted key pinned. From then on every
// mount of this client trusts it. DESIGN 3.6 (a) names --to, --add and --from only.
func TestRemoveDoesNotPinAPlantedKey(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	c.write(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
	listKey(t, dir, keyOther, []byte("forged"))
	var victim string
	for path := range snapshot(t, dir) {
		if in, err := inspectFile(path); err == nil && in.Use == "file" {
			victim = path
		}
	}
	h, err := crypt.ParseHeader(xattrOf(t, victim))
	require.NoError(t, err)
	h.Copies = []crypt.Copy{{Key: keyOther, Blob: []byte("forged")}}
	raw, err := h.Marshal()
	require.NoError(t, err)
	planted := filepath.Join(filepath.Dir(victim), "planted")
	require.NoError(t, os.WriteFile(planted, []byte("sealed under a forger's key"), 0o600))
	require.NoError(t, unix.Setxattr(planted, crypt.HeaderXattr, raw, 0))

	require.Equal(t, s("local:default"), c.pinOf().Keys)
	r := c.run("rekey", dir, "--remove", keyOther, "--yes")
	require.Equal(t, exitPartial, r.status, r.err)
	require.Contains(t, r.err, "planted: strange")
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	require.Equal(t, s("local:default"), v.Settings().Keys, "it is out, whatever planted files name it")
	require.NotContains(t, c.pinOf().Keys, keyOther, "a key that was to be removed is trusted from now on")
}

// a key that is retired and comes back by an old copy of kmsfs.toml is refused
// to everybody; --remove of it brings it back into the pin, and out of the retired.
func TestRemoveDoesNotReviveARetiredKey(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	c.mount(dir, point)
	c.write(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
	var victim string
	for path := range snapshot(t, dir) {
		if in, err := inspectFile(path); err == nil && in.Use == "file" {
			victim = path
		}
	}
	before := xattrOf(t, victim)
	v, err := volume.Open(dir)
	require.NoError(t, err)
	old := v.Header().Find("local:default").Blob
	v.Close()
	c.ok("rekey", dir, "--to", "local:next", "--yes")
	require.Equal(t, s("local:default"), c.pinOf().Retired)
	listKey(t, dir, "local:default", old) // the replay
	require.NoError(t, unix.Setxattr(victim, crypt.HeaderXattr, before, 0))
	c.bad(exitUsage, []string{"retired"}, "mount", dir, point)
	c.run("rekey", dir, "--remove", "local:default", "--yes")
	require.Contains(t, c.pinOf().Retired, "local:default")
	require.NotContains(t, c.pinOf().Keys, "local:default")
}

// leftover makes a volume that was rekeyed from local:default to local:next, with one
// file whose header is under the old key still (restored from a backup, say).
func leftover(t *testing.T) (c *client, dir string) {
	c = newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	c.mount(dir, point)
	c.write(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
	var victim string
	for path := range snapshot(t, dir) {
		if in, err := inspectFile(path); err == nil && in.Use == "file" {
			victim = path
		}
	}
	before := xattrOf(t, victim)
	c.ok("rekey", dir, "--to", "local:next", "--yes")
	require.NoError(t, unix.Setxattr(victim, crypt.HeaderXattr, before, 0))
	return c, dir
}

// status says "retired: rekey again to move what is left". That does nothing,
// and ends with the advice to delete the files, which open perfectly with --from.
func TestLeftoversAreNotToBeDeleted(t *testing.T) {
	c, dir := leftover(t)
	require.Contains(t, c.ok("status", dir).out, "--from local:default\" moves what is left")
	r := c.run("rekey", dir, "--to", "local:next", "--yes")
	require.Equal(t, exitPartial, r.status)
	require.NotContains(t, r.err, "delete")
	require.Contains(t, r.err, "--from")
	c.ok("rekey", dir, "--to", "local:next", "--from", "local:default", "--yes")
	require.NotContains(t, c.ok("status", dir).out, "local:default")
}

// "every file opens under KEY now" although files were left out.
func TestAddClaimsNoMoreThanIsSo(t *testing.T) {
	c, dir := leftover(t)
	c.ok("key", "create", "third")
	r := c.run("rekey", dir, "--add", "local:third", "--yes")
	require.Equal(t, exitPartial, r.status)
	require.NotContains(t, r.out, "every file opens under")
	require.Contains(t, r.out, "opens under local:third now")
}
