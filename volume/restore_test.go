package volume

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// WalkAll meets the files of Walk and every directory, all at paths by which
// OpenStored finds the same inode.
func TestWalkAllAndOpenStored(t *testing.T) {
	for _, mode := range bothModes {
		made, _ := newVolume(t, mode)
		d := root(t, made)
		for i := range walkOpen + 10 { // deeper than directories are kept open
			touch(t, d, fmt.Sprint("file", i), "x")
			touch(t, d, longName("f"), "x")
			d = mkdir(t, d, longName("d"))
		}
		v, err := Open(made.Path())
		require.NoError(t, err)
		defer v.Close()
		var wantFiles, files, dirs []string
		require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
			wantFiles = append(wantFiles, it.Path())
			return it.Err
		}))
		found := func(path string, ino uint64) {
			fd, st, err := v.OpenStored(path)
			require.NoError(t, err)
			require.Equal(t, ino, st.Ino)
			require.NoError(t, unix.Close(fd))
		}
		fds := openFDs(t)
		require.NoError(t, v.WalkAll(context.Background(), func(it *Item) error {
			files = append(files, it.Path())
			found(it.Path(), it.Ino)
			return it.Err
		}, func(path string, fd int) error {
			dirs = append(dirs, path)
			var st unix.Stat_t
			require.NoError(t, unix.Fstat(fd, &st))
			found(path, st.Ino)
			return nil
		}))
		require.LessOrEqual(t, openFDs(t), fds)
		require.Equal(t, wantFiles, files)
		sort.Strings(dirs)
		for depth, path := range dirs {
			require.Equal(t, depth, strings.Count(path, "/"))
		}
		require.Len(t, dirs, walkOpen+10)
	}
}

func TestOpenStoredStaysInside(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, v.Lock(""))
	d := root(t, v)
	touch(t, mkdir(t, d, "dir"), "file", "x")
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "file"), nil, 0o600))
	require.NoError(t, os.Symlink(outside, filepath.Join(v.Path(), "away")))
	require.NoError(t, os.Symlink("dir", filepath.Join(v.Path(), "within")))
	fds := openFDs(t)
	for path, want := range map[string]error{
		"../" + filepath.Base(v.Path()): ErrBadPath, "dir/../dir": ErrBadPath, "/dir": ErrBadPath, "dir//file": ErrBadPath, "": ErrBadPath, ".": ErrBadPath,
		SettingsFile: ErrBadPath, LockFile: ErrBadPath, longPrefix + "x": ErrBadPath, longPrefix + strings.Repeat("a", hashDigits): ErrBadPath,
		"away/file": ErrNotThere, "within/file": ErrNotThere, "dir/file/x": ErrNotThere,
		"dir/none": unix.ENOENT, "none/file": unix.ENOENT,
	} {
		_, _, err := v.OpenStored(path)
		require.ErrorIs(t, err, want, "%q", path)
	}
	require.LessOrEqual(t, openFDs(t), fds)
}

// An id is checked by who has the volume key, and replaced only if it is the one
// that was seen.
func TestStoredDirIDs(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	sub := mkdir(t, root(t, v), "dir")
	fd := sub.Fd()
	raw, err := StoredDirID(fd)
	require.NoError(t, err)
	require.NoError(t, v.CheckDirID(raw))
	bad := bytes.Clone(raw)
	bad[3] ^= 1
	require.ErrorIs(t, v.CheckDirID(bad), crypt.ErrDamaged)
	require.ErrorIs(t, v.CheckDirID(raw[:20]), crypt.ErrDamaged)
	locked, err := Open(v.Path())
	require.NoError(t, err)
	defer locked.Close()
	require.ErrorIs(t, locked.CheckDirID(raw), ErrLocked)

	require.ErrorIs(t, ReplaceDirID(fd, nil, bad), ErrHeaderChanged)
	require.ErrorIs(t, ReplaceDirID(fd, bad, raw), ErrHeaderChanged)
	require.NoError(t, ReplaceDirID(fd, raw, bad))
	got, err := StoredDirID(fd)
	require.NoError(t, err)
	require.Equal(t, bad, got)
	require.NoError(t, removexattr(fd, DirXattr))
	got, err = StoredDirID(fd)
	require.NoError(t, err)
	require.Nil(t, got)
	require.NoError(t, ReplaceDirID(fd, nil, raw))

	needs, err := v.NeedsDirID(fd)
	require.NoError(t, err)
	require.False(t, needs, "nothing is bound to it")
	touch(t, sub, "file", "x")
	needs, err = v.NeedsDirID(fd)
	require.NoError(t, err)
	require.True(t, needs)
}
