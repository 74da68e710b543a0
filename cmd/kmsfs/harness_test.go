package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// binary is the program, built once for all tests of this package.
var binary string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	if os.Getenv("KMSFS_TEST_CHILD") != "" { // a test's own child, as another user
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "kmsfs-cmd-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "kmsfs")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "GODEBUG=") // the compiler itself need not be FIPS
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building kmsfs: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// A client is a person with a home of his own: keyring, pins, configuration and
// runtime directory. Whatever he mounts is gone at the end of the test.
type client struct {
	t    *testing.T
	home string
	env  []string
}

func newClient(t *testing.T) *client {
	t.Helper()
	c := &client{t: t, home: t.TempDir()}
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, "AWS_") && !strings.HasPrefix(name, "KMSFS_") && !strings.HasPrefix(name, "XDG_") && name != "HOME" {
			c.env = append(c.env, e)
		}
	}
	c.env = append(c.env, "HOME="+c.home, "XDG_CONFIG_HOME="+c.path("config"), "XDG_STATE_HOME="+c.path("state"), "XDG_RUNTIME_DIR="+c.path("run"),
		"AWS_EC2_METADATA_DISABLED=true")
	t.Cleanup(c.unmountAll)
	return c
}

func (c *client) path(elem ...string) string {
	return filepath.Join(append([]string{c.home}, elem...)...)
}

// unmountAll leaves nothing behind, whatever the test did.
func (c *client) unmountAll() {
	list, _ := mounts()
	for i := len(list) - 1; i >= 0; i-- {
		if inside(list[i].point, c.home) {
			_ = unix.Unmount(list[i].point, unix.MNT_DETACH)
		}
	}
}

// A result is what a run of the program did.
type result struct {
	status   int
	out, err string
}

func (c *client) command(args ...string) *exec.Cmd {
	cmd := exec.Command(binary, args...)
	cmd.Env, cmd.Dir = c.env, c.home
	return cmd
}

func (c *client) run(args ...string) result {
	c.t.Helper()
	var out, errs bytes.Buffer
	cmd := c.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	done := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer done.Stop()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// ok runs the program and wants status 0.
func (c *client) ok(args ...string) result {
	c.t.Helper()
	r := c.run(args...)
	require.Equal(c.t, exitDone, r.status, "kmsfs %v: %s%s", args, r.out, r.err)
	return r
}

// bad runs the program, wants a status, and one sentence that says all of says.
func (c *client) bad(status int, says []string, args ...string) result {
	c.t.Helper()
	r := c.run(args...)
	require.Equal(c.t, status, r.status, "kmsfs %v: %s%s", args, r.out, r.err)
	last := r.err[strings.LastIndex(strings.TrimSpace(r.err), "\n")+1:]
	require.True(c.t, strings.HasPrefix(last, "kmsfs: "), "kmsfs %v says %q", args, r.err)
	for _, s := range says {
		require.Contains(c.t, last, s)
	}
	return r
}

// volume makes a volume under local:default, or under keys, and a mountpoint.
func (c *client) volume(keys ...string) (dir, point string) {
	c.t.Helper()
	var args []string
	for _, k := range keys {
		args = append(args, "--key", k)
	}
	return c.volumeWith(args...)
}

// volumeWith takes what kmsfs init takes.
func (c *client) volumeWith(args ...string) (dir, point string) {
	c.t.Helper()
	dir, point = c.path("vol"), c.path("mnt")
	require.NoError(c.t, os.MkdirAll(point, 0o755))
	c.ok(append([]string{"init", dir}, args...)...)
	return dir, point
}

func (c *client) mount(dir, point string, more ...string) {
	c.t.Helper()
	c.ok(append([]string{"mount", dir, point}, more...)...)
	require.True(c.t, mounted(c.t, point))
}

func mounted(t *testing.T, point string) bool {
	t.Helper()
	m, err := mountedAt(point)
	require.NoError(t, err)
	return m != nil && m.isKmsfs()
}

func (c *client) write(path, text string) {
	c.t.Helper()
	require.NoError(c.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(c.t, os.WriteFile(path, []byte(text), 0o644))
}

func (c *client) reads(path, want string) {
	c.t.Helper()
	got, err := os.ReadFile(path)
	require.NoError(c.t, err)
	require.Equal(c.t, want, string(got))
}

// daemon is the process id in the volume's lock.
func daemonOf(t *testing.T, dir string) int {
	t.Helper()
	h, err := holderOf(dir)
	require.NoError(t, err)
	require.NotNil(t, h)
	return h.PID
}

// snapshot is everything under dirs but what changes by being looked at.
func snapshot(t *testing.T, dirs ...string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			st, err := os.Lstat(path)
			if err != nil {
				return err
			}
			sys := st.Sys().(*syscall.Stat_t)
			text := fmt.Sprint(st.Mode(), sys.Uid, sys.Gid, sys.Nlink, " ", xattrs(t, path), " ")
			if st.Mode().IsRegular() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				sum := sha256.Sum256(data)
				text += hex.EncodeToString(sum[:])
			}
			all[path] = text
			return nil
		})
		require.NoError(t, err)
	}
	return all
}

func xattrs(t *testing.T, path string) string {
	t.Helper()
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, name := range strings.Split(string(names[:n]), "\x00") {
		value := make([]byte, 8192)
		if n, err := unix.Lgetxattr(path, name, value); err == nil && name != "" {
			fmt.Fprintf(&b, "%s=%x ", name, value[:n])
		}
	}
	return b.String()
}

// edit changes kmsfs.toml and its backup as somebody with access to the backing
// directory would.
func edit(t *testing.T, dir string, change func(text string) string) {
	t.Helper()
	for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
		path := filepath.Join(dir, name)
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		next := change(string(text))
		require.NotEqual(t, string(text), next, "the test changes nothing")
		require.NoError(t, os.WriteFile(path, []byte(next), 0o600))
	}
}

// eventually polls for something another process does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, 20*time.Second, 10*time.Millisecond, what)
}

func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z") // a zombie waits for its parent only
}
