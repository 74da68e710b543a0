package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/keys/kmstest"
)

// TestStatusTellsTheCost: what a mount asked of KMS is counted, and agrees with what KMS
// counts; a walk is decrypted ahead, unless that is switched off.
func TestStatusTellsTheCost(t *testing.T) {
	const files = 60
	srv := kmstest.New(t, nil)
	c := newClient(t)
	c.env = append(c.env, srv.Env(srv.Admin())...)
	srv.SetLatency(5 * time.Millisecond)
	dir, point := c.volume(srv.CreateKey("us-east-1"))
	c.mount(dir, point)
	for i := range files {
		c.write(filepath.Join(point, fmt.Sprintf("f%d", i)), "contents")
	}
	cost := c.cost(dir)
	require.EqualValues(t, files, cost.Pool.Hits+cost.Pool.Waits)
	require.Equal(t, cost.CreateWait.Count, cost.Pool.Waits)
	require.Contains(t, c.ok("status", dir).out, "GenerateDataKey")
	c.ok("umount", point)

	for _, ahead := range []bool{true, false} {
		args := []string{dir, point}
		if !ahead {
			args = append(args, "--prefetch", "0")
		}
		c.mount(args[0], args[1], args[2:]...)
		before := c.cost(dir) // the volume's own key
		srv.Reset()
		out, err := exec.Command("sh", "-c", `tar cf - -C "$0" . | wc -c`, point).CombinedOutput()
		require.NoError(t, err, "%s", out)
		cost := c.cost(dir)
		require.Equal(t, files, srv.Count("Decrypt"), "each key was asked for once")
		require.EqualValues(t, files, cost.Calls["Decrypt"]-before.Calls["Decrypt"])
		require.EqualValues(t, files, cost.Prefetch.Issued+cost.Cache.Misses-before.Cache.Misses)
		if ahead {
			require.Positive(t, cost.Prefetch.Used)
			require.Zero(t, cost.Prefetch.Wasted)
		} else {
			require.Zero(t, cost.Prefetch.Issued)
			require.EqualValues(t, files, cost.OpenWait.Count-before.OpenWait.Count)
			require.Positive(t, cost.OpenWait.Longest)
		}
		c.ok("umount", point)
	}
}

func (c *client) cost(dir string) *costReport {
	c.t.Helper()
	var r volumeReport
	require.NoError(c.t, json.Unmarshal([]byte(c.ok("status", "--json", dir).out), &r))
	require.NotNil(c.t, r.Live)
	require.NotNil(c.t, r.Live.Cost)
	return r.Live.Cost
}
