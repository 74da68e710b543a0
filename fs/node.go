package fs

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// fileSystem is what all nodes of a mount share.
type fileSystem struct {
	vol   *volume.Volume
	keys  Keys
	opts  Options
	root  *node
	dev   uint64 // device of the backing root
	priv  bool   // this process is root: it may give files away, and no mode stops it
	acl   bool   // POSIX ACLs are negotiated
	files fileTable
	dirs  dirCache
	stats stats
	log   *limiter
	tend  upkeep

	tenure tenure
	used   usage

	ahead *ahead // nil: no key is opened before it is asked for

	keyAge atomic.Uint64 // how often Reprime was called

	orphans orphanage
	moves   moves
}

// A fileID names a backing inode for as long as anybody may remember it: numbers
// are reused, birth times are not.
type fileID struct {
	dev, ino uint64
	born     int64 // ns; 0 if the backing store keeps no birth time
}

// statMask is what we ask statx(2) for.
const statMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME

func idOf(st *unix.Statx_t) fileID {
	id := fileID{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return id
}

// node is an inode that the kernel knows. It is small: there may be millions.
type node struct {
	fusefs.Inode
	fs *fileSystem
	id fileID

	// orphan is a descriptor of an inode whose last name went while the kernel
	// still knows it, or nil. It is used by way of the orphanage, which keeps it
	// open meanwhile.
	orphan atomic.Pointer[orphan]
	// seen is the state of the backing file that the kernel's cached pages
	// belong to, since the last close.
	seen atomic.Pointer[stamp]
	// under is what the keys of the contents depended on at the last close; nil if
	// that is not known, or the kernel has no pages any more.
	under atomic.Pointer[[]string]
	// noCaps: there is no security.capability. The kernel asks before writes.
	noCaps atomic.Bool
}

// stamp tells whether a backing file was changed behind our back.
type stamp struct {
	mtime, ctime unix.StatxTimestamp
	size         uint64
}

func stampOf(st *unix.Statx_t) stamp { return stamp{st.Mtime, st.Ctime, st.Size} }

// errMoved says that what a name leads to is not the inode that was meant.
var errMoved = errors.New("the name leads to another inode now")

// errNameless says that the tree has no name for an inode.
var errNameless = fmt.Errorf("the inode has no name left: %w", syscall.ESTALE)

// stable is go-fuse's identity of a backing inode. Inode numbers of file systems
// mounted inside the backing directory are moved apart from the root's.
func (fs *fileSystem) stable(st *unix.Statx_t) fusefs.StableAttr {
	id := idOf(st)
	return fusefs.StableAttr{Mode: uint32(st.Mode) & syscall.S_IFMT, Ino: fs.inoOf(id), Gen: uint64(id.born)}
}

func (fs *fileSystem) inoOf(id fileID) uint64 {
	other := id.dev ^ fs.dev
	return id.ino ^ (other<<40 | other>>24)
}

// child makes the node of an entry and fills in the kernel's answer. go-fuse puts
// the known node in its place if there is one.
func (n *node) child(ctx context.Context, st *unix.Statx_t, out *fuse.EntryOut) *fusefs.Inode {
	c := &node{fs: n.fs, id: idOf(st)}
	n.fs.attr(st, &out.Attr)
	out.SetAttrTimeout(n.fs.opts.AttrTimeout)
	out.SetEntryTimeout(n.fs.opts.EntryTimeout)
	return n.NewInode(ctx, c, n.fs.stable(st))
}

// attr translates attributes; the size is the plaintext's already.
func (fs *fileSystem) attr(st *unix.Statx_t, a *fuse.Attr) {
	a.Ino = fs.inoOf(idOf(st))
	a.Size = st.Size
	a.Blocks = st.Blocks
	a.Atime, a.Atimensec = uint64(st.Atime.Sec), st.Atime.Nsec
	a.Mtime, a.Mtimensec = uint64(st.Mtime.Sec), st.Mtime.Nsec
	a.Ctime, a.Ctimensec = uint64(st.Ctime.Sec), st.Ctime.Nsec
	a.Mode = uint32(st.Mode)
	a.Nlink = st.Nlink
	a.Uid, a.Gid = st.Uid, st.Gid
	a.Rdev = uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor))
	a.Blksize = fs.blksize()
}

// blksize is what programs should read and write at a time: a block of ours, and
// never less than a page, below which the writeback cache would do
// read-modify-write.
func (fs *fileSystem) blksize() uint32 { return uint32(max(4096, fs.vol.BlockSize())) }

// liveSize puts the authoritative size of an open file in place of the stored
// one's arithmetic.
func (fs *fileSystem) liveSize(st *unix.Statx_t) {
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	if f := fs.files.find(idOf(st)); f != nil {
		if v := f.view.Load(); v != nil {
			st.Size = uint64(v.Size())
		}
		fs.files.release(f)
	}
}

// statFd reads the attributes behind a descriptor of any kind.
func (fs *fileSystem) statFd(fd int, st *unix.Statx_t) error {
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW, statMask, st)
	if err == nil {
		fs.vol.StatxToPlain(st)
	}
	return err
}

// statName reads the attributes of an entry.
func (fs *fileSystem) statName(d *volume.Dir, name string, st *unix.Statx_t) error {
	if err := d.Statx(name, statMask, st); err != nil {
		return err
	}
	fs.liveSize(st)
	return nil
}

