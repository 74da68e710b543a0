package fs

import (
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// A file is a backing regular file in use: what its handles share.
type file struct {
	fs   *fileSystem
	id   fileID
	refs int // guarded by fileTable.mu

	// store holds the descriptor; a read-only one is replaced at the first
	// writable open. Replaced with mu held.
	store store
	// view is the plaintext: nil until somebody opens the file, then the same
	// until the last handle is gone. Set with mu held.
	view atomic.Pointer[crypt.File]
	// bar is why the file may not be used, or nil. Lifted with mu held.
	bar atomic.Pointer[bar]
	// stale: the kernel may show pages that could not be written.
	stale atomic.Bool
	// made: we made it, and it has had no header yet.
	made atomic.Bool
	// kept: a use is counted for the end, which is in memory only (crypt.File.Torn).
	kept atomic.Bool
	// node is one that the kernel knows the file by, from the first handle on.
	node atomic.Pointer[node]

	mu      sync.Mutex
	old     []int     // guarded by mu; descriptors replaced, closed with the file
	writers int       // guarded by mu; handles that may write
	loading *loading  // guarded by mu; the open that is asking for the key
	gaps    time.Time // guarded by mu; since when gaps have been seen pending

	timesMu sync.Mutex // times, while they are kept over a settle
	// told is the mtime that the kernel has of a file it keeps the times of, as
	// far as we know; guarded by timesMu, nil if we don't.
	told *unix.Timespec
	// cached: what the kernel sets the time of was written since then.
	cached atomic.Bool
	modeMu sync.Mutex // mode bits, while a header is being set (volume.Stored)
}

func newFile(fs *fileSystem, id fileID) *file {
	f := &file{fs: fs, id: id}
	f.store.f = f
	return f
}

// descriptor is the file's descriptor, or -1 while it has none. It stays open for
// as long as the caller uses the file, also when it is replaced.
func (f *file) descriptor() int {
	if d := f.store.cur.Load(); d != nil {
		return d.fd
	}
	return -1
}

// A descriptor is an open backing file.
type descriptor struct {
	fd int
	rw bool
	*volume.Stored
}

// close ends a file that nobody uses.
func (f *file) close() {
	if v := f.view.Load(); v != nil {
		v.Close()
	}
	for _, fd := range f.old {
		unix.Close(fd)
	}
	if fd := f.descriptor(); fd >= 0 {
		unix.Close(fd)
	}
}

// install makes fd the file's descriptor. mu is held.
func (f *file) install(fd int, rw bool) {
	if before := f.descriptor(); before >= 0 {
		f.old = append(f.old, before)
	}
	f.store.cur.Store(&descriptor{fd: fd, rw: rw, Stored: volume.NewBacking(fd)})
}

// ready opens the backing file for what is wanted of its mode (access(2): R_OK,
// W_OK). Writable handles need a descriptor for both: the kernel reads through them to
// fill pages, and part of a block can't be sealed without the rest.
func (f *file) ready(n *node, want uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rw := want&unix.W_OK != 0
	d := f.store.cur.Load()
	if d != nil && (d.rw || !rw) {
		return f.fs.mayUse(d.fd, want)
	}
	flags := unix.O_RDONLY
	if rw {
		flags = unix.O_RDWR
	}
	fd, mtime, err := f.openBacking(n, flags)
	if err == unix.EACCES && want == unix.W_OK {
		fd, err = f.openUnreadable(n)
	}
	if err != nil {
		return err
	}
	f.install(fd, rw)
	f.learnTime(fd, mtime)
	return nil
}

// openUnreadable opens for both what the mode lets this process write and not read.
func (f *file) openUnreadable(n *node) (fd int, err error) {
	err = n.with(func(at int) error {
		if err := f.fs.mayUse(at, unix.W_OK); err != nil {
			return err
		}
		f.modeMu.Lock()
		defer f.modeMu.Unlock()
		fd, err = volume.OpenAnyway(at)
		return err
	})
	return fd, err
}

// openBacking opens the backing file anew: through the descriptor there is, or
// by name. O_DIRECT, O_APPEND and O_TRUNC never reach it. mtime is nil if it was not
// looked at.
func (f *file) openBacking(n *node, flags int) (fd int, mtime *unix.Timespec, err error) {
	if have := f.descriptor(); have >= 0 {
		fd, err = reopen(have, flags)
		return fd, nil, err
	}
	checked := func(opened int, err error) error {
		if err != nil {
			return err
		}
		var st unix.Statx_t
		if err = n.fs.statFd(opened, &st); err == nil {
			err = n.check(&st)
		}
		if err != nil {
			unix.Close(opened)
			return err
		}
		fd, mtime = opened, mtimeOf(&st)
		return nil
	}
	err = n.viaName(func(kept int) error { return checked(reopen(kept, flags)) },
		func(d *volume.Dir, name string) error { return checked(d.Open(name, flags)) })
	return fd, mtime, err
}

func mtimeOf(st *unix.Statx_t) *unix.Timespec {
	return &unix.Timespec{Sec: st.Mtime.Sec, Nsec: int64(st.Mtime.Nsec)}
}

// procPath names what fd refers to; opening it opens that inode, whatever became
// of its names.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func reopen(fd, flags int) (int, error) {
	for {
		n, err := unix.Open(procPath(fd), flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// mayUse asks whether the file's mode lets this process open it, when no open(2)
// tells. Nothing stops root, and with default_permissions the kernel has asked for
// the caller.
func (fs *fileSystem) mayUse(fd int, want uint32) error {
	if fs.priv {
		return nil
	}
	return unix.Faccessat(unix.AT_FDCWD, procPath(fd), want, unix.AT_EACCESS)
}

// stat reads the attributes through a descriptor.
func (f *file) stat(fd int, st *unix.Statx_t) error {
	err := f.fs.statFd(fd, st)
	if v := f.view.Load(); v != nil {
		st.Size = uint64(v.Size())
	}
	return err
}

// writerLeaves ends a writable handle's hold; after the last one gaps are settled
// and a key that was not needed goes back.
func (f *file) writerLeaves() {
	if unused := f.dropWriter(); unused != nil {
		f.fs.keys.Return(unused)
	}
}

// dropWriter decides who is last and acts on it in one go: of two that leave at
// once, one must settle.
func (f *file) dropWriter() (unused *crypt.Fresh) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writers--
	v := f.view.Load()
	if f.writers > 0 || v == nil {
		return nil
	}
	if v.Pending() {
		if err := f.settleLocked(v); err != nil {
			f.fs.log.trouble("writing the gaps of a file", f.id.ino, err)
		}
		f.keepTorn(v)
	}
	f.keepTold()
	return v.Unprime()
}

// keepTorn keeps a file whose end is in memory only, until settleOld finds room for it.
// The caller uses the file.
func (f *file) keepTorn(v *crypt.File) {
	if v.Torn() && !f.kept.Swap(true) {
		f.fs.files.hold(f)
	}
}

// keepTold puts the mtime back to what the kernel has. With the writeback cache
// the time of a write is the kernel's to set, and it sends it along, unless its
// clock has not ticked since it learned the last one; then the pages alone arrive,
// later, and move the backing file's.
func (f *file) keepTold() {
	f.timesMu.Lock()
	defer f.timesMu.Unlock()
	if f.cached.Swap(false) && f.told != nil {
		_ = volume.Utimens(f.descriptor(), &[2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, *f.told}) // costs only the time
	}
}

// learnTime takes the backing file's mtime for the kernel's, when the file is opened
// anew: what the kernel kept of earlier changes it sent before their last handle went.
// Without, a write within one tick of that time would move the backing file's alone: the
// store gives a file whose time was asked for a finer one.
// mtime is nil if it is not known yet.
func (f *file) learnTime(fd int, mtime *unix.Timespec) {
	f.timesMu.Lock()
	defer f.timesMu.Unlock()
	if f.told != nil {
		return
	}
	var st unix.Statx_t
	if mtime == nil && f.fs.statFd(fd, &st) == nil {
		mtime = mtimeOf(&st)
	}
	if mtime != nil {
		f.tell(*mtime)
	}
}

// movedTimes notes a change that moves the backing file's mtime, and that the kernel, if
// it keeps the times, has set a time for: the same one, if its clock has not ticked.
func (f *file) movedTimes() {
	if f.fs.opts.Writeback {
		f.cached.Store(true)
	}
}

// tell notes an mtime that the kernel has now. timesMu is held.
func (f *file) tell(mtime unix.Timespec) {
	f.told = &mtime
	f.cached.Store(false)
}

func (f *file) settleNow(v *crypt.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.settleLocked(v)
}

// settleLocked makes pending gaps true on disk, and leaves the times as they
// were: they are the kernel's to set, and nobody wrote. mu is held.
func (f *file) settleLocked(v *crypt.File) error {
	f.timesMu.Lock()
	defer f.timesMu.Unlock()
	var st unix.Stat_t
	fd := f.descriptor()
	kept := unix.Fstat(fd, &st) == nil
	err := v.Settle()
	if kept {
		_ = volume.Utimens(fd, &[2]unix.Timespec{st.Atim, st.Mtim}) // costs only the time itself
	}
	f.gaps = time.Time{}
	f.fs.stats.settles.Add(1)
	return err
}

// store is a file's crypt.Backing: the descriptor of the moment.
type store struct {
	f   *file
	cur atomic.Pointer[descriptor]
}

var _ crypt.Backing = (*store)(nil)

var _ crypt.SlotKeeper = (*store)(nil)

// backing is the store as its view sees it: whether ends are kept is seen by type.
func (s *store) backing() crypt.Backing {
	if s.f.fs.opts.Tails == nil {
		return s
	}
	return keepingStore{s}
}

// A keepingStore is a store whose end is kept while it is written over.
type keepingStore struct{ *store }

var _ crypt.TailKeeper = keepingStore{}

func (k keepingStore) KeepTail(t crypt.Tail) error { return k.f.fs.opts.Tails.Keep(k.inode(), t) }

func (k keepingStore) Disturb(from, to int64) error {
	return k.f.fs.opts.Tails.Disturb(k.inode(), from, to)
}

func (k keepingStore) BeginSync(again func(off int64) bool) func(error) {
	return k.f.fs.opts.Tails.BeginSync(k.inode(), again)
}

func (s *store) inode() volume.Inode { return s.f.id.inode() }

func (id fileID) inode() volume.Inode { return volume.Inode{Dev: id.dev, Ino: id.ino, Born: id.born} }

func (s *store) TakeSlot(n int64, use crypt.SlotUse) crypt.Slot {
	return s.f.fs.opts.Slots.Take(s.inode(), n, use)
}

func (s *store) ReadAt(p []byte, off int64) (int, error) { return s.cur.Load().ReadAt(p, off) }

func (s *store) WriteAt(p []byte, off int64) (int, error) {
	s.f.fs.tend.changed()
	return s.cur.Load().WriteAt(p, off)
}

func (s *store) Truncate(stored int64) error {
	s.f.fs.tend.changed()
	return s.cur.Load().Truncate(stored)
}

func (s *store) Sync() error { return s.cur.Load().Sync() }

// SetHeader may have to add to the mode for a moment: no chmod meanwhile.
func (s *store) SetHeader(raw []byte) error {
	s.f.modeMu.Lock()
	defer s.f.modeMu.Unlock()
	s.f.fs.tend.changed()
	if s.f.made.Swap(false) {
		return s.cur.Load().FirstHeader(raw)
	}
	return s.cur.Load().SetHeader(raw)
}

func (s *store) SparseMark() ([]byte, error) {
	s.f.modeMu.Lock()
	defer s.f.modeMu.Unlock()
	return s.cur.Load().SparseMark()
}

func (s *store) SetSparseMark(mark []byte) error {
	s.f.modeMu.Lock()
	defer s.f.modeMu.Unlock()
	return s.cur.Load().SetSparseMark(mark)
}

func (s *store) PunchHole(off, n int64) error {
	s.f.fs.tend.changed()
	return s.cur.Load().PunchHole(off, n)
}

func (s *store) Allocate(off, n int64) error {
	s.f.fs.tend.changed()
	return s.cur.Load().Allocate(off, n)
}

func (s *store) SeekData(off int64) (int64, error) { return s.cur.Load().SeekData(off) }

func (s *store) SeekHole(off int64) (int64, error) { return s.cur.Load().SeekHole(off) }
