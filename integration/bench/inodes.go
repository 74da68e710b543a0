package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// benchInodes shows what the daemon's memory is for inodes that the kernel knows: a
// tree of empty files is looked up as a whole, then the kernel is made to forget it
// (forget).
func benchInodes(parent string, sizes []int) error {
	w, err := newWorld(parent)
	if err != nil {
		return err
	}
	defer w.close()
	for _, n := range sizes {
		if err := w.inodes(n); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) inodes(n int) error {
	dir, point := filepath.Join(w.Root, fmt.Sprint("inodes", n)), filepath.Join(w.Root, fmt.Sprint("inodes", n, ".mnt"))
	for _, d := range []string{dir, point} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if _, err := w.run("init", dir, "--key", "local:one", "--names", "plain"); err != nil {
		return err
	}
	for i := range n { // empty files need no header, so they can be made without a mount
		sub := filepath.Join(dir, fmt.Sprint("d", i/1000))
		if i%1000 == 0 {
			if err := os.Mkdir(sub, 0o700); err != nil {
				return err
			}
		}
		if err := syscall.Mknod(filepath.Join(sub, fmt.Sprint("a file of some name ", i)), syscall.S_IFREG|0o600, 0); err != nil {
			return err
		}
	}
	daemon := exec.Command(w.Program, "mount", "-f", dir, point)
	daemon.Env = w.Env
	if err := daemon.Start(); err != nil {
		return err
	}
	w.mounted = point
	for { // until something is there
		if entries, err := os.ReadDir(point); err == nil && len(entries) > 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	before := resident(daemon.Process.Pid)
	start, seen := time.Now(), 0
	err := filepath.WalkDir(point, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil {
			seen++
			_, err = entry.Info()
		}
		return err
	})
	if err != nil {
		return err
	}
	took, full := time.Since(start), resident(daemon.Process.Pid)
	if err := forget(point); err != nil {
		return err
	}
	after := full
	for end := time.Now().Add(4 * time.Minute); time.Now().Before(end) && after > before+(full-before)/4; time.Sleep(time.Second) {
		after = min(after, resident(daemon.Process.Pid)) // the Go runtime gives memory back in its own time
	}
	fmt.Printf("%d inodes looked up in %v: %d MiB resident before, %d MiB with them (%d bytes each), %d MiB once they were forgotten\n",
		seen, took.Round(time.Millisecond), before>>10, full>>10, (full-before)<<10/int64(seen), after>>10)
	if _, err := w.run("umount", point); err != nil {
		return err
	}
	w.mounted = ""
	return daemon.Wait()
}

// forget makes the kernel drop what it knows of the names under a mount point, and with
// them the inodes that nobody uses: a remount does (shrink_dcache_sb). Unlike drop_caches it
// leaves alone what the rest of the machine is working with.
func forget(point string) error {
	err := unix.Mount("", point, "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, "")
	if err != nil {
		return fmt.Errorf("remounting %s: %w; bench runs as root", point, err)
	}
	return nil
}

// resident is a process's memory in KiB (proc_pid_status(5), VmRSS).
func resident(pid int) (kib int64) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if _, rest, ok := strings.Cut(string(status), "VmRSS:"); ok {
		_, _ = fmt.Sscan(rest, &kib)
	}
	return kib
}
