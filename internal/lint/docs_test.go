package lint

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Each promise of SECURITY.md names its test, and the test is there.
func TestSecurityNamesItsTests(t *testing.T) {
	top := filepath.Join("..", "..")
	doc, err := os.ReadFile(filepath.Join(top, "SECURITY.md"))
	require.NoError(t, err)
	var code strings.Builder
	require.NoError(t, filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			raw, rerr := os.ReadFile(path)
			code.Write(raw)
			err = rerr
		}
		return err
	}))
	named := regexp.MustCompile("`(Test[A-Za-z]+)`").FindAllStringSubmatch(string(doc), -1)
	require.Greater(t, len(named), 20)
	for _, m := range named {
		require.Contains(t, code.String(), "func "+m[1]+"(", "SECURITY.md names %s", m[1])
	}
}
