package harness

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// commandLimit bounds one run of kmsfs or of a program on a mount. It is far
// above what any takes; a hang ends there and names itself.
const commandLimit = 10 * time.Minute

// parallel is how many of the tests that allow it run at a time, whatever the number of
// processors: they are those that mostly wait, for deadlines and leases. Tests that make
// namespaces, into which the others' mounts would be copied, and those that ask
// moto_server, which answers one request after the other, don't allow it.
const parallel = "6"

func given(name string) (is bool) {
	flag.Visit(func(f *flag.Flag) { is = is || f.Name == name })
	return is
}

// shared is what Main prepares once for all tests of a binary.
var shared struct {
	dir   string // 0755: other users run the programs in it
	kmsfs string
	self  string // a copy of the test binary that every user may run
}

// Main is TestMain: it builds kmsfs once, runs the tests, and removes it. A test
// binary that was started as a helper (Env.Helper) does that job instead.
func Main(m interface{ Run() int }) {
	if name := os.Getenv(helperVariable); name != "" {
		os.Exit(runHelper(name, os.Args[1:]))
	}
	flag.Parse()
	if !given("test.parallel") {
		_ = flag.Set("test.parallel", parallel)
	}
	status, err := setUp()
	if err == nil {
		status = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, "integration:", err)
	}
	stopMoto()
	os.RemoveAll(shared.dir)
	os.Exit(status)
}

func setUp() (status int, err error) {
	if err := possible(); err != nil {
		return 1, err
	}
	if shared.dir, err = os.MkdirTemp("", "kmsfs-bin."); err != nil {
		return 1, err
	}
	if err := os.Chmod(shared.dir, 0o755); err != nil {
		return 1, err
	}
	shared.kmsfs, shared.self = filepath.Join(shared.dir, "kmsfs"), filepath.Join(shared.dir, "helper")
	if given := os.Getenv("KMSFS_TEST_PROGRAM"); given != "" { // a released one, say
		if err := copyProgram(given, shared.kmsfs); err != nil {
			return 1, err
		}
		return 1, copyProgram("/proc/self/exe", shared.self)
	}
	build := exec.Command("go", "build", "-o", shared.kmsfs, "kmsfs/cmd/kmsfs")
	if os.Getenv("KMSFS_TEST_RACE") != "" { // the daemon under the race detector
		build.Args = slices.Insert(build.Args, 2, "-race")
	}
	if out, err := build.CombinedOutput(); err != nil {
		return 1, fmt.Errorf("building kmsfs: %w\n%s", err, out)
	}
	return 1, copyProgram("/proc/self/exe", shared.self)
}

// possible fails early where no test can pass.
func possible() error {
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return fmt.Errorf("these tests mount: %w", err)
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		return fmt.Errorf("these tests mount (apt-get install fuse3): %w", err)
	}
	if os.Getuid() != 0 && !Unprivileged() {
		return errors.New("these tests need root: they act as several users")
	}
	return nil
}

// An Env is one test's world: nothing of the machine's own configuration, pins
// or keys is seen or touched.
type Env struct {
	T    testing.TB
	Root string // private directory, reachable by other users
	vars map[string]string
	uid  int // whom Kmsfs and Run act as
	gid  int
}

// New makes a world for t.
func New(t testing.TB) *Env {
	t.Helper()
	root, err := os.MkdirTemp("", "kmsfs-test.")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(root, 0o755))
	e := &Env{T: t, Root: root, vars: map[string]string{}}
	t.Cleanup(e.leave)
	for name, dir := range map[string]string{
		"HOME": "home", "XDG_CONFIG_HOME": "config", "XDG_STATE_HOME": "state",
		"XDG_RUNTIME_DIR": "run", "XDG_CACHE_HOME": "cache", "KMSFS_KEYRING": "keyring",
	} {
		e.Set(name, e.Mkdir(dir))
	}
	e.Set("PATH", shared.dir+":"+os.Getenv("PATH"))
	e.Set("AWS_EC2_METADATA_DISABLED", "true")
	e.Set("LC_ALL", "C.UTF-8")
	e.Set("GIT_CONFIG_NOSYSTEM", "1")
	e.Set("TMPDIR", e.Mkdir("tmp"))
	e.Set("GORACE", "halt_on_error=1 log_path="+filepath.Join(root, "race"))
	for _, name := range []string{"GODEBUG", "GOCOVERDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			e.Set(name, value)
		}
	}
	return e
}

