package volume

import (
	"golang.org/x/sys/unix"
)

// Rename moves the entry oldName of d to newName of to. flags are those of
// renameat2(2): RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT. The contents
// of a directory need no change: their names are bound to its id, which goes
// with it.
func (d *Dir) Rename(oldName string, to *Dir, newName string, flags uint) error {
	from, err := d.existing(oldName)
	if err != nil {
		return err
	}
	entry, full, err := to.fresh(newName)
	if err != nil {
		return err
	}
	err = d.rename(from, to, entry, full, flags)
	// An empty directory that is to be replaced may hold sidecars that a crash left.
	if flags == 0 && isNotEmpty(err) && to.clearOrphans(entry) {
		err = d.rename(from, to, entry, full, flags)
	}
	return err
}

// rename moves an entry and keeps the sidecars of both names right. full is the
// whole stored name if the new entry's is only its hash.
func (d *Dir) rename(from string, to *Dir, entry, full string, flags uint) error {
	fromLong := d.v.encrypted() && isLong(from)
	if !fromLong && full == "" {
		return renameat(d.fd, from, to.fd, entry, flags)
	}
	d.v.longMu.Lock()
	defer d.v.longMu.Unlock()
	if full != "" {
		if err := to.putSidecar(entry, full); err != nil {
			return err
		}
	}
	err := renameat(d.fd, from, to.fd, entry, flags)
	// A name that is free now needs no sidecar any more. After success that can
	// only be the old name, after failure only the new one.
	if fromLong && err == nil {
		d.dropSidecar(from)
	}
	if full != "" && err != nil {
		to.dropSidecar(entry)
	}
	return err
}

// renameat keeps to the older call without flags, which every file system has.
func renameat(fromDir int, from string, toDir int, to string, flags uint) error {
	if flags == 0 {
		return unix.Renameat(fromDir, from, toDir, to)
	}
	return unix.Renameat2(fromDir, from, toDir, to, flags)
}
