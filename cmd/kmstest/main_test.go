package main

import (
	"bufio"
	"context"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/keys"
)

// TestPrintedEnvironmentWorks sources what is printed in a shell, and uses the
// keys through the product's own provider.
func TestPrintedEnvironmentWorks(t *testing.T) {
	ctx, stop := context.WithCancel(context.Background())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, []string{"-regions", "us-east-1,eu-west-1", "-keys", "1"}, w, io.Discard)
		_ = w.Close()
	}()
	var script strings.Builder
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		script.WriteString(lines.Text() + "\n")
		if strings.HasPrefix(lines.Text(), "MRK_eu_west_1=") {
			break
		}
	}
	out, err := exec.Command("sh", "-c", "set -a\n"+script.String()+"env").Output()
	require.NoError(t, err)
	vars := map[string]string{}
	for _, line := range strings.Split(string(out), "\n") {
		name, value, _ := strings.Cut(line, "=")
		vars[name] = value
		if strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, value)
		}
	}
	p, err := keys.NewAWS(keys.AWSOptions{})
	require.NoError(t, err)
	for _, name := range []string{"KEY1", "KEY2", "MRK", "MRK_eu_west_1"} {
		k, _, err := p.GenerateDataKey(ctx, vars[name], nil)
		require.NoError(t, err, name)
		k.Wipe()
	}
	stop()
	require.NoError(t, <-done)
}

func TestBadFlags(t *testing.T) {
	require.Error(t, run(context.Background(), []string{"-nonsense"}, io.Discard, io.Discard))
	require.Error(t, run(context.Background(), []string{"-listen", "256.0.0.1:1"}, io.Discard, io.Discard))
}
