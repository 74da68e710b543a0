package volume

import "golang.org/x/sys/unix"

// Peek reads the header's bytes (nil if there is none) of the file name, and its
// attributes as they are stored, without opening it. The attributes are read last: if
// they are the file's that the caller means, so is the header.
func (d *Dir) Peek(name string) (raw []byte, st unix.Stat_t, err error) {
	stored, err := d.existing(name)
	if err != nil {
		return nil, st, err
	}
	if raw, err = readXattrAt(d.fd, stored); err != nil {
		return nil, st, err
	}
	return raw, st, unix.Fstatat(d.fd, stored, &st, unix.AT_SYMLINK_NOFOLLOW)
}
