package volume

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A stored name of more than 255 bytes becomes an entry kmsfs.long.<hash>; the
// symlink kmsfs.long.<hash>.n beside it, the sidecar, holds the stored name. A
// symlink is made by one atomic call and journalled with its entry. It is made
// before the entry and removed after it, so a crash leaves at most a sidecar
// without an entry, which nobody sees and rmdir clears away.
const (
	longPrefix    = "kmsfs.long."
	sidecarSuffix = ".n"
	hashDigits    = 2 * sha256.Size
)

// DamagedPrefix starts the names under which entries are listed that can't be
// decrypted: their stored name follows, or its hash if that is too long. Users
// can stat, rename and remove by such a name, and make none.
const DamagedPrefix = "kmsfs.damaged."

func hashOf(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:])
}

func isHash(s string) bool {
	if len(s) != hashDigits {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return false
		}
	}
	return true
}

// isLong reports whether an entry's name is that of a long name.
func isLong(stored string) bool {
	hash, ok := strings.CutPrefix(stored, longPrefix)
	return ok && isHash(hash)
}

func isSidecar(stored string) bool {
	entry, ok := strings.CutSuffix(stored, sidecarSuffix)
	return ok && isLong(entry)
}

func isDot(name string) bool { return name == "." || name == ".." }

// encrypt is the name of the entry of plain in this directory; full is the whole
// stored name if the entry's is only its hash.
func (d *Dir) encrypt(plain string) (entry, full string) {
	if n := d.last.Load(); n != nil && n.plain == plain {
		return n.stored, ""
	}
	stored := d.v.names.EncryptName(d.id, plain)
	if len(stored) <= crypt.MaxName {
		d.last.Store(&named{strings.Clone(plain), stored})
		return stored, ""
	}
	return longPrefix + hashOf(stored), stored
}

// existing translates the name of an entry that is to be found.
func (d *Dir) existing(plain string) (string, error) {
	if err := checkPlain(plain); err != nil {
		return "", err
	}
	if !d.v.encrypted() {
		if d.root && strings.HasPrefix(plain, ownPrefix) {
			return "", unix.ENOENT
		}
		return plain, nil
	}
	if strings.HasPrefix(plain, DamagedPrefix) {
		return d.damagedEntry(plain[len(DamagedPrefix):])
	}
	if d.root && strings.HasPrefix(plain, ownPrefix) {
		return "", unix.ENOENT
	}
	if d.bad != nil {
		return "", d.bad
	}
	entry, _ := d.encrypt(plain)
	return entry, nil
}

// fresh translates a name that may come to be. Ours are refused.
func (d *Dir) fresh(plain string) (entry, full string, err error) {
	switch err := checkPlain(plain); {
	case err != nil:
		return "", "", err
	case d.root && strings.HasPrefix(plain, ownPrefix):
		return "", "", unix.EPERM
	case !d.v.encrypted():
		return plain, "", nil
	case strings.HasPrefix(plain, DamagedPrefix):
		return "", "", unix.EPERM
	case d.bad != nil:
		return "", "", d.bad
	}
	entry, full = d.encrypt(plain)
	return entry, full, nil
}

func checkPlain(plain string) error {
	switch {
	case crypt.CheckName(plain):
		return nil
	case len(plain) > crypt.MaxName:
		return unix.ENAMETOOLONG
	}
	return unix.EINVAL
}

// making calls op, which makes the entry of a plain name, with the sidecar in
// place.
func (d *Dir) making(plain string, op func(stored string) error) error {
	entry, full, err := d.fresh(plain)
	if err != nil {
		return err
	}
	if full == "" {
		return op(entry)
	}
	d.v.longMu.Lock()
	defer d.v.longMu.Unlock()
	if err := d.putSidecar(entry, full); err != nil {
		return err
	}
	err = op(entry)
	if err != nil {
		d.dropSidecar(entry)
	}
	return err
}

// removing calls op, which removes an entry, and removes its sidecar after it.
func (d *Dir) removing(plain string, op func(stored string) error) error {
	entry, err := d.existing(plain)
	if err != nil {
		return err
	}
	if !d.v.encrypted() || !isLong(entry) {
		return op(entry)
	}
	d.v.longMu.Lock()
	defer d.v.longMu.Unlock()
	if err := op(entry); err != nil {
		return err
	}
	d.dropSidecar(entry)
	return nil
}

// putSidecar makes the sidecar of entry, or puts a wrong one right. Caller holds
// longMu.
func (d *Dir) putSidecar(entry, full string) error {
	side := entry + sidecarSuffix
	err := unix.Symlinkat(full, d.fd, side)
	if err != unix.EEXIST {
		return err
	}
	if got, err := readlinkat(d.fd, side); err == nil && string(got) == full {
		return nil
	}
	// A forged or torn one, or something planted that is no symlink.
	if err := unix.Unlinkat(d.fd, side, 0); err != nil {
		return err
	}
	return unix.Symlinkat(full, d.fd, side)
}

// dropSidecar removes the sidecar of entry, but not while the entry is there
// (an exchange, a whiteout, a rename between two links of one file). What fails
// here leaves an orphan, which is harmless. Caller holds longMu.
func (d *Dir) dropSidecar(entry string) {
	if !d.exists(entry) {
		_ = unix.Unlinkat(d.fd, entry+sidecarSuffix, 0)
	}
}

