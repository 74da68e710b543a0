package volume

import "golang.org/x/sys/unix"

// Peek reads the header's bytes (nil if there is none) of a file that was listed in this
// directory, by its Entry.Stored, and its attributes as they are stored, without opening
// it. The attributes are read last: if they are the file's that the caller means, so is
// the header.
func (d *Dir) Peek(stored string) (raw []byte, st unix.Stat_t, err error) {
	if raw, err = readXattrAt(d.fd, stored); err != nil {
		return nil, st, err
	}
	return raw, st, unix.Fstatat(d.fd, stored, &st, unix.AT_SYMLINK_NOFOLLOW)
}
