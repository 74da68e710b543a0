package volume

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// xattrs are the plain names, as a user sees them.
func xattrs(t testing.TB, v *Volume, fd int) []string {
	t.Helper()
	n, err := v.Listxattr(fd, nil)
	require.NoError(t, err)
	buf := make([]byte, n)
	m, err := v.Listxattr(fd, buf)
	require.NoError(t, err)
	require.Equal(t, n, m)
	return strings.FieldsFunc(string(buf), func(r rune) bool { return r == 0 })
}

func TestUserXattrs(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := root(t, v)
		touch(t, d, "f", "stored")
		mkdir(t, d, "d")
		for _, name := range []string{"f", "d"} {
			fd, err := d.OpenPath(name)
			require.NoError(t, err)
			defer unix.Close(fd)
			require.Empty(t, xattrs(t, v, fd), "ours are hidden")
			buf := make([]byte, 100)
			_, err = v.Getxattr(fd, "user.a", buf)
			require.ErrorIs(t, err, unix.ENODATA)
			require.ErrorIs(t, v.Setxattr(fd, "user.a", []byte("v"), unix.XATTR_REPLACE), unix.ENODATA)
			require.NoError(t, v.Setxattr(fd, "user.a", []byte("value"), unix.XATTR_CREATE))
			require.ErrorIs(t, v.Setxattr(fd, "user.a", []byte("v"), unix.XATTR_CREATE), unix.EEXIST)
			require.NoError(t, v.Setxattr(fd, "user.empty", nil, 0))
			require.NoError(t, v.Setxattr(fd, "trusted.t", []byte("t"), 0))
			require.ElementsMatch(t, []string{"user.a", "user.empty", "trusted.t"}, xattrs(t, v, fd))
			n, err := v.Getxattr(fd, "user.a", buf)
			require.NoError(t, err)
			require.Equal(t, "value", string(buf[:n]))
			n, err = v.Getxattr(fd, "user.a", nil)
			require.NoError(t, err)
			require.Equal(t, 5, n)
			_, err = v.Getxattr(fd, "user.a", buf[:4])
			require.ErrorIs(t, err, unix.ERANGE)
			n, err = v.Getxattr(fd, "user.a", buf[:5])
			require.NoError(t, err)
			require.Equal(t, 5, n)
			n, err = v.Getxattr(fd, "user.empty", buf)
			require.NoError(t, err)
			require.Zero(t, n)
			_, err = v.Listxattr(fd, buf[:3])
			require.ErrorIs(t, err, unix.ERANGE)
			require.NoError(t, v.Removexattr(fd, "user.a"))
			require.ErrorIs(t, v.Removexattr(fd, "user.a"), unix.ENODATA)

			raw, err := listAll(fd)
			require.NoError(t, err)
			require.NotContains(t, string(raw), "empty")
		}
	}
}

func TestOurXattrsAreHiddenAndRefused(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	fd := openFile(t, d, "f", unix.O_RDWR)
	header := fileHeader(t, v, 184)
	require.NoError(t, SetHeader(fd, header))
	require.NoError(t, v.Setxattr(fd, "user.mine", []byte("x"), 0))
	buf := make([]byte, 1000)
	for _, name := range []string{crypt.HeaderXattr, crypt.SparseXattr, DirXattr, "user.kmsfs.u.AAAA", "user.kmsfsx", v.names.EncryptXattrName("mine")} {
		_, err := v.Getxattr(fd, name, buf)
		require.ErrorIs(t, err, unix.ENODATA, name)
		require.ErrorIs(t, v.Setxattr(fd, name, []byte("x"), 0), unix.EPERM, name)
		require.ErrorIs(t, v.Removexattr(fd, name), unix.EPERM, name)
	}
	require.Equal(t, []string{"user.mine"}, xattrs(t, v, fd))
	got, err := ReadHeader(fd)
	require.NoError(t, err)
	require.Equal(t, header, got)
}