// exists is true in doubt.
func (d *Dir) exists(stored string) bool {
	var st unix.Stat_t
	return unix.Fstatat(d.fd, stored, &st, unix.AT_SYMLINK_NOFOLLOW) != unix.ENOENT
}

// isLink reports whether the entry is a symlink: only such a sidecar is ours.
func (d *Dir) isLink(stored string) bool {
	var st unix.Stat_t
	return unix.Fstatat(d.fd, stored, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK
}

// clearOrphans removes the sidecars from the directory stored if it holds
// nothing else, and reports whether it is worth trying to remove it again.
func (d *Dir) clearOrphans(stored string) bool {
	if !d.v.encrypted() {
		return false
	}
	d.v.longMu.Lock() // a sidecar whose entry is just being made is no orphan
	defer d.v.longMu.Unlock()
	fd, err := d.openat(stored, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return false
	}
	sub := &Dir{v: d.v, fd: fd}
	defer unix.Close(fd)
	only, err := sub.eachSidecar(func(string) error { return nil })
	if err != nil || !only {
		return false
	}
	_, err = sub.eachSidecar(func(side string) error { return unix.Unlinkat(fd, side, 0) })
	return err == nil
}

// eachSidecar calls f for the sidecars of a directory until it meets something
// else: then only is false.
func (d *Dir) eachSidecar(f func(side string) error) (only bool, err error) {
	var e Entries
	defer e.Close()
	if err := e.open(d.fd); err != nil {
		return false, err
	}
	for {
		raw, ok, err := e.nextRaw()
		if err != nil || !ok {
			return err == nil, err
		}
		if isDot(raw.name) {
			continue
		}
		if !isSidecar(raw.name) || !d.isLink(raw.name) {
			return false, nil
		}
		if err := f(raw.name); err != nil {
			return false, err
		}
	}
}

// plainName is the reverse way, for listings: what an entry is called, and
// whether it is hidden.
func (d *Dir) plainName(stored string, dtype uint8) (plain string, hidden bool) {
	if isDot(stored) {
		return stored, false
	}
	if !d.v.encrypted() {
		return stored, d.root && strings.HasPrefix(stored, ownPrefix)
	}
	switch {
	case isSidecar(stored):
		if dtype == unix.DT_LNK || dtype == unix.DT_UNKNOWN && d.isLink(stored) {
			return "", true
		}
	case d.root && strings.HasPrefix(stored, ownPrefix) && !isLong(stored):
		return "", true
	}
	plain, err := d.decrypt(stored)
	if err != nil {
		return damagedName(stored), false
	}
	return plain, false
}

// decrypt is the plain name of an entry.
func (d *Dir) decrypt(entry string) (string, error) {
	if d.bad != nil {
		return "", d.bad
	}
	full := entry
	if strings.HasPrefix(entry, longPrefix) {
		var err error
		if full, err = d.readSidecar(entry); err != nil {
			return "", err
		}
	}
	plain, err := d.v.names.DecryptName(d.id, full)
	if err == nil && full == entry { // which encrypts to it again (RFC 5297)
		d.last.Store(&named{plain, entry})
	}
	return plain, err
}

// readSidecar is the stored name that entry is the hash of.
func (d *Dir) readSidecar(entry string) (string, error) {
	if !isLong(entry) {
		return "", crypt.ErrDamaged
	}
	raw, err := readlinkat(d.fd, entry+sidecarSuffix)
	full := string(raw)
	if err != nil || len(full) <= crypt.MaxName || longPrefix+hashOf(full) != entry {
		return "", crypt.ErrDamaged
	}
	return full, nil
}

func damagedName(stored string) string {
	if len(DamagedPrefix)+len(stored) > crypt.MaxName {
		return DamagedPrefix + hashOf(stored)
	}
	return DamagedPrefix + stored
}

// damagedEntry finds the entry that is listed as kmsfs.damaged.<text>. An entry
// in good order does not have such a name, and our own files are not to be had
// this way.
func (d *Dir) damagedEntry(text string) (string, error) {
	if !crypt.CheckName(text) || d.root && strings.HasPrefix(text, ownPrefix) && !isLong(text) && !isSidecar(text) {
		return "", unix.ENOENT
	}
	if isHash(text) && !d.exists(text) {
		return d.damagedByHash(text)
	}
	if isSidecar(text) && d.isLink(text) {
		return "", unix.ENOENT
	}
	if _, err := d.decrypt(text); err == nil {
		return "", unix.ENOENT
	}
	return text, nil
}

// damagedByHash looks for the entry whose name was too long to be listed.
func (d *Dir) damagedByHash(hash string) (string, error) {
	var e Entries
	defer e.Close()
	if err := e.open(d.fd); err != nil {
		return "", err
	}
	for {
		raw, ok, err := e.nextRaw()
		if err != nil {
			return "", err
		}
		if !ok {
			return "", unix.ENOENT
		}
		if len(DamagedPrefix)+len(raw.name) <= crypt.MaxName || hashOf(raw.name) != hash {
			continue
		}
		if _, err := d.decrypt(raw.name); err != nil {
			return raw.name, nil
		}
	}
}
