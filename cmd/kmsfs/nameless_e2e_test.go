package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/keys/kmstest"
)

// tmpfile writes a file that has no name.
func (c *client) tmpfile(dir, text string) *os.File {
	c.t.Helper()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	require.NoError(c.t, err)
	f := os.NewFile(uintptr(fd), "tmpfile")
	c.t.Cleanup(func() { f.Close() })
	_, err = f.WriteString(text)
	require.NoError(c.t, err)
	require.NoError(c.t, f.Sync())
	return f
}

func linkTo(f *os.File, path string) error {
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
}

// A file that had no name during a rekey gets one afterwards, and reads back when
// the old key is gone.
func TestRekeyReachesWhatHasNoName(t *testing.T) {
	for _, envelope := range []string{"per-file", "shared"} {
		t.Run(envelope, func(t *testing.T) { rekeyReachesWhatHasNoName(t, envelope) })
	}
}

func rekeyReachesWhatHasNoName(t *testing.T, envelope string) {
	c := newClient(t)
	dir, point := c.volumeWith("--envelope", envelope)
	c.ok("key", "create", "next")
	c.ok("key", "create", "last")
	c.mount(dir, point)
	one, two := c.tmpfile(point, "linked after one rekey"), c.tmpfile(point, "linked after two")
	c.ok("rekey", dir, "--to", "local:next", "--yes")
	require.NoError(t, os.Remove(c.path("config/kmsfs/keys/default.key")))
	require.NoError(t, linkTo(one, filepath.Join(point, "one")))
	c.ok("rekey", dir, "--to", "local:last", "--yes")
	require.NoError(t, os.Remove(c.path("config/kmsfs/keys/next.key")))
	require.NoError(t, linkTo(two, filepath.Join(point, "two")))
	require.NoError(t, one.Close())
	require.NoError(t, two.Close())
	c.ok("umount", point)
	c.mount(dir, point)
	c.reads(filepath.Join(point, "one"), "linked after one rekey")
	c.reads(filepath.Join(point, "two"), "linked after two")
	c.ok("umount", point)
}

// A mount that may not wrap keys adopts the list all the same and says what it
// lacks; such a file gets a name as soon as it may.
func TestRekeyOfAMountThatMayNotEncrypt(t *testing.T) {
	srv := kmstest.New(t, nil)
	c := newClient(t)
	one, two := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	without := []string{"GenerateDataKey", "Decrypt", "DescribeKey", "ReEncryptFrom", "ReEncryptTo"}
	p := srv.AddPrincipal("user", kmstest.Rule{Actions: without})
	c.env = append(c.env, srv.Env(p)...)
	dir, point := c.volume(one)
	log := c.path("log")
	c.mount(dir, point, "--log-file", log)
	f := c.tmpfile(point, "kept")
	c.ok("rekey", dir, "--to", two, "--yes")
	said := string(must(os.ReadFile(log)))
	require.Contains(t, said, "open files without a name (1 failed)")
	require.Contains(t, said, "kms:Encrypt")
	require.Contains(t, said, two)
	require.Equal(t, unix.EACCES, linkTo(f, filepath.Join(point, "f")))
	srv.SetRules(p, kmstest.Rule{Actions: append(without, "Encrypt")})
	require.NoError(t, linkTo(f, filepath.Join(point, "f")))
	require.NoError(t, f.Close())
	c.ok("umount", point)
	srv.SetState(one, kmstest.Disabled)
	c.mount(dir, point)
	c.reads(filepath.Join(point, "f"), "kept")
	c.ok("umount", point)
}
