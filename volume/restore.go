package volume

import (
	"bytes"
	"crypto/hmac"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// What a job needs that puts back what was lost beside the contents: headers,
// directory ids, the settings. It works on stored paths, because names can't be
// translated before the settings and the directory ids are there.

// Bounds of what a backup of headers carries, in bytes.
const (
	MaxStoredPath = 1 << 20
	MaxSettings   = maxSettings
	DirXattrSize  = dirXattrSize
)

// What OpenStored refuses.
var (
	// ErrBadPath: the path does not lead to an entry below the root, or leads to one
	// of kmsfs's own files.
	ErrBadPath = errors.New("not the stored path of an entry of a volume")
	// ErrNotThere: a part of the path is a symlink, or not a directory, or lies on
	// another file system.
	ErrNotThere = errors.New("a directory on the way was replaced by something else, which is not followed")
)

// CheckStoredPath says whether path has the form that Walk gives to the paths of
// a volume without its key: components separated by one slash, none of them a way
// up or out, none of them our own file at the root.
func CheckStoredPath(path string) error {
	if len(path) > MaxStoredPath || strings.ContainsRune(path, 0) || strings.HasPrefix(path, ownPrefix) && !strings.HasPrefix(path, longPrefix) {
		return ErrBadPath
	}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || isDot(name) || len(name) > crypt.MaxName {
			return ErrBadPath
		}
	}
	return nil
}

// OpenStored opens (O_PATH) what lies at a stored path, component by component
// from the root. No symlink is followed and no other file system entered, whoever
// changes the tree meanwhile; a symlink at the end is opened itself. ENOENT: there
// is no such entry.
func (v *Volume) OpenStored(path string) (fd int, st unix.Stat_t, err error) {
	if err := CheckStoredPath(path); err != nil {
		return -1, st, err
	}
	if first, _, _ := strings.Cut(path, "/"); (&walker{v: v}).isOwn(first) {
		return -1, st, ErrBadPath
	}
	if fd, err = unix.FcntlInt(uintptr(v.root), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return -1, st, err
	}
	for more := true; more; {
		var name string
		name, path, more = strings.Cut(path, "/")
		if fd, err = v.descend(fd, name, more, &st); err != nil {
			return -1, st, err
		}
	}
	return fd, st, nil
}

