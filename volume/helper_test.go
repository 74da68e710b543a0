package volume

import (
	"bytes"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

func TestMain(m *testing.M) {
	if job := os.Getenv(childEnv); job != "" {
		os.Exit(childMain(job))
	}
	unix.Umask(0) // as the daemon does
	os.Exit(m.Run())
}

// testKey is a volume key with the settings that go with it.
type testKey struct {
	settings Settings
	secrets  *crypt.Secrets
	data     *crypt.Key
}

func newTestKey(t testing.TB, names NamesMode) *testKey {
	t.Helper()
	data, err := crypt.RandomKey()
	require.NoError(t, err)
	t.Cleanup(data.Wipe)
	id, err := crypt.NewIdentity(crypt.VolumeID(bytes.Repeat([]byte{5}, 16)), crypt.UseVolume, 12)
	require.NoError(t, err)
	secrets, err := crypt.Commit(&id, data)
	require.NoError(t, err)
	t.Cleanup(secrets.Wipe)
	h := &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}
	raw, err := h.Marshal()
	require.NoError(t, err)
	return &testKey{
		settings: Settings{Format: Format, ID: id.Volume, BlockSize: 4096, Names: names, Keys: []string{"local:test"}, Header: raw},
		secrets:  secrets, data: data,
	}
}

// clone are secrets that Unlock may keep.
func (k *testKey) clone(t testing.TB) *crypt.Secrets {
	t.Helper()
	s, err := k.secrets.Clone()
	require.NoError(t, err)
	return s
}

// newVolume makes and unlocks a volume in a fresh directory.
func newVolume(t testing.TB, names NamesMode) (*Volume, *testKey) {
	t.Helper()
	k := newTestKey(t, names)
	dir := filepath.Join(t.TempDir(), "vol")
	require.NoError(t, Create(dir, k.settings, k.secrets))
	return openVolume(t, dir, k), k
}

func openVolume(t testing.TB, dir string, k *testKey) *Volume {
	t.Helper()
	v, err := Open(dir)
	require.NoError(t, err)
	require.NoError(t, v.Unlock(k.clone(t)))
	t.Cleanup(func() { v.Close() })
	return v
}

func root(t testing.TB, v *Volume) *Dir {
	t.Helper()
	d, err := v.Root()
	require.NoError(t, err)
	t.Cleanup(d.Close)
	return d
}

func openDir(t testing.TB, d *Dir, name string) *Dir {
	t.Helper()
	sub, err := d.OpenDir(name)
	require.NoError(t, err)
	t.Cleanup(sub.Close)
	return sub
}

func mkdir(t testing.TB, d *Dir, name string) *Dir {
	t.Helper()
	require.NoError(t, d.Mkdir(name, 0o755))
	return openDir(t, d, name)
}

// touch makes a file whose stored bytes are content, without a header.
func touch(t testing.TB, d *Dir, name, content string) {
	t.Helper()
	fd, err := d.Create(name, unix.O_RDWR|unix.O_EXCL, 0o644)
	require.NoError(t, err, "creating a name of %d bytes", len(name))
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(content))
	require.NoError(t, err)
}

// content reads a file's stored bytes; "" and false if it is not there.
func content(t testing.TB, d *Dir, name string) (string, bool) {
	t.Helper()
	fd, err := d.Open(name, unix.O_RDONLY)
	if err == unix.ENOENT {
		return "", false
	}
	require.NoError(t, err)
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	require.NoError(t, err)
	return string(buf[:n]), true
}

// list are the plain names, sorted, without "." and "..".
func list(t testing.TB, d *Dir) []string {
	t.Helper()
	e, err := d.Entries()
	require.NoError(t, err)
	defer e.Close()
	names := []string{}
	var entry Entry
	for {
		ok, err := e.Next(&entry)
		require.NoError(t, err)
		if !ok {
			sort.Strings(names)
			return names
		}
		if !isDot(entry.Name) {
			names = append(names, entry.Name)
		}
	}
}

// stored are the names as they stand on disk, sorted, without our own files at
// the root.
func stored(t testing.TB, d *Dir) []string {
	t.Helper()
	var e Entries
	require.NoError(t, e.open(d.fd))
	defer e.Close()
	names := []string{}
	for {
		raw, ok, err := e.nextRaw()
		require.NoError(t, err)
		if !ok {
			sort.Strings(names)
			return names
		}
		own := d.root && strings.HasPrefix(raw.name, ownPrefix) && !strings.HasPrefix(raw.name, longPrefix)
		if !isDot(raw.name) && !own {
			names = append(names, raw.name)
		}
	}
}

// consistent checks that every long entry has its sidecar and every sidecar its
// entry.
func consistent(t testing.TB, d *Dir) {
	t.Helper()
	names := map[string]bool{}
	for _, s := range stored(t, d) {
		names[s] = true
	}
	for s := range names {
		if isLong(s) {
			_, err := d.readSidecar(s)
			require.NoError(t, err, "the sidecar of %s", s)
		}
		if isSidecar(s) {
			require.True(t, names[strings.TrimSuffix(s, sidecarSuffix)], "orphan %s", s)
		}
	}
}

// storedPath is where an entry lies, for attacks from outside.
func storedPath(t testing.TB, d *Dir, name string) string {
	t.Helper()
	entry, err := d.existing(name)
	require.NoError(t, err)
	return filepath.Join(dirPath(t, d), entry)
}

func dirPath(t testing.TB, d *Dir) string {
	t.Helper()
	p, err := os.Readlink(procPath(d.fd))
	require.NoError(t, err)
	return p
}

// openFDs counts this process's descriptors. There may be fewer than before: what an earlier
// test let go of is closed by the garbage collector.
func openFDs(t testing.TB) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(l)
}

const long = 200 // a name of so many bytes is long

func longName(c string) string { return strings.Repeat(c, long) }
