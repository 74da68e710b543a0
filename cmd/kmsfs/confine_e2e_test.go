package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const someUser = 30001

// threadField is a line of /proc/PID/task/TID/status of every thread.
func threadField(t *testing.T, pid int, name string) (values []string) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	require.NoError(t, err)
	require.Greater(t, len(tasks), 2, "a Go program has several threads")
	for _, task := range tasks {
		raw, err := os.ReadFile(task)
		if os.IsNotExist(err) {
			continue // it has ended
		}
		require.NoError(t, err)
		m := regexp.MustCompile(`(?m)^` + name + `:\s+(\S+)$`).FindSubmatch(raw)
		require.NotNil(t, m, name)
		values = append(values, string(m[1]))
	}
	return values
}

// as runs a shell command as a user who is nobody special.
func as(t *testing.T, uid uint32, script string, args ...string) {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-euc", script, "sh"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s: %s", script, out)
}

// TestDaemonKeepsFewCapabilities: no thread of root's daemon has, or can get, another
// capability than those that are kept; and with them everything works that needs each.
func TestDaemonKeepsFewCapabilities(t *testing.T) {
	require.Zero(t, os.Geteuid(), "only root has capabilities to give up")
	had := must(permitted())
	for _, foreground := range []bool{false, true} {
		c := newClient(t)
		for dir := c.home; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
			require.NoError(t, os.Chmod(dir, 0o755)) // for the other user
		}
		dir, point := c.volume()
		args := []string{"-c", `ulimit -l 0; exec "$@"`, "sh", binary, "mount", dir, point, "--allow-other"}
		if foreground {
			args = append(args, "-f")
		} else {
			args = append(args, "--log-file", c.path("stderr"))
		}
		cmd := c.command(args...)
		cmd.Path, cmd.Args = must(exec.LookPath("sh")), append([]string{"sh"}, args...)
		if foreground {
			cmd.Stderr = must(os.Create(c.path("stderr")))
		}
		require.NoError(t, cmd.Start())
		eventually(t, "it is mounted", func() bool { return mounted(t, point) })
		if !foreground {
			require.NoError(t, cmd.Wait())
		}
		pid := daemonOf(t, dir)
		for _, field := range []string{"CapPrm", "CapEff", "CapBnd"} {
			for _, v := range threadField(t, pid, field) {
				set, err := strconv.ParseUint(v, 16, 64)
				require.NoError(t, err)
				require.Equal(t, had&capsFor(0), capSet(set), "%s", field)
			}
		}
		for _, field := range []string{"CapInh", "CapAmb"} {
			for _, v := range threadField(t, pid, field) {
				require.Equal(t, strings.Repeat("0", 16), v, field)
			}
		}
		for _, v := range threadField(t, pid, "NoNewPrivs") {
			require.Equal(t, "1", v)
		}
		needCapabilities(t, point)
		log := string(must(os.ReadFile(c.path("stderr"))))
		require.NotContains(t, log, "may reach swap or a dump", "CAP_IPC_LOCK")
		require.NotContains(t, log, "more privileges")

		require.NoError(t, unix.Kill(pid, unix.SIGTERM)) // CAP_SYS_ADMIN
		if foreground {
			require.NoError(t, cmd.Wait())
		}
		eventually(t, "SIGTERM unmounts", func() bool { return !mounted(t, point) && !alive(pid) })
	}
}

