package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// What Walk reports about places it does not go to.
var (
	// ErrOtherDevice: another file system is mounted there.
	ErrOtherDevice = errors.New("something else is mounted here; it is not walked")
	// ErrMoved: the directory was moved or replaced while it was walked.
	ErrMoved = errors.New("the directory was moved or replaced during the walk")
	// ErrGone: the entry was listed, and was removed, renamed or replaced by
	// something of another kind before it could be looked at. If it was renamed,
	// the walk may miss the file.
	ErrGone = errors.New("the entry was removed or renamed during the walk")
)

// An Item is a regular file that Walk met, or a place where it could not go on. It
// is what the listing says; whoever wants to know more asks (Peek, Open), with as
// many goroutines as there are idle disks.
type Item struct {
	Name string // stored name in its directory
	Type uint8  // unix.DT_*; Walk meets DT_REG only
	Ino  uint64 // inode number on the backing store
	Err  error  // what is wrong with this place; then only Path may be called

	dir  *walkDir
	full string // of a place where something is wrong
}

// Path is relative to the root, for messages: plain names if the volume is
// unlocked, else stored ones.
func (it *Item) Path() string {
	if it.Err != nil {
		return it.full
	}
	if it.IsSidecar() { // it has no plain name
		return it.dir.at.path(it.Name)
	}
	return it.dir.at.path(it.dir.plain(it.Name))
}

// Peek reads the header's bytes (nil if there is none) and the attributes of the
// item's file, by name and without opening it. What has taken the file's place, or
// the removal of its name, since it was listed is ErrGone: the attributes are read
// last, so they vouch for the header.
func (it *Item) Peek() (raw []byte, st unix.Stat_t, err error) {
	if it.Err != nil {
		return nil, st, it.Err
	}
	for range 2 {
		var errHeader error
		raw, errHeader = readXattrAt(it.dir.fd, it.Name)
		if err := it.check(unix.Fstatat(it.dir.fd, it.Name, &st, unix.AT_SYMLINK_NOFOLLOW), &st); err != nil {
			return nil, st, err
		}
		if errHeader != nil || raw != nil || st.Size == 0 {
			return raw, st, errHeader
		}
		// A file that is being made gets its header, then its contents: look again.
	}
	return nil, st, nil
}

// PeekOwn is Peek for a file of ours whose mode forbids reading (EACCES): the mode is
// changed for the moment.
func (it *Item) PeekOwn() (raw []byte, st unix.Stat_t, err error) {
	fd, err := it.Open(unix.O_PATH)
	if err != nil {
		return nil, st, err
	}
	defer unix.Close(fd)
	if raw, err = readOwnHeader(fd); err == nil {
		err = unix.Fstat(fd, &st)
	}
	return raw, st, err
}

// check judges what a look at the item's name found.
func (it *Item) check(err error, st *unix.Stat_t) error {
	switch {
	case err == unix.ENOENT:
		return ErrGone
	case err != nil:
		return err
	case st.Dev != it.dir.dev:
		return ErrOtherDevice
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return ErrGone
	case st.Ino == it.Ino:
		return nil
	case isMountpoint(it.dir.fd, it.Name): // the listing has the number of what is beneath
		return ErrOtherDevice
	}
	return ErrGone
}

