package posix

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// TestFullAttributes fills what ext4 has for a file's attributes, which the user's own
// share with the header. What has no room is refused, nothing that stood there goes, and
// what needs no more room works.
func TestFullAttributes(t *testing.T) {
	e := harness.New(t)
	v := volumeOn(t, e, "ext4", 64<<20)
	contents := harness.Noise(5000)
	for name, p := range map[string][]byte{"full": contents, "empty": nil} {
		require.NoError(t, os.WriteFile(v.Path(name), p, 0o600))
		require.NotZero(t, fillAttributes(t, v.Path(name)))
	}
	full, empty := harness.Xattrs(t, v.Path("full")), harness.Xattrs(t, v.Path("empty"))
	same := func() {
		t.Helper()
		require.Equal(t, full, harness.Xattrs(t, v.Path("full")))
		require.Equal(t, empty, harness.Xattrs(t, v.Path("empty")))
		require.Equal(t, contents, harness.ReadAt(t, v.Path("full"), 0, len(contents)+1))
		info, err := os.Stat(v.Path("empty"))
		require.NoError(t, err)
		require.Zero(t, info.Size())
	}
	noRoom(t, unix.Truncate(v.Path("full"), 8<<20), "a hole that has to be declared")
	same()
	noRoom(t, replaceSynced(v.Path("empty"), contents), "the header of a file that grows from nothing")
	v.Remount() // the kernel keeps for a while what it could not write
	same()
	require.NoError(t, replaceSynced(v.Path("full"), contents[:4000]), "a new header takes no more room than the old one")
	contents = contents[:4000]
	same()
	require.NoError(t, unix.Setxattr(v.Path("full"), "user.fill0", []byte("other"), unix.XATTR_REPLACE))
	for i := range 4 {
		for _, name := range []string{"full", "empty"} {
			require.NoError(t, unix.Removexattr(v.Path(name), fmt.Sprint("user.fill", i)))
		}
	}
	require.NoError(t, unix.Truncate(v.Path("full"), 8<<20))
	require.NoError(t, replaceSynced(v.Path("empty"), contents))
	v.Remount()
	require.Equal(t, contents, harness.ReadAt(t, v.Path("full"), 0, len(contents)))
	require.Equal(t, contents, harness.ReadAt(t, v.Path("empty"), 0, len(contents)+1))
	v.Umount()
	e.Must("fsck", v.Dir, "--data")
}

// fillAttributes sets attributes, ever smaller ones, until not one more fits.
func fillAttributes(t *testing.T, path string) (n int) {
	t.Helper()
	for _, size := range []int{150, 40, 0} {
		for {
			err := unix.Setxattr(path, fmt.Sprint("user.fill", n), []byte(strings.Repeat("x", size)), unix.XATTR_CREATE)
			if err != nil {
				noRoom(t, err, "an attribute")
				break
			}
			n++
			require.Less(t, n, 1000, "this file system has room for any attribute")
		}
	}
	return n
}

func noRoom(t *testing.T, err error, what string) {
	t.Helper()
	require.True(t, errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG), "%s: %v", what, err)
}

// replaceSynced replaces what is in a file.
func replaceSynced(path string, p []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
