package main

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
)

// xfstests mounts and unmounts by itself, through mount(8), so a file system is given
// to it as what mount(8) needs: see xfstests.sh.
type device struct {
	fstype  string            // what follows "fuse." in its type
	options string            // the mount options, for both devices
	helpers map[string]string // programs in /sbin: scripts, or what they are links to
	prepare string            // a script that makes the backing directory $1
	verify  string            // a script that checks it in the end
}

//go:embed xfstests.sh
var xfstestsScript string

// builtXfstests refuses what is not a built suite before anything is mounted; check
// wants to be run in its directory, dir made absolute.
func builtXfstests(dir string) (string, error) {
	for _, need := range []string{"check", "ltp/fsstress", "src/lstat64"} {
		if _, err := os.Stat(filepath.Join(dir, need)); err != nil {
			return "", fmt.Errorf("this is not a built xfstests: %w", err)
		}
	}
	return filepath.Abs(dir)
}

// A verdict is what check said of the tests that it was asked for.
type verdict struct{ ran, notRun, failed []string }

func (v verdict) count() count {
	return count{passed: len(v.ran) - len(v.notRun) - len(v.failed), failed: len(v.failed)}
}

// xfstests has a built suite's check run on a file system whose devices lie on backing.
func (w *world) xfstests(fs fileSystem, suite, backing string, args []string) (v verdict, err error) {
	work, err := os.MkdirTemp(w.root, "xfstests.")
	if err != nil {
		return v, err
	}
	if err := w.lay(fs.device(w), work); err != nil {
		return v, err
	}
	script := append([]string{filepath.Join(work, "xfstests.sh"), work, suite, backing, fs.device(w).fstype}, args...)
	cmd := exec.Command("bash", script...)
	cmd.Env = w.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC} // 478 takes others' semaphores for its own
	said, err := cmd.CombinedOutput()
	if keep := w.keep(fs.short+".xfstests."+backing+".log", said); keep != nil {
		return v, keep
	}
	if err != nil {
		return v, fmt.Errorf("xfstests on %s: %w:\n%s", backing, err, tail(said))
	}
	if w.logs != "" {
		keep := filepath.Join(w.logs, fs.short+".xfstests."+backing)
		if err := errors.Join(os.RemoveAll(keep), os.CopyFS(keep, os.DirFS(filepath.Join(work, "results")))); err != nil {
			return v, err
		}
	}
	return verdictOf(said)
}

// lay puts what the script needs where it looks for it.
func (w *world) lay(d device, work string) error {
	if err := os.Mkdir(filepath.Join(work, "helpers"), 0o755); err != nil {
		return err
	}
	for name, text := range d.helpers {
		path := filepath.Join(work, "helpers", name)
		if filepath.IsAbs(text) {
			if err := os.Symlink(text, path); err != nil {
				return err
			}
			continue
		}
		if err := os.WriteFile(path, []byte("#!/bin/bash\nset -eu\n"+text), 0o755); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"prepare": "#!/bin/bash\nset -eu\n" + d.prepare, "verify": "#!/bin/bash\nset -eu\n" + d.verify,
		"mount-options": d.options, "xfstests.sh": xfstestsScript,
	} {
		if err := os.WriteFile(filepath.Join(work, name), []byte(text), 0o755); err != nil {
			return err
		}
	}
	return os.Chmod(work, 0o755) // other users go through it
}

var summary = regexp.MustCompile(`(?m)^(Ran|Not run|Failures): (.*)$`)

// verdictOf reads the end of what check says. Without its list of tests it broke off.
func verdictOf(said []byte) (v verdict, err error) {
	lists := map[string]*[]string{"Ran": &v.ran, "Not run": &v.notRun, "Failures": &v.failed}
	for _, m := range summary.FindAllSubmatch(said, -1) {
		*lists[string(m[1])] = strings.Fields(string(m[2]))
	}
	if len(v.ran) == 0 {
		return v, fmt.Errorf("xfstests broke off:\n%s", tail(said))
	}
	return v, nil
}

func tail(said []byte) []byte { return said[max(0, len(said)-4096):] }

// judge compares what failed on kmsfs with the departures: both what fails without a
// reason and a reason that is not needed any more are mistakes.
func (v verdict) judge(backing string) (err error) {
	for _, test := range v.failed {
		if departureOf(test, backing) == nil {
			err = errors.Join(err, fmt.Errorf("xfstests on %s: %s fails, and POSIX.md has no reason for it", backing, test))
		}
	}
	for _, d := range departures {
		tried := slices.Contains(v.ran, d.test) && !slices.Contains(v.notRun, d.test)
		if tried && d.on(backing) && !d.maybe && !slices.Contains(v.failed, d.test) {
			err = errors.Join(err, fmt.Errorf("xfstests on %s: %s does not fail any more (%s): take it out of the departures and of POSIX.md", backing, d.test, d.reason))
		}
	}
	return err
}

// A departure is a test that fails on kmsfs for a reason that stands in POSIX.md.
type departure struct {
	test, reason string
	backing      string // only there; "" means on all
	maybe        bool   // it depends on the machine, or on luck
}

func (d departure) on(backing string) bool { return d.backing == "" || d.backing == backing }

func departureOf(test, backing string) *departure {
	for i, d := range departures {
		if d.test == test && d.on(backing) {
			return &departures[i]
		}
	}
	return nil
}
