package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestReplaceLeavesOldOrNewAndNothingElse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	require.NoError(t, Replace(path, []byte("one"), 0o600))
	require.NoError(t, Replace(path, []byte("two"), 0o640))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "two", string(got))
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o640), fi.Mode())
	onlyEntries(t, dir, "f")
}

func TestReplaceIgnoresTheUmask(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "f")
	require.NoError(t, Replace(path, nil, 0o644))
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o644), fi.Mode())
}

func TestCreateKeepsWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	require.NoError(t, Create(path, []byte("one"), 0o600))
	err := Create(path, []byte("two"), 0o600)
	require.ErrorIs(t, err, fs.ErrExist)
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "one", string(got))
	onlyEntries(t, dir, "f")
}

func TestReplaceDoesNotFollowASymlink(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	require.NoError(t, os.WriteFile(outside, []byte("keep"), 0o600))
	path := filepath.Join(dir, "f")
	require.NoError(t, os.Symlink(outside, path))
	require.NoError(t, Replace(path, []byte("new"), 0o600))
	got, err := os.ReadFile(outside)
	require.NoError(t, err)
	require.Equal(t, "keep", string(got))
	fi, err := os.Lstat(path)
	require.NoError(t, err)
	require.True(t, fi.Mode().IsRegular())
}

func TestFailedReplaceLeavesNoTemporary(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "f", "full"), 0o700))
	require.Error(t, Replace(filepath.Join(dir, "f"), []byte("x"), 0o600))
	onlyEntries(t, dir, "f")
	require.Error(t, Replace(filepath.Join(dir, "none", "f"), nil, 0o600))
}

func TestReadAtRefusesWhatIsNotAFile(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "big"), make([]byte, 11), 0o600))
	for _, name := range []string{"fifo", "link", "big", "missing"} {
		_, err := ReadAt(fd, name, 10)
		require.Error(t, err, name)
	}
	_, err = ReadAt(fd, "missing", 10)
	require.True(t, errors.Is(err, fs.ErrNotExist))
	got, err := ReadAt(fd, "big", 11)
	require.NoError(t, err)
	require.Len(t, got, 11)
}

func onlyEntries(t *testing.T, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	require.NoError(t, err)
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	require.Equal(t, want, got)
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write := func(text string) *File {
		f, err := NewFile(path, 0o640)
		require.NoError(t, err)
		_, err = f.Write([]byte(text))
		require.NoError(t, err)
		return f
	}
	holds := func(want string) {
		t.Helper()
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, want, string(got))
		list, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, list, 1, "nothing else is left")
	}
	f := write("first")
	require.NoFileExists(t, path, "before the commit nobody sees it")
	require.NoError(t, f.Commit(false))
	holds("first")
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 0o640, info.Mode().Perm())
	require.ErrorIs(t, write("second").Commit(false), fs.ErrExist)
	holds("first")
	require.NoError(t, write("third").Commit(true))
	holds("third")
	write("fourth").Discard()
	holds("third")
	_, err = NewFile(filepath.Join(dir, "none", "file"), 0o600)
	require.ErrorIs(t, err, fs.ErrNotExist)
}
