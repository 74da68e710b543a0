package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

const unitFile = "kmsfs@.service"

// unitSettings are the lines of the shipped unit, by name.
func unitSettings(t *testing.T) map[string][]string {
	t.Helper()
	raw, err := os.ReadFile(deployed(t, unitFile))
	require.NoError(t, err)
	settings := map[string][]string{}
	for line := range strings.Lines(string(raw)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			settings[name] = append(settings[name], value)
		}
	}
	return settings
}

// TestUnitIsValid: systemd understands every line of the shipped unit, and finds the
// service no more exposed than it has to be.
func TestUnitIsValid(t *testing.T) {
	e := harness.New(t)
	raw, err := os.ReadFile(deployed(t, unitFile))
	require.NoError(t, err)
	unit := filepath.Join(e.Mkdir("unit"), unitFile)
	text := strings.ReplaceAll(string(raw), "/usr/bin/kmsfs", e.Command("kmsfs").Path)
	require.NoError(t, os.WriteFile(unit, []byte(text), 0o644))
	r := e.Run("systemd-analyze", "verify", "--man=no", strings.Replace(unit, "@", "@data", 1))
	require.Zero(t, r.Status, "%v", r)
	require.Empty(t, r.Stderr, "systemd ignores what it does not know, and says so")
	r = e.Run("systemd-analyze", "security", "--offline=true", "--threshold=50", "--no-pager", unit) // of 100
	require.Zero(t, r.Status, "%v", r)
	// What gives a service a mount namespace keeps its mounts from everybody else.
	for _, hides := range []string{"ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ReadWritePaths", "ReadOnlyPaths",
		"InaccessiblePaths", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset",
		"TemporaryFileSystem", "BindPaths", "RootDirectory", "MountFlags", "DynamicUser"} {
		require.NotContains(t, unitSettings(t), hides)
	}
}

// allowedCalls are the system calls that the unit's SystemCallFilter lets pass, by name,
// as systemd reads it: groups are expanded, "~" takes away, and @default is always there.
func allowedCalls(t *testing.T, e *harness.Env) map[string]bool {
	t.Helper()
	groups := map[string][]string{}
	var group string
	for line := range strings.Lines(e.Do("systemd-analyze", "syscall-filter", "--no-pager")) {
		word := strings.TrimSpace(line)
		switch {
		case word == "" || strings.HasPrefix(word, "#"):
		case strings.HasPrefix(line, "@"):
			group = word
		case group != "":
			groups[group] = append(groups[group], word)
		}
	}
	require.NotEmpty(t, groups["@system-service"])
	var expand func(name string) []string
	expand = func(name string) (names []string) {
		if !strings.HasPrefix(name, "@") {
			return []string{name}
		}
		require.Contains(t, groups, name)
		for _, member := range groups[name] {
			names = append(names, expand(member)...)
		}
		return names
	}
	allowed := map[string]bool{}
	for _, line := range unitSettings(t)["SystemCallFilter"] {
		line, remove := strings.CutPrefix(line, "~")
		for _, word := range strings.Fields(line) {
			for _, name := range expand(word) {
				allowed[name] = !remove
			}
		}
	}
	for _, name := range expand("@default") {
		allowed[name] = true
	}
	return allowed
}

// callNumbers are this machine's numbers of system calls, from the list that
// golang.org/x/sys was made with.
func callNumbers(t *testing.T) map[string]int {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "golang.org/x/sys").Output()
	require.NoError(t, err)
	raw, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "unix", "zsysnum_linux_"+runtime.GOARCH+".go"))
	require.NoError(t, err)
	numbers := map[string]int{}
	for _, m := range regexp.MustCompile(`SYS_([A-Z0-9_]+)\s+= (\d+)`).FindAllStringSubmatch(string(raw), -1) {
		n, err := strconv.Atoi(m[2])
		require.NoError(t, err)
		numbers[strings.ToLower(m[1])] = n
	}
	require.Greater(t, len(numbers), 200)
	return numbers
}

func init() { harness.Helper("sandbox", sandbox) }

