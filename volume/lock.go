package volume

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

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
	Gone   bool    // kmsfs.lock is not the file that the other process holds
}

func (e *LockedError) Error() string {
	if e.Gone {
		return fmt.Sprintf("%s is mounted by another kmsfs process of this user, although %s was removed or replaced; unmount it first", e.Path, LockFile)
	}
	if e.Holder == nil {
		return fmt.Sprintf("%s is in use by another kmsfs process", e.Path)
	}
	doing := e.Holder.Owner
	if doing != "" {
		doing = " (" + doing + ")"
	}
	return fmt.Sprintf("%s is in use by process %d on %s%s; unmount it there first", e.Path, e.Holder.PID, e.Holder.Host, doing)
}

// lockText is what kmsfs.lock says: who holds the volume, or held it and died, and
// the session, which is drawn anew whenever somebody takes the lock. Whoever lets go
// of it leaves the session there without a holder.
type lockText struct {
	Holder
	Session string `json:"session,omitempty"`
}

// lockFile is the open kmsfs.lock of a volume that we hold.
type lockFile struct {
	mu      sync.Mutex
	file    *os.File // guarded by mu; nil if not held
	session string   // guarded by mu
	before  string   // the session before ours, set once by Lock
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
	f, err := v.openLock(unix.O_RDWR|unix.O_CREAT, 0o600)
	if errors.Is(err, unix.EROFS) {
		return nil
	}
	if err != nil {
		return err
	}
	text := lockText{self(owner), rand.Text()}
	before, err := v.hold(f, &text)
	if err != nil {
		f.Close()
		return err
	}
	v.lock.file, v.lock.session, v.lock.before = f, text.Session, before
	return nil
}

func (v *Volume) openLock(flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(v.root, LockFile, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
	if err == nil {
		if err = checkRegular(fd); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("opening %s in %s: %w", LockFile, v.path, err)
	}
	return os.NewFile(uintptr(fd), LockFile), nil
}

// hold takes the lock and says whose session was the last.
func (v *Volume) hold(f *os.File, text *lockText) (before string, err error) {
	// A hard link planted as kmsfs.lock would have us empty somebody's file.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Nlink != 1 {
		return "", fmt.Errorf("%s in %s has %d names, so it is not ours: remove that name of it and try again", LockFile, v.path, st.Nlink)
	}
	if err := v.lockAlone(f); err != nil {
		return "", err
	}
	before = readLock(f).sessionIn(f)
	if err := text.write(f); err != nil {
		return "", fmt.Errorf("writing %s in %s: %w", LockFile, v.path, err)
	}
	return before, nil
}

// Who only looks has the flock shared, for some microseconds, and who has just taken
// it may not have written yet: that is waited out.
const (
	lockWait  = time.Second
	lockPause = 2 * time.Millisecond // and as much again, by chance
)

func pauseLock() { time.Sleep(lockPause + mathrand.N(lockPause)) }

