package fs

import (
	"context"
	"fmt"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// inDir calls op with the node's own directory.
func (n *node) inDir(op func(d *volume.Dir) error) error {
	d, err := n.fs.dirs.acquire(n)
	if err != nil {
		return err
	}
	defer n.fs.dirs.release(d)
	n.fs.tend.changed()
	return op(d.Dir)
}

// makeEntry makes something other than an open file, gives it to the caller, and
// answers with it. If it can't be given away it goes again.
func (n *node) makeEntry(ctx context.Context, name string, out *fuse.EntryOut, mk, undo func(d *volume.Dir) error) (*fusefs.Inode, error) {
	var st unix.Statx_t
	err := n.inDir(func(d *volume.Dir) error {
		if err := mk(d); err != nil {
			return err
		}
		if err := n.ownName(ctx, d, name, &st); err != nil {
			_ = undo(d)
			return err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return n.child(ctx, &st, out), nil
}

var _ = (fusefs.NodeMkdirer)((*node)(nil))

// Mkdir makes a directory.
func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	child, err := n.makeEntry(ctx, name, out,
		func(d *volume.Dir) error { return d.Mkdir(name, n.creationMode(d, mode)) },
		func(d *volume.Dir) error { return d.Rmdir(name) })
	return child, n.errno("mkdir", err)
}

var _ = (fusefs.NodeMknoder)((*node)(nil))

// Mknod makes a special file, or an empty regular one, which needs no key.
func (n *node) Mknod(ctx context.Context, name string, mode, dev uint32, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	child, err := n.makeEntry(ctx, name, out,
		func(d *volume.Dir) error { return d.Mknod(name, n.creationMode(d, mode), int(dev)) },
		func(d *volume.Dir) error { return d.Unlink(name) })
	return child, n.errno("mknod", err)
}

var _ = (fusefs.NodeSymlinker)((*node)(nil))

// Symlink makes a symlink.
func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	child, err := n.makeEntry(ctx, name, out,
		func(d *volume.Dir) error { return d.Symlink(target, name) },
		func(d *volume.Dir) error { return d.Unlink(name) })
	return child, n.errno("symlink", err)
}

var _ = (fusefs.NodeLinker)((*node)(nil))

// Link gives an inode another name, one made by O_TMPFILE its first. That may need
// Keys, and the kernel holds the directory and the inode meanwhile, so the wait is
// as short as a create's.
func (n *node) Link(ctx context.Context, target fusefs.InodeEmbedder, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	t := target.(*node)
	wait, cancel := within(ctx, n.fs.opts.CreateWait)
	defer cancel()
	var st unix.Statx_t
	err := t.with(func(fd int) error {
		if err := n.inDir(func(d *volume.Dir) error { return t.linkTo(wait, fd, d, name) }); err != nil {
			return err
		}
		return n.fs.statFd(fd, &st)
	})
	if err != nil {
		return nil, n.errno("link", err)
	}
	n.fs.liveSize(&st)
	n.fs.attr(&st, &out.Attr)
	out.SetAttrTimeout(n.fs.opts.AttrTimeout)
	out.SetEntryTimeout(n.fs.opts.EntryTimeout)
	return t.EmbeddedInode(), ok
}

// linkTo gives what fd refers to a name. What had none is looked at again when it
// has: a rekey may have begun in between, and have passed by here already.
func (n *node) linkTo(ctx context.Context, fd int, d *volume.Dir, name string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	link := func() error {
		return n.fs.moves.moving(func() error { return d.Link(fd, name) }, spot{d, name, st.Ino})
	}
	if st.Nlink > 0 {
		return link()
	}
	if err := n.readyForName(ctx, fd); err != nil {
		return err
	}
	if err := link(); err != nil {
		return err
	}
	if err := n.readyForName(ctx, fd); err != nil {
		_ = d.Unlink(name)
		return err
	}
	return nil
}

// readyForName refuses a file without a name that is not under the key of new files,
// and can't be put under it.
func (n *node) readyForName(ctx context.Context, fd int) error {
	err := n.checkKey(fd)
	if err == nil {
		return nil
	}
	f := n.fs.files.find(n.id)
	if f == nil {
		return err
	}
	defer n.fs.files.release(f)
	if err := f.renew(ctx); err != nil {
		return fmt.Errorf("giving a name to a file that has none: renewing its header: %w", err)
	}
	return n.checkKey(fd)
}

// checkKey refuses a file that was overtaken by a rekey while it had no name. One
// that holds nothing has no key to keep it under; a fresh key it may have was
// exchanged (Reprime).
func (n *node) checkKey(fd int) error {
	keys, can := n.fs.keys.(KeyChecker)
	if !can || n.Mode() != syscall.S_IFREG || !n.holds(fd) {
		return nil
	}
	raw, err := volume.ReadHeader(fd)
	if err != nil {
		return err
	}
	h, err := n.fs.vol.ParseHeader(raw)
	if err == nil {
		err = keys.Check(h)
	}
	if err != nil {
		return fmt.Errorf("giving a name to a file that has none: %w", err)
	}
	return nil
}

// holds reports whether a regular file is under a data key: it stores something, or
// will, once its gaps are settled.
func (n *node) holds(fd int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Size > 0 {
		return true
	}
	f := n.fs.files.find(n.id)
	if f == nil {
		return false
	}
	defer n.fs.files.release(f)
	v := f.view.Load()
	return v != nil && v.Secrets() != nil
}

var _ = (fusefs.NodeUnlinker)((*node)(nil))

// Unlink removes a name. It needs no key, and works on damaged files.
func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	return n.errno("unlink", n.inDir(func(d *volume.Dir) error {
		kept := n.keepOrphan(d, name)
		err := d.Unlink(name)
		kept(err == nil)
		return err
	}))
}

var _ = (fusefs.NodeRmdirer)((*node)(nil))

// Rmdir removes an empty directory.
func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	return n.errno("rmdir", n.inDir(func(d *volume.Dir) error {
		kept := n.keepOrphan(d, name)
		err := d.Rmdir(name)
		kept(err == nil)
		return err
	}))
}

var _ = (fusefs.NodeRenamer)((*node)(nil))

// Rename moves an entry; flags are those of renameat2(2).
func (n *node) Rename(_ context.Context, name string, newParent fusefs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	to := newParent.(*node)
	return n.errno("rename", n.inDir(func(d *volume.Dir) error {
		return to.inDir(func(toDir *volume.Dir) error {
			kept := func(bool) {}
			if flags&(unix.RENAME_EXCHANGE|unix.RENAME_NOREPLACE) == 0 {
				kept = to.keepOrphan(toDir, newName)
			}
			spots := []spot{{toDir, newName, n.inoOf(name)}}
			if flags&unix.RENAME_EXCHANGE != 0 {
				spots = append(spots, spot{d, name, to.inoOf(newName)})
			}
			err := n.fs.moves.moving(func() error { return d.Rename(name, toDir, newName, uint(flags)) }, spots...)
			kept(err == nil)
			return err
		})
	}))
}
