package keys

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

func newTestLocal(t testing.TB, names ...string) *Local {
	t.Helper()
	l := NewLocal(filepath.Join(t.TempDir(), "a", "keys"))
	for _, n := range names {
		require.NoError(t, l.Create(n))
	}
	return l
}

func TestKeyringFiles(t *testing.T) {
	l := newTestLocal(t)
	list, err := l.List()
	require.NoError(t, err, "a keyring that does not exist holds no keys")
	require.Empty(t, list)
	require.NoError(t, l.Create("local:b"))
	require.NoError(t, l.Create("local:a"))
	dir, err := os.Stat(l.dir)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o700), dir.Mode().Perm())
	st, err := os.Stat(l.Path("local:a"))
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), st.Mode().Perm())
	require.NoError(t, l.Disable("local:b"))

	list, err = l.List()
	require.NoError(t, err)
	require.Len(t, list, 2)
	require.Equal(t, "local:a", list[0].Key)
	require.Equal(t, "Enabled", list[0].State)
	require.Equal(t, "Disabled", list[1].State)
	require.NotEqual(t, list[0].ID, list[1].ID)
	require.Equal(t, l.Path("local:b"), list[1].Path)
	names, err := os.ReadDir(l.dir)
	require.NoError(t, err)
	require.Len(t, names, 2, "no temporary file is left")
}

func TestCreateNeverReplaces(t *testing.T) {
	l := newTestLocal(t, "local:a")
	before, err := os.ReadFile(l.Path("local:a"))
	require.NoError(t, err)
	require.ErrorIs(t, l.Create("local:a"), fs.ErrExist)
	after, err := os.ReadFile(l.Path("local:a"))
	require.NoError(t, err)
	require.Equal(t, before, after)
	for _, name := range []string{"a", "local:", "local:../a", "local:x/y", "local:.hidden", arnA} {
		require.Error(t, l.Create(name), name)
	}
}

// TestDisableKeepsTheKey: what was wrapped opens again once enabled.
func TestDisableKeepsTheKey(t *testing.T) {
	l := newTestLocal(t, "local:a")
	k, blob, err := l.GenerateDataKey(context.Background(), "local:a", testContext)
	require.NoError(t, err)
	defer k.Wipe()
	require.NoError(t, l.Disable("local:a"))
	_, err = l.Decrypt(context.Background(), "local:a", testContext, blob)
	require.ErrorIs(t, err, crypt.ErrKeyDisabled)
	require.NoError(t, l.Enable("local:a"))
	again, err := l.Decrypt(context.Background(), "local:a", testContext, blob)
	require.NoError(t, err)
	defer again.Wipe()
	require.True(t, k.Equal(again))
	require.ErrorIs(t, l.Disable("local:none"), crypt.ErrKeyNotFound)
}

// TestExposedKeysAreRefused: a key that others can read or replace protects nothing.
func TestExposedKeysAreRefused(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"group may read": func(p string) error { return os.Chmod(p, 0o640) },
		"all may read":   func(p string) error { return os.Chmod(p, 0o604) },
		"group may write": func(p string) error {
			return os.Chmod(p, 0o620)
		},
		"another's file": func(p string) error { return os.Chown(p, 12345, -1) },
		"a FIFO": func(p string) error {
			return errors.Join(os.Remove(p), syscall.Mkfifo(p, 0o600))
		},
		"a directory": func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newTestLocal(t, "local:a")
			require.NoError(t, spoil(l.Path("local:a")))
			_, _, err := l.GenerateDataKey(context.Background(), "local:a", nil)
			requireKind(t, err, KindRejected, opGenerate, "local:a")
			list, err := l.List()
			require.NoError(t, err)
			require.Error(t, list[0].Err)
		})
	}
	l := newTestLocal(t, "local:a")
	require.NoError(t, os.Symlink(l.Path("local:a"), l.Path("local:b")))
	_, _, err := l.GenerateDataKey(context.Background(), "local:b", nil)
	require.Error(t, err, "symlinks are not followed")
	require.NoError(t, os.Chmod(l.dir, 0o777))
	require.ErrorContains(t, l.Create("local:c"), "written by others")
}

// TestDamagedKeyFiles: no single changed, missing or added byte goes unnoticed,
// and none of it is reported as damage of a file's data.
func TestDamagedKeyFiles(t *testing.T) {
	l := newTestLocal(t, "local:a")
	good, err := os.ReadFile(l.Path("local:a"))
	require.NoError(t, err)
	for i := range good {
		for _, bad := range [][]byte{
			append(append(bytes.Clone(good[:i]), good[i]^0x01), good[i+1:]...),
			append(append(bytes.Clone(good[:i]), good[i]^0x20), good[i+1:]...),
			good[:i], append(append(bytes.Clone(good[:i]), ' '), good[i:]...),
		} {
			_, err := parseKeyFile(bad)
			require.Error(t, err, "%d", i)
		}
	}
	_, err = parseKeyFile(append(bytes.Clone(good), good...))
	require.Error(t, err)
	require.NoError(t, os.WriteFile(l.Path("local:a"), good[:40], 0o600))
	_, err = l.Decrypt(context.Background(), "local:a", nil, nil)
	requireKind(t, err, KindRejected, opDecrypt, "local:a")
	require.NotErrorIs(t, err, crypt.ErrDamaged)
}

// FuzzKeyFile: what parses is what marshal writes.
func FuzzKeyFile(f *testing.F) {
	l := newTestLocal(f, "local:a")
	good, err := os.ReadFile(l.Path("local:a"))
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(strings.Repeat(" ", 4)))
	f.Fuzz(func(t *testing.T, line []byte) {
		k, err := parseKeyFile(line)
		if err != nil {
			return
		}
		defer k.wipe()
		again, err := k.marshal()
		require.NoError(t, err)
		require.Equal(t, line, again)
	})
}

// TestEveryByteOfABlobCounts.
func TestEveryByteOfABlobCounts(t *testing.T) {
	l := newTestLocal(t, "local:a")
	k, blob, err := l.GenerateDataKey(context.Background(), "local:a", testContext)
	require.NoError(t, err)
	k.Wipe()
	for i := range blob {
		bad := bytes.Clone(blob)
		bad[i] ^= 1
		_, err := l.Decrypt(context.Background(), "local:a", testContext, bad)
		require.Error(t, err, "byte %d", i)
		_, err = l.Decrypt(context.Background(), "local:a", testContext, blob[:i])
		requireKind(t, err, KindBadBlob, opDecrypt, "local:a")
	}
}

// TestKeyOfTheSameName: a key file restored from elsewhere under the old name is
// told apart from damage.
func TestKeyOfTheSameName(t *testing.T) {
	l := newTestLocal(t, "local:a")
	k, blob, err := l.GenerateDataKey(context.Background(), "local:a", nil)
	require.NoError(t, err)
	k.Wipe()
	require.NoError(t, os.Remove(l.Path("local:a")))
	require.NoError(t, l.Create("local:a"))
	_, err = l.Decrypt(context.Background(), "local:a", nil, blob)
	requireKind(t, err, KindIncorrectKey, opDecrypt, "local:a")
}
