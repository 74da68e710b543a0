package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// Prepare says whether Create can make a volume of dir, so that init can refuse
// before it asks for a key. It changes nothing; a missing dir is fine if its
// parent exists.
func Prepare(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		parent := filepath.Dir(filepath.Clean(dir))
		if fd, err = unix.Open(parent, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return &fs.PathError{Op: "open", Path: parent, Err: err}
		}
		defer unix.Close(fd)
		return inPath(dir, checkBackingStore(fd))
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	return inPath(dir, checkNew(fd))
}

func inPath(dir string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return nil
}

// checkNew says whether the open directory fd may become a volume.
func checkNew(fd int) error {
	if err := checkBackingStore(fd); err != nil {
		return err
	}
	var e Entries
	defer e.Close()
	if err := e.open(fd); err != nil {
		return err
	}
	for {
		raw, ok, err := e.nextRaw()
		if err != nil {
			return fmt.Errorf("listing it: %w", err)
		}
		if !ok {
			return nil
		}
		if !isDot(raw.name) {
			return fmt.Errorf("%w (it holds %q)", ErrNotEmpty, raw.name)
		}
	}
}

// Create makes dir (which may be missing, else must be empty) a volume: mode
// 0700, kmsfs.toml and its backup durable. s needs Format, ID, BlockSize, Names,
// Shared, Keys and the Header that key belongs to; its MAC is made here. key stays the
// caller's.
func Create(dir string, s Settings, key *crypt.Secrets) error {
	mac, err := key.SettingsMAC(s.unchanging())
	if err != nil {
		return err
	}
	s.MAC = mac
	h, err := s.check()
	if err == nil {
		err = s.checkCopies(h)
	}
	if err == nil && h.Identity != key.Identity() {
		err = errors.New("the volume key's header belongs to another key")
	}
	if err != nil {
		return fmt.Errorf("settings of the new volume: %w", err)
	}
	made := unix.Mkdir(dir, 0o700) == nil
	if err := create(dir, &s); err != nil {
		if made {
			_ = unix.Rmdir(dir)
		}
		return inPath(dir, err)
	}
	return nil
}

func create(dir string, s *Settings) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening it: %w", err)
	}
	defer unix.Close(fd)
	if err := checkNew(fd); err != nil {
		return err
	}
	if err := probeXattrs(fd); err != nil {
		return err
	}
	// Modes, owners and, with names = "plain", names are not hidden by kmsfs.
	if err := unix.Fchmod(fd, 0o700); err != nil {
		return fmt.Errorf("making it private (mode 0700): %w", err)
	}
	if err := writeSettings(fd, s); err != nil {
		_ = unix.Unlinkat(fd, SettingsFile, 0)
		_ = unix.Unlinkat(fd, BackupFile, 0)
		return fmt.Errorf("writing %s: %w", SettingsFile, err)
	}
	_ = durable.SyncDir(fd)
	return syncParent(fd)
}

// syncParent makes the directory's own entry durable. A parent that can't be
// opened for reading was not made by us just now.
func syncParent(fd int) error {
	parent, err := unix.Openat(fd, "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening its parent: %w", err)
	}
	defer unix.Close(parent)
	if err := unix.Fsync(parent); err != nil {
		return fmt.Errorf("syncing its parent: %w", err)
	}
	return nil
}
