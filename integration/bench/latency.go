package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"kmsfs/volume"
)

// filesPerDir is how many files a directory of benchLatency's tree holds.
const filesPerDir = 200

// A service is what wraps data keys in a measurement.
type service struct {
	name string
	key  string
	kms  *kmsProcess // nil for a local key
}

func runLatency(args []string) error {
	fl := flag.NewFlagSet("latency", flag.ContinueOnError)
	files := fl.Int("files", 20000, "number of files")
	list := fl.String("latency", "10ms,25ms", "what a KMS call takes, separated by commas")
	rounds := fl.Int("rounds", 3, "how often each is measured")
	dir := fl.String("dir", "", "where to make the volumes (default: a temporary directory)")
	if err := fl.Parse(args); err != nil {
		return err
	}
	var latencies []time.Duration
	for _, s := range strings.Split(*list, ",") {
		d, err := time.ParseDuration(s)
		if err != nil || d <= 0 {
			return fmt.Errorf("-latency: %q is not a duration", s)
		}
		latencies = append(latencies, d)
	}
	return benchLatency(*dir, *files, *rounds, latencies)
}

// benchLatency creates a tree of small files through a mount, and reads all of it with
// tar through a new one, with a local key and with KMS at each latency. The KMS is a
// process of its own on the same processors: what it takes is told apart.
func benchLatency(parent string, files, rounds int, latencies []time.Duration) error {
	w, err := newWorld(parent)
	if err != nil {
		return err
	}
	defer w.close()
	services := []service{{name: "local key", key: "local:one"}}
	for _, d := range latencies {
		kms, err := w.startKMS(d)
		if err != nil {
			return err
		}
		defer kms.stop()
		services = append(services, service{fmt.Sprintf("KMS at %v", d), kms.key, kms})
	}
	created, read := make([][]took, len(services)), make([][]took, len(services))
	for round := range rounds {
		for i, s := range services {
			c, r, err := w.createAndRead(s, fmt.Sprintf("v%d.%d", round, i), files)
			if err != nil {
				return err
			}
			created[i], read[i] = append(created[i], c), append(read[i], r)
		}
	}
	fmt.Printf("%d files of 2 KiB, %d to a directory, %d rounds, medians\n\n", files, filesPerDir, rounds)
	fmt.Println("| what | keys | seconds | of the local key's time | CPU seconds of kmsfs | of the KMS |")
	fmt.Println("|---|---|---|---|---|---|")
	showRuns("create", services, created)
	showRuns("tar, cold", services, read)
	return nil
}

// took is what one measurement took.
type took struct{ wall, daemon, kms time.Duration }

func showRuns(what string, services []service, all [][]took) {
	var floor float64
	for i, s := range services {
		var wall, daemon, kms []time.Duration
		for _, r := range all[i] {
			wall, daemon, kms = append(wall, r.wall), append(daemon, r.daemon), append(kms, r.kms)
		}
		seconds := median(wall).Seconds()
		if i == 0 {
			floor = seconds
		}
		fmt.Printf("| %s | %s | %.2f | %.2f | %.2f | %.2f |\n", what, s.name, seconds, seconds/floor, median(daemon).Seconds(), median(kms).Seconds())
	}
}

func (w *world) createAndRead(s service, name string, files int) (created, read took, err error) {
	if s.kms != nil {
		before := w.Env
		w.Env = append(w.Env[:len(w.Env):len(w.Env)], s.kms.env...)
		defer func() { w.Env = before }()
	}
	dir, point := filepath.Join(w.Root, name), filepath.Join(w.Root, name+".mnt")
	for _, d := range []string{dir, point} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return created, read, err
		}
	}
	defer os.RemoveAll(dir)
	if _, err := w.run("init", dir, "--key", s.key); err != nil {
		return created, read, err
	}
	if created, err = w.onMount(dir, point, s, func() error { return createFiles(point, files) }); err != nil {
		return created, read, err
	}
	read, err = w.onMount(dir, point, s, func() error { return readTree(point) })
	return created, read, err
}

