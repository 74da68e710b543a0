package peers

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A World is a private place: programs, configuration, keys, and what is mounted.
type World struct {
	Root    string   // an absolute path that other users may enter
	Env     []string // of every program that is run in it
	Program string   // kmsfs
	Key     string   // a local key, made for this world
}

// New makes a world in a new directory beneath parent (by default the temporary
// directory) and builds kmsfs. The caller closes it.
func New(parent string) (*World, error) {
	root, err := os.MkdirTemp(parent, "kmsfs-beside.")
	if err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, err
	}
	w := &World{Root: root, Program: filepath.Join(root, "bin", "kmsfs"), Key: "local:one"}
	w.Env = append(os.Environ(), "HOME="+root, "XDG_CONFIG_HOME="+root+"/config", "XDG_STATE_HOME="+root+"/state",
		"XDG_RUNTIME_DIR="+root+"/run", "KMSFS_KEYRING="+root+"/keyring", "AWS_EC2_METADATA_DISABLED=true",
		"CRYFS_FRONTEND=noninteractive", "CRYFS_NO_UPDATE_CHECK=true")
	err = errors.Join(os.Chmod(root, 0o755), os.Mkdir(w.Path("run"), 0o700), w.Build("kmsfs", "kmsfs/cmd/kmsfs"))
	if err == nil {
		_, err = w.Run(w.Program, "key", "create", "one")
	}
	if err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// Close removes the world; everything in it must be unmounted.
func (w *World) Close() { _ = os.RemoveAll(w.Root) }

// Path is a path in the world.
func (w *World) Path(parts ...string) string {
	return filepath.Join(append([]string{w.Root}, parts...)...)
}

// Build builds a Go program from this module, or one that it depends on.
func (w *World) Build(name, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", w.Path("bin", name), pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return nil
}

// Command prepares a program to run in the world.
func (w *World) Command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Env = w.Env
	return cmd
}

// Run runs a program to its end and returns what it says.
func (w *World) Run(program string, args ...string) ([]byte, error) {
	return said(w.Command(program, args...))
}

func said(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return out, err
}
