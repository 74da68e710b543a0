package fs

import (
	"context"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

var _ = (fusefs.NodeReader)((*node)(nil))

// Read decrypts straight into the reply. Write-only handles are read too: the
// writeback cache fills pages through them.
func (n *node) Read(_ context.Context, fh fusefs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	h := handleOf(fh)
	if h == nil {
		return nil, syscall.EBADF
	}
	res, err := h.read(dest, off)
	return res, n.errno("read", err)
}

var _ = (fusefs.NodeWriter)((*node)(nil))

// Write encrypts and stores.
func (n *node) Write(_ context.Context, fh fusefs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	h := handleOf(fh)
	if h == nil {
		return 0, syscall.EBADF
	}
	done, err := h.write(data, off)
	h.f.movedTimes() // past the cache, too
	if done > 0 && err != nil && !n.fs.opts.Writeback {
		err = nil // a short write; the next one gets the error
	}
	return uint32(done), n.errno("write", err)
}

var _ = (fusefs.NodeFlusher)((*node)(nil))

// Flush has nothing to do, for ever: the daemon buffers nothing. ENOSYS saves a
// request for each close; the kernel has written its dirty pages before and still
// reports their errors.
func (n *node) Flush(context.Context, fusefs.FileHandle) syscall.Errno { return syscall.ENOSYS }

// fsyncData is FUSE_FSYNC_FDATASYNC.
const fsyncData = 1

var _ = (fusefs.NodeFsyncer)((*node)(nil))

// Fsync makes a file durable.
func (n *node) Fsync(_ context.Context, fh fusefs.FileHandle, flags uint32) syscall.Errno {
	h := handleOf(fh)
	if h == nil {
		return syscall.EBADF
	}
	return n.errno("fsync", h.sync(flags&fsyncData != 0))
}

var _ = (fusefs.NodeLseeker)((*node)(nil))

// Lseek finds data and holes.
func (n *node) Lseek(_ context.Context, fh fusefs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	h := handleOf(fh)
	if h == nil {
		return 0, syscall.ENXIO // of a directory
	}
	at, err := h.seek(int64(off), whence)
	if err == syscall.ENXIO {
		return 0, syscall.ENXIO // how every search ends
	}
	return uint64(at), n.errno("lseek", err)
}

var _ = (fusefs.NodeAllocater)((*node)(nil))

// Allocate is fallocate(2). The kernel clears no setuid bit before it, so we do.
func (n *node) Allocate(ctx context.Context, fh fusefs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	h := handleOf(fh)
	if h == nil {
		return syscall.EBADF
	}
	if int64(off) < 0 || int64(size) <= 0 || int64(off+size) < 0 {
		return syscall.EFBIG
	}
	err := h.allocate(int64(off), int64(size), mode)
	h.f.movedTimes()
	if err == nil {
		err = h.killFor(ctx)
	}
	return n.errno("fallocate", err)
}

// killFor clears setuid bits if the caller is not root.
func (h *handle) killFor(ctx context.Context) error {
	caller, is := ctx.(*fuse.Context)
	if !is || caller.Uid == 0 {
		return nil
	}
	h.f.modeMu.Lock()
	defer h.f.modeMu.Unlock()
	return killPriv(h.f.descriptor(), &caller.Caller)
}

var _ = (fusefs.NodeCopyFileRanger)((*node)(nil))

// CopyFileRange copies inside the server; the kernel has written out the dirty
// pages of both ranges.
func (n *node) CopyFileRange(ctx context.Context, fhIn fusefs.FileHandle, offIn uint64, _ *fusefs.Inode,
	fhOut fusefs.FileHandle, offOut, size, flags uint64) (uint32, syscall.Errno) {
	from, to := handleOf(fhIn), handleOf(fhOut)
	if from == nil || to == nil || flags != 0 {
		return 0, syscall.EINVAL
	}
	done, err := from.copyTo(ctx, int64(offIn), to, int64(offOut), int64(min(size, copyMax)))
	to.f.movedTimes()
	if err == nil && done > 0 {
		err = to.killFor(ctx)
	}
	return uint32(done), n.errno("copy_file_range", err)
}

var _ = (fusefs.NodeIoctler)((*node)(nil))

// Ioctl forwards nothing: the backing file would take a privileged daemon's
// ioctls for its own.
func (n *node) Ioctl(context.Context, fusefs.FileHandle, uint32, uint64, []byte, []byte) (int32, syscall.Errno) {
	return 0, unix.ENOTTY
}