// onMount mounts, measures what work takes, and unmounts.
func (w *world) onMount(dir, point string, s service, work func() error) (r took, err error) {
	if _, err := w.run("mount", dir, point); err != nil {
		return r, err
	}
	w.mounted = point
	pid, err := daemonOf(dir)
	if err != nil {
		return r, err
	}
	cpu, kms, start := cpuOf(pid), s.cpu(), time.Now()
	if err := work(); err != nil {
		return r, err
	}
	r = took{time.Since(start), cpuOf(pid) - cpu, s.cpu() - kms}
	if s.kms != nil {
		if err := w.showCost(dir, s.name); err != nil {
			return r, err
		}
	}
	if _, err := w.run("umount", point); err != nil {
		return r, err
	}
	w.mounted = ""
	return r, nil
}

// showCost prints what the mount says of its key service.
func (w *world) showCost(dir, name string) error {
	cmd := exec.Command(w.Program, "status", dir)
	cmd.Env = w.Env
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("kmsfs status: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		for _, word := range []string{"calls of", "opens:", "creates:", "ahead:"} {
			if strings.Contains(line, word) {
				fmt.Printf("%s: %s", name, strings.TrimLeft(line, " "))
			}
		}
	}
	fmt.Println()
	return nil
}

func createFiles(point string, files int) error {
	content := bytes.Repeat([]byte("kmsfs small file"), 128)
	for i := range files {
		sub := filepath.Join(point, fmt.Sprintf("d%03d", i/filesPerDir))
		if i%filesPerDir == 0 {
			if err := os.Mkdir(sub, 0o700); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%05d", i)), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// readTree reads all as a backup does. (To /dev/null itself tar would not read.)
func readTree(point string) error {
	out, err := exec.Command("sh", "-c", `tar cf - -C "$0" . | cat >/dev/null`, point).CombinedOutput()
	if err != nil || len(out) > 0 {
		return fmt.Errorf("tar: %v: %s", err, out)
	}
	return nil
}

// daemonOf is the process that has a volume mounted.
func daemonOf(dir string) (pid int, err error) {
	v, err := volume.Open(dir)
	if err != nil {
		return 0, err
	}
	defer v.Close()
	s, err := v.Look()
	if err == nil && s.Holder == nil {
		err = fmt.Errorf("nobody has %s mounted", dir)
	}
	if err != nil {
		return 0, err
	}
	return s.Holder.PID, nil
}

func (s service) cpu() time.Duration {
	if s.kms == nil {
		return 0
	}
	return cpuOf(s.kms.cmd.Process.Pid)
}

// A kmsProcess is a loopback KMS in a process of its own.
type kmsProcess struct {
	cmd *exec.Cmd
	env []string
	key string
}

func (w *world) startKMS(latency time.Duration) (*kmsProcess, error) {
	program := filepath.Join(w.Root, "kmstest")
	if _, err := os.Stat(program); err != nil {
		if out, err := exec.Command("go", "build", "-o", program, "kmsfs/cmd/kmstest").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building kmstest: %w\n%s", err, out)
		}
	}
	k := &kmsProcess{cmd: exec.Command(program, "-latency", latency.String(), "-regions", "us-east-1", "-keys", "1")}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := k.cmd.Start(); err != nil {
		return nil, err
	}
	in := bufio.NewScanner(out)
	for in.Scan() {
		name, value, ok := strings.Cut(in.Text(), "=")
		value = strings.Trim(value, "'")
		switch {
		case ok && strings.HasPrefix(name, "AWS_"):
			k.env = append(k.env, name+"="+value)
		case name == "KEY1":
			k.key = value
		case name == "MRK": // the last line
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return k, nil
		}
	}
	k.stop()
	return nil, fmt.Errorf("kmstest ended before it said what to use: %v", in.Err())
}

func (k *kmsProcess) stop() {
	_ = k.cmd.Process.Kill()
	_ = k.cmd.Wait()
}
