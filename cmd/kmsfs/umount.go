package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

func (p *program) umountCommand() *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:     "umount MOUNTPOINT",
		Aliases: []string{"unmount"},
		Short:   "Unmount a volume",
		Long: `Unmount MOUNTPOINT and wait until its daemon has written everything and is gone.
A mountpoint left over from a daemon that died is cleaned up. With --lazy a mount
that is in use is taken out of the tree at once, and served to those who have it open
until the last of them is done.` + statuses(0, 1, 6),
		Args: exactly(1, "MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error { return p.umount(cmd.Context(), args[0], lazy) },
	}
	cmd.Flags().BoolVarP(&lazy, "lazy", "l", false, "take a busy mount out of the tree, and don't wait for its users")
	return cmd
}

// daemonWait is how long umount waits for a daemon that has nothing left to
// serve: it may have gigabytes to sync.
const daemonWait = 2 * time.Minute

func (p *program) umount(ctx context.Context, arg string, lazy bool) error {
	point, err := pointPath(arg)
	if err != nil {
		return &failure{status: exitMount, err: err}
	}
	m, err := mountedAt(point)
	if err != nil {
		return err
	}
	if m == nil || !m.isKmsfs() {
		return fail(exitMount, "", "%s is not a kmsfs mountpoint", point)
	}
	daemon := findDaemon(ctx, m.source, point)
	if daemon >= 0 {
		defer unix.Close(daemon)
	}
	var st unix.Stat_t
	stale := errors.Is(unix.Stat(point, &st), unix.ENOTCONN)
	if err := unmountPoint(point, stale || lazy); err != nil || lazy {
		return err
	}
	if elsewhere, err := isMounted(m.device); err != nil || elsewhere {
		return err // a bind mount, or what it was made of: the daemon goes on
	}
	return waitForDaemon(daemon, m)
}

// findDaemon returns a descriptor of the process that serves the mount (so that
// no other process can be mistaken for it later), or -1.
func findDaemon(ctx context.Context, dir, point string) int {
	_, pid, _ := statusAt(ctx, dir, point)
	if pid == 0 {
		if h, err := holderOf(dir); err == nil && h != nil && here(h) {
			pid = h.PID
		}
	}
	if pid == 0 {
		return -1
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1
	}
	return fd
}

// isMounted says whether a file system is mounted anywhere.
func isMounted(device string) (bool, error) {
	list, err := mounts()
	return slices.ContainsFunc(list, func(m mountEntry) bool { return m.device == device }), err
}

// statusAt asks the daemon that serves a mount of dir on point.
func statusAt(ctx context.Context, dir, point string) (r controlReply, pid int, err error) {
	v, err := volume.Open(dir)
	if err != nil {
		return r, 0, err
	}
	defer v.Close()
	c, peer, err := dialControl(v.ID().String(), 0)
	if err != nil {
		return r, 0, err
	}
	defer c.Close()
	if r, err = request(ctx, c, controlRequest{Op: "status"}, controlIdle); err == nil && r.Mountpoint != point {
		err = fmt.Errorf("it is mounted on %s", r.Mountpoint)
	}
	if err != nil {
		return r, 0, err
	}
	return r, int(peer.Pid), nil
}

// unmountPoint takes the mount away; lazy also if it is in use.
func unmountPoint(point string, lazy bool) error {
	err := unmountCall(point, lazy)
	// What only looks at it, an indexer or df, is gone in a moment.
	for tries := 0; errors.Is(err, unix.EBUSY) && tries < 10; tries++ {
		time.Sleep(50 * time.Millisecond)
		err = unmountCall(point, lazy)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return fail(exitMount, "end the programs that use it (\"fuser -vm "+quote(point)+"\" names them) and try again", "%s is busy", point)
	}
	return fail(exitMount, "", "unmounting %s: %w", point, err)
}

func unmountCall(point string, lazy bool) error {
	if os.Geteuid() == 0 {
		flags := unix.UMOUNT_NOFOLLOW
		if lazy {
			flags |= unix.MNT_DETACH
		}
		return unix.Unmount(point, flags)
	}
	args := []string{"-u", "--", point}
	if lazy {
		args = []string{"-u", "-z", "--", point}
	}
	text, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err != nil && strings.Contains(string(text), "busy") {
		return unix.EBUSY
	}
	if err != nil && len(text) > 0 {
		return errors.New(strings.TrimSpace(string(text)))
	}
	return err
}

// daemonSettles is after how long a daemon that is still there may have something left to
// serve, in another mount namespace.
const daemonSettles = time.Second

// waitForDaemon returns when the process is gone: the volume can be mounted again
// at once, and all is on its way to the disk.
func waitForDaemon(pidfd int, m *mountEntry) error {
	if pidfd < 0 {
		return nil
	}
	gone, err := waitProcess(pidfd, daemonSettles)
	if gone || err != nil {
		return err
	}
	if pid, point := holderElsewhere(m.device); pid > 0 {
		return fail(exitMount, fmt.Sprintf("end that process, or run: nsenter -t %d -m umount -- %s", pid, quote(point)),
			"%s is unmounted here, but process %d has a mount namespace in which it is still mounted, and the daemon goes on to serve it", m.point, pid)
	}
	if gone, err = waitProcess(pidfd, daemonWait); gone || err != nil {
		return err
	}
	return fail(exitMount, "look at its log", "the daemon of %s is still running %v after the unmount", m.source, daemonWait)
}

// waitProcess waits for the end of a process.
func waitProcess(pidfd int, long time.Duration) (gone bool, err error) {
	poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(long); ; {
		n, err := unix.Poll(poll, int(max(0, time.Until(deadline)).Milliseconds()))
		switch {
		case n > 0:
			return true, nil
		case err != nil && err != unix.EINTR:
			return false, fmt.Errorf("waiting for the daemon: %w", err)
		case time.Now().After(deadline):
			return false, nil
		}
	}
}

// holderElsewhere is a process in whose mount namespace, not ours, a file system is
// mounted, and where: a container's that was made while it was mounted here too. 0 if we
// see none.
func holderElsewhere(device string) (pid int, point string) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return 0, ""
	}
	seen := map[string]bool{own: true}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		ns, err := os.Readlink(filepath.Join(dir, "ns/mnt")) // one look at each namespace
		if err != nil || seen[ns] {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, "mountinfo"))
		if err != nil {
			continue // it is ending: another process of its namespace may say
		}
		seen[ns] = true
		for _, m := range parseMountinfo(string(text)) {
			if m.device == device {
				pid, _ = strconv.Atoi(filepath.Base(dir))
				return pid, m.point
			}
		}
	}
	return 0, ""
}
