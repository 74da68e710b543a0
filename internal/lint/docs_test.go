package lint

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// testsOf are the tests of each directory, as "dir TestName".
func testsOf(t *testing.T, top string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	definition := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	require.NoError(t, filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		raw, err := os.ReadFile(path)
		dir, _ := filepath.Rel(top, filepath.Dir(path))
		for _, m := range definition.FindAllStringSubmatch(string(raw), -1) {
			found[dir+" "+m[1]] = true
		}
		return err
	}))
	return found
}

// Each promise of SECURITY.md names its tests, by room and name, and they are there.
func TestSecurityNamesItsTests(t *testing.T) {
	top := filepath.Join("..", "..")
	raw, err := os.ReadFile(filepath.Join(top, "SECURITY.md"))
	require.NoError(t, err)
	doc, tests := string(raw), testsOf(t, top)
	rooms := map[string]bool{}
	for test := range tests {
		dir, _, _ := strings.Cut(test, " ")
		rooms[dir] = true
	}
	room, named := "", 0
	for _, word := range regexp.MustCompile("`Test\\w+`|[a-z]+(/[a-z]+)*").FindAllString(doc, -1) {
		if rooms[word] {
			room = word
		}
		if name := strings.Trim(word, "`"); name != word {
			named++
			require.True(t, tests[room+" "+name], "SECURITY.md names %s in %s", name, room)
		}
	}
	require.Greater(t, named, 150)

	_, table, found := strings.Cut(doc, "| claim | test |\n|---|---|\n")
	require.True(t, found)
	rows := 0
	for line := range strings.Lines(table) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		rows++
		require.Regexp(t, "`Test\\w+`[^|]*\\|$", strings.TrimSpace(line), "a claim without a test")
	}
	require.Greater(t, rows, 50)
}
