package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDeparturesAreListed: POSIX.md names every test that may fail.
func TestDeparturesAreListed(t *testing.T) {
	text, err := os.ReadFile("../POSIX.md")
	require.NoError(t, err)
	for _, d := range departures {
		number := strings.TrimPrefix(d.test, "generic/")
		require.Regexp(t, `(?m)^\|[^|]*\b`+number+`\b[^|]*\|[^|]+\|`, string(text), "%s: %s", d.test, d.reason)
	}
}

// TestVerdict reads what check says in the end.
func TestVerdict(t *testing.T) {
	v, err := verdictOf([]byte("generic/001 1s\nRan: generic/001 generic/002 generic/003\nNot run: generic/002\nFailures: generic/003\nFailed 1 of 3 tests\n"))
	require.NoError(t, err)
	require.Equal(t, count{passed: 1, failed: 1}, v.count())
	v, err = verdictOf([]byte("Ran: generic/001\nPassed all 1 tests\n"))
	require.NoError(t, err)
	require.Equal(t, count{passed: 1}, v.count())
	_, err = verdictOf([]byte("generic/001 1s\ngeneric/002"))
	require.ErrorContains(t, err, "xfstests broke off")
}

// TestJudge: a failure without a reason is a mistake, and a reason without a failure.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		backing string
		v       verdict
		words   string
	}{
		{"ext4", verdict{ran: []string{"generic/001"}}, ""},
		{"ext4", verdict{ran: []string{"generic/001"}, failed: []string{"generic/001"}}, "generic/001 fails"},
		{"ext4", verdict{ran: []string{"generic/426"}, failed: []string{"generic/426"}}, ""},
		{"ext4", verdict{ran: []string{"generic/426"}}, "generic/426 does not fail any more"},
		{"ext4", verdict{ran: []string{"generic/426"}, notRun: []string{"generic/426"}}, ""},
		{"ext4", verdict{ran: []string{"generic/394"}}, ""},
		{"ext4", verdict{ran: []string{"generic/360"}, failed: []string{"generic/360"}}, "generic/360 fails"},
		{"xfs", verdict{ran: []string{"generic/360"}, failed: []string{"generic/360"}}, ""},
	} {
		err := c.v.judge(c.backing)
		if c.words == "" {
			require.NoError(t, err, "%+v", c.v)
			continue
		}
		require.ErrorContains(t, err, c.words, "%+v", c.v)
	}
}

// TestScriptParses: bash reads the whole script.
func TestScriptParses(t *testing.T) {
	cmd := exec.Command("bash", "-n")
	cmd.Stdin = strings.NewReader(xfstestsScript)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}
