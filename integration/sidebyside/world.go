package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A world is a private place with the programs that are compared.
type world struct {
	root, logs string
	env        []string
}

func newWorld(parent, logs string) (*world, error) {
	if logs != "" {
		if err := os.MkdirAll(logs, 0o755); err != nil {
			return nil, fmt.Errorf("making the directory for logs: %w", err)
		}
	}
	root, err := os.MkdirTemp(parent, "kmsfs-posix.")
	if err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, err
	}
	w := &world{root: root, logs: logs}
	w.env = append(os.Environ(), "HOME="+root, "XDG_CONFIG_HOME="+root+"/config", "XDG_STATE_HOME="+root+"/state",
		"XDG_RUNTIME_DIR="+root+"/run", "KMSFS_KEYRING="+root+"/keyring", "AWS_EC2_METADATA_DISABLED=true")
	err = errors.Join(os.Chmod(root, 0o755), os.Mkdir(filepath.Join(root, "on"), 0o755), w.build())
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// build makes the programs that come as source: kmsfs, go-fuse's loopback (of the
// version that kmsfs uses) and the tests.
func (w *world) build() error {
	for name, args := range map[string][]string{
		"kmsfs":    {"build", "kmsfs/cmd/kmsfs"},
		"loopback": {"build", "github.com/hanwen/go-fuse/v2/example/loopback"},
		"posix":    {"test", "-c", "kmsfs/integration/posix"},
	} {
		args = append(args[:len(args)-1:len(args)-1], "-o", filepath.Join(w.root, name), args[len(args)-1])
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", name, err, out)
		}
	}
	_, err := w.run(filepath.Join(w.root, "kmsfs"), "key", "create", "one")
	return err
}

func (w *world) close() { _ = os.RemoveAll(w.root) }

func (w *world) run(program string, args ...string) ([]byte, error) {
	cmd := exec.Command(program, args...)
	cmd.Env = w.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return out, nil
}

// keep keeps what a suite said, if that is wanted.
func (w *world) keep(name string, said []byte) error {
	if w.logs == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(w.logs, name), said, 0o644)
}

// A fileSystem is one that is tried.
type fileSystem struct {
	name, short string
	// mount mounts it beneath base and says where, and how it ends.
	mount func(w *world, base string) (dir string, end func() error, err error)
	// allowed is how many may fail, by suite; POSIX.md says which. Those that are
	// here for comparison may fail what they like.
	allowed map[string]int
	// device gives it to xfstests; nil if that has no business there.
	device func(w *world) device
	ours   bool // xfstests' departures are those of POSIX.md
}

var fileSystems = []fileSystem{
	{name: "the backing store", short: "backing", mount: plainly, allowed: map[string]int{"scenes": 0, "posixtest": 0, "pjdfstest": 0}},
	{name: "kmsfs, plain names", short: "plain", mount: kmsfs("plain"), allowed: map[string]int{"scenes": 0, "posixtest": 0, "pjdfstest": 0}, device: kmsfsDevice("plain"), ours: true},
	{name: "kmsfs, encrypted names", short: "encrypted", mount: kmsfs("encrypted"), allowed: map[string]int{"scenes": 0, "posixtest": 0, "pjdfstest": 2}, device: kmsfsDevice("encrypted"), ours: true},
	{name: "go-fuse's loopback", short: "loopback", mount: loopback, device: loopbackDevice},
	{name: "gocryptfs", short: "gocryptfs", mount: gocryptfs, device: gocryptfsDevice},
}

func plainly(_ *world, base string) (string, func() error, error) {
	return base, func() error { return os.RemoveAll(base) }, os.Mkdir(base, 0o755)
}

// places makes a backing directory and a mountpoint.
func places(base string) (backing, mnt string, err error) {
	backing, mnt = filepath.Join(base, "backing"), filepath.Join(base, "mnt")
	return backing, mnt, errors.Join(os.MkdirAll(backing, 0o755), os.Mkdir(mnt, 0o755))
}

func kmsfs(names string) func(*world, string) (string, func() error, error) {
	return func(w *world, base string) (string, func() error, error) {
		backing, mnt, err := places(base)
		if err != nil {
			return "", nil, err
		}
		program := filepath.Join(w.root, "kmsfs")
		if _, err := w.run(program, "init", backing, "--key", "local:one", "--names", names); err != nil {
			return "", nil, err
		}
		if _, err := w.run(program, "mount", backing, mnt, "--allow-other", "-o", "suid,dev"); err != nil {
			return "", nil, err
		}
		return mnt, func() error { _, err := w.run(program, "umount", mnt); return err }, nil
	}
}

func loopback(w *world, base string) (string, func() error, error) {
	backing, mnt, err := places(base)
	if err != nil {
		return "", nil, err
	}
	cmd := exec.Command(filepath.Join(w.root, "loopback"), "-q", "-allow-other", mnt, backing)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	for end := time.Now().Add(10 * time.Second); !mounted(mnt); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			_ = cmd.Process.Kill()
			return "", nil, fmt.Errorf("loopback does not mount: %s", said.String())
		}
	}
	return mnt, func() error { return errors.Join(unmount(w, mnt), cmd.Wait()) }, nil
}

func gocryptfs(w *world, base string) (string, func() error, error) {
	backing, mnt, err := places(base)
	if err != nil {
		return "", nil, err
	}
	secret := filepath.Join(base, "password")
	if err := os.WriteFile(secret, []byte("password\n"), 0o600); err != nil {
		return "", nil, err
	}
	if _, err := w.run("gocryptfs", "-init", "-q", "-passfile", secret, backing); err != nil {
		return "", nil, fmt.Errorf("%w (apt-get install gocryptfs)", err)
	}
	// Without pipes: its daemon would hold them open.
	if err := exec.Command("gocryptfs", "-q", "-allow_other", "-suid", "-dev", "-passfile", secret, backing, mnt).Run(); err != nil {
		return "", nil, fmt.Errorf("mounting gocryptfs: %w", err)
	}
	return mnt, func() error { return unmount(w, mnt) }, nil
}

func mounted(dir string) bool {
	table, _ := os.ReadFile("/proc/self/mountinfo")
	return bytes.Contains(table, []byte(" "+dir+" "))
}

func unmount(w *world, mnt string) error {
	_, err := w.run("fusermount3", "-u", mnt)
	return err
}
