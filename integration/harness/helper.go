package harness

import (
	"fmt"
	"io"
	"os"
	"os/exec"
)

// helperVariable names the helper that a copy of the test binary runs as.
const helperVariable = "KMSFS_TEST_HELPER"

var helpers = map[string]func(args []string) error{}

// Helper registers a function that tests run in a process of its own, by
// Env.Helper: for what one process can't show, such as two programs that share a
// mapping. Call it from an init function.
func Helper(name string, f func(args []string) error) { helpers[name] = f }

// Helper prepares a process that runs the helper of that name.
func (e *Env) Helper(name string, args ...string) *exec.Cmd {
	cmd := e.Command(shared.self, args...)
	cmd.Env = append(cmd.Env, helperVariable+"="+name)
	return cmd
}

// Help runs a helper to its end; it must succeed.
func (e *Env) Help(name string, args ...string) string {
	e.T.Helper()
	r := e.finish(e.Helper(name, args...))
	if r.Status != 0 {
		e.T.Fatalf("helper %s: %v", name, r)
	}
	return r.Stdout
}

func runHelper(name string, args []string) int {
	f := helpers[name]
	if f == nil {
		fmt.Fprintf(os.Stderr, "no helper is called %q\n", name)
		return 2
	}
	if err := f(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// copyProgram copies a program to where every user may run it: the go command
// keeps its own in a directory of root's.
func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if errClose := out.Close(); err == nil {
		err = errClose
	}
	return err
}
