package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Each of the program's commands measures something, in miniature: a benchmark that
// breaks is found out when somebody wants figures. It empties the machine's caches, which
// slows the tests beside it down, so it is run by itself.
func TestEachCommand(t *testing.T) {
	if os.Getenv("KMSFS_TEST_BENCH") == "" {
		t.Skip("make bench-check runs it")
	}
	require.Zero(t, os.Geteuid(), "only root may drop the kernel's caches")
	program := filepath.Join(t.TempDir(), "bench")
	out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, c := range []struct {
		args []string
		want []string // lines; # is a number
	}{
		{[]string{"-parts", "peers", "-scale", "0.001", "-rounds", "1", "-peers", "none", "-only", "create"},
			[]string{`\| create \| at most 0.8 of the loopback's time \| #`, `\| create \| # \| # \| #`, `\| memory when idle \| at most 64 MiB \| # MiB`}},
		{[]string{"-parts", "scale", "-scale", "0.001", "-rounds", "1", "-peers", "none", "-only", "open files"},
			[]string{`\| open files, append 4 KiB in turn, fsync all \| 1, 100 \| # \| # \| # \| # \| # \| # \|`}},
		{[]string{"rekey", "-files", "40", "-rounds", "1"},
			[]string{`\| 40 \| kmsfs rekey, local key \| # \| # \| #`, `\| 40 \| kmsfs rekey, KMS at 10ms a call, --jobs # \| # \| #`}},
		{[]string{"latency", "-files", "40", "-rounds", "1", "-latency", "1ms"},
			[]string{`\| create \| KMS at 1ms \| # \| #`, `\| tar, cold \| KMS at 1ms \| # \| #`, `KMS at 1ms: calls of key services: Decrypt #`}},
		{[]string{"inodes", "-files", "300"},
			[]string{`# inodes looked up in .*: # MiB resident before, # MiB with them \(# bytes each\)`}},
	} {
		t.Run(c.args[0]+" "+c.args[1], func(t *testing.T) {
			cmd := exec.Command(program, append(c.args, "-dir", t.TempDir())...)
			cmd.WaitDelay = time.Minute
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			for _, line := range c.want {
				want := regexp.MustCompile("(?m)^" + regexp.MustCompile("#").ReplaceAllString(line, `[0-9.]+`))
				require.Regexp(t, want, string(out))
			}
			require.NotContains(t, string(out), "NaN")
		})
	}
}
