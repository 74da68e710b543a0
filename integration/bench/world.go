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

	"kmsfs/integration/peers"
)

// A world has the built program, directories of its own, and volumes.
type world struct {
	*peers.World
	mounted string
}

func newWorld(parent string) (*world, error) {
	in, err := peers.New(parent)
	return &world{World: in}, err
}

func (w *world) close() {
	if w.mounted != "" {
		_, _ = w.run("umount", w.mounted)
	}
	w.Close()
}

// A cost is what a program took.
type cost struct {
	wall, cpu time.Duration
	peak      int64 // KiB resident
}

// run runs kmsfs.
func (w *world) run(args ...string) (cost, error) { return w.measure(exec.Command(w.Program, args...)) }

func (w *world) measure(cmd *exec.Cmd) (cost, error) {
	var stderr bytes.Buffer
	cmd.Env, cmd.Stderr = w.Env, &stderr
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

// watchPeak reads the high-water mark of a process's memory, in KiB, as long as it
// lives.
func watchPeak(pid int, ended <-chan struct{}) (peak int64) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return peak
		case <-tick.C:
		}
		_, now := memoryOf(pid)
		peak = max(peak, now)
	}
}

// fill makes a volume with files of 100 bytes, a hundred to a directory, through a
// mount.
func (w *world) fill(name, key string, files int) (dir string, err error) {
	dir, point := filepath.Join(w.Root, name), filepath.Join(w.Root, name+".mnt")
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
