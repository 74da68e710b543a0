package volume

import (
	"context"
	"errors"
	"path"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// What Walk reports about places it does not go to.
var (
	// ErrOtherDevice: another file system is mounted there.
	ErrOtherDevice = errors.New("another file system is mounted here; it is not walked")
	// ErrMoved: the directory was moved or replaced while it was walked.
	ErrMoved = errors.New("the directory was moved or replaced during the walk")
	// ErrGone: the entry was listed, and was removed, renamed or replaced by
	// something of another kind before it could be looked at. If it was renamed,
	// the walk may miss the file.
	ErrGone = errors.New("the entry was removed or renamed during the walk")
)

// An Item is a regular file that Walk met, or a place where it could not go on.
type Item struct {
	Path string      // relative to the root, for messages: plain names if unlocked, else stored ones
	Name string      // stored name in its directory
	Stat unix.Stat_t // of the backing file: the stored size
	Err  error       // what is wrong with this place; then only Path is valid

	dir *walkDir
}

// Open opens the item's file. With O_PATH in flags it needs no permission;
// otherwise flags are as for Dir.Open. A file that was replaced since it was met
// is ESTALE.
func (it *Item) Open(flags int) (int, error) {
	if it.Err != nil {
		return -1, it.Err
	}
	d := &Dir{fd: it.dir.fd}
	fd, err := d.openat(it.Name, flags&(openFlags|unix.O_PATH), 0)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && (st.Dev != it.Stat.Dev || st.Ino != it.Stat.Ino || st.Mode&unix.S_IFMT != unix.S_IFREG) {
		err = unix.ESTALE
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Hold keeps the item usable after the callback has returned, until Release.
// Each item held keeps the descriptor of its directory open.
func (it *Item) Hold() {
	if it.dir != nil {
		it.dir.refs.Add(1)
	}
}

// Release ends a Hold.
func (it *Item) Release() {
	if it.dir != nil {
		it.dir.release()
	}
}

// walkDir is a directory's descriptor, shared by the walk and the items held.
type walkDir struct {
	fd   int
	refs atomic.Int32
}

func newWalkDir(fd int) *walkDir {
	w := &walkDir{fd: fd}
	w.refs.Store(1)
	return w
}

func (w *walkDir) release() {
	if w.refs.Add(-1) == 0 {
		unix.Close(w.fd)
	}
}

// Walk calls visit for every regular file below the root, once per directory
// entry (a file with several links is met several times; Stat tells), and for
// every place where something is wrong (Err), after which it goes on. It stops
// with the error of visit or ctx. Entries made or moved meanwhile are met or not;
// one that vanished between its listing and its visit is ErrGone, so that whoever
// must not miss a renamed file knows to walk again.
//
// It needs no key; it follows no symlink, skips our own files, and leaves out
// other file systems mounted below. Its memory grows with the depth of the tree
// only.
func (v *Volume) Walk(ctx context.Context, visit func(*Item) error) error {
	w := &walker{v: v, visit: visit}
	defer w.close()
	if err := w.enterRoot(); err != nil {
		return err
	}
	for len(w.stack) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.step(); err != nil {
			return err
		}
	}
	return nil
}

type walker struct {
	v     *Volume
	visit func(*Item) error
	stack []*frame // from the root down to the directory being listed
}

// A frame is a directory on the way. Below walkOpen levels its descriptor and
// buffer are given up while a subdirectory is walked, or a deep tree would eat
// all descriptors.
type frame struct {
	stored   string // name in its parent
	path     string
	dev, ino uint64
	off      int64 // where to go on after a reopening
	dir      *walkDir
	list     *Entries // nil while given up
	names    *Dir     // translates names; its fd is borrowed from dir
}

const walkOpen = 32

func (w *walker) enterRoot() error {
	fd, err := unix.FcntlInt(uintptr(w.v.root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return w.push(&frame{}, fd)
}

func (w *walker) top() *frame { return w.stack[len(w.stack)-1] }

// step takes the next entry of the directory on top.
func (w *walker) step() error {
	f := w.top()
	if f.list == nil {
		if err := w.reopen(); err != nil {
			w.drop()
			return w.report(f.path, err)
		}
	}
	raw, ok, err := f.list.nextRaw()
	if err != nil {
		w.drop()
		return w.report(f.path, err)
	}
	if !ok {
		w.pop()
		return nil
	}
	f.off = raw.off
	if isDot(raw.name) || len(w.stack) == 1 && w.isOwn(raw.name) {
		return nil
	}
	switch raw.dtype {
	case unix.DT_REG, unix.DT_DIR, unix.DT_UNKNOWN:
		return w.entry(f, raw)
	}
	return nil
}

// isOwn reports whether an entry of the root is a file of ours. Sidecars of long
// names are symlinks, which a walk passes over anyway.
func (w *walker) isOwn(stored string) bool {
	return strings.HasPrefix(stored, ownPrefix) && !(w.v.encrypted() && isLong(stored))
}

func (w *walker) entry(f *frame, raw rawEntry) error {
	it := Item{Name: raw.name, dir: f.dir}
	err := unix.Fstatat(f.dir.fd, raw.name, &it.Stat, unix.AT_SYMLINK_NOFOLLOW)
	kind := it.Stat.Mode & unix.S_IFMT
	if err == nil && kind != unix.S_IFREG && kind != unix.S_IFDIR && raw.dtype == unix.DT_UNKNOWN {
		return nil
	}
	it.Path = path.Join(f.path, f.plain(raw.name))
	if err == nil && raw.dtype != unix.DT_UNKNOWN && kind != uint32(raw.dtype)<<12 {
		// What was listed may live on under another name; what stands here now is
		// for the next walk.
		err = ErrGone
	}
	switch {
	case err != nil:
		return w.report(it.Path, err)
	case it.Stat.Dev != w.v.dev:
		return w.report(it.Path, ErrOtherDevice)
	case kind == unix.S_IFREG:
		return w.visit(&it)
	}
	return w.enter(f, raw.name, it.Path)
}

// plain is a name for messages.
func (f *frame) plain(stored string) string {
	if f.names == nil {
		return stored
	}
	plain, _ := f.names.plainName(stored, unix.DT_REG)
	return plain
}

// enter goes down into a directory.
func (w *walker) enter(f *frame, stored, full string) error {
	fd, err := (&Dir{fd: f.dir.fd}).openat(stored, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err == unix.ENOTDIR {
		err = ErrGone
	}
	if err != nil {
		return w.report(full, err)
	}
	if len(w.stack) > walkOpen {
		f.giveUp()
	}
	if err := w.push(&frame{stored: stored, path: full}, fd); err != nil {
		return w.report(full, err)
	}
	return nil
}

// push starts to list the directory fd, which it takes over.
func (w *walker) push(f *frame, fd int) error {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Dev != w.v.dev {
		err = ErrOtherDevice
	}
	f.dev, f.ino = st.Dev, st.Ino
	if err == nil {
		err = w.list(f, fd)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	w.stack = append(w.stack, f)
	return nil
}

// list opens the listing of f on fd, which f then owns.
func (w *walker) list(f *frame, fd int) error {
	e := new(Entries)
	if err := e.open(fd); err != nil {
		return err
	}
	if f.off != 0 {
		if err := e.SeekTo(f.off); err != nil {
			e.Close()
			return err
		}
	}
	f.dir, f.list = newWalkDir(fd), e
	f.names = w.translator(fd, f.stored == "")
	return nil
}

// translator is the door's idea of names, without its registry: a walk reads and
// changes nothing. nil if names can't be translated.
func (w *walker) translator(fd int, root bool) *Dir {
	d := &Dir{v: w.v, fd: fd, root: root}
	switch {
	case !w.v.encrypted():
		return d
	case !w.v.Unlocked():
		return nil
	case root:
		d.id = w.v.rootID
	default:
		d.id, d.bad = w.v.readDirID(fd)
		if errors.Is(d.bad, unix.ENODATA) {
			d.bad = crypt.ErrDamaged
		}
	}
	return d
}

// giveUp closes what f has open; reopen gets it back.
func (f *frame) giveUp() {
	if f.list != nil {
		f.list.Close()
		f.dir.release()
		f.list, f.dir, f.names = nil, nil, nil
	}
}

// pop goes back up. A parent that was given up is opened again through "..",
// while we still stand in its child.
func (w *walker) pop() {
	f := w.top()
	w.stack = w.stack[:len(w.stack)-1]
	if len(w.stack) > 0 && w.top().list == nil {
		if fd, err := unix.Openat(f.dir.fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			_ = w.resume(w.top(), fd) // if that isn't it, reopen goes from the root
		}
	}
	f.giveUp()
}

// drop leaves a directory that can't be listed any more.
func (w *walker) drop() {
	w.top().giveUp()
	w.stack = w.stack[:len(w.stack)-1]
}

// resume goes on with f on fd if that is still the same directory.
func (w *walker) resume(f *frame, fd int) error {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && (st.Dev != f.dev || st.Ino != f.ino) {
		err = ErrMoved
	}
	if err == nil {
		err = w.list(f, fd)
	}
	if err != nil {
		unix.Close(fd)
	}
	return err
}

// reopen opens the directory on top again, going down from the root.
func (w *walker) reopen() error {
	fd, err := unix.FcntlInt(uintptr(w.v.root), unix.F_DUPFD_CLOEXEC, 0)
	for _, f := range w.stack[1:] {
		if err != nil {
			return err
		}
		var next int
		next, err = (&Dir{fd: fd}).openat(f.stored, unix.O_PATH|unix.O_DIRECTORY, 0)
		unix.Close(fd)
		fd = next
	}
	if err != nil {
		if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
			err = ErrMoved
		}
		return err
	}
	return w.resume(w.top(), fd)
}

func (w *walker) report(path string, err error) error {
	if err == unix.ENOENT { // also what listing a removed directory says
		err = ErrGone
	}
	return w.visit(&Item{Path: path, Err: err})
}

func (w *walker) close() {
	for len(w.stack) > 0 {
		w.drop()
	}
}
