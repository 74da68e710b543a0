package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// service is one kind of key: how a world comes to it, and how to make keys.
type service struct {
	name string
	use  func(e *harness.Env) (newKey func() string)
}

var services = []service{
	{"local", func(e *harness.Env) func() string {
		names := []string{"first", "second", "third"}
		return func() string {
			name := names[0]
			names = names[1:]
			e.Must("key", "create", name)
			return "local:" + name
		}
	}},
	{"kmstest", func(e *harness.Env) func() string { return e.KMS().NewKey }},
	{"moto", func(e *harness.Env) func() string {
		newKey := e.Moto()
		return func() string { return newKey() }
	}},
}

// TestMainFlow is the whole main job: init, mount, copy a tree in, compare it,
// rekey, compare again, unmount; with each kind of key and of names.
func TestMainFlow(t *testing.T) {
	for _, s := range services {
		for _, names := range []string{"encrypted", "plain"} {
			t.Run(s.name+"/"+names, func(t *testing.T) {
				if s.name == "moto" && names == "plain" {
					heavy(t) // moto_server takes some 10 ms for a call
				}
				e := harness.New(t)
				newKey := s.use(e)
				first, second := newKey(), newKey()
				v := e.Init("volume", "--key", first, "--names", names)
				tree := sources(t, e)
				if s.name == "local" { // ACLs are there where the kernel enforces them
					v.Options("--allow-other")
					withACLs(e, tree)
				}
				v.Mount()
				mainFlow(t, v, tree, first, second)
			})
		}
	}
}

// TestMainFlowWholeTree is the same with the whole tree of the Go toolchain, on
// kmstest; with KMSFS_TEST_WHOLE=all on a local key and on moto_server too, which
// is slow to answer some 45,000 calls.
func TestMainFlowWholeTree(t *testing.T) {
	heavy(t)
	for _, s := range services {
		if s.name != "kmstest" && os.Getenv("KMSFS_TEST_WHOLE") != "all" {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			e := harness.New(t)
			newKey := s.use(e)
			first, second := newKey(), newKey()
			v := e.Init("volume", "--key", first)
			v.Damaged() // the main flow has compared it; once more would take half a minute
			v.Mount()
			mainFlow(t, v, filepath.Join(harness.GOROOT(t), "src"), first, second)
		})
	}
}

func mainFlow(t *testing.T, v *harness.Volume, source, first, second string) {
	e := v.Env
	tree := harness.Snapshot(t, source)
	e.Do("cp", "-a", source, v.Path("src"))
	v.Remount()
	tree.Holds(t, v.Path("src"))
	inspect(t, v, first)

	files := v.KeysOf()
	require.Zero(t, files[""], "files without a header")
	require.Zero(t, files[second])
	require.NotZero(t, files[first])
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	require.Equal(t, map[string]int{second: files[first]}, v.KeysOf(), "headers by key after the rekey")
	inspect(t, v, second)
	require.NoError(t, os.WriteFile(v.Path("live"), []byte("made on the live mount"), 0o600))

	v.Remount()
	tree.Holds(t, v.Path("src"))
	require.NoError(t, os.WriteFile(v.Path("after"), []byte("made after a new mount"), 0o600))
	for _, name := range []string{"live", "after"} {
		h, err := harness.HeaderOf(v.Stored(name))
		require.NoError(t, err)
		require.Len(t, h.Copies, 1)
		require.Equal(t, second, h.Copies[0].Key, name)
	}
}

// inspect looks at one stored file of the volume as a person would, who has no
// key and no credentials.
func inspect(t *testing.T, v *harness.Volume, key string) {
	t.Helper()
	plain := harness.Find(t, v.Path("src"), func(st *unix.Stat_t) bool { return st.Size > 4096 })
	content, err := os.ReadFile(plain)
	require.NoError(t, err)
	rel, err := filepath.Rel(v.Mnt, plain)
	require.NoError(t, err)
	stored := v.Stored(rel)
	raw, err := os.ReadFile(stored)
	require.NoError(t, err)
	for at := 0; at+32 <= len(content); at += 32 {
		require.False(t, bytes.Contains(raw, content[at:at+32]), "%s holds plaintext at %d", stored, at)
	}
	h, err := harness.HeaderOf(stored)
	require.NoError(t, err)

	stranger := harness.New(t)
	for _, args := range [][]string{{"inspect", stored}, {"inspect", "--json", stored}} {
		out := stranger.Must(args...)
		require.Contains(t, out, key)
		require.Contains(t, out, h.File.String())
		require.Contains(t, out, h.Volume.String())
	}
}

// sources is a tree of some 600 real files, with the things that the toolchain's
// own tree lacks: links, special files, attributes, odd names, holes.
func sources(t *testing.T, e *harness.Env) string {
	t.Helper()
	tree := e.Mkdir("tree")
	for _, dir := range []string{"encoding", "net"} {
		e.Do("cp", "-a", filepath.Join(harness.GOROOT(t), "src", dir), tree)
	}
	odd := filepath.Join(tree, "odd")
	require.NoError(t, os.Mkdir(odd, 0o2775))
	write := func(name string, size int, mode os.FileMode) string {
		path := filepath.Join(odd, name)
		require.NoError(t, os.WriteFile(path, harness.Noise(size), 0o600))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	for _, size := range []int{0, 1, 4095, 4096, 4097, 8192, 1 << 20, 3<<20 + 17} {
		write("size "+strings.Repeat("x", size%7)+string(rune('a'+size%26)), size, 0o640)
	}
	write(strings.Repeat("n", 255), 100, 0o600)
	write(strings.Repeat("ü", 127), 100, 0o600)
	write("line\nfeed \xff\xfe", 10, 0o000)
	write("-rf *", 10, 0o4755)
	linked := write("linked", 5000, 0o444)
	require.NoError(t, os.Link(linked, filepath.Join(tree, "encoding", "other name")))
	require.NoError(t, os.Symlink("../net/http/server.go", filepath.Join(odd, "symlink")))
	require.NoError(t, os.Symlink(strings.Repeat("long/", 600), filepath.Join(odd, "long symlink")))
	require.NoError(t, os.Symlink("nowhere \xff", filepath.Join(odd, "dangling")))
	require.NoError(t, unix.Mkfifo(filepath.Join(odd, "fifo"), 0o622))
	require.NoError(t, unix.Mknod(filepath.Join(odd, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	require.NoError(t, os.Chown(linked, 1234, 5678))
	require.NoError(t, unix.Setxattr(linked, "user.colour", []byte("blue"), 0))
	require.NoError(t, unix.Setxattr(odd, "user.empty", nil, 0))
	require.NoError(t, unix.Lsetxattr(linked, "trusted.mark", []byte{0, 1, 2}, 0))
	sparse := write("sparse", 0, 0o600)
	require.NoError(t, os.Truncate(sparse, 5<<20))
	harness.WriteAt(t, sparse, 3<<20+5, []byte("an island"))
	for path, ns := range map[string]int64{odd: 981173106_987654321, linked: -1_000_000_001} {
		ts := unix.NsecToTimespec(ns)
		require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
	return tree
}

func withACLs(e *harness.Env, tree string) {
	e.Do("setfacl", "-m", "u:1234:rw,g:77:r", filepath.Join(tree, "net", "http", "server.go"))
	e.Do("setfacl", "-m", "d:u:1234:rwx", filepath.Join(tree, "net", "http"))
}
