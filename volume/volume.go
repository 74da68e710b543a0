package volume

import (
	"bytes"
	"crypto/hmac"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// What can be wrong with a directory that is to be a volume.
var (
	// ErrNotVolume: the directory holds no kmsfs.toml.
	ErrNotVolume = errors.New("not a kmsfs volume (no kmsfs.toml); make one with \"kmsfs init\"")
	// ErrNotEmpty: init never touches a directory with something in it.
	ErrNotEmpty = errors.New("the directory is not empty; kmsfs init wants an empty one")
	// ErrNoXattrs: the file system can't hold headers.
	ErrNoXattrs = errors.New("the file system has no user extended attributes, where kmsfs keeps its headers; use ext4, xfs or btrfs, or mount it with user_xattr")
	// ErrIsMount: the directory lies on a kmsfs mount, not in a backing store.
	ErrIsMount = errors.New("the directory is itself on a kmsfs mount; name the backing directory")
	// ErrLocked: the volume key is needed first (Unlock).
	ErrLocked = errors.New("the volume is locked: its key has not been opened")
	// ErrBusy: another process is changing kmsfs.toml.
	ErrBusy = errors.New("another process is changing kmsfs.toml; try again")
)

// A Volume is an open backing directory. It is safe for concurrent use.
type Volume struct {
	path string // for messages only
	root int    // O_PATH descriptor, owned, until Close
	dev  uint64 // the root's device

	fixed Settings // of the settings, what never changes: read without mu

	mu       sync.RWMutex
	settings Settings      // guarded by mu
	header   *crypt.Header // guarded by mu; the volume key's
	warning  string        // guarded by mu

	// Set once by Unlock, before any Dir exists.
	secrets *crypt.Secrets
	names   *crypt.Names
	rootID  crypt.DirID

	ids    idRegistry
	longMu sync.Mutex // one change to long names at a time: entry and sidecar belong together

	lock              lockFile
	markFirst, marked uint64 // numbers of markers; of who has the volume locked

	// heldTails are kept ends that RecoverTails could not judge. This mount must know
	// whose they are.
	heldTails []heldTail
}

// Open opens the backing directory dir and reads its settings. It needs no key
// and changes nothing. If kmsfs.toml is missing or malformed and its backup is
// good, the backup counts and Warning says why.
func Open(dir string) (*Volume, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	v := &Volume{path: dir, root: fd}
	if err := v.open(); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return v, nil
}

func (v *Volume) open() error {
	var st unix.Stat_t
	if err := unix.Fstat(v.root, &st); err != nil {
		return fmt.Errorf("reading its attributes: %w", err)
	}
	v.dev = st.Dev
	if err := checkBackingStore(v.root); err != nil {
		return err
	}
	if err := v.load(); err != nil {
		return err
	}
	v.fixed = v.settings.clone()
	return nil
}

// load reads the settings from disk.
func (v *Volume) load() error {
	s, warning, err := readSettings(v.root)
	if err != nil {
		return err
	}
	h, err := s.check()
	if err != nil {
		return badSettings(err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.settings, v.header, v.warning = *s, h, warning
	return nil
}

// readSettings reads kmsfs.toml, or else its backup with a reason.
func readSettings(root int) (s *Settings, warning string, err error) {
	s, err = readSettingsFile(root, SettingsFile)
	if err == nil {
		return s, "", nil
	}
	backup, errBackup := readSettingsFile(root, BackupFile)
	switch {
	case errBackup == nil:
		return backup, fmt.Sprintf("%v; its backup %s is used instead", err, BackupFile), nil
	case errors.Is(err, fs.ErrNotExist) && errors.Is(errBackup, fs.ErrNotExist):
		return nil, "", ErrNotVolume
	case errors.Is(err, fs.ErrNotExist):
		return nil, "", errBackup
	}
	return nil, "", err
}

func readSettingsFile(root int, name string) (*Settings, error) {
	data, err := durable.ReadAt(root, name, maxSettings)
	if errors.Is(err, durable.ErrTooBig) {
		err = badSettings(err)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the volume's settings: %w", err)
	}
	s, err := parseSettings(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// Path is the directory as it was given to Open.
func (v *Volume) Path() string { return v.path }

// Warning is not empty if the settings came from the backup.
func (v *Volume) Warning() string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.warning
}

// Settings are the settings as last read.
func (v *Volume) Settings() Settings {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.settings.clone()
}

// ID is the volume's id.
func (v *Volume) ID() crypt.VolumeID { return v.fixed.ID }

// BlockSize is the size of a plaintext block in bytes.
func (v *Volume) BlockSize() int { return v.fixed.BlockSize }

// Names says how entries are named on disk.
func (v *Volume) Names() NamesMode { return v.fixed.Names }

// Digest names the settings that never change, for the client's pin.
func (v *Volume) Digest() string { return v.fixed.Digest() }

// Header is the volume key's header. The caller must not change it.
func (v *Volume) Header() *crypt.Header {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.header
}

// Unlock takes the secrets of the volume key (it owns them from now on, also on
// error), checks with them that nobody changed the settings, and makes names
// readable. It must come before the first Root.
func (v *Volume) Unlock(s *crypt.Secrets) error {
	if err := v.unlock(s); err != nil {
		s.Wipe()
		return fmt.Errorf("%s: %w", v.path, err)
	}
	return nil
}

func (v *Volume) unlock(s *crypt.Secrets) error {
	if v.secrets != nil {
		return errors.New("the volume is unlocked already")
	}
	if s.Identity() != v.Header().Identity {
		return fmt.Errorf("this is not the volume's key: %w", crypt.ErrDamaged)
	}
	settings := v.Settings()
	mac, err := s.SettingsMAC(settings.unchanging())
	if err != nil {
		return err
	}
	if !hmac.Equal(mac, settings.MAC) {
		return fmt.Errorf("%s was changed by somebody without the volume key: %w", SettingsFile, crypt.ErrDamaged)
	}
	rootID, err := s.RootDirID()
	if err != nil {
		return err
	}
	names, err := crypt.NewNames(s)
	if err != nil {
		return err
	}
	v.secrets, v.names, v.rootID = s, names, rootID
	return nil
}

// Unlocked reports whether Unlock has succeeded.
func (v *Volume) Unlocked() bool { return v.names != nil }

// encrypted reports whether entries have encrypted names.
func (v *Volume) encrypted() bool { return v.fixed.Names == NamesEncrypted }

// Reload reads the settings again, for a live mount after a rekey; changed
// says whether the key list or the volume key's header differ from before. What
// never changes must not have.
func (v *Volume) Reload() (changed bool, err error) {
	before := v.Settings()
	s, warning, err := readSettings(v.root)
	if err != nil {
		return false, fmt.Errorf("%s: %w", v.path, err)
	}
	return v.adopt(&before, s, warning)
}

// adopt installs settings if they are a lawful successor of before.
func (v *Volume) adopt(before, s *Settings, warning string) (changed bool, err error) {
	h, err := successor(before, s)
	if err != nil {
		return false, fmt.Errorf("%s: %w", v.path, badSettings(err))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.settings, v.header, v.warning = *s, h, warning
	return !slices.Equal(before.Keys, s.Keys) || !bytes.Equal(before.Header, s.Header), nil
}

// successor checks that s may follow before, and returns its header: only the
// keys and the copies of the volume key may differ.
func successor(before, s *Settings) (*crypt.Header, error) {
	if !bytes.Equal(before.unchanging(), s.unchanging()) || !bytes.Equal(before.MAC, s.MAC) {
		return nil, errors.New("format, volume id, block size, names mode and envelope can't change")
	}
	h, err := s.check()
	if err != nil {
		return nil, err
	}
	old, err := crypt.ParseHeader(before.Header)
	if err != nil {
		return nil, err
	}
	if h.Identity != old.Identity {
		return nil, errors.New("the volume key can't change")
	}
	return h, nil
}

// Update reads the settings, lets change edit the key list and the volume key's
// header, and writes them back atomically, the backup too. Updates by several
// processes come one after another; each sees the one before. No key is needed.
func (v *Volume) Update(change func(*Settings) error) error {
	unlock, err := v.lockSettings()
	if err != nil {
		return fmt.Errorf("%s: %w", v.path, err)
	}
	defer unlock()
	before, _, err := readSettings(v.root)
	if err != nil {
		return fmt.Errorf("%s: %w", v.path, err)
	}
	own := v.Settings()
	// Adopted also if change declines: it may want to look again at what is there now.
	if _, err := v.adopt(&own, before, ""); err != nil {
		return err
	}
	after := before.clone()
	if err := change(&after); err != nil {
		return err
	}
	h, err := successor(before, &after)
	if err == nil {
		err = after.checkCopies(h)
	}
	if err == nil {
		err = writeSettings(v.root, &after)
	}
	if err != nil {
		return fmt.Errorf("%s: changing %s: %w", v.path, SettingsFile, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.settings, v.header, v.warning = after, h, ""
	return nil
}

// writeSettings writes kmsfs.toml first: a crash before the backup is written
// leaves an older, still valid one.
func writeSettings(root int, s *Settings) error {
	data, err := s.encode()
	if err != nil {
		return err
	}
	if err := durable.ReplaceAt(root, SettingsFile, data, 0o600); err != nil {
		return err
	}
	return durable.ReplaceAt(root, BackupFile, data, 0o600)
}

// lockSettings is a flock on the root directory itself: kmsfs.toml is replaced
// by every update, and kmsfs.lock is held as long as the volume is mounted.
func (v *Volume) lockSettings() (unlock func(), err error) {
	fd, err := unix.Openat(v.root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the root directory: %w", err)
	}
	for deadline := time.Now().Add(settingsWait); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { unix.Close(fd) }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(deadline) {
			break
		}
	}
	unix.Close(fd)
	if err == unix.EWOULDBLOCK {
		err = ErrBusy
	}
	return nil, fmt.Errorf("locking %s: %w", SettingsFile, err)
}

const settingsWait = 10 * time.Second

// Root opens the root directory. Every call returns a Dir of its own.
func (v *Volume) Root() (*Dir, error) {
	if v.encrypted() && !v.Unlocked() {
		return nil, ErrLocked
	}
	fd, err := unix.FcntlInt(uintptr(v.root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return v.newDir(fd, true)
}

// A Syncer makes durable what was written to the backing store since it was opened:
// the kernel reports a failed write-back to each descriptor once (syncfs(2)), so who
// relies on it opens one before the first change.
type Syncer struct{ fd int }

// OpenSync opens a Syncer, which the caller closes.
func (v *Volume) OpenSync() (*Syncer, error) {
	fd, err := unix.Openat(v.root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the backing directory to sync it: %w", err)
	}
	return &Syncer{fd}, nil
}

// Sync returns when everything written so far is durable.
func (s *Syncer) Sync() error {
	if err := retry(func() error { return unix.Syncfs(s.fd) }); err != nil {
		return fmt.Errorf("syncing the backing store: %w", err)
	}
	return nil
}

// Close closes it.
func (s *Syncer) Close() { unix.Close(s.fd) }

// Fd is the O_PATH descriptor of the root, for statfs and the like. It is the
// volume's.
func (v *Volume) Fd() int { return v.root }

// Close releases the lock, wipes the volume key and closes the root. No Dir may
// be in use any more.
func (v *Volume) Close() error {
	v.lock.release()
	v.secrets.Wipe()
	return unix.Close(v.root)
}