// isMountpoint reports whether something is mounted on an entry, a file say.
func isMountpoint(dirfd int, name string) bool {
	var stx unix.Statx_t
	err := unix.Statx(dirfd, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &stx)
	return err == nil && stx.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// Open opens the item's file. With O_PATH in flags it needs no permission;
// otherwise flags are as for Dir.Open. A file that is no longer there, or was
// replaced since it was met, is ErrGone.
func (it *Item) Open(flags int) (int, error) {
	if it.Err != nil {
		return -1, it.Err
	}
	d := &Dir{fd: it.dir.fd}
	fd, err := d.openat(it.Name, flags&(openFlags|unix.O_PATH), 0)
	switch err {
	case nil:
	case unix.ENOENT, unix.ELOOP, unix.ENXIO, unix.EISDIR:
		return -1, ErrGone // ENXIO: a FIFO or device stands there
	default:
		return -1, err
	}
	var st unix.Stat_t
	if err := it.check(unix.Fstat(fd, &st), &st); err != nil {
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
	v     *Volume
	fd    int
	dev   uint64 // the volume's
	root  bool
	at    *walkPlace
	names *Dir // translates names; its fd is borrowed. nil if names can't be translated
	refs  atomic.Int32
}

// A walkPlace is where a directory lies. Paths are put together when somebody asks: users
// make trees as deep as they like, and the paths of all directories on the way down would
// take memory with the square of the depth.
type walkPlace struct {
	up            *walkPlace // nil at the root
	plain, stored string     // its names in up
}

// path is that of an entry of the directory, "" of the directory itself.
func (p *walkPlace) path(entry string) string {
	return p.join(entry, func(p *walkPlace) string { return p.plain })
}

// storedPath is path of stored names.
func (p *walkPlace) storedPath(entry string) string {
	return p.join(entry, func(p *walkPlace) string { return p.stored })
}

func (p *walkPlace) join(entry string, name func(*walkPlace) string) string {
	var names []string
	if entry != "" {
		names = append(names, entry)
	}
	for ; p.up != nil; p = p.up {
		names = append(names, name(p))
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// plain is a name for messages.
func (w *walkDir) plain(stored string) string {
	if w.names == nil {
		return stored
	}
	plain, _ := w.names.plainName(stored, unix.DT_REG)
	return plain
}

func (w *walkDir) release() {
	if w.refs.Add(-1) == 0 {
		unix.Close(w.fd)
	}
}

// Walk calls visit for every regular file below the root, once per directory
// entry (a file with several links is met several times; Peek tells), and for
// every place where something is wrong (Err), after which it goes on. It stops
// with the error of visit or ctx. Entries made or moved meanwhile are met or not;
// one that vanished between its listing and its visit is ErrGone, here or when it
// is asked for, so that whoever must not miss a renamed file knows to look again.
//
// It needs no key; it follows no symlink, skips our own files, and leaves out
// other file systems mounted below. Files are met in the order of their inodes, as
// far as one listing call goes: that is how a disk has them. Its memory grows with
// the depth of the tree only.
func (v *Volume) Walk(ctx context.Context, visit func(*Item) error) error {
	w := &walker{v: v, visit: visit}
	defer w.close()
	if err := w.enterRoot(); err != nil {
		return err
	}
	return w.run(ctx)
}

// A Place is what WalkBelow found at the end of a path.
type Place struct {
	Ino uint64 // 0 for nothing
	Dir bool
}

// WalkBelow is Walk for what stands at one stored path relative to the root: a
// file, or a directory and everything below it. If nothing does, that is ErrGone.
func (v *Volume) WalkBelow(ctx context.Context, stored string, visit func(*Item) error) (at Place, err error) {
	w := &walker{v: v, visit: func(it *Item) error {
		if it.Err == nil && !at.Dir {
			at.Ino = it.Ino
		}
		return visit(it)
	}}
	defer w.close()
	if err := w.enterRoot(); err != nil {
		return at, err
	}
	names := strings.Split(stored, "/")
	for i, name := range names {
		if name == "" || isDot(name) {
			return at, fmt.Errorf("%q is not a path in a volume", stored)
		}
		f := w.top()
		if len(w.stack) == 1 && w.isOwn(name) {
			return at, nil
		}
		f.list.Close() // of the way down nothing is listed
		f.list, f.done = nil, true
		dtype := uint8(unix.DT_DIR)
		if i == len(names)-1 {
			dtype = unix.DT_UNKNOWN
		}
		if err := w.entry(f, rawEntry{name: name, dtype: dtype}); err != nil {
			return at, err
		}
		if w.top() == f { // no directory
			if at.Ino == 0 && i == len(names)-1 {
				at.Ino = other(f.dir.fd, name)
			}
			return at, nil
		}
	}
	at = Place{Ino: w.top().ino, Dir: true}
	return at, w.run(ctx)
}

// other is the inode number of an entry that is neither a file nor a directory.
func other(dirfd int, name string) uint64 {
	var st unix.Stat_t
	err := unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if kind := st.Mode & unix.S_IFMT; err != nil || kind == unix.S_IFREG || kind == unix.S_IFDIR {
		return 0
	}
	return st.Ino
}

func (w *walker) run(ctx context.Context) error {
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
	all   bool     // visit is called for every entry, whatever it is
	stack []*frame // from the root down to the directory being listed
}

// A frame is a directory on the way. Below walkOpen levels its descriptor and
// buffer are given up while a subdirectory is walked, or a deep tree would eat
// all descriptors; the names of subdirectories yet to be walked are kept.
type frame struct {
	at       *walkPlace
	dev, ino uint64
	off      int64 // where to go on after a reopening
	done     bool  // everything is listed
	loose    bool  // the numbers in its listing are not those of the files (some FUSE stores)
	dir      *walkDir
	list     *Entries // nil while given up
	subdirs  []rawEntry
}

const walkOpen = 32

func (w *walker) enterRoot() error {
	fd, err := unix.FcntlInt(uintptr(w.v.root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return w.push(&frame{at: &walkPlace{}}, fd)
}

func (w *walker) top() *frame { return w.stack[len(w.stack)-1] }

// step goes down into the next subdirectory, or lists more of the directory on
// top, or leaves it.
func (w *walker) step() error {
	f := w.top()
	if f.dir == nil {
		if err := w.reopen(); err != nil {
			w.drop()
			return w.report(f.at.path(""), err)
		}
	}
	switch {
	case len(f.subdirs) > 0:
		raw := f.subdirs[0]
		f.subdirs = f.subdirs[1:]
		return w.entry(f, raw)
	case f.done:
		w.pop()
		return nil
	}
	return w.batch(f)
}

// batch visits the files of one listing call in the order of their inodes, and
// keeps its subdirectories for later.
func (w *walker) batch(f *frame) error {
	list, err := f.list.batch()
	if err != nil {
		w.drop()
		return w.report(f.at.path(""), err)
	}
	f.done = len(list) == 0
	f.subdirs = nil
	for _, raw := range list {
		f.off = raw.off
		f.loose = f.loose || raw.name == "." && raw.ino != f.ino
	}
	slices.SortFunc(list, func(a, b rawEntry) int { return cmp.Compare(a.ino, b.ino) })
	for _, raw := range list {
		switch {
		case isDot(raw.name) || len(w.stack) == 1 && w.passesOver(raw.name):
		case raw.dtype == unix.DT_REG && f.loose:
			raw.dtype = unix.DT_UNKNOWN // its own number has to be asked for
			f.subdirs = append(f.subdirs, raw)
		case raw.dtype == unix.DT_DIR, raw.dtype == unix.DT_UNKNOWN:
			f.subdirs = append(f.subdirs, raw)
		case raw.dtype == unix.DT_REG || w.all:
			if err := w.visit(&Item{Name: raw.name, Type: raw.dtype, Ino: raw.ino, dir: f.dir}); err != nil {
				return err
			}
		}
	}
	return nil
}

// isOwn reports whether an entry of the root is a file of ours. Sidecars of long
// names are symlinks, which a walk passes over anyway.
func (w *walker) isOwn(stored string) bool {
	return strings.HasPrefix(stored, ownPrefix) && !(w.v.encrypted() && isLong(stored))
}

// passesOver reports whether an entry of the root is left out.
func (w *walker) passesOver(stored string) bool {
	return w.isOwn(stored) && !(w.all && w.v.encrypted() && isSidecar(stored))
}

// entry looks at what may be a directory and goes down into it.
func (w *walker) entry(f *frame, raw rawEntry) error {
	var st unix.Stat_t
	err := unix.Fstatat(f.dir.fd, raw.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	kind := st.Mode & unix.S_IFMT
	if err == nil && raw.dtype == unix.DT_DIR && kind != unix.S_IFDIR {
		// What was listed may live on under another name; what stands here now is
		// for the next walk.
		err = ErrGone
	}
	full := func() string { return f.at.path(f.dir.plain(raw.name)) }
	switch {
	case err != nil:
		return w.report(full(), err)
	case kind != unix.S_IFREG && kind != unix.S_IFDIR && !w.all:
		return nil
	case st.Dev != w.v.dev:
		return w.report(full(), ErrOtherDevice)
	}
	it := &Item{Name: raw.name, Type: uint8(kind >> 12), Ino: st.Ino, dir: f.dir} // DT_* is S_IF* shifted
	if kind != unix.S_IFDIR {
		return w.visit(it)
	}
	if w.all {
		if err := w.visit(it); err != nil {
			return err
		}
	}
	return w.enter(f, raw.name)
}

// enter goes down into a directory.
func (w *walker) enter(f *frame, stored string) error {
	at := &walkPlace{up: f.at, stored: stored, plain: f.dir.plain(stored)}
	fd, err := (&Dir{fd: f.dir.fd}).openat(stored, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err == unix.ENOTDIR {
		err = ErrGone
	}
	if err != nil {
		return w.report(at.path(""), err)
	}
	if len(w.stack) > walkOpen {
		f.giveUp()
	}
	if err := w.push(&frame{at: at}, fd); err != nil {
		return w.report(at.path(""), err)
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
	root := f.at.up == nil
	f.dir, f.list = &walkDir{v: w.v, fd: fd, dev: w.v.dev, root: root, at: f.at, names: w.translator(fd, root)}, e
	f.dir.refs.Store(1)
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
	}
	if f.dir != nil {
		f.dir.release()
	}
	f.list, f.dir = nil, nil
}

// pop goes back up. A parent that was given up is opened again through "..",
// while we still stand in its child.
func (w *walker) pop() {
	f := w.top()
	w.stack = w.stack[:len(w.stack)-1]
	if len(w.stack) > 0 && w.top().dir == nil {
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
		next, err = (&Dir{fd: fd}).openat(f.at.stored, unix.O_PATH|unix.O_DIRECTORY, 0)
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
	return w.visit(&Item{full: path, Err: err})
}

func (w *walker) close() {
	for len(w.stack) > 0 {
		w.drop()
	}
}
