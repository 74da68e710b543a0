package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A world is a private place: the built program, directories of its own for
// configuration, pins and keys, and volumes.
type world struct {
	root, program string
	env           []string
	mounted       string
}

func newWorld(parent string) (*world, error) {
	root, err := os.MkdirTemp(parent, "kmsfs-bench.")
	if err != nil {
		return nil, err
	}
	w := &world{root: root, program: filepath.Join(root, "kmsfs")}
	w.env = append(os.Environ(), "HOME="+root, "XDG_CONFIG_HOME="+root+"/config", "XDG_STATE_HOME="+root+"/state",
		"XDG_RUNTIME_DIR="+root+"/run", "KMSFS_KEYRING="+root+"/keyring", "AWS_EC2_METADATA_DISABLED=true")
	build := exec.Command("go", "build", "-trimpath", "-o", w.program, "kmsfs/cmd/kmsfs")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		w.close()
		return nil, fmt.Errorf("building kmsfs: %w\n%s", err, out)
	}
	return w, nil
}

func (w *world) close() {
	if w.mounted != "" {
		_, _ = w.run("umount", w.mounted)
	}
	_ = os.RemoveAll(w.root)
}

// A cost is what a program took.
type cost struct {
	wall, cpu time.Duration
	peak      int64 // KiB resident
}

// run runs kmsfs.
func (w *world) run(args ...string) (cost, error) { return w.measure(exec.Command(w.program, args...)) }

func (w *world) measure(cmd *exec.Cmd) (cost, error) {
	var stderr bytes.Buffer
	cmd.Env, cmd.Stderr = w.env, &stderr
	start := time.Now()
	err := cmd.Start()
	if err != nil {
		return cost{}, err
	}
	ended := make(chan struct{})
	peak := make(chan int64)
	go func() { peak <- watchPeak(cmd.Process.Pid, ended) }()
	err = cmd.Wait()
	c := cost{wall: time.Since(start), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	close(ended)
	c.peak = <-peak
	if err != nil {
		return c, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return c, nil
}

// watchPeak reads the high-water mark of a process's resident memory, in KiB, as long
// as it lives. (The kernel's ru_maxrss won't do: a child's begins with its parent's.)
func watchPeak(pid int, ended <-chan struct{}) (peak int64) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return peak
		case <-tick.C:
		}
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if _, rest, ok := strings.Cut(string(status), "VmHWM:"); ok {
			var now int64
			if n, _ := fmt.Sscan(rest, &now); n == 1 {
				peak = max(peak, now)
			}
		}
	}
}

// fill makes a volume with files of 100 bytes, a hundred to a directory, through a
// mount.
func (w *world) fill(name, key string, files int) (dir string, err error) {
	dir, point := filepath.Join(w.root, name), filepath.Join(w.root, name+".mnt")
	for _, d := range []string{dir, point} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return "", err
		}
	}
	if _, err := w.run("init", dir, "--key", key); err != nil {
		return "", err
	}
	if _, err := w.run("mount", dir, point); err != nil {
		return "", err
	}
	w.mounted = point
	content := bytes.Repeat([]byte("x"), 100)
	for i := range files {
		sub := filepath.Join(point, fmt.Sprintf("d%d", i/100))
		if i%100 == 0 {
			err = os.Mkdir(sub, 0o700)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%d", i)), content, 0o600)
		}
		if err != nil {
			return "", err
		}
	}
	if _, err := w.run("umount", point); err != nil {
		return "", err
	}
	w.mounted = ""
	return dir, nil
}

func median[T int64 | time.Duration](list []T) T {
	slices.Sort(list)
	return list[len(list)/2]
}

func medianCost(list []cost) (m cost) {
	var wall, cpu []time.Duration
	var peak []int64
	for _, c := range list {
		wall, cpu, peak = append(wall, c.wall), append(cpu, c.cpu), append(peak, c.peak)
	}
	return cost{median(wall), median(cpu), median(peak)}
}
