package posix

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

// TestAsUser plays the scenes that need no privilege as a user who mounts his own
// directories through fusermount3, for himself and for all.
func TestAsUser(t *testing.T) {
	if harness.Unprivileged() {
		t.Fatal("it starts itself")
	}
	said := harness.New(t).AsUser("^(TestScenes|TestForbidden)$")
	require.Contains(t, said, "--- PASS: TestForbidden ")
	for _, sc := range scenes {
		name := strings.ReplaceAll(sc.name, " ", "_")
		for _, where := range []string{"alone", "shared"} {
			require.Equal(t, !sc.root, strings.Contains(said, "--- PASS: TestScenes/"+name+"/"+where+" "), "%s, mounted %s:\n%s", name, where, said)
		}
	}
}

// userPlaces are mounts of a user: his own, and one that others may use as well, for
// which the kernel enforces modes beside the backing store.
func userPlaces(t *testing.T, e *harness.Env) map[string]string {
	t.Helper()
	places := map[string]string{}
	for where, args := range map[string][]string{"alone": nil, "shared": {"--allow-other"}} {
		e.Must("key", "create", where)
		v := e.Init(where, "--key", "local:"+where)
		require.NoError(t, os.Chmod(filepath.Dir(v.Mnt), 0o755))
		v.Options(args...)
		v.Mount()
		places[where] = v.Mnt
	}
	return places
}

// forbidding are modes that keep an owner from some of what he might do; directories
// that can't be listed and searched keep him from all that is in them, and a rekey too.
var (
	forbidding = []os.FileMode{0o000, 0o200, 0o400, 0o444, 0o111, 0o644}
	closed     = []os.FileMode{0o000, 0o333, 0o444}
)

// TestForbidden has a tree whose modes forbid its owner nearly all of it moved to
// another key, and read after a remount. (TestAsUser runs it as one whom modes
// bind.)
func TestForbidden(t *testing.T) {
	e := harness.New(t)
	for _, key := range []string{"before", "after"} {
		e.Must("key", "create", key)
	}
	v := e.Init("volume", "--key", "local:before")
	v.Mount()
	dirs := append([]os.FileMode{0o555, 0o700}, closed...)
	for _, mode := range dirs {
		forbid(t, v.Path(fmt.Sprintf("d%03o", mode)), mode)
	}
	v.Umount()
	if harness.Unprivileged() { // what it can't reach it names, and a second run resumes
		e.Refused(5, []string{"permission denied"}, "rekey", v.Dir, "--to", "local:after", "--yes")
	}
	v.Mount()
	for _, mode := range dirs {
		requireMode(t, v.Path(fmt.Sprintf("d%03o", mode)), mode)
		require.NoError(t, os.Chmod(v.Path(fmt.Sprintf("d%03o", mode)), 0o700|mode))
	}
	v.Umount()
	e.Must("rekey", v.Dir, "--to", "local:after", "--yes")
	v.Mount()
	for _, mode := range dirs {
		unforbid(t, v.Path(fmt.Sprintf("d%03o", mode)))
	}
	require.Equal(t, map[string]int{"local:after": len(dirs) * len(forbidding)}, v.KeysOf())
	v.Umount()
	e.Must("fsck", v.Dir, "--data") // it leaves modes alone, so now that all can be read
}

// forbid makes a directory with a file of each mode, and sets its own.
func forbid(t *testing.T, dir string, mode os.FileMode) {
	t.Helper()
	require.NoError(t, os.Mkdir(dir, 0o700))
	for _, mode := range forbidding {
		name := filepath.Join(dir, fmt.Sprintf("f%03o", mode))
		require.NoError(t, os.WriteFile(name, []byte(name), 0o600))
		require.NoError(t, os.Chmod(name, mode))
	}
	require.NoError(t, os.Chmod(dir, mode))
}

// unforbid finds all as it was left, and reads it.
func unforbid(t *testing.T, dir string) {
	t.Helper()
	for _, mode := range forbidding {
		name := filepath.Join(dir, fmt.Sprintf("f%03o", mode))
		requireMode(t, name, mode)
		require.NoError(t, os.Chmod(name, 0o600))
		got, err := os.ReadFile(name)
		require.NoError(t, err)
		require.Equal(t, name, string(got))
	}
	require.NoError(t, os.Chmod(dir, 0o700))
}

func requireMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, want, info.Mode().Perm(), path)
}
