package fs

import (
	"context"
	"sync"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

var _ = (fusefs.NodeOpendirHandler)((*node)(nil))

// OpendirHandle opens a directory for listing.
func (n *node) OpendirHandle(context.Context, uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	d, err := n.fs.dirs.acquire(n)
	if err != nil {
		return nil, 0, n.errno("opendir", err)
	}
	list, err := d.Entries()
	if err != nil {
		n.fs.dirs.release(d)
		return nil, 0, n.errno("opendir", err)
	}
	var flags uint32
	if n.fs.opts.Writeback {
		flags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	}
	return &dirHandle{n: n, d: d, list: list}, flags, ok
}

// A dirHandle is one opendir(3).
type dirHandle struct {
	n    *node
	d    *cachedDir
	mu   sync.Mutex // fsyncdir may come while a listing goes on
	list *volume.Entries

	// The entry handed out last, and the offsets before and behind it. It is handed out
	// again when there was no room for it.
	last         volume.Entry // guarded by mu
	before, next int64        // guarded by mu; the same if there is none
	again        bool         // guarded by mu
}

var _ = (fusefs.FileReaddirenter)((*dirHandle)(nil))

// Readdirent yields the next entry; its offset is the backing directory's, so that
// telldir(3) and seekdir(3) hold across handles.
func (h *dirHandle) Readdirent(context.Context) (*fuse.DirEntry, syscall.Errno) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.again {
		var e volume.Entry
		more, err := h.list.Next(&e)
		if err != nil {
			return nil, h.n.errno("readdir", err)
		}
		if !more {
			return nil, ok
		}
		h.last, h.before = e, h.next
	}
	e := h.last
	h.next, h.again = e.Off, false
	return &fuse.DirEntry{Name: e.Name, Mode: uint32(e.Type) << 12, Ino: e.Ino, Off: uint64(e.Off)}, ok
}

var _ = (fusefs.FileLookuper)((*dirHandle)(nil))

// Lookup answers READDIRPLUS for the entry just read.
func (h *dirHandle) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	var st unix.Statx_t
	if err := h.n.fs.statName(h.d.Dir, name, &st); err != nil {
		if err == syscall.ENOENT {
			return nil, syscall.ENOENT // removed meanwhile
		}
		return nil, h.n.errno("readdirplus", err)
	}
	return h.n.child(ctx, &st, out), ok
}

var _ = (fusefs.FileSeekdirer)((*dirHandle)(nil))

// Seekdir goes on after the entry with that offset. Every request begins with it, most
// where the last one ended; a rewind shows what was made since.
func (h *dirHandle) Seekdir(_ context.Context, off uint64) syscall.Errno {
	h.mu.Lock()
	defer h.mu.Unlock()
	to := int64(off &^ anyOffset)
	switch {
	case to != 0 && to == h.next && !h.again:
		return ok
	case to != 0 && to == h.before:
		h.next, h.again = h.before, true
		return ok
	}
	if err := h.list.SeekTo(to); err != nil {
		return h.n.errno("seekdir", err)
	}
	h.before, h.next, h.again = to, to, false
	return ok
}

var _ = (fusefs.FileFsyncdirer)((*dirHandle)(nil))

// Fsyncdir makes the directory's entries durable.
func (h *dirHandle) Fsyncdir(_ context.Context, _ uint32) syscall.Errno {
	return h.n.errno("fsyncdir", ignoringEINTR(func() error { return unix.Fsync(h.list.Fd()) }))
}

var _ = (fusefs.FileReleasedirer)((*dirHandle)(nil))

// Releasedir ends the handle.
func (h *dirHandle) Releasedir(context.Context, uint32) {
	h.list.Close()
	h.n.fs.dirs.release(h.d)
}
