package fsck

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
	"kmsfs/volume"
)

// settings checks kmsfs.toml and its backup. One of them is good, or the volume would
// not be open.
func (j *job) settings() {
	main, errMain := readSettings(j.v, volume.SettingsFile)
	backup, errBackup := readSettings(j.v, volume.BackupFile)
	if j.o.VolumeErr != nil {
		j.tell(j.inSettings(volume.SettingsFile, Damage, fmt.Errorf("the volume's key or settings can't be used: %w", j.o.VolumeErr)))
	}
	switch {
	case errMain != nil:
		j.lostSettings(volume.SettingsFile, volume.BackupFile, errMain)
	case errBackup != nil:
		j.lostSettings(volume.BackupFile, volume.SettingsFile, errBackup)
	case !same(main, backup):
		j.tell(j.inSettings(volume.BackupFile, Damage, errors.New("it does not belong to kmsfs.toml: what never changes differs")))
	case !bytes.Equal(main.raw, backup.raw):
		f := j.inSettings(volume.BackupFile, Untidy, errors.New("it is older than kmsfs.toml"))
		if j.o.Repair {
			f.act("written from kmsfs.toml", j.v.CopySettings(volume.SettingsFile, volume.BackupFile, true))
		}
		j.tell(f)
	}
}

func (j *job) inSettings(name string, level Level, err error) Finding {
	return Finding{Kind: Settings, Level: level, Path: name, Stored: name, Err: err}
}

// lostSettings: one of the two can't be used. It is made anew if it is missing; what
// is there, if only as a heap of bytes, is not written over.
func (j *job) lostSettings(name, from string, err error) {
	if missing := errors.Is(err, fs.ErrNotExist); missing {
		f := j.inSettings(name, Damage, errors.New("it is missing"))
		if j.o.Repair {
			f.act("written from "+from, j.v.CopySettings(from, name, false))
		}
		j.tell(f)
		return
	}
	j.tell(j.inSettings(name, Damage, fmt.Errorf("%w; --repair writes it anew from %s after it was moved away", err, from)))
}

// keysChanged reports whether a rekey wrote kmsfs.toml since the beginning.
func (j *job) keysChanged() bool {
	now, err := readSettings(j.v, volume.SettingsFile)
	s := j.v.Settings()
	return err == nil && !(slices.Equal(now.s.Keys, s.Keys) && bytes.Equal(now.s.Header, s.Header))
}

type settingsCopy struct {
	raw    []byte
	s      *volume.Settings
	header *crypt.Header
}

func readSettings(v *volume.Volume, name string) (c settingsCopy, err error) {
	if c.raw, err = durable.ReadAt(v.Fd(), name, volume.MaxSettings); err != nil {
		return c, err
	}
	if c.s, err = volume.ParseSettings(c.raw); err != nil {
		return c, err
	}
	c.header, err = crypt.ParseHeader(c.s.Header)
	return c, err
}

// same reports whether two files tell of one volume and one volume key.
func same(a, b settingsCopy) bool {
	return a.s.Digest() == b.s.Digest() && bytes.Equal(a.s.MAC, b.s.MAC) && a.header.Identity == b.header.Identity
}

// root checks the attributes of the root directory, which no entry stands for.
func (j *job) root() {
	if !j.v.Unlocked() {
		return
	}
	tell := func(kind Kind, level Level, err error) {
		j.tell(Finding{Kind: kind, Level: level, Path: ".", Stored: ".", Err: err})
	}
	err := j.v.CheckXattrs(j.v.Fd(), func(name string, err error) {
		if errors.Is(err, volume.ErrStrayXattr) {
			tell(Xattr, Untidy, fmt.Errorf("%s: %w", name, err))
			return
		}
		tell(Xattr, Damage, err)
	})
	if err != nil {
		tell(Access, Unread, err)
	}
}