// needCapabilities does on a mount what takes each of the kept capabilities.
func needCapabilities(t *testing.T, point string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(point, name) }
	require.NoError(t, os.Chmod(point, 0o777))
	as(t, someUser, `mkdir -m 700 "$1/d" && echo text >"$1/d/f" && chmod 600 "$1/d/f" && echo more >>"$1/d/f" && rm "$1/d/f"`, point) // CAP_CHOWN, CAP_DAC_OVERRIDE
	as(t, someUser, `echo text >"$1/own" && chmod 604 "$1/own" && touch -d 2001-01-01 "$1/own"`, point)                               // CAP_FOWNER
	as(t, someUser, `chmod 2755 "$1/own"`, point)                                                                                     // CAP_FSETID
	st, err := os.Stat(at("own"))
	require.NoError(t, err)
	require.NotZero(t, st.Mode()&os.ModeSetgid, "CAP_FSETID")
	require.NoError(t, unix.Mknod(at("null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))), "CAP_MKNOD")
	require.NoError(t, os.WriteFile(at("program"), nil, 0o755))
	// Revision 2, CAP_NET_RAW permitted (capability.h).
	netRaw := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	require.NoError(t, unix.Setxattr(at("program"), "security.capability", netRaw, 0), "CAP_SETFCAP")
	require.NoError(t, unix.Setxattr(at("program"), "trusted.test", []byte("x"), 0), "CAP_SYS_ADMIN")
	require.NoError(t, os.Chown(at("program"), someUser, someUser), "CAP_CHOWN")
}

// Each kept capability stands in SECURITY.md, with the same reason, and in the unit.
func TestManualNamesTheCapabilities(t *testing.T) {
	doc := string(must(os.ReadFile("../../SECURITY.md")))
	for _, c := range keptCapabilities {
		require.Contains(t, doc, fmt.Sprintf("| `%s` | %s |", c.name, c.why))
	}
	require.Equal(t, len(keptCapabilities), strings.Count(doc, "\n| `CAP_"))
	var names []string
	for _, c := range keptCapabilities {
		names = append(names, c.name)
	}
	unit := string(must(os.ReadFile("../../deploy/kmsfs@.service")))
	require.Contains(t, unit, "\nCapabilityBoundingSet="+strings.Join(names, " ")+"\n")
}

// TestUsersDaemonHasNoCapabilities: not even those that the user's shell had as ambient
// ones.
func TestUsersDaemonHasNoCapabilities(t *testing.T) {
	require.Zero(t, os.Geteuid(), "only root becomes another user")
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestConfinedUser$", "-test.v")
	cmd.Env = append(os.Environ(), "KMSFS_TEST_CHILD=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: someUser, Gid: someUser}, AmbientCaps: []uintptr{unix.CAP_NET_RAW, unix.CAP_DAC_OVERRIDE}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestConfinedUser")
}

// TestConfinedUser is the job of that user: what is started on a confined thread.
func TestConfinedUser(t *testing.T) {
	if os.Getenv("KMSFS_TEST_CHILD") == "" {
		return // it is for the test above
	}
	require.NotZero(t, must(permitted()), "there is something to give up")
	require.False(t, confined())
	cmd := exec.Command("cat", "/proc/self/status")
	var out strings.Builder
	cmd.Stdout = &out
	require.NoError(t, onConfinedThread(cmd.Start))
	require.NoError(t, cmd.Wait())
	for _, field := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
		require.Contains(t, out.String(), field+":\t0000000000000000\n")
	}
	require.Contains(t, out.String(), "NoNewPrivs:\t0\n", "fusermount3 is setuid")
}

// TestNobodyLooksIntoTheDaemon: another process of the daemon's own user can neither
// read its memory nor trace it, whatever ptrace_scope says, and no core is written.
func TestNobodyLooksIntoTheDaemon(t *testing.T) {
	require.Zero(t, os.Geteuid(), "only root becomes another user")
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestLookIntoOneself$", "-test.v")
	cmd.Env = append(os.Environ(), "KMSFS_TEST_CHILD=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: someUser, Gid: someUser}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestLookIntoOneself")
}

// TestLookIntoOneself hardens this process, as the daemon does, and has a child of the
// same user try.
func TestLookIntoOneself(t *testing.T) {
	if os.Getenv("KMSFS_TEST_CHILD") == "" {
		return // it is for the test above
	}
	look := func() error {
		return exec.Command("sh", "-c", fmt.Sprintf("head -c 0 /proc/%d/mem && cat /proc/%d/environ >/dev/null", os.Getpid(), os.Getpid())).Run()
	}
	require.NoError(t, look(), "the child may look before: else this tests nothing")
	harden()
	require.Error(t, look())
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	require.NoError(t, err)
	require.Zero(t, dumpable)
	var core unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_CORE, &core))
	require.Equal(t, unix.Rlimit{}, core)
}

// TestStartedAgainUnderItsOwnName: what mount(8) has started, as a helper, starts itself
// again as kmsfs, for its arguments are translated by then.
func TestStartedAgainUnderItsOwnName(t *testing.T) {
	old := os.Args
	defer func() { os.Args = old }()
	p := &program{args: []string{"mount", "a", "b"}}
	for given, want := range map[string]string{"/sbin/" + mountHelper: "/usr/bin/kmsfs", "kmsfs": "kmsfs"} {
		os.Args = []string{given, "a", "b"}
		require.Equal(t, []string{want, "mount", "a", "b"}, p.argv("/usr/bin/kmsfs"))
	}
}
