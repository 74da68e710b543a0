package volume

import (
	"bytes"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// The user's own attributes (user.*) are stored under encrypted names with
// encrypted values, in both names modes. POSIX ACLs, security.* and trusted.* pass
// through: the kernel reads them. Ours are hidden: reading one is ENODATA, setting
// or removing one EPERM.
//
// Limits: the part of a name after "user." has at most crypt.MaxUserXattrName
// bytes (ERANGE beyond), a value 16 bytes less than the backing store takes, and
// on ext4 all of it shares one block with our header (ENOSPC, E2BIG).

const userXattr = "user."

// maxXattr is the kernel's limit for a value, and for a list of names.
const maxXattr = 64 << 10

// userPart returns what follows "user." in the name of an attribute of the
// user's own; pass is true for names that are none of our business.
func userPart(name string) (user string, pass bool) {
	user, ok := strings.CutPrefix(name, userXattr)
	return user, !ok
}

func isOurs(name string) bool { return strings.HasPrefix(name, crypt.XattrPrefix) }

// storedXattr checks and encrypts the name of a user's attribute.
func (v *Volume) storedXattr(user string) (string, error) {
	switch {
	case v.names == nil:
		return "", ErrLocked
	case user == "":
		return "", unix.EINVAL
	case len(user) > crypt.MaxUserXattrName:
		return "", unix.ERANGE
	}
	return v.names.EncryptXattrName(user), nil
}

// Getxattr reads an attribute of what fd (O_PATH will do) refers to, as
// getxattr(2): with an empty dest it says how long the value is; ERANGE if dest is
// too small.
func (v *Volume) Getxattr(fd int, name string, dest []byte) (int, error) {
	user, pass := userPart(name)
	if pass {
		return getxattr(fd, name, dest)
	}
	if isOurs(name) || len(user) > crypt.MaxUserXattrName {
		return 0, unix.ENODATA
	}
	stored, err := v.storedXattr(user)
	if err != nil {
		return 0, err
	}
	if len(dest) == 0 {
		n, err := getxattr(fd, stored, nil)
		return max(n-crypt.XattrOverhead, 0), err
	}
	buf := make([]byte, min(len(dest), maxXattr)+crypt.XattrOverhead)
	n, err := getxattr(fd, stored, buf)
	if err != nil {
		return 0, err
	}
	value, err := v.names.DecryptXattrValue(user, buf[:n])
	if err != nil {
		return 0, err
	}
	return copy(dest, value), nil
}

// Setxattr sets an attribute of what fd (O_PATH will do) refers to; flags as in
// setxattr(2).
func (v *Volume) Setxattr(fd int, name string, value []byte, flags int) error {
	user, pass := userPart(name)
	if pass {
		return setxattr(fd, name, value, flags)
	}
	if isOurs(name) {
		return unix.EPERM
	}
	stored, err := v.storedXattr(user)
	if err != nil {
		return err
	}
	return setxattr(fd, stored, v.names.EncryptXattrValue(user, value), flags)
}

// Removexattr removes an attribute of what fd (O_PATH will do) refers to.
func (v *Volume) Removexattr(fd int, name string) error {
	user, pass := userPart(name)
	if pass {
		return removexattr(fd, name)
	}
	if isOurs(name) {
		return unix.EPERM
	}
	stored, err := v.storedXattr(user)
	if err == unix.ERANGE {
		err = unix.ENODATA
	}
	if err != nil {
		return err
	}
	return removexattr(fd, stored)
}

// Listxattr lists the plain names of the attributes of what fd (O_PATH will do)
// refers to, each ended by NUL, as listxattr(2): with an empty dest it says how
// much room they need. A name that can't be decrypted is not the user's: it is
// left out, like ours, and like a plain user.* that somebody planted.
func (v *Volume) Listxattr(fd int, dest []byte) (int, error) {
	raw, err := listAll(fd)
	if err != nil {
		return 0, err
	}
	out := make([]byte, 0, len(raw))
	for name := range bytes.SplitSeq(raw, []byte{0}) {
		if len(name) == 0 {
			continue
		}
		if plain, ok := v.plainXattr(string(name)); ok {
			out = append(append(out, plain...), 0)
		}
	}
	switch {
	case len(dest) == 0:
		return len(out), nil
	case len(dest) < len(out):
		return 0, unix.ERANGE
	}
	return copy(dest, out), nil
}

func (v *Volume) plainXattr(stored string) (string, bool) {
	if !strings.HasPrefix(stored, userXattr) {
		return stored, true
	}
	if v.names == nil {
		return "", false
	}
	plain, err := v.names.DecryptXattrName(stored)
	return userXattr + plain, err == nil
}

// listAll reads the stored list; most files have a short one.
func listAll(fd int) ([]byte, error) {
	small := make([]byte, 1024)
	n, err := listxattr(fd, small)
	if err == unix.ERANGE {
		small = make([]byte, maxXattr)
		n, err = listxattr(fd, small)
	}
	if err != nil {
		return nil, err
	}
	return small[:n], nil
}
