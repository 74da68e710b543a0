package fs

import (
	"context"
	"errors"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

func writes(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }

// wanted is what open(2) with these flags asks of a file's mode.
func wanted(flags uint32) (want uint32) {
	if flags&syscall.O_ACCMODE != syscall.O_WRONLY {
		want |= unix.R_OK
	}
	if writes(flags) || flags&syscall.O_TRUNC != 0 {
		want |= unix.W_OK
	}
	return want
}

var _ = (fusefs.NodeOpener)((*node)(nil))

// Open opens a file. It is here that KMS may say no.
func (n *node) Open(ctx context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	ctx, cancel := within(ctx, n.fs.opts.Deadline)
	defer cancel()
	if err := n.fs.files.room(n.id); err != nil {
		return nil, 0, n.errno("open", err)
	}
	if flags&syscall.O_TRUNC == 0 {
		n.fs.ahead.opened(n)
	}
	f := n.fs.files.acquire(n.fs, n.id)
	err := f.open(ctx, n, flags)
	if err == nil {
		var h *handle
		var keep uint32
		if h, keep, err = n.newHandle(f, flags); err == nil {
			return h, keep, ok
		}
	}
	n.fs.files.release(f)
	return nil, 0, n.errno("open", err)
}

var _ = (fusefs.NodeCreater)((*node)(nil))

// Create makes a file and opens it. The key comes first: if it is refused there
// is no file. The kernel holds the directory meanwhile, so the wait is short.
func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	return n.create(ctx, "create", flags, out, func(d *volume.Dir) (int, error) {
		fd, err := d.Create(name, unix.O_RDWR|unix.O_EXCL, n.creationMode(d, mode))
		if err == syscall.EEXIST && flags&syscall.O_EXCL == 0 {
			// Someone made it in the backing directory: the kernel shall look
			// it up and open it.
			err = syscall.ESTALE
		}
		return fd, err
	}, func(d *volume.Dir) error { return d.Unlink(name) })
}

var _ = (fusefs.NodeTmpfiler)((*node)(nil))

// Tmpfile makes a file without a name.
func (n *node) Tmpfile(ctx context.Context, flags, mode uint32, out *fuse.EntryOut) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	return n.create(ctx, "tmpfile", flags, out, func(d *volume.Dir) (int, error) {
		return d.Tmpfile(unix.O_RDWR|int(flags)&unix.O_EXCL, n.creationMode(d, mode))
	}, func(*volume.Dir) error { return nil })
}

// create makes a file with the call given, and a handle on it; undo removes it
// again.
func (n *node) create(ctx context.Context, op string, flags uint32, out *fuse.EntryOut,
	mk func(*volume.Dir) (int, error), undo func(*volume.Dir) error) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	if err := n.fs.files.room(fileID{}); err != nil {
		return nil, nil, 0, n.errno(op, err)
	}
	wait, cancel := within(ctx, n.fs.opts.CreateWait)
	defer cancel()
	for {
		var k freshKey
		if writes(flags) {
			var err error
			if k, err = n.fs.freshKey(wait); err != nil {
				return nil, nil, 0, n.errno(op, err)
			}
		}
		child, h, err := n.createWith(ctx, k, writes(flags), out, mk, undo)
		if err == nil {
			n.fs.stats.opens.Add(1)
			n.fs.stats.creates.Add(1)
			return child, h, fuse.FOPEN_KEEP_CACHE, ok
		}
		if k.Fresh != nil {
			n.fs.keys.Return(k.Fresh)
		}
		if err != errOutdated {
			return nil, nil, 0, n.errno(op, err)
		}
	}
}

// errOutdated says that a file was not made since a rekey came between it and its
// key.
var errOutdated = errors.New("the file's fresh key was fetched before the last rekey")

func (n *node) createWith(ctx context.Context, k freshKey, write bool, out *fuse.EntryOut,
	mk func(*volume.Dir) (int, error), undo func(*volume.Dir) error) (*fusefs.Inode, *handle, error) {
	d, err := n.fs.dirs.acquire(n)
	if err != nil {
		return nil, nil, err
	}
	defer n.fs.dirs.release(d)
	fd, err := mk(d.Dir)
	if err != nil {
		return nil, nil, err
	}
	n.fs.tend.changed()
	var st unix.Statx_t
	if err = n.own(ctx, d.Dir, fd); err == nil {
		err = n.fs.statFd(fd, &st)
	}
	var f *file
	if err == nil {
		f, err = n.adopt(fd, &st, k, write)
	}
	if err != nil {
		unix.Close(fd)
		_ = undo(d.Dir)
		return nil, nil, err
	}
	child := n.child(ctx, &st, out)
	c := child.Operations().(*node)
	c.noCaps.Store(true)
	f.node.Store(c)
	return child, &handle{f: f, n: c, writer: write}, nil
}

// adopt makes the file of a new backing file, and gives it its key.
func (n *node) adopt(fd int, st *unix.Statx_t, k freshKey, write bool) (*file, error) {
	f := n.fs.files.acquire(n.fs, idOf(st))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.descriptor() >= 0 {
		// Same device, number and birth time as a file in use: not new.
		n.fs.files.release(f)
		return nil, syscall.ESTALE
	}
	v, err := crypt.NewFile(f.store.backing(), n.fs.vol.BlockSize(), 0, nil)
	if err != nil {
		defer n.fs.files.release(f)
		return nil, err
	}
	if k.Fresh != nil {
		// Asked only now that Reprime finds the file.
		if n.fs.outdated(k) {
			defer n.fs.files.release(f)
			return nil, errOutdated
		}
		v.Prime(k.Fresh)
	}
	f.install(fd, true)
	f.made.Store(true)
	f.view.Store(v)
	f.reconsider(v)
	f.timesMu.Lock()
	f.tell(*mtimeOf(st))
	f.timesMu.Unlock()
	if write {
		f.writers++
	}
	return f, nil
}

var _ = (fusefs.NodeReleaser)((*node)(nil))

// Release ends a handle.
func (n *node) Release(_ context.Context, fh fusefs.FileHandle) syscall.Errno {
	if h := handleOf(fh); h != nil {
		h.release()
	}
	return ok
}
