package main

import (
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// TestEnding: the next mount waits for a daemon that is on its way out, up to its very
// end, and not for one that serves.
func TestEnding(t *testing.T) {
	host, err := os.Hostname()
	require.NoError(t, err)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	require.NoError(t, err)
	held := func(pid int, owner string) *volume.LockedError {
		return &volume.LockedError{Holder: &volume.Holder{PID: pid, Host: host, BootID: string(boot[:len(boot)-1]), Owner: owner}}
	}
	require.True(t, ending(held(os.Getpid(), mountOwner+"/not/mounted")), "its mount is gone")
	require.False(t, ending(held(os.Getpid(), "rekey")))
	require.False(t, ending(&volume.LockedError{}))

	cmd := exec.Command("true")
	require.NoError(t, cmd.Start())
	var info unix.Siginfo
	require.NoError(t, unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil))
	dead := held(cmd.Process.Pid, mountOwner+"/mnt")
	require.True(t, ending(dead), "it has ended, and nobody waited for it yet")
	require.NoError(t, cmd.Wait())
	require.True(t, ending(dead), "it is gone")
}