// As is the same world seen by another user; its directories become his.
func (e *Env) As(uid, gid int) *Env {
	other := *e
	other.uid, other.gid = uid, gid
	other.vars = map[string]string{}
	for name, value := range e.vars {
		other.vars[name] = value
	}
	for _, name := range []string{"HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "KMSFS_KEYRING", "TMPDIR"} {
		require.NoError(e.T, os.Chown(e.vars[name], uid, gid))
	}
	return &other
}

// Set sets a variable for the programs that the test runs; an empty value
// removes it.
func (e *Env) Set(name, value string) {
	e.vars[name] = value
	if value == "" {
		delete(e.vars, name)
	}
}

// Var is the value of a variable.
func (e *Env) Var(name string) string { return e.vars[name] }

// Mkdir makes a directory in the private one; its mode lets only the owner in.
func (e *Env) Mkdir(name string) string {
	e.T.Helper()
	dir := filepath.Join(e.Root, name)
	require.NoError(e.T, os.MkdirAll(dir, 0o700))
	if e.uid != 0 {
		require.NoError(e.T, os.Chown(dir, e.uid, e.gid))
	}
	return dir
}

func (e *Env) environ() []string {
	var env []string
	for name, value := range e.vars {
		env = append(env, name+"="+value)
	}
	return env
}

// A Result is what a program left.
type Result struct {
	Command string
	Status  int // exit status; 128 + N after signal N
	Stdout  string
	Stderr  string
	Took    time.Duration
}

func (r Result) String() string {
	return fmt.Sprintf("%s: status %d after %v\nstdout: %s\nstderr: %s", r.Command, r.Status, r.Took.Round(time.Millisecond), r.Stdout, r.Stderr)
}

// Command prepares a program that runs in this world, without a terminal.
func (e *Env) Command(name string, args ...string) *exec.Cmd {
	if name == "kmsfs" {
		name = shared.kmsfs
	}
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = e.Root, e.environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if e.uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(e.uid), Gid: uint32(e.gid)}
	}
	return cmd
}

// Run runs a program to its end and reports what it left. Output goes to files:
// a daemon that a program leaves behind may keep pipes open.
func (e *Env) Run(name string, args ...string) Result {
	e.T.Helper()
	return e.finish(e.Command(name, args...))
}

func (e *Env) finish(cmd *exec.Cmd) Result {
	e.T.Helper()
	stdout, stderr := e.scratch(), e.scratch()
	defer stdout.Close()
	defer stderr.Close()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	start := time.Now()
	require.NoError(e.T, cmd.Start(), "starting %v", cmd.Args)
	timer := time.AfterFunc(commandLimit, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer timer.Stop()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(e.T, err, "running %v", cmd.Args)
	}
	return Result{
		Command: strings.Join(append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...), " "),
		Status:  exitStatus(cmd.ProcessState), Took: time.Since(start),
		Stdout: e.slurp(stdout), Stderr: e.slurp(stderr),
	}
}

func exitStatus(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}

// scratch is a nameless file: it costs nothing to clean up.
func (e *Env) scratch() *os.File {
	e.T.Helper()
	f, err := os.CreateTemp(e.Root, "out.")
	require.NoError(e.T, err)
	require.NoError(e.T, os.Remove(f.Name()))
	return f
}

func (e *Env) slurp(f *os.File) string {
	e.T.Helper()
	info, err := f.Stat()
	require.NoError(e.T, err)
	buf := make([]byte, info.Size())
	_, err = f.ReadAt(buf, 0)
	require.NoError(e.T, err)
	return string(buf)
}

// Do runs a program that must succeed and gives its output.
func (e *Env) Do(name string, args ...string) string {
	e.T.Helper()
	r := e.Run(name, args...)
	require.Zero(e.T, r.Status, "%v", r)
	return r.Stdout
}

