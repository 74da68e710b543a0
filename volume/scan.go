package volume

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// What a check of a volume needs that looks at everything in it: entries that are
// no files, names that nobody here gave, attributes that do not decrypt.

var (
	// ErrSidecar: the symlink that holds a long name is missing, or holds another's.
	ErrSidecar = fmt.Errorf("the symlink beside it that holds its long name is missing or holds another name: %w", crypt.ErrDamaged)
	// ErrStrayXattr: an attribute in the name space of users that kmsfs did not make.
	// It is hidden from them.
	ErrStrayXattr = errors.New("the attribute was not made by kmsfs and is hidden on a mount")
	errNotOurName = fmt.Errorf("its stored name was not made for this directory: %w", crypt.ErrDamaged)
)

// Scan is Walk for every entry below the root, whatever it is: symlinks, devices,
// directories (before what is in them), and the sidecars of long names. Our own files
// at the root are left out.
func (v *Volume) Scan(ctx context.Context, visit func(*Item) error) error {
	w := &walker{v: v, visit: visit, all: true}
	defer w.close()
	if err := w.enterRoot(); err != nil {
		return err
	}
	return w.run(ctx)
}

// StoredPath is the item's path in stored names; "" where a place went wrong.
func (it *Item) StoredPath() string {
	if it.Err != nil {
		return ""
	}
	return it.dir.at.storedPath(it.Name)
}

// OpenPath opens (O_PATH) what was met, of whatever kind it is; ErrGone if something
// else stands there now, or nothing.
func (it *Item) OpenPath() (fd int, st unix.Stat_t, err error) {
	if it.Err != nil {
		return -1, st, it.Err
	}
	fd, err = (&Dir{fd: it.dir.fd}).openat(it.Name, unix.O_PATH, 0)
	if err == unix.ENOENT {
		err = ErrGone
	}
	if err != nil {
		return -1, st, err
	}
	err = unix.Fstat(fd, &st)
	switch {
	case err != nil:
	case st.Dev != it.dir.dev:
		err = ErrOtherDevice
	case st.Ino != it.Ino || uint8(st.Mode&unix.S_IFMT>>12) != it.Type:
		err = ErrGone
	}
	if err != nil {
		unix.Close(fd)
		return -1, st, err
	}
	return fd, st, nil
}

// NameErr says why the item's name can't be one that this volume gave it. Without
// the volume's key only its form is judged. Names in a directory whose id is damaged
// are not judged: that damage is the directory's.
func (it *Item) NameErr() error {
	if it.Err != nil || !it.dir.v.encrypted() || it.IsSidecar() {
		return nil
	}
	d := it.dir.names
	if d == nil {
		d = &Dir{v: it.dir.v, fd: it.dir.fd}
	}
	if d.bad != nil {
		return nil
	}
	full := it.Name
	if isLong(it.Name) {
		var err error
		if full, err = d.readSidecar(it.Name); err != nil {
			return ErrSidecar
		}
	}
	if !crypt.IsStoredName(full) {
		return errNotOurName
	}
	if it.dir.names == nil {
		return nil
	}
	if _, err := d.decrypt(it.Name); err != nil {
		return errNotOurName
	}
	return nil
}

// IsSidecar reports whether the item holds a long name, or held one.
func (it *Item) IsSidecar() bool {
	return it.Err == nil && it.dir.v.encrypted() && it.Type == unix.DT_LNK && isSidecar(it.Name)
}

// IsOrphan reports whether a sidecar's entry is gone: a crash leaves such, and
// nobody sees them.
func (it *Item) IsOrphan() bool {
	return it.IsSidecar() && !(&Dir{fd: it.dir.fd}).exists(strings.TrimSuffix(it.Name, sidecarSuffix))
}

// RemoveOrphan removes a sidecar whose entry is gone. The caller has the volume
// locked: a mount makes the sidecar first.
func (it *Item) RemoveOrphan() error {
	it.dir.v.longMu.Lock()
	defer it.dir.v.longMu.Unlock()
	if !it.IsOrphan() {
		return ErrGone
	}
	err := unix.Unlinkat(it.dir.fd, it.Name, 0)
	if err == unix.ENOENT {
		err = ErrGone
	}
	if err != nil {
		return fmt.Errorf("removing it: %w", err)
	}
	return nil
}