func TestXattrLimitsAreHonest(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	fd := openFile(t, d, "f", unix.O_RDWR)
	require.NoError(t, SetHeader(fd, fileHeader(t, v, 184)))
	longest := "user." + strings.Repeat("n", crypt.MaxUserXattrName)
	require.NoError(t, v.Setxattr(fd, longest, []byte("x"), 0))
	require.Equal(t, []string{longest}, xattrs(t, v, fd))
	require.ErrorIs(t, v.Setxattr(fd, longest+"n", []byte("x"), 0), unix.ERANGE)
	_, err := v.Getxattr(fd, longest+"n", nil)
	require.ErrorIs(t, err, unix.ENODATA)
	require.ErrorIs(t, v.Removexattr(fd, longest+"n"), unix.ENODATA)
	require.ErrorIs(t, v.Setxattr(fd, "user.", []byte("x"), 0), unix.EINVAL)
	err = v.Setxattr(fd, "user.big", make([]byte, 8000), 0)
	require.True(t, errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG), "%v", err)
	require.ErrorIs(t, v.Setxattr(fd, "user.big", make([]byte, 1<<17), 0), unix.E2BIG)
	raw, err := ReadHeader(fd)
	require.NoError(t, err)
	require.NotEmpty(t, raw)
}

func TestDamagedXattrs(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	fd := openFile(t, d, "f", unix.O_RDWR)
	require.NoError(t, v.Setxattr(fd, "user.a", []byte("value"), 0))
	name := v.names.EncryptXattrName("a")
	require.NoError(t, unix.Fsetxattr(fd, name, []byte("forged value, long enough"), 0))
	_, err := v.Getxattr(fd, "user.a", make([]byte, 100))
	require.ErrorIs(t, err, crypt.ErrDamaged)
	require.NoError(t, unix.Fsetxattr(fd, name, []byte("short"), 0))
	_, err = v.Getxattr(fd, "user.a", make([]byte, 100))
	require.ErrorIs(t, err, crypt.ErrDamaged)
	require.NoError(t, unix.Fsetxattr(fd, "user.planted", []byte("x"), 0))
	require.NoError(t, unix.Fsetxattr(fd, crypt.UserXattrPrefix+"junk", []byte("x"), 0))
	require.Equal(t, []string{"user.a"}, xattrs(t, v, fd))
	_, err = v.Getxattr(fd, "user.planted", nil)
	require.ErrorIs(t, err, unix.ENODATA)
	require.NoError(t, v.Removexattr(fd, "user.a"))

	// A value moved to another name is damage.
	require.NoError(t, v.Setxattr(fd, "user.a", []byte("value"), 0))
	require.NoError(t, unix.Fsetxattr(fd, v.names.EncryptXattrName("b"), v.names.EncryptXattrValue("a", []byte("value")), 0))
	_, err = v.Getxattr(fd, "user.b", make([]byte, 100))
	require.ErrorIs(t, err, crypt.ErrDamaged)
}

func TestLockedVolumeHasNoUserXattrs(t *testing.T) {
	unlocked, _ := newVolume(t, NamesPlain)
	touch(t, root(t, unlocked), "f", "stored")
	v, err := Open(unlocked.Path())
	require.NoError(t, err)
	defer v.Close()
	fd := openFile(t, root(t, v), "f", unix.O_RDWR)
	require.ErrorIs(t, v.Setxattr(fd, "user.a", nil, 0), ErrLocked)
	_, err = v.Getxattr(fd, "user.a", nil)
	require.ErrorIs(t, err, ErrLocked)
	require.Empty(t, xattrs(t, v, fd))
}

func TestSymlinksTakeTrustedXattrs(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	require.NoError(t, d.Symlink("f", "l"))
	fd, err := d.OpenPath("l")
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, v.Setxattr(fd, "trusted.t", []byte("link"), 0))
	require.ErrorIs(t, v.Setxattr(fd, "user.a", []byte("x"), 0), unix.EPERM)
	require.Equal(t, []string{"trusted.t"}, xattrs(t, v, fd))
	require.Empty(t, xattrs(t, v, openFile(t, d, "f", unix.O_RDONLY)), "the link's target was not meant")
}