// stat reads the attributes of the node, by the cheapest way there is.
func (n *node) stat(st *unix.Statx_t) error {
	switch n.Mode() {
	case syscall.S_IFREG:
		if f := n.fs.files.find(n.id); f != nil {
			defer n.fs.files.release(f)
			if fd := f.descriptor(); fd >= 0 {
				return f.stat(fd, st)
			}
		}
	case syscall.S_IFDIR:
		if d := n.fs.dirs.cached(n); d != nil {
			defer n.fs.dirs.release(d)
			return n.fs.statFd(d.Fd(), st)
		}
	}
	return n.viaName(func(fd int) error { return n.fs.statFd(fd, st) },
		func(d *volume.Dir, name string) error {
			if err := n.fs.statName(d, name, st); err != nil {
				return err
			}
			return n.check(st)
		})
}

// check says whether st is this node's.
func (n *node) check(st *unix.Statx_t) error {
	if idOf(st) != n.id || uint32(st.Mode)&syscall.S_IFMT != n.Mode() {
		return errMoved
	}
	return nil
}

// checkFd says whether fd refers to this node's inode.
func (n *node) checkFd(fd int) error {
	var st unix.Statx_t
	if err := n.fs.statFd(fd, &st); err != nil {
		return err
	}
	return n.check(&st)
}

// viaName reaches the node through its directory: by calls op with directory and
// name, and op must check that it found this node. If the inode has lost its last
// name, orphaned is called with the descriptor kept for it instead, which is the
// caller's only until it returns.
//
// The kernel does not stop requests on an inode while it renames it, and go-fuse's
// tree follows the backing store a moment later; a removed inode is an orphan a
// moment after its name went. So a miss is tried again, for a moment; what is then
// still missing was changed in the backing directory, and ESTALE makes the kernel
// look it up again.
func (n *node) viaName(orphaned func(fd int) error, op func(d *volume.Dir, name string) error) error {
	for delay := 20 * time.Microsecond; ; delay *= 2 {
		if err, is := n.throughOrphan(orphaned); is {
			return err
		}
		err, final := n.onceViaName(op)
		if err == errNameless && n.orphan.Load() != nil {
			continue // it became one just now
		}
		if final || !missed(err) {
			return err
		}
		if delay > 50*time.Millisecond {
			return syscall.ESTALE
		}
		time.Sleep(delay)
	}
}

func missed(err error) bool {
	return err == errMoved || errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ESTALE) ||
		errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.EISDIR)
}

// onceViaName is one attempt; final says that another would be in vain: the
// directory was tried again already.
func (n *node) onceViaName(op func(d *volume.Dir, name string) error) (err error, final bool) {
	name, parent := n.Parent()
	if parent == nil {
		return errNameless, true
	}
	d, err := n.fs.dirs.acquire(parent.Operations().(*node))
	if err != nil {
		return err, true
	}
	defer n.fs.dirs.release(d)
	return op(d.Dir, name), false
}

// A place is a descriptor of the node's inode, O_PATH at least, for as long as
// its user needs it.
type place struct {
	fd   int
	done func()
}

// reach finds a descriptor of the node: an open one, a kept one, or a new one.
func (n *node) reach() (p place, err error) {
	switch n.Mode() {
	case syscall.S_IFREG:
		if f := n.fs.files.find(n.id); f != nil {
			if fd := f.descriptor(); fd >= 0 {
				return place{fd, func() { n.fs.files.release(f) }}, nil
			}
			n.fs.files.release(f)
		}
	case syscall.S_IFDIR:
		if d, err := n.fs.dirs.acquire(n); err == nil {
			return place{d.Fd(), func() { n.fs.dirs.release(d) }}, nil
		}
	}
	err = n.viaName(func(kept int) error {
		fd, err := unix.FcntlInt(uintptr(kept), unix.F_DUPFD_CLOEXEC, 0)
		p = place{fd, func() { unix.Close(fd) }}
		return err
	}, func(d *volume.Dir, name string) error {
		fd, err := d.OpenPath(name)
		if err != nil {
			return err
		}
		if err = n.checkFd(fd); err != nil {
			unix.Close(fd)
			return err
		}
		p = place{fd, func() { unix.Close(fd) }}
		return nil
	})
	return p, err
}

// with calls op with a descriptor of the node.
func (n *node) with(op func(fd int) error) error {
	p, err := n.reach()
	if err != nil {
		return err
	}
	defer p.done()
	return op(p.fd)
}

// known is the node that go-fuse has under a name.
func (n *node) known(name string) *node {
	if c := n.GetChild(name); c != nil {
		return c.Operations().(*node)
	}
	return nil
}

// inoOf is the backing inode number of the child of that name; 0 if it is not known.
func (n *node) inoOf(name string) uint64 {
	if c := n.known(name); c != nil {
		return c.id.ino
	}
	return 0
}

var _ = (fusefs.NodeOnForgetter)((*node)(nil))

// OnForget gives back what is kept for an inode that the kernel knew. The kernel
// forgets what no request refers to, but go-fuse may give the node to a LOOKUP that
// comes just then: requests hold what they use.
func (n *node) OnForget() {
	n.fs.orphans.drop(n)
	n.fs.dirs.forget(n)
}