// lockAlone takes the flock. Those who look don't hold the volume: whoever does
// keeps others from sharing the flock, too.
func (v *Volume) lockAlone(f *os.File) error {
	for deadline := time.Now().Add(lockWait); ; pauseLock() {
		taken, err := v.flock(f, unix.LOCK_EX)
		if taken || err != nil {
			return err
		}
		looked, err := v.flock(f, unix.LOCK_SH)
		if err != nil {
			return err
		}
		if !looked {
			// Nobody is named before who has taken it has written, and once who lets
			// go of it has.
			h := readLock(f).holder()
			if h != nil || time.Now().After(deadline) {
				return &LockedError{Path: v.path, Holder: h}
			}
			continue
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil || time.Now().After(deadline) {
			return &LockedError{Path: v.path}
		}
	}
}

// flock takes the lock if that can be done at once.
func (v *Volume) flock(f *os.File, how int) (taken bool, err error) {
	err = retry(func() error { return unix.Flock(int(f.Fd()), how|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("locking %s in %s: %w", LockFile, v.path, err)
	}
	return true, nil
}

// CheckUnused refuses, with a *LockedError, a volume that this user has mounted on this
// machine, going by the slots that the mount has in memory (in the directory slots): whoever
// writes the backing directory, or tidies it up, can remove kmsfs.lock under a live mount,
// and two that serve one volume lose what the other writes.
func (v *Volume) CheckUnused(slots string) error {
	fd, err := unix.Open(v.slotPath(slots), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // there are none, or they are not ours
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != unix.Geteuid() {
		return nil
	}
	for deadline := time.Now().Add(lockWait); ; pauseLock() { // a process that dies lets go of one after the other
		if retry(func() error { return unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) }) != unix.EWOULDBLOCK {
			return nil
		}
		if time.Now().After(deadline) {
			return &LockedError{Path: v.path, Gone: true}
		}
	}
}

// A Sighting is what Look saw.
type Sighting struct {
	Holder *Holder // who has the volume mounted; nil if nobody
	// Session names the last time that anybody took the lock, over or not: of two
	// looks that see one session nobody took it in between. It is "" before the
	// first time.
	Session string
}

// Look says who holds the volume's lock. It neither takes the lock nor writes
// anything, and keeps nobody from taking it.
func (v *Volume) Look() (Sighting, error) {
	f, err := v.openLock(unix.O_RDONLY, 0)
	if errors.Is(err, unix.ENOENT) {
		return Sighting{}, v.CheckUnused(SlotDir)
	}
	if err != nil {
		return Sighting{}, err
	}
	defer f.Close() // and with it goes the flock
	for deadline := time.Now().Add(lockWait); ; pauseLock() {
		free, err := v.flock(f, unix.LOCK_SH)
		if err != nil {
			return Sighting{}, err
		}
		text := readLock(f)
		if h := text.holder(); free || h != nil {
			if free {
				h, err = nil, v.CheckUnused(SlotDir) // whoever it was died
			}
			return Sighting{Holder: h, Session: text.sessionIn(f)}, err
		}
		if time.Now().After(deadline) {
			return Sighting{}, &LockedError{Path: v.path}
		}
	}
}

// readLock reads what the file says; nothing if it is being written, or says
// something else.
func readLock(f *os.File) (text lockText) {
	buf := make([]byte, 4096)
	n, _ := f.ReadAt(buf, 0)
	if json.Unmarshal(buf[:n], &text) != nil {
		return lockText{}
	}
	text.Host, text.Owner = printable(text.Host), printable(text.Owner)
	return text
}

// printable is what may be shown of a text that somebody else may have written.
func printable(text string) string {
	if strings.IndexFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return text
	}
	return strconv.Quote(text)
}

func (t lockText) holder() *Holder {
	if t.PID == 0 {
		return nil
	}
	return &t.Holder
}

// sessionIn is the session that the file names. If it names none, since whoever
// wrote it failed or died half-way, or kept no sessions, it is told by when that was.
func (t lockText) sessionIn(f *os.File) string {
	var st unix.Stat_t
	if t.Session != "" || unix.Fstat(int(f.Fd()), &st) != nil {
		return t.Session
	}
	return fmt.Sprintf("written %d.%09d", st.Ctim.Sec, st.Ctim.Nsec)
}

// write needs the flock. It overwrites before it cuts, so that a full disk has room
// for the text of who lets go.
func (t *lockText) write(f *os.File) error {
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	text = append(text, '\n')
	if _, err := f.WriteAt(text, 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(text)))
}

func self(owner string) Holder {
	host, _ := os.Hostname()
	return Holder{PID: os.Getpid(), Host: host, BootID: bootID(), Owner: owner}
}

// release leaves the session in the file before it lets go; the file stays: removing
// it would race with who is just opening it. Should that fail it says that we hold it,
// which the free lock belies.
func (l *lockFile) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = (&lockText{Session: l.session}).write(l.file)
		l.file.Close()
		l.file = nil
	}
}
