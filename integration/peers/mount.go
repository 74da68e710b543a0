package peers

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Options say how a file system is mounted.
type Options struct {
	AllowOther bool // other users too, with setuid bits and device files
	// Daemon has the loopback's daemon serve contents. Root's would have the kernel
	// pass them through to the backing file, which costs what no daemon does.
	Daemon bool
	Init   []string // further arguments of kmsfs init
	Mount  []string // further arguments of kmsfs mount
}

// A Peer is a file system that can be mounted.
type Peer struct {
	Name, Short string
	// find says which version there is; Absent if there is none.
	find func(w *World) (version string, err error)
	// start initialises the backing directory unless that was done, and prepares
	// the command that serves it in the foreground; nil if the directory itself
	// is what is measured.
	start func(w *World, m *Mount) (*exec.Cmd, error)
	ready string // what it says when it may be used and unmounted; "" if nothing
}

// Absent says that a peer is not installed.
type Absent struct{ Why string }

func (a Absent) Error() string { return a.Why }

// Find prepares the peer and says which version it is; the error is Absent if it is
// not installed.
func (p Peer) Find(w *World) (string, error) { return p.find(w) }

// A Mount is a peer that is mounted, or was and can be again.
type Mount struct {
	Peer    Peer
	Dir     string // where programs work
	Backing string // where it stores; Dir itself without a mount
	Options Options

	w      *World
	base   string
	inited bool
	cmd    *exec.Cmd
	log    *os.File
	from   int           // where in log what this process says begins
	device *os.File      // of a mount that was made for the process; nil once it has it
	ended  chan struct{} // closed when the process has ended
	exit   error         // set before ended is closed
}

// startup is how long a peer may take to mount: some stretch passwords.
const startup = 3 * time.Minute

// Mount mounts the peer beneath base, a new directory of the world.
func (p Peer) Mount(w *World, base string, o Options) (*Mount, error) {
	m := &Mount{Peer: p, Backing: filepath.Join(base, "backing"), Dir: filepath.Join(base, "mnt"), Options: o, w: w, base: base}
	if err := errors.Join(os.MkdirAll(m.Backing, 0o755), os.Mkdir(m.Dir, 0o755)); err != nil {
		return nil, err
	}
	spread(m.Backing)
	return m, m.Start()
}

// spread has ext4 put each directory that is made in dir in another block group
// (chattr +T), if it can. It takes no inode again for a minute, or five, that was freed,
// and tries one by one of a group when it looks for one: who creates where somebody has
// deleted before would be measured at that.
func spread(dir string) {
	const topDir = 0x00020000 // FS_TOPDIR_FL, ioctl_iflags(2)
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	if flags, err := unix.IoctlGetInt(int(d.Fd()), unix.FS_IOC_GETFLAGS); err == nil {
		_ = unix.IoctlSetPointerInt(int(d.Fd()), unix.FS_IOC_SETFLAGS, flags|topDir)
	}
}

// Start mounts it.
func (m *Mount) Start() error {
	cmd, err := m.Peer.start(m.w, m)
	if err != nil {
		return err
	}
	m.inited = true
	if cmd == nil {
		m.Dir = m.Backing
		return nil
	}
	if m.log, err = os.OpenFile(filepath.Join(m.base, "log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600); err != nil {
		return err
	}
	m.from = len(m.said())
	cmd.Stdout, cmd.Stderr = m.log, m.log
	err = cmd.Start()
	if m.device != nil {
		// Without it the mount ends with the process.
		_ = m.device.Close()
		m.device = nil
	}
	if err != nil {
		return err
	}
	m.cmd, m.ended = cmd, make(chan struct{})
	go func() {
		m.exit = cmd.Wait()
		close(m.ended)
	}()
	return m.await()
}

// await returns when the mount is there.
func (m *Mount) await() error {
	for end := time.Now().Add(startup); !mounted(m.Dir) || !bytes.Contains(m.said()[m.from:], []byte(m.Peer.ready)); time.Sleep(10 * time.Millisecond) {
		select {
		case <-m.ended:
			return fmt.Errorf("%s does not mount: %w: %s", m.Peer.Name, m.exit, m.said())
		default:
		}
		if time.Now().After(end) {
			_ = m.Kill()
			return fmt.Errorf("%s does not mount: %s", m.Peer.Name, m.said())
		}
	}
	return nil
}

func (m *Mount) said() []byte {
	text, _ := os.ReadFile(m.log.Name())
	return text
}

// PID is that of the process that serves it; 0 if there is none.
func (m *Mount) PID() int {
	if m.cmd == nil {
		return 0
	}
	return m.cmd.Process.Pid
}

// Stop unmounts it and waits for its process. Start mounts it again.
func (m *Mount) Stop() error {
	if m.cmd == nil {
		return nil
	}
	if _, err := m.w.Run("fusermount3", "-u", m.Dir); err != nil {
		return err
	}
	select {
	case <-m.ended:
	case <-time.After(startup):
		return errors.Join(fmt.Errorf("%s is unmounted and its process does not end", m.Peer.Name), m.Kill())
	}
	defer m.log.Close()
	m.cmd = nil
	if m.exit != nil {
		return fmt.Errorf("%s: %w: %s", m.Peer.Name, m.exit, m.said())
	}
	return nil
}

// Kill ends it whatever it does: requests that hang are answered with errors.
func (m *Mount) Kill() error {
	if m.cmd == nil {
		return nil
	}
	_ = m.cmd.Process.Kill()
	<-m.ended
	m.cmd = nil
	m.log.Close()
	if !mounted(m.Dir) {
		return nil
	}
	return unix.Unmount(m.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// End unmounts it and removes all that it stored.
func (m *Mount) End() error {
	if err := m.Stop(); err != nil {
		return err
	}
	return os.RemoveAll(m.base)
}

func mounted(dir string) bool {
	table, _ := os.ReadFile("/proc/self/mountinfo")
	return bytes.Contains(table, []byte(" "+dir+" "))
}
