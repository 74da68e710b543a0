package volume

import (
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// DirXattr holds a directory's id and its HMAC under the volume key.
const DirXattr = "user.kmsfs.dir"

const dirXattrSize = len(crypt.DirID{}) + 32

// idRegistry knows which directory has which id, for the directories that are
// open. Names are bound to the id of their directory: with one id on two
// directories, entries could be moved between them unnoticed. The first one
// keeps its names; those of the second are damage.
type idRegistry struct {
	mu   sync.Mutex
	live map[crypt.DirID]*liveID // guarded by mu
}

type liveID struct {
	dev, ino uint64
	refs     int
}

// enter registers an open directory and reports whether its id is its own.
func (r *idRegistry) enter(id crypt.DirID, dev, ino uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.live[id]
	switch {
	case l == nil:
		if r.live == nil {
			r.live = make(map[crypt.DirID]*liveID)
		}
		r.live[id] = &liveID{dev: dev, ino: ino, refs: 1}
	case l.dev == dev && l.ino == ino:
		l.refs++
	default:
		return false
	}
	return true
}

// leave forgets one enter.
func (r *idRegistry) leave(id crypt.DirID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.live[id]; l != nil {
		if l.refs--; l.refs == 0 {
			delete(r.live, id)
		}
	}
}

// readDirID reads and checks the id of the directory fd; ENODATA if it has none.
func (v *Volume) readDirID(fd int) (id crypt.DirID, err error) {
	var raw [dirXattrSize + 1]byte
	n := 0
	err = withAccess(fd, accessDir, func() (err error) {
		n, err = getxattr(fd, DirXattr, raw[:])
		return err
	})
	switch {
	case err == unix.ERANGE || err == nil && n != dirXattrSize:
		return id, fmt.Errorf("malformed directory id: %w", crypt.ErrDamaged)
	case err != nil:
		return id, err
	}
	copy(id[:], raw[:])
	mac, err := v.secrets.DirMAC(id)
	if err != nil {
		return id, err
	}
	if !hmac.Equal(mac, raw[len(id):n]) {
		return id, fmt.Errorf("forged directory id: %w", crypt.ErrDamaged)
	}
	return id, nil
}

// setDirID gives the directory fd a fresh id. If somebody else was first, his
// counts.
func (v *Volume) setDirID(fd int) (id crypt.DirID, err error) {
	if _, err := rand.Read(id[:]); err != nil {
		return id, err
	}
	mac, err := v.secrets.DirMAC(id)
	if err != nil {
		return id, err
	}
	raw := append(id[:len(id):len(id)], mac...)
	err = withAccess(fd, accessDir, func() error {
		return setxattr(fd, DirXattr, raw, unix.XATTR_CREATE)
	})
	if err == unix.EEXIST {
		return v.readDirID(fd)
	}
	return id, err
}

// dirID finds the id of the directory fd. A directory without one and without
// entries gets a fresh one: a power cut after mkdir must not brick it. With
// entries but no id it is damaged.
func (v *Volume) dirID(fd int) (crypt.DirID, error) {
	id, err := v.readDirID(fd)
	if err != unix.ENODATA {
		return id, err
	}
	empty, err := isEmptyDir(fd)
	if err != nil {
		return id, err
	}
	if !empty {
		// Perhaps it got its id and its first entry just now.
		if id, err = v.readDirID(fd); err == unix.ENODATA {
			err = fmt.Errorf("the directory has entries but no id: %w", crypt.ErrDamaged)
		}
		return id, err
	}
	id, err = v.setDirID(fd)
	if errors.Is(err, unix.EROFS) {
		err = nil // nothing will ever be bound to it
	}
	return id, err
}

func isEmptyDir(fd int) (bool, error) {
	var e Entries
	defer e.Close()
	if err := e.open(fd); err != nil {
		return false, err
	}
	for {
		raw, ok, err := e.nextRaw()
		if err != nil || !ok {
			return err == nil, err
		}
		if !isDot(raw.name) {
			return false, nil
		}
	}
}