// Shell runs a script of bash that must succeed; arguments are $1, $2, ...
func (e *Env) Shell(script string, args ...string) string {
	e.T.Helper()
	return e.Do("bash", append([]string{"-euo", "pipefail", "-c", script, "bash"}, args...)...)
}

// Kmsfs runs kmsfs.
func (e *Env) Kmsfs(args ...string) Result {
	e.T.Helper()
	return e.Run("kmsfs", args...)
}

// Must runs kmsfs, which must succeed, and gives its output.
func (e *Env) Must(args ...string) string {
	e.T.Helper()
	return e.Do("kmsfs", args...)
}

// Refused runs kmsfs, which must end with status and one understandable error:
// a sentence that holds each of the words, with no trace of a crash.
func (e *Env) Refused(status int, words []string, args ...string) Result {
	e.T.Helper()
	r := e.Kmsfs(args...)
	require.Equal(e.T, status, r.Status, "%v", r)
	message := strings.ToLower(r.Stderr)
	for _, word := range words {
		require.Contains(e.T, message, strings.ToLower(word), "%v", r)
	}
	require.NotEmpty(e.T, strings.TrimSpace(r.Stderr), "a failure without a sentence: %v", r)
	for _, bad := range []string{"panic:", "goroutine ", "%!", "<nil>", "usage:\n"} {
		require.NotContains(e.T, message, bad, "%v", r)
	}
	return r
}

// leave checks that the test left nothing, and removes what is left.
func (e *Env) leave() {
	for _, m := range mountsUnder(e.Root) {
		e.T.Errorf("a mount is left: %s", m)
		release(m)
	}
	for _, pid := range daemonsOf(e.Root) {
		if waitGone(pid, 5*time.Second) {
			continue
		}
		e.T.Errorf("a daemon is left: process %d: %s", pid, cmdline(pid))
		_ = syscall.Kill(pid, syscall.SIGKILL)
		waitGone(pid, 5*time.Second)
	}
	races, _ := filepath.Glob(filepath.Join(e.Root, "race.*"))
	for _, race := range races {
		report, _ := os.ReadFile(race)
		e.T.Errorf("the race detector found:\n%s", report)
	}
	if log, _ := os.ReadFile(filepath.Join(e.Root, "state", "kmsfs", "kmsfs.log")); e.T.Failed() && len(log) > 0 {
		e.T.Logf("the end of the daemon's log:\n%s", log[max(0, len(log)-4000):])
	}
	if e.T.Failed() && os.Getenv("KMSFS_TEST_KEEP") != "" {
		e.T.Logf("kept %s", e.Root)
		return
	}
	if err := os.RemoveAll(e.Root); err != nil {
		e.T.Errorf("removing the test's directory: %v", err)
	}
}

// daemonsOf lists the kmsfs processes whose arguments or environment name root:
// the way to find them that needs nothing from kmsfs itself.
func daemonsOf(root string) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if strings.TrimSuffix(exe, " (deleted)") != shared.kmsfs {
			continue
		}
		env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if strings.Contains(cmdline(pid), root) || bytes.Contains(env, []byte(root)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func cmdline(pid int) string {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(raw), "\x00", " "))
}

// waitGone waits until a process has ended. A zombie has ended: whoever is init
// here may be slow to collect it.
func waitGone(pid int, limit time.Duration) bool {
	return Eventually(limit, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return true
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		return strings.HasPrefix(rest, "Z")
	})
}

// Eventually waits until f holds, at most limit.
func Eventually(limit time.Duration, f func() bool) bool {
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if f() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// mountsUnder lists mountpoints in root, innermost first.
func mountsUnder(root string) (mounts []string) {
	info, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], root+"/") {
			mounts = append(mounts, f[4])
		}
	}
	slices.Reverse(mounts)
	return mounts
}

// release takes a mount away whatever state its daemon is in.
func release(mountpoint string) {
	for _, args := range [][]string{{"fusermount3", "-u", "-z", mountpoint}, {"umount", "-l", mountpoint}} {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_ = exec.CommandContext(ctx, args[0], args[1:]...).Run()
		cancel()
		if !slices.Contains(mountsUnder(filepath.Dir(mountpoint)), mountpoint) {
			return
		}
	}
}
