package fs

import (
	"context"
	"errors"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

var _ = (fusefs.NodeLookuper)((*node)(nil))

// Lookup finds an entry.
func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	d, err := n.fs.dirs.acquire(n)
	if err != nil {
		return nil, n.errno("lookup", err)
	}
	defer n.fs.dirs.release(d)
	var st unix.Statx_t
	if err := n.fs.statName(d.Dir, name, &st); err != nil {
		if err == syscall.ENOENT {
			return nil, syscall.ENOENT // too common to count
		}
		return nil, n.errno("lookup", err)
	}
	return n.child(ctx, &st, out), ok
}

var _ = (fusefs.NodeGetattrer)((*node)(nil))

// Getattr is stat(2): no key is needed.
func (n *node) Getattr(_ context.Context, fh fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	var st unix.Statx_t
	if err := n.statVia(fh, &st); err != nil {
		return n.errno("getattr", err)
	}
	n.fs.attr(&st, &out.Attr)
	out.SetTimeout(n.fs.opts.AttrTimeout)
	return ok
}

// statVia reads the attributes through a handle, if there is one.
func (n *node) statVia(fh fusefs.FileHandle, st *unix.Statx_t) error {
	if h := handleOf(fh); h != nil {
		return h.f.stat(h.f.descriptor(), st)
	}
	return n.stat(st)
}

var _ = (fusefs.NodeStatxer)((*node)(nil))

// Statx is statx(2), asked for when somebody wants the birth time.
func (n *node) Statx(_ context.Context, fh fusefs.FileHandle, _, _ uint32, out *fuse.StatxOut) syscall.Errno {
	var st unix.Statx_t
	if err := n.statVia(fh, &st); err != nil {
		return n.errno("statx", err)
	}
	out.FromStatx(&st)
	out.Ino = n.fs.inoOf(n.id)
	out.Blksize = n.fs.blksize()
	out.Mask = st.Mask & statMask
	out.SetTimeout(n.fs.opts.AttrTimeout)
	return ok
}

var _ = (fusefs.NodeSetattrer)((*node)(nil))

// Setattr changes size, owner, mode and times, in this order: each may undo a
// part of what comes before it.
func (n *node) Setattr(ctx context.Context, fh fusefs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if fh == nil && isTimeFlush(in) && n.fs.orphans.unused(n) {
		return ok
	}
	// Once the size is changed nothing may fail: the kernel would keep the old one, and
	// show zeros up to it. So there must be an answer before.
	size, sized := in.GetSize()
	var before unix.Statx_t
	if sized {
		if err := n.statVia(fh, &before); err != nil {
			return n.errno("setattr", err)
		}
		before.Size = size
	}
	err := n.setattr(ctx, fh, in)
	if isTimeFlush(in) && lostOnly(err) {
		err = nil
	}
	if err != nil {
		return n.errno("setattr", err)
	}
	var st unix.Statx_t
	if err := n.statVia(fh, &st); err != nil {
		if isTimeFlush(in) {
			return ok // the kernel doesn't look at the answer
		}
		if !sized {
			return n.errno("setattr", err)
		}
		st = before
	}
	n.fs.attr(&st, &out.Attr)
	out.SetTimeout(n.fs.opts.AttrTimeout)
	return ok
}

// isTimeFlush recognises how the writeback cache stores the times that it keeps:
// mtime and ctime and nothing else.
func isTimeFlush(in *fuse.SetAttrIn) bool {
	const flush = fuse.FATTR_MTIME | fuse.FATTR_CTIME
	return in.Valid&^(fuse.FATTR_FH|fuse.FATTR_LOCKOWNER) == flush
}

