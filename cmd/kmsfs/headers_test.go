package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A stored path never takes a second line, and never speaks to the terminal.
func TestPrintable(t *testing.T) {
	for path, want := range map[string]string{
		"dir/file": "dir/file", "mit ü": "mit ü", "YuR3-_": "YuR3-_",
		"a\nkmsfs: done": `"a\nkmsfs: done"`, "\x1b[2J": `"\x1b[2J"`, "\xff": `"\xff"`,
	} {
		require.Equal(t, want, printable(path))
		require.NotContains(t, printable(path), "\n")
		require.False(t, strings.ContainsRune(printable(path), 0x1b))
	}
}