// descend opens name in the directory dir, which it closes.
func (v *Volume) descend(dir int, name string, asDir bool, st *unix.Stat_t) (int, error) {
	defer unix.Close(dir)
	flags := unix.O_PATH
	if asDir {
		flags |= unix.O_DIRECTORY
	}
	fd, err := (&Dir{fd: dir}).openat(name, flags, 0)
	if err == unix.ENOTDIR {
		err = ErrNotThere
	}
	if err != nil {
		return -1, err
	}
	err = unix.Fstat(fd, st)
	if err == nil && st.Dev != v.dev {
		err = ErrNotThere
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// OwnHeader reads the header's bytes of a file of ours even if its mode forbids
// it; nil if there is none.
func OwnHeader(fd int) ([]byte, error) { return readOwnHeader(fd) }

// OpenContents opens the regular file that fd (O_PATH) refers to for reading, also
// a file of ours whose mode forbids it.
func OpenContents(fd int) (contents int, err error) {
	if err := checkRegular(fd); err != nil { // opening a device has effects
		return -1, err
	}
	err = withAccess(fd, accessFile, func() error {
		return retry(func() (err error) {
			contents, err = unix.Open(procPath(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			return err
		})
	})
	if err != nil {
		return -1, fmt.Errorf("opening the file to read it: %w", err)
	}
	return contents, nil
}

// StoredDirID reads the attribute that holds the id of the directory fd (O_PATH
// will do); nil if there is none.
func StoredDirID(fd int) (raw []byte, err error) {
	err = withAccess(fd, accessDir, func() error {
		raw, err = readXattr(fd, DirXattr, maxXattr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the directory's id: %w", err)
	}
	return raw, nil
}

// NeedsDirID reports whether the directory fd can't be used without an id: it has
// entries, whose names are bound to it.
func (v *Volume) NeedsDirID(fd int) (bool, error) {
	if !v.encrypted() {
		return false, nil
	}
	empty, err := isEmptyDir(fd)
	return !empty, err
}

// ReplaceDirID installs an id's attribute in place of old (nil: there must be
// none), or gives up with ErrHeaderChanged.
func ReplaceDirID(fd int, old, raw []byte) error {
	flags := unix.XATTR_CREATE
	if old != nil {
		now, err := StoredDirID(fd)
		if err != nil {
			return err
		}
		if !bytes.Equal(now, old) {
			return ErrHeaderChanged
		}
		flags = unix.XATTR_REPLACE
	}
	err := withAccess(fd, accessDir, func() error { return setxattr(fd, DirXattr, raw, flags) })
	if err == unix.EEXIST || err == unix.ENODATA {
		return ErrHeaderChanged
	}
	if err != nil {
		return fmt.Errorf("setting the directory's id: %w", err)
	}
	return nil
}

// CheckDirID says whether a directory's attribute was made by somebody with the
// volume key. The volume must be unlocked.
func (v *Volume) CheckDirID(raw []byte) error {
	if v.secrets == nil {
		return ErrLocked
	}
	if len(raw) != dirXattrSize {
		return fmt.Errorf("malformed directory id: %w", crypt.ErrDamaged)
	}
	mac, err := v.secrets.DirMAC(crypt.DirID(raw[:len(crypt.DirID{})]))
	if err != nil {
		return err
	}
	if !hmac.Equal(mac, raw[len(crypt.DirID{}):]) {
		return fmt.Errorf("forged directory id: %w", crypt.ErrDamaged)
	}
	return nil
}

// ParseSettings reads the bytes of a kmsfs.toml that was kept elsewhere. Nothing
// in it is trusted yet.
func ParseSettings(data []byte) (*Settings, error) { return parseSettings(data) }

// EncodeSettings are the bytes of kmsfs.toml for the settings as last read.
func (v *Volume) EncodeSettings() ([]byte, error) {
	s := v.Settings()
	return s.encode()
}

// OpenLost opens a backing directory that has lost kmsfs.toml and its backup, with
// settings that were kept elsewhere. Like Open it changes nothing:
// RestoreSettings writes them. If one of the two is there, fs.ErrExist.
func OpenLost(dir string, s *Settings) (*Volume, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	v := &Volume{path: dir, root: fd}
	if err := v.openLost(s); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return v, nil
}

func (v *Volume) openLost(s *Settings) error {
	var st unix.Stat_t
	if err := unix.Fstat(v.root, &st); err != nil {
		return fmt.Errorf("reading its attributes: %w", err)
	}
	if err := checkBackingStore(v.root); err != nil {
		return err
	}
	if err := settingsLost(v.root); err != nil {
		return err
	}
	h, err := s.check()
	if err != nil {
		return badSettings(err)
	}
	v.dev, v.settings, v.fixed, v.header = st.Dev, s.clone(), s.clone(), h
	return nil
}

func settingsLost(root int) error {
	for _, name := range []string{SettingsFile, BackupFile} {
		var st unix.Stat_t
		err := unix.Fstatat(root, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil {
			return &fs.PathError{Op: "restore", Path: name, Err: unix.EEXIST}
		}
		if err != unix.ENOENT {
			return &fs.PathError{Op: "stat", Path: name, Err: err}
		}
	}
	return nil
}

// RestoreSettings writes kmsfs.toml and its backup, durable, where both are lost.
func (v *Volume) RestoreSettings() error {
	unlock, err := v.lockSettings()
	if err != nil {
		return fmt.Errorf("%s: %w", v.path, err)
	}
	defer unlock()
	data, err := v.EncodeSettings()
	if err == nil {
		err = settingsLost(v.root)
	}
	if err == nil {
		err = durable.CreateAt(v.root, SettingsFile, data, 0o600)
	}
	if err == nil {
		err = durable.ReplaceAt(v.root, BackupFile, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("%s: restoring %s: %w", v.path, SettingsFile, err)
	}
	return nil
}