// MoveTo renames the item into the directory to, which must be empty and nobody
// else's, under its stored name; the sidecar of a long name goes with it. Attributes
// stay as they are.
func (it *Item) MoveTo(to int) error {
	fd, _, err := it.OpenPath()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := moveAlone(it.dir.fd, it.Name, to); err != nil {
		return fmt.Errorf("moving it: %w", err)
	}
	if it.dir.v.encrypted() && isLong(it.Name) {
		err = moveAlone(it.dir.fd, it.Name+sidecarSuffix, to)
		if err != nil && err != unix.ENOENT {
			return fmt.Errorf("moving the symlink that holds its name: %w", err)
		}
	}
	return durable.SyncDir(it.dir.fd)
}

func moveAlone(from int, name string, to int) error {
	err := unix.Renameat2(from, name, to, name, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS { // not known to every file system
		err = unix.Renameat(from, name, to, name)
	}
	return err
}

// PeekDirID is StoredDirID that never touches the mode of a directory that forbids
// reading: that is EACCES.
func PeekDirID(fd int) ([]byte, error) { return readXattr(fd, DirXattr, maxXattr) }

// GiveDirID gives a directory without entries the id that a power cut lost.
func (v *Volume) GiveDirID(fd int) error {
	if !v.Unlocked() {
		return ErrLocked
	}
	needs, err := v.NeedsDirID(fd)
	if err == nil && needs {
		err = fmt.Errorf("the directory has entries but no id: %w", crypt.ErrDamaged)
	}
	if err == nil {
		_, err = v.setDirID(fd)
	}
	return err
}

// CheckXattrs calls bad for each of the users' own attributes of what fd (O_PATH will
// do) refers to that does not decrypt, and for each that a mount hides because kmsfs
// did not make it (ErrStrayXattr). The volume must be unlocked. It never touches the
// mode of a file that forbids reading: that is EACCES.
func (v *Volume) CheckXattrs(fd int, bad func(name string, err error)) error {
	if v.names == nil {
		return ErrLocked
	}
	raw, err := listAll(fd)
	if err == unix.EOPNOTSUPP {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing its attributes: %w", err)
	}
	for name := range strings.SplitSeq(string(raw), "\x00") {
		if !strings.HasPrefix(name, userXattr) || name == crypt.HeaderXattr || name == crypt.SparseXattr || name == DirXattr {
			continue
		}
		if !strings.HasPrefix(name, crypt.UserXattrPrefix) {
			bad(name, ErrStrayXattr)
			continue
		}
		plain, err := v.checkXattr(fd, name)
		if errors.Is(err, crypt.ErrDamaged) {
			bad(plain, err)
			continue
		}
		if err != nil && err != unix.ENODATA { // removed just now
			return fmt.Errorf("reading the attribute %s: %w", name, err)
		}
	}
	return nil
}

// checkXattr decrypts one attribute; plain is what its user calls it, as far as that
// can be told.
func (v *Volume) checkXattr(fd int, stored string) (plain string, err error) {
	user, err := v.names.DecryptXattrName(stored)
	if err != nil {
		return stored, fmt.Errorf("the name of an attribute does not decrypt: %w", err)
	}
	buf := make([]byte, maxXattr)
	n, err := getxattr(fd, stored, buf)
	if err != nil {
		return stored, err
	}
	if _, err := v.names.DecryptXattrValue(user, buf[:n]); err != nil {
		return userXattr + user, fmt.Errorf("the value of the attribute %s does not decrypt: %w", userXattr+user, err)
	}
	return userXattr + user, nil
}

// CopySettings writes one of kmsfs.toml and its backup from the other, which must be
// well-formed. A missing one is made; one that is there is replaced only if replace
// is set.
func (v *Volume) CopySettings(from, to string, replace bool) error {
	unlock, err := v.lockSettings()
	if err != nil {
		return err
	}
	defer unlock()
	data, err := durable.ReadAt(v.root, from, maxSettings)
	if err == nil {
		_, err = parseSettings(data)
	}
	switch {
	case err != nil:
	case replace:
		err = durable.ReplaceAt(v.root, to, data, 0o600)
	default:
		err = durable.CreateAt(v.root, to, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("writing %s from %s: %w", to, from, err)
	}
	return nil
}
