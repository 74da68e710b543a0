package volume

import (
	"bytes"
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"
)

// An Entry is one entry of a directory.
type Entry struct {
	Name string // plain name
	Type uint8  // unix.DT_*; DT_UNKNOWN if the backing store doesn't say
	Ino  uint64 // inode number on the backing store
	Off  int64  // where the listing goes on after this entry (SeekTo)

	Stored string // the name on the backing store, for Peek
}

// Entries lists a directory. It is for one goroutine at a time.
type Entries struct {
	d    *Dir
	fd   int     // open for reading, owned, until Close
	own  bool    // fd is to be closed
	buf  *dirBuf // from dirBufs, until Close
	rest []byte  // what is left of the last getdents64
}

// dirBuf is what one getdents64 call fills: 64 KiB hold about 2,000 entries.
type dirBuf [64 << 10]byte

var dirBufs = sync.Pool{New: func() any { return new(dirBuf) }}

// rawEntry is an entry as it is stored.
type rawEntry struct {
	name  string
	dtype uint8
	ino   uint64
	off   int64
}

// Entries opens a listing of the directory. "." and ".." are part of it; our own
// files and the sidecars of long names are not; entries that can't be decrypted
// are listed as kmsfs.damaged.*.
func (d *Dir) Entries() (*Entries, error) {
	e := &Entries{d: d}
	if err := e.open(d.fd); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Entries) open(dirfd int) error {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	return retry(func() (err error) {
		e.fd, err = unix.Openat(dirfd, ".", flags, 0)
		if err == unix.EACCES { // "." is a search, which a listing doesn't need
			e.fd, err = unix.Open(procPath(dirfd), flags, 0)
		}
		e.own = err == nil
		return err
	})
}

// Fd is the listing's own descriptor, open for reading (fsyncdir, fstat).
func (e *Entries) Fd() int { return e.fd }

// Close ends the listing.
func (e *Entries) Close() {
	if e.own {
		unix.Close(e.fd)
		e.own = false
	}
	if e.buf != nil {
		dirBufs.Put(e.buf)
		e.buf, e.rest = nil, nil
	}
}

// SeekTo goes on after the entry whose Off this is; 0 is the beginning. Offsets
// hold for any listing of the same directory.
func (e *Entries) SeekTo(off int64) error {
	e.rest = nil
	_, err := unix.Seek(e.fd, off, unix.SEEK_SET)
	return err
}

// Next fills in the next entry; false at the end.
func (e *Entries) Next(out *Entry) (bool, error) {
	for {
		raw, ok, err := e.nextRaw()
		if err != nil || !ok {
			return false, err
		}
		plain, hidden := e.d.plainName(raw.name, raw.dtype)
		if hidden {
			continue
		}
		*out = Entry{Name: plain, Type: raw.dtype, Ino: raw.ino, Off: raw.off, Stored: raw.name}
		return true, nil
	}
}

// nextRaw is the next entry as it is stored.
func (e *Entries) nextRaw() (raw rawEntry, ok bool, err error) {
	if len(e.rest) == 0 {
		if err := e.fill(); err != nil || len(e.rest) == 0 {
			return raw, false, err
		}
	}
	// struct linux_dirent64 of getdents(2): d_ino u64, d_off s64, d_reclen u16,
	// d_type u8, d_name NUL-terminated. The kernel's own bytes: well-formed.
	b := e.rest
	size := int(binary.NativeEndian.Uint16(b[16:]))
	name := b[19:size]
	raw = rawEntry{
		name:  string(name[:bytes.IndexByte(name, 0)]),
		dtype: b[18],
		ino:   binary.NativeEndian.Uint64(b),
		off:   int64(binary.NativeEndian.Uint64(b[8:])),
	}
	e.rest = b[size:]
	return raw, true, nil
}

// batch is what one call lists; nothing at the end.
func (e *Entries) batch() (list []rawEntry, err error) {
	for {
		raw, ok, err := e.nextRaw()
		if err != nil || !ok {
			return list, err
		}
		if list = append(list, raw); len(e.rest) == 0 {
			return list, nil
		}
	}
}

func (e *Entries) fill() error {
	if e.buf == nil {
		e.buf = dirBufs.Get().(*dirBuf)
	}
	return retry(func() error {
		n, err := unix.Getdents(e.fd, e.buf[:])
		if err == nil {
			e.rest = e.buf[:n]
		}
		return err
	})
}
