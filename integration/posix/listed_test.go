package posix

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestEveryTestIsThere: what POSIX.md names as a test is one, and it names every scene.
func TestEveryTestIsThere(t *testing.T) {
	text, err := os.ReadFile("../POSIX.md")
	require.NoError(t, err)
	_, table, found := strings.Cut(string(text), "## Which test holds what")
	require.True(t, found)
	table, _, found = strings.Cut(table, "\n## ")
	require.True(t, found)
	tests := testsOf(t, "../..")
	for _, m := range regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(table, -1) {
		require.True(t, tests[m[1]], "%s does not exist", m[1])
	}
	var named []string
	for _, m := range regexp.MustCompile(`\*([a-z' ]+)\*`).FindAllStringSubmatch(table, -1) {
		named = append(named, m[1])
	}
	for _, sc := range scenes {
		require.Contains(t, named, sc.name, "a scene that POSIX.md does not name")
	}
	for _, name := range named {
		require.True(t, slices.ContainsFunc(scenes, func(sc scene) bool { return sc.name == name }), "%s is not a scene", name)
	}
}

// testsOf finds the tests of a tree by name.
func testsOf(t *testing.T, root string) map[string]bool {
	t.Helper()
	tests := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		code, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`).FindAllSubmatch(code, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	require.NoError(t, err)
	require.NotEmpty(t, tests)
	return tests
}