// lostOnly errors of a time flush cost only the time: they must not fail a close,
// and the inode may be gone.
func lostOnly(err error) bool {
	for _, e := range []error{syscall.EPERM, syscall.EACCES, syscall.EROFS, syscall.ESTALE, syscall.ENOENT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (n *node) setattr(ctx context.Context, fh fusefs.FileHandle, in *fuse.SetAttrIn) error {
	if size, set := in.GetSize(); set {
		if err := n.setSize(ctx, handleOf(fh), size); err != nil {
			return err
		}
		if in.Valid&explicit == 0 { // the times that go with it
			_ = n.setRest(fh, in)
			return nil
		}
	}
	return n.setRest(fh, in)
}

// explicit is what is set beside a size and its times only because somebody asked, or
// for safety.
const explicit = fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_KILL_SUIDGID | killSetgid

// setRest sets all but the size.
func (n *node) setRest(fh fusefs.FileHandle, in *fuse.SetAttrIn) error {
	if h := handleOf(fh); h != nil {
		return n.setMeta(h.f.descriptor(), in)
	}
	if in.Valid&^(fuse.FATTR_SIZE|fuse.FATTR_FH|fuse.FATTR_LOCKOWNER) == 0 {
		return nil
	}
	return n.with(func(fd int) error { return n.setMeta(fd, in) })
}

// setSize truncates, through a handle or a path.
func (n *node) setSize(ctx context.Context, h *handle, size uint64) error {
	if int64(size) < 0 {
		return syscall.EFBIG
	}
	ctx, cancel := within(ctx, n.fs.opts.Deadline)
	defer cancel()
	if h != nil {
		return h.f.truncate(ctx, int64(size))
	}
	f := n.fs.files.acquire(n.fs, n.id)
	defer n.fs.files.release(f)
	if err := f.ready(n, unix.W_OK); err != nil {
		return err
	}
	return f.truncate(ctx, int64(size))
}

func (n *node) setMeta(fd int, in *fuse.SetAttrIn) error {
	n.fs.tend.changed()
	// A header that is being set may have changed the mode for a moment, gaps
	// that are being settled the times.
	if f := n.fs.files.find(n.id); f != nil {
		defer n.fs.files.release(f)
		f.timesMu.Lock()
		defer f.timesMu.Unlock()
		f.modeMu.Lock()
		defer f.modeMu.Unlock()
		if in.Valid&(fuse.FATTR_MTIME|fuse.FATTR_MTIME_NOW) == fuse.FATTR_MTIME {
			f.tell(unix.Timespec{Sec: int64(in.Mtime), Nsec: int64(in.Mtimensec)})
		}
	}
	uid, gid := -1, -1
	if id, set := in.GetUID(); set {
		uid = int(id)
	}
	if id, set := in.GetGID(); set {
		gid = int(id)
	}
	if uid >= 0 || gid >= 0 {
		if err := volume.Chown(fd, uid, gid); err != nil {
			return err
		}
	}
	if err := setMode(fd, in); err != nil {
		return err
	}
	return setTimes(fd, in)
}

// setMode changes the mode, or clears what writing clears.
func setMode(fd int, in *fuse.SetAttrIn) error {
	if mode, set := in.GetMode(); set {
		if err := volume.Chmod(fd, mode); err != nil {
			return err
		}
	}
	if in.Valid&killSetgid != 0 {
		return clearSetgid(fd)
	}
	if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
		return killPriv(fd, &in.Caller)
	}
	return nil
}

func setTimes(fd int, in *fuse.SetAttrIn) error {
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) == 0 {
		return nil
	}
	return volume.Utimens(fd, &[2]unix.Timespec{
		timeOf(in, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec),
		timeOf(in, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec),
	})
}

func timeOf(in *fuse.SetAttrIn, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case in.Valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case in.Valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

var _ = (fusefs.NodeAccesser)((*node)(nil))

// Access is access(2) and chdir(2) on a mount that is one user's own; on a shared
// one the kernel decides (default_permissions).
func (n *node) Access(_ context.Context, mask uint32) syscall.Errno {
	if n.fs.priv && mask&unix.X_OK == 0 {
		return ok
	}
	return n.errno("access", n.with(func(fd int) error {
		return unix.Faccessat(unix.AT_FDCWD, procPath(fd), mask, unix.AT_EACCESS)
	}))
}

var _ = (fusefs.NodeStatfser)((*node)(nil))

// Statfs describes the backing file system.
func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var st unix.Statfs_t
	if err := n.fs.dirs.root.Statfs(&st); err != nil {
		return n.errno("statfs", err)
	}
	*out = fuse.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail,
		Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Frsize: uint32(st.Frsize), NameLen: uint32(st.Namelen),
	}
	return ok
}

var _ = (fusefs.NodeReadlinker)((*node)(nil))

// Readlink reads a symlink's target.
func (n *node) Readlink(context.Context) ([]byte, syscall.Errno) {
	var target string
	err := n.with(func(fd int) (err error) {
		target, err = n.fs.vol.ReadlinkFd(fd)
		return err
	})
	return []byte(target), n.errno("readlink", err)
}
