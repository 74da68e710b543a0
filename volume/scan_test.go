package volume

import (
	"context"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// scan lists what a scan meets, with its kind, sorted; other lines say what is wrong.
func scan(t testing.TB, v *Volume, each func(*Item)) (met []string) {
	t.Helper()
	require.NoError(t, v.Scan(context.Background(), func(it *Item) error {
		require.NoError(t, it.Err)
		kind := map[uint8]string{unix.DT_REG: "file", unix.DT_DIR: "dir", unix.DT_LNK: "link", unix.DT_FIFO: "fifo"}[it.Type]
		if it.IsSidecar() {
			kind = "sidecar"
		}
		met = append(met, it.Path()+" "+kind)
		if each != nil {
			each(it)
		}
		return nil
	}))
	sort.Strings(met)
	return met
}

// A scan meets every entry but our own files, and directories before what is in them;
// what it meets can be opened under its stored path.
func TestScanMeetsEverything(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		require.NoError(t, v.Lock("test"))
		d := root(t, v)
		touch(t, d, "file", "x")
		touch(t, d, longName("l"), "x")
		sub := mkdir(t, d, "sub")
		require.NoError(t, sub.Symlink("to", "link"))
		require.NoError(t, sub.Mknod("fifo", unix.S_IFIFO|0o600, 0))
		mkdir(t, sub, "deeper")
		want := []string{"file file", longName("l") + " file", "sub dir", "sub/deeper dir", "sub/fifo fifo", "sub/link link"}
		if mode == NamesEncrypted {
			want = append(want, filepath.Base(storedPath(t, d, longName("l")))+".n sidecar")
		}
		var order []string
		met := scan(t, v, func(it *Item) {
			order = append(order, it.Path())
			require.NoError(t, it.NameErr())
			require.False(t, it.IsOrphan())
			fd, st, err := it.OpenPath()
			require.NoError(t, err)
			defer unix.Close(fd)
			require.Equal(t, it.Ino, st.Ino)
			var there unix.Stat_t
			require.NoError(t, unix.Lstat(filepath.Join(v.Path(), it.StoredPath()), &there))
			require.Equal(t, it.Ino, there.Ino)
		})
		require.ElementsMatch(t, want, met)
		for _, pair := range [][2]string{{"sub", "sub/link"}, {"sub", "sub/deeper"}} {
			require.Less(t, index(order, pair[0]), index(order, pair[1]))
		}
	}
}

func index(list []string, s string) int {
	for i, v := range list {
		if v == s {
			return i
		}
	}
	return -1
}

// What has taken an item's place is gone, whatever it is.
func TestOpenPathIsWhatWasMet(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	d := root(t, v)
	for _, plant := range []func(path string) error{
		func(path string) error { return nil },
		func(path string) error { return os.WriteFile(path, nil, 0o600) },
		func(path string) error { return os.Symlink("/etc/passwd", path) },
		func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		touch(t, d, "file", "x")
		path := storedPath(t, d, "file")
		scan(t, v, func(it *Item) {
			require.NoError(t, os.Rename(path, v.Path()+".moved"))
			require.NoError(t, plant(path))
			_, _, err := it.OpenPath()
			require.ErrorIs(t, err, ErrGone)
			require.ErrorIs(t, it.MoveTo(d.Fd()), ErrGone)
		})
		require.NoError(t, os.RemoveAll(path))
	}
}

// An orphan is removed, and no other sidecar; a move takes the sidecar along.
func TestOrphansAndMoves(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, longName("a"), "x")
	touch(t, d, longName("b"), "x")
	touch(t, d, longName("c"), "x")
	gone, moved := storedPath(t, d, longName("a")), storedPath(t, d, longName("c"))
	require.NoError(t, os.Remove(gone))
	away := filepath.Join(t.TempDir(), "away")
	require.NoError(t, os.Mkdir(away, 0o700))
	to, err := unix.Open(away, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer unix.Close(to)
	orphans := 0
	scan(t, v, func(it *Item) {
		switch {
		case it.Name == filepath.Base(moved)+sidecarSuffix && it.IsOrphan(): // it went along, before its turn
			require.ErrorIs(t, it.RemoveOrphan(), ErrGone)
		case it.IsOrphan():
			orphans++
			require.NoError(t, it.RemoveOrphan())
			require.ErrorIs(t, it.RemoveOrphan(), ErrGone)
		case it.IsSidecar():
			require.ErrorIs(t, it.RemoveOrphan(), ErrGone, "its entry is there")
		case it.Name == filepath.Base(moved):
			require.NoError(t, it.MoveTo(to))
		}
	})
	require.Equal(t, 1, orphans)
	require.Equal(t, []string{longName("b")}, list(t, d))
	consistent(t, d)
	for _, name := range []string{filepath.Base(moved), filepath.Base(moved) + ".n"} {
		_, err := os.Lstat(filepath.Join(away, name))
		require.NoError(t, err)
	}
	touch(t, d, longName("c"), "another")
	scan(t, v, func(it *Item) {
		if it.Name == filepath.Base(moved) {
			require.Error(t, it.MoveTo(to), "nothing is written over")
		}
	})
	require.Len(t, list(t, d), 2)
}

// An id is given to an empty directory, and to no other.
func TestGiveDirID(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	sub := mkdir(t, d, "sub")
	fd := sub.Fd()
	require.NoError(t, removexattr(fd, DirXattr))
	require.NoError(t, v.GiveDirID(fd))
	raw, err := StoredDirID(fd)
	require.NoError(t, err)
	require.NoError(t, v.CheckDirID(raw))
	touch(t, openDir(t, d, "sub"), "file", "x")
	require.NoError(t, removexattr(fd, DirXattr))
	require.ErrorIs(t, v.GiveDirID(fd), crypt.ErrDamaged)
	locked, err := Open(v.Path())
	require.NoError(t, err)
	defer locked.Close()
	require.ErrorIs(t, locked.GiveDirID(fd), ErrLocked)
}

// One copy of the settings makes the other, and only a good one does.
func TestCopySettings(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	main, backup := filepath.Join(v.Path(), SettingsFile), filepath.Join(v.Path(), BackupFile)
	require.ErrorIs(t, v.CopySettings(SettingsFile, BackupFile, false), os.ErrExist)
	require.NoError(t, os.Remove(backup))
	require.NoError(t, v.CopySettings(SettingsFile, BackupFile, false))
	a, err := os.ReadFile(main)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(main, a[:len(a)/2], 0o600))
	require.ErrorIs(t, v.CopySettings(SettingsFile, BackupFile, true), crypt.ErrDamaged)
	b, err := os.ReadFile(backup)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(b), settingsComment))
	require.Equal(t, a, b)
}
