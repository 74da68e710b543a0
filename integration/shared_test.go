package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// TestSharedCalls: the files of a volume whose envelope is shared, KMSFS_TEST_FILES or
// 5,000 of them, are made, opened and rekeyed with 20 KMS requests each, at most. So it
// is with 20,000 too, which takes longer.
func TestSharedCalls(t *testing.T) {
	t.Parallel()
	files := 5000
	if n, err := strconv.Atoi(os.Getenv("KMSFS_TEST_FILES")); err == nil {
		files = n
	}
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first, "--envelope", "shared")
	v.Mount()
	made := kms.During(func() {
		for i := range files {
			if i%1000 == 0 {
				require.NoError(t, os.Mkdir(v.Path(fmt.Sprint(i/1000)), 0o755))
			}
			require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i/1000), fmt.Sprint(i)), fmt.Append(nil, i), 0o600))
		}
	})
	require.LessOrEqual(t, len(made), 20, "%v", made)
	v.Remount() // every cache is empty
	read := func() {
		e.Shell(`cat "$1"/*/* | wc -c`, v.Mnt)
	}
	opened := kms.During(read)
	require.LessOrEqual(t, len(opened), 20, "%v", opened)
	v.Umount()

	out := e.Must("rekey", v.Dir, "--to", second, "--dry-run")
	require.Contains(t, out, "intermediate keys")
	moved := kms.During(func() { e.Must("rekey", v.Dir, "--to", second, "--yes") })
	require.LessOrEqual(t, len(moved), 20, "%v", moved)
	require.Equal(t, map[string]int{second: files}, v.KeysOf())
	kms.SetState(first, kmstest.Disabled)
	v.Mount()
	for i := 0; i < files; i += files / 10 {
		got, err := os.ReadFile(v.Path(fmt.Sprint(i/1000), fmt.Sprint(i)))
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(i), string(got))
	}
	v.Damaged() // nothing is, but to compare it all again would take long
	v.Umount()
}

