package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
)

// A suite is run in an empty directory; what it says is counted.
type suite struct {
	name    string
	command func(dir string) *exec.Cmd
	passed  *regexp.Regexp
	failed  *regexp.Regexp
	waived  *regexp.Regexp // of those that failed: the suite itself expects it
}

func (s suite) run(dir string) ([]byte, error) {
	cmd := s.command(dir)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil // it is the counts that matter
	}
	return out, err
}

func (s suite) count(said []byte) (c count) {
	c.passed = len(s.passed.FindAll(said, -1))
	for _, line := range s.failed.FindAll(said, -1) {
		if s.waived == nil || !s.waived.Match(line) {
			c.failed++
		}
	}
	return c
}

// suites are those that can be run here.
func (w *world) suites(pjdfstest string) ([]suite, error) {
	goTest := func(name, test string) suite {
		return suite{
			name: name,
			command: func(dir string) *exec.Cmd {
				cmd := exec.Command(filepath.Join(w.root, "posix"), "-test.v", "-test.timeout", "30m", "-test.run", "^"+test+"$", "-at", dir)
				cmd.Dir = "integration/posix"
				return cmd
			},
			passed: regexp.MustCompile(`(?m)^    --- PASS: .*$`), failed: regexp.MustCompile(`(?m)^    --- FAIL: .*$`),
		}
	}
	list := []suite{goTest("scenes", "TestScenes"), goTest("posixtest", "TestGoFuse")}
	if pjdfstest == "" {
		return list, nil
	}
	for _, need := range []string{"pjdfstest", "tests"} {
		if _, err := os.Stat(filepath.Join(pjdfstest, need)); err != nil {
			return nil, fmt.Errorf("this is not a built pjdfstest: %w", err)
		}
	}
	return append(list, suite{
		name: "pjdfstest",
		command: func(dir string) *exec.Cmd {
			cmd := exec.Command("prove", "-r", "-v", filepath.Join(pjdfstest, "tests"))
			cmd.Dir = dir
			return cmd
		},
		passed: regexp.MustCompile(`(?m)^ok .*$`), failed: regexp.MustCompile(`(?m)^not ok .*$`), waived: regexp.MustCompile(`# TODO`),
	}), nil
}
