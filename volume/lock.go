package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A Holder says who has a volume locked.
type Holder struct {
	PID    int    `json:"pid"`
	Host   string `json:"host"`
	BootID string `json:"boot_id"`
	Owner  string `json:"owner,omitempty"` // what it does, "mount on /mnt"
}

// A LockedError says that another process holds the volume.
type LockedError struct {
	Path   string
	Holder *Holder // nil if kmsfs.lock doesn't say
}

func (e *LockedError) Error() string {
	if e.Holder == nil {
		return fmt.Sprintf("%s is in use by another kmsfs process", e.Path)
	}
	doing := e.Holder.Owner
	if doing != "" {
		doing = " (" + doing + ")"
	}
	return fmt.Sprintf("%s is in use by process %d on %s%s; unmount it there first", e.Path, e.Holder.PID, e.Holder.Host, doing)
}

// lockFile is the open kmsfs.lock of a volume that we hold.
type lockFile struct {
	mu   sync.Mutex
	file *os.File // guarded by mu; nil if not held
}

// Lock makes this process the only one that has the volume mounted: a flock on
// kmsfs.lock, which ends with the process, also after kill -9, and is not
// inherited by programs it starts. owner says for others what it is held for.
// A *LockedError names who has it. On a read-only file system there is nothing to
// lock.
func (v *Volume) Lock(owner string) error {
	v.lock.mu.Lock()
	defer v.lock.mu.Unlock()
	if v.lock.file != nil {
		return nil
	}
	fd, err := unix.Openat(v.root, LockFile, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EROFS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening %s in %s: %w", LockFile, v.path, err)
	}
	f := os.NewFile(uintptr(fd), LockFile)
	if err := v.hold(f, owner); err != nil {
		f.Close()
		return err
	}
	v.lock.file = f
	return nil
}

func (v *Volume) hold(f *os.File, owner string) error {
	fd := int(f.Fd())
	if err := checkRegular(fd); err != nil {
		return fmt.Errorf("%s in %s: %w", LockFile, v.path, err)
	}
	// A hard link planted as kmsfs.lock would have us empty somebody's file.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Nlink != 1 {
		return fmt.Errorf("%s in %s has %d names, so it is not ours: remove that name of it and try again", LockFile, v.path, st.Nlink)
	}
	err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &LockedError{Path: v.path, Holder: readHolder(f)}
	}
	if err != nil {
		return fmt.Errorf("locking %s in %s: %w", LockFile, v.path, err)
	}
	text, err := json.Marshal(self(owner))
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(append(text, '\n'), 0)
	}
	if err != nil {
		return fmt.Errorf("writing %s in %s: %w", LockFile, v.path, err)
	}
	return nil
}

func readHolder(f *os.File) *Holder {
	buf := make([]byte, 4096)
	n, _ := f.ReadAt(buf, 0)
	h := new(Holder)
	if json.Unmarshal(buf[:n], h) != nil || h.PID == 0 {
		return nil
	}
	return h
}

func self(owner string) Holder {
	host, _ := os.Hostname()
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return Holder{PID: os.Getpid(), Host: host, BootID: strings.TrimSpace(string(boot)), Owner: owner}
}

// release empties the file before it lets go; the file stays: removing it would
// race with who is just opening it.
func (l *lockFile) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Truncate(0)
		l.file.Close()
		l.file = nil
	}
}
