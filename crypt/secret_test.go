package crypt

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// flagsOf are the kernel's flags of the mapping that holds p (proc_pid_smaps(5), VmFlags).
func flagsOf(t *testing.T, p *byte) []string {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/smaps")
	require.NoError(t, err)
	at, inside := uintptr(unsafe.Pointer(p)), false
	for line := range strings.Lines(string(raw)) {
		var from, to uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			inside = from <= at && at < to
		} else if flags, is := strings.CutPrefix(line, "VmFlags:"); is && inside {
			return strings.Fields(flags)
		}
	}
	t.Fatal("no mapping holds it")
	return nil
}

// TestKeysLieInLockedMemory: data keys, and what is derived from them, lie where neither
// swap nor a core dump gets them.
func TestKeysLieInLockedMemory(t *testing.T) {
	require.NoError(t, MemoryLocked())
	var held []*Key
	for range 300 { // more than one page
		k, err := RandomKey()
		require.NoError(t, err)
		held = append(held, k)
	}
	for _, k := range held {
		flags := flagsOf(t, &k.slot[0])
		require.Contains(t, flags, "lo", "it is not locked")
		require.Contains(t, flags, "dd", "a core dump would have it")
		k.Wipe()
	}
	id, err := NewIdentity(VolumeID{1}, UseFile, 12)
	require.NoError(t, err)
	data, err := RandomKey()
	require.NoError(t, err)
	s, err := Commit(&id, data)
	require.NoError(t, err)
	defer s.Wipe()
	require.NoError(t, s.prk.Use(func(b []byte) error {
		require.Subset(t, flagsOf(t, &b[0]), []string{"lo", "dd"})
		return nil
	}))
}

const rlimitMemlock = 8 // RLIMIT_MEMLOCK, which package syscall does not name

// TestMemoryThatCannotBeLocked is said, for a mount to warn of.
func TestMemoryThatCannotBeLocked(t *testing.T) {
	if os.Getenv("KMSFS_TEST_CHILD") != "" {
		require.NoError(t, syscall.Setrlimit(rlimitMemlock, &syscall.Rlimit{}))
		k, err := RandomKey()
		require.NoError(t, err)
		defer k.Wipe()
		require.Error(t, MemoryLocked())
		require.Contains(t, flagsOf(t, &k.slot[0]), "dd")
		return
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestMemoryThatCannotBeLocked$", "-test.v")
	cmd.Env = append(os.Environ(), "KMSFS_TEST_CHILD=1")
	if os.Geteuid() == 0 { // whose CAP_IPC_LOCK overrides the limit
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestMemoryThatCannotBeLocked")
}
