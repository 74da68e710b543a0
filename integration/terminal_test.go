package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

// TestNothingSteersATerminal: whoever writes the backing directory chooses names, and
// whom kmsfs.lock names. None of it reaches a terminal as a control sequence, or as a line
// that kmsfs seems to say.
func TestNothingSteersATerminal(t *testing.T) {
	const evil = "\x1b[2J\x1b]0;x\a\u009b31m\nkmsfs: all is well"
	e := harness.New(t)
	one, two := localKey(e, "one"), localKey(e, "two")
	v := e.Init("volume", "--key", one, "--names", "plain")
	v.Damaged()
	v.Mount()
	require.NoError(t, os.WriteFile(v.Path("good"), []byte("x"), 0o600))
	v.Umount()
	require.NoError(t, os.WriteFile(filepath.Join(v.Dir, "headless"+evil), []byte("planted"), 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(v.Dir, "dir"+evil), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(v.Dir, "dir"+evil, "x"), []byte("planted"), 0o600))
	said := 0
	check := func(args ...string) {
		t.Helper()
		r := e.Kmsfs(args...)
		for _, text := range []string{r.Stdout, r.Stderr} {
			require.False(t, strings.ContainsAny(text, "\x1b\a"), "%q says %q", args, text)
			if !slices.Contains(args, "--json") {
				require.False(t, strings.ContainsRune(text, '\u009b'), "%q says %q", args, text)
			}
			require.NotContains(t, text, "\nkmsfs: all is well", "%q", args)
			said += strings.Count(text, "all is well")
		}
	}
	for _, args := range [][]string{
		{"status", v.Dir}, {"status", "--json", v.Dir}, {"fsck", "--data", v.Dir}, {"fsck", "--json", v.Dir},
		{"rekey", v.Dir, "--to", two, "--yes"}, {"rekey", v.Dir, "--to", one, "--yes", "--json"},
		{"inspect", filepath.Join(v.Dir, "headless"+evil)}, {"inspect", filepath.Join(v.Dir, "none"+evil)},
		{"headers", "export", v.Dir, filepath.Join(e.Root, "export")},
		{"mount", v.Dir, filepath.Join(e.Root, "none"+evil)}, {"umount", filepath.Join(e.Root, "none"+evil)},
	} {
		check(args...)
	}
	require.Greater(t, said, 8, "it is not about these names")

	lock := filepath.Join(v.Dir, "kmsfs.lock")
	require.NoError(t, os.WriteFile(lock, []byte(`{"pid":1,"host":"h\u001b[2J\nkmsfs: all is well","boot_id":"b\u001b","owner":"o\u001b[2J\nkmsfs: all is well"}`), 0o600))
	f, err := os.Open(lock)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
	said = 0
	for _, args := range [][]string{
		{"status", v.Dir}, {"mount", v.Dir, v.Mnt}, {"fsck", v.Dir}, {"fsck", "--repair", v.Dir},
		{"rekey", v.Dir, "--to", two, "--yes"}, {"headers", "import", v.Dir, filepath.Join(e.Root, "export")},
	} {
		check(args...)
	}
	require.Greater(t, said, 3, "nobody was told who has the volume")
}
