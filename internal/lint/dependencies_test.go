package lint

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// docs/DEPENDENCIES.md names every module that go.mod asks for by name or as a tool,
// with where it is used and what for; and what else the program links. It names no other.
func TestDependenciesAreExplained(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("..", "..", "docs", "DEPENDENCIES.md"))
	require.NoError(t, err)
	use, by := map[string]string{}, map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.+) \\|$").FindAllStringSubmatch(string(raw), -1) {
		where, why, both := strings.Cut(m[2], " | ")
		if both {
			require.NotEmpty(t, why)
			use[m[1]] = where
		} else {
			by[m[1]] = true
		}
	}
	linked := modules(t, "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", "./cmd/kmsfs")
	direct := modules(t, "list", "-m", "-f", "{{if not (or .Indirect .Main)}}{{.Path}}{{end}}", "all")
	tools := modules(t, "list", "-f", "{{with .Module}}{{.Path}}{{end}}", "tool")
	require.Greater(t, len(tools), 1)
	for _, m := range direct {
		want := "tests"
		if slices.Contains(linked, m) {
			want = "program"
		}
		require.Equal(t, want, use[m], "docs/DEPENDENCIES.md on %s", m)
		delete(use, m)
	}
	for _, m := range tools {
		require.Equal(t, "tools", use[m], "docs/DEPENDENCIES.md on %s", m)
		delete(use, m)
	}
	require.Empty(t, use, "docs/DEPENDENCIES.md names modules that go.mod does not ask for")
	for _, m := range linked {
		require.True(t, by[m] || slices.Contains(direct, m), "docs/DEPENDENCIES.md says nothing of %s, which is linked", m)
		delete(by, m)
	}
	require.Empty(t, by, "docs/DEPENDENCIES.md names modules that are not linked")
}

// modules asks the go command.
func modules(t *testing.T, args ...string) (paths []string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Stderr = top(t), os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err)
	for path := range strings.FieldsSeq(string(out)) {
		if path != module && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	return paths
}