// sandbox executes a program under a filter that lets the system calls pass whose numbers
// are given, separated by commas. Any other ends the program by SIGSYS, of which Go tells
// more than of an EPERM.
func sandbox(args []string) error {
	runtime.LockOSThread()
	statement := func(code, k int) unix.SockFilter { return unix.SockFilter{Code: uint16(code), K: uint32(k)} }
	// struct seccomp_data begins with the number of the call.
	filter := []unix.SockFilter{statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0)}
	for _, word := range strings.Split(args[0], ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		equal := statement(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, n)
		equal.Jf = 1
		filter = append(filter, equal, statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW))
	}
	filter = append(filter, statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_TRAP))
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("setting the filter: %w", errno)
	}
	return syscall.Exec(args[1], args[1:], os.Environ())
}

// TestUnitAllowsTheMainJob: a mount on KMS, with metrics, does all its work under the
// shipped unit's filter of system calls, and tells systemd when it is ready.
func TestUnitAllowsTheMainJob(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first)
	numbers := callNumbers(t)
	var list []string
	for name, ok := range allowedCalls(t, e) {
		if n, known := numbers[name]; ok && known {
			list = append(list, strconv.Itoa(n))
		}
	}
	require.Greater(t, len(list), 100)
	for _, no := range []string{"ptrace", "bpf", "init_module", "pivot_root", "setuid", "add_key"} {
		require.NotContains(t, list, strconv.Itoa(numbers[no]), no)
	}

	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(e.Root, "notify"), Net: "unixgram"})
	require.NoError(t, err)
	defer notify.Close()
	e.Set("NOTIFY_SOCKET", notify.LocalAddr().String())
	metrics := filepath.Join(e.Root, "metrics")
	daemon := e.Helper("sandbox", strings.Join(list, ","), e.Command("kmsfs").Path, "mount", "-f", v.Dir, v.Mnt,
		"--allow-other", "--metrics", "unix:"+metrics, "--lease", "1s")
	e.Set("NOTIFY_SOCKET", "")
	log, err := os.Create(filepath.Join(e.Root, "log"))
	require.NoError(t, err)
	defer log.Close()
	daemon.Stderr = log
	require.NoError(t, daemon.Start())
	ended := make(chan error, 1)
	go func() { ended <- daemon.Wait() }()
	alive := func() {
		t.Helper()
		select {
		case err := <-ended:
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("the daemon has ended: %v\n%s", err, text)
		default:
		}
	}
	word := make([]byte, 100)
	require.NoError(t, notify.SetReadDeadline(time.Now().Add(time.Minute)))
	n, err := notify.Read(word)
	alive()
	require.NoError(t, err)
	require.Equal(t, "READY=1", string(word[:n]))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", daemon.Process.Pid))
	require.NoError(t, err)
	require.Contains(t, string(status), "Seccomp:\t2\n", "nothing is filtered: this tests nothing")

	source := filepath.Join(harness.GOROOT(t), "src", "encoding")
	tree := harness.Snapshot(t, source)
	e.Do("cp", "-a", source, v.Path("tree"))
	tree.Holds(t, v.Path("tree"))
	e.Shell(`cd "$1"
		mknod null c 1 3; mkfifo pipe; ln -s tree link; ln tree/encoding.go hard; mv tree/json renamed
		chmod 2755 renamed; chown 1:1 hard; touch -d 2001-01-01 hard; setfattr -n user.x -v y hard; setfattr -n trusted.x -v y hard
		setfacl -m u:1:r hard; getfacl -p hard >/dev/null; setfattr -x user.x hard
		dd if=/dev/urandom of=big bs=64k count=50 conv=fsync status=none; truncate -s 12345 big; fallocate -l 1M big; fallocate -p -o 8192 -l 8192 big
		cp --sparse=always big copy; cmp big copy; flock big true; sync -f big; df . >/dev/null; rm -r renamed hard copy`, v.Mnt)
	alive()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", metrics)
		}}}
	reply, err := client.Get("http://kmsfs/metrics")
	require.NoError(t, err)
	text, err := io.ReadAll(reply.Body)
	require.NoError(t, err)
	require.NoError(t, reply.Body.Close())
	require.Contains(t, string(text), "kmsfs_open_files")
	e.Must("lock", v.Mnt)
	e.Must("unlock", v.Mnt)
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	e.Do("cat", v.Path("big"))
	alive()
	require.NoError(t, daemon.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-ended:
		written, _ := os.ReadFile(log.Name())
		require.NoError(t, err, "%s", written)
	case <-time.After(time.Minute):
		t.Fatal("SIGTERM does not unmount")
	}
	require.False(t, v.IsMounted())
	v.Mount() // as it was left, without the filter
	e.Do("test", "-c", v.Path("null"))
	v.Umount()
}