// TestSharedMainFlow: a real tree goes through all that a volume lives through: copied
// in, rekeyed live, opened in a second region, without the first, exported, stripped of
// its headers, restored and checked; an operator who can't read moves it.
func TestSharedMainFlow(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	first, second, abroad := kms.NewKey(), kms.NewKey(), kms.CreateKey("eu-west-1")
	v := e.Init("volume", "--key", first, "--envelope", "shared")
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	e.Do("cp", "-a", tree, v.Path("tree"))
	e.Must("rekey", v.Dir, "--to", second, "--yes") // live
	harness.Same(t, tree, v.Path("tree"))
	require.NoError(t, os.WriteFile(v.Path("late"), []byte("late"), 0o600))
	counts := v.KeysOf()
	require.Zero(t, counts[first])
	v.Umount()

	e.Must("rekey", v.Dir, "--add", abroad, "--verify", "--yes")
	e.Must("rekey", v.Dir, "--remove", second, "--yes")
	kms.SetState(second, kmstest.Disabled)
	v.Mount()
	harness.Same(t, tree, v.Path("tree"))
	v.Umount()

	export := filepath.Join(e.Root, "headers")
	e.Must("headers", "export", v.Dir, export)
	e.Shell(`find "$1" -type f ! -name 'kmsfs.*' -exec setfattr -x user.kmsfs {} +`, v.Dir)
	require.Zero(t, v.KeysOf()[abroad])
	e.Must("headers", "import", v.Dir, export, "--yes")
	calls := kms.During(func() { e.Must("fsck", v.Dir, "--data") })
	require.LessOrEqual(t, len(calls), 6, "a check asks once for each intermediate key: %v", calls)

	last := kms.CreateKey("eu-west-1")
	operator := kms.AddPrincipal("operator", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo", "DescribeKey"}})
	e.ActAs(kms, operator)
	moved := kms.During(func() { e.Must("rekey", v.Dir, "--to", last, "--yes") })
	require.LessOrEqual(t, len(moved), 10, "%v", moved)
	e.Refused(statusRefused, []string{"kms:Decrypt"}, "mount", v.Dir, v.Mnt)
	e.ActAs(kms, kms.Admin())
	require.Contains(t, e.Must("status", v.Dir), "shared envelope")
	v.Mount()
	harness.Same(t, tree, v.Path("tree"))
	require.Equal(t, "late", string(harness.ReadAt(t, v.Path("late"), 0, 10)))
}

// TestSharedAttacks: what the holder of the backing directory can do to the headers of a
// shared volume opens nothing, whether the files that he takes from are open or not, and
// hurts no other file.
func TestSharedAttacks(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	key := localKey(e, "one")
	v := e.Init("volume", "--key", key, "--names", "plain", "--envelope", "shared")
	v.Damaged()
	alien := e.Init("alien", "--key", key, "--names", "plain", "--envelope", "shared")
	perFile := e.Init("per-file", "--key", key, "--names", "plain")
	content := harness.Noise(5000)
	write := func(v *harness.Volume, names ...string) {
		v.Mount()
		for _, name := range names {
			require.NoError(t, os.WriteFile(v.Path(name), content, 0o600))
		}
		v.Umount()
	}
	write(v, "other") // under an intermediate key of its own, for it is another mount
	write(alien, "file")
	write(perFile, "file")
	rows := map[string]func(h *crypt.Header) *crypt.Header{
		"intermediate id of another": func(h *crypt.Header) *crypt.Header {
			copy(h.File[:14], parsed(t, v, "other").File[:14])
			return h
		},
		"intermediate id flipped":         func(h *crypt.Header) *crypt.Header { h.File[0] ^= 1; return h },
		"number flipped":                  func(h *crypt.Header) *crypt.Header { h.File[14] ^= 0x40; return h },
		"blob of another":                 func(h *crypt.Header) *crypt.Header { h.Copies = parsed(t, v, "other").Copies; return h },
		"blob of another volume":          func(h *crypt.Header) *crypt.Header { h.Copies = parsed(t, alien, "file").Copies; return h },
		"blob of a volume per file":       func(h *crypt.Header) *crypt.Header { h.Copies = parsed(t, perFile, "file").Copies; return h },
		"flag stripped":                   func(h *crypt.Header) *crypt.Header { h.Shared = false; return h },
		"header of a neighbour":           func(*crypt.Header) *crypt.Header { return parsed(t, v, "neighbour") },
		"header of another":               func(*crypt.Header) *crypt.Header { return parsed(t, v, "other") },
		"header of another volume":        func(*crypt.Header) *crypt.Header { return parsed(t, alien, "file") },
		"the same, with this volume's id": func(h *crypt.Header) *crypt.Header { a := parsed(t, alien, "file"); a.Volume = h.Volume; return a },
	}
	var names []string
	for name := range rows {
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	write(v, append(names, "neighbour")...)
	for name, edit := range rows {
		at := strings.ReplaceAll(name, " ", "-")
		raw, err := edit(parsed(t, v, at)).Marshal()
		require.NoError(t, err)
		setHeader(t, filepath.Join(v.Dir, at), raw)
	}
	check := func() {
		for _, name := range names {
			fd, err := harness.Open(v.Path(name), unix.O_RDONLY, 0)
			if err == nil { // of a neighbour: it opens, and no block does
				_, err = unix.Pread(fd, make([]byte, 100), 0)
				require.NoError(t, unix.Close(fd))
			}
			require.ErrorIs(t, err, unix.EBADMSG, name)
		}
	}
	v.Mount()
	check()
	for _, name := range []string{"other", "neighbour"} { // their intermediate keys are in memory now
		got, err := os.ReadFile(v.Path(name))
		require.NoError(t, err)
		require.True(t, bytes.Equal(content, got), name)
	}
	check()
	for _, name := range names {
		deletable(t, v, name)
	}
	v.Umount()
	setHeader(t, filepath.Join(perFile.Dir, "file"), func() []byte {
		h := parsed(t, perFile, "file")
		h.Shared = true
		raw, err := h.Marshal()
		require.NoError(t, err)
		return raw
	}())
	perFile.Damaged()
	perFile.Mount()
	_, err := harness.Open(perFile.Path("file"), unix.O_RDONLY, 0)
	require.ErrorIs(t, err, unix.EBADMSG, "the flag added")
}

func parsed(t *testing.T, v *harness.Volume, name string) *crypt.Header {
	t.Helper()
	h, err := harness.HeaderOf(filepath.Join(v.Dir, name))
	require.NoError(t, err)
	require.NotNil(t, h, name)
	return h
}
