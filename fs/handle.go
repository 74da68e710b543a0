package fs

import (
	"context"
	"errors"
	"io"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A handle is one open(2) of a file.
type handle struct {
	f      *file
	n      *node
	writer bool
}

// view is the file's plaintext: an open handle implies that there is one.
func (h *handle) view() *crypt.File { return h.f.view.Load() }

// newHandle counts an open and says what the kernel may keep cached: the pages it
// has, unless the backing file is not what it was when the last handle closed.
func (n *node) newHandle(f *file, openFlags uint32) (_ *handle, flags uint32, err error) {
	f.node.Store(n)
	var keep bool
	if n.mayHaveWhole(openFlags) {
		if keep, err = n.handWhole(f); err != nil {
			return nil, 0, err
		}
	}
	var st unix.Statx_t
	if keep || f.shared() || n.fs.statFd(f.descriptor(), &st) == nil && n.unchanged(&st) {
		flags = fuse.FOPEN_KEEP_CACHE
	}
	n.fs.stats.opens.Add(1)
	return &handle{f: f, n: n, writer: writes(openFlags)}, flags, nil
}

// shared reports whether others use the file too: then the pages are current.
func (f *file) shared() bool {
	t := &f.fs.files
	t.mu.Lock()
	defer t.mu.Unlock()
	return f.refs > 1
}

func (n *node) unchanged(st *unix.Statx_t) bool {
	seen := n.seen.Load()
	return seen != nil && *seen == stampOf(st)
}

// release ends the handle.
func (h *handle) release() {
	if h.writer {
		h.f.writerLeaves()
	}
	var st unix.Statx_t
	if h.n.fs.statFd(h.f.descriptor(), &st) == nil {
		s := stampOf(&st)
		h.n.seen.Store(&s)
	}
	h.n.closing(h.view())
	h.n.fs.files.release(h.f)
}

// read fills dest. A file shorter than that ends; anything else that is missing
// is an error, never a short answer, which the kernel would fill up with zeros.
// After an error the kernel asks again page by page, so only what is damaged
// fails.
func (h *handle) read(dest []byte, off int64) (fuse.ReadResult, error) {
	if err := h.f.barErr(); err != nil {
		return nil, err
	}
	n, err := h.view().ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.f.because(err)
	}
	return fuse.ReadResultData(dest[:n]), nil
}

// write seals what it is given. It never waits for KMS: the key is at hand since the
// open, or its lease has ended.
func (h *handle) write(data []byte, off int64) (int, error) {
	if err := h.f.sealErr(); err != nil {
		return 0, err
	}
	n, err := h.view().WriteAt(data, off)
	return n, h.f.because(err)
}

// seek answers SEEK_DATA and SEEK_HOLE.
func (h *handle) seek(off int64, whence uint32) (int64, error) {
	if err := h.f.barErr(); err != nil {
		return 0, err
	}
	asIs := h.f.unwritten()
	if !asIs {
		h.n.flushBeyond(h.view().Size())
	}
	switch whence {
	case unix.SEEK_DATA:
		return h.view().SeekData(off, asIs)
	case unix.SEEK_HOLE:
		return h.view().SeekHole(off, asIs)
	}
	return 0, syscall.EINVAL
}

// unwritten reports whether no handle may write: then nothing is dirty in the
// kernel.
func (f *file) unwritten() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.writers == 0
}

// flushBeyond has the kernel write out what lies at and beyond size: with the
// writeback cache it knows of a longer file than we do, asks for holes before it
// flushes, and would take our end for the end of the data (cp would lose the
// rest). The request that waits for this (LSEEK) pins no page and we hold no lock,
// so the WRITEs it causes can be served meanwhile.
func (n *node) flushBeyond(size int64) {
	if !n.fs.opts.Writeback {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.NotifyContent(size&^4095, 0)
	}()
	<-done
}

// allocate serves fallocate(2).
func (h *handle) allocate(off, size int64, mode uint32) error {
	if err := h.f.barErr(); err != nil {
		return err
	}
	v := h.view()
	keep := mode&unix.FALLOC_FL_KEEP_SIZE != 0
	switch mode {
	case 0, unix.FALLOC_FL_KEEP_SIZE:
		return v.Allocate(off, size, keep)
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		return v.Punch(off, size)
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		return v.Zero(off, size, keep)
	}
	return syscall.EOPNOTSUPP
}

// sync makes the file durable; only its contents if datasync is set.
func (h *handle) sync(datasync bool) error {
	v := h.view()
	if v.Pending() {
		if err := h.f.settleNow(v); err != nil {
			return h.f.because(err)
		}
	}
	if datasync {
		return v.Sync()
	}
	h.f.keepTold() // or a crash would leave the time of the pages' arrival
	return v.SyncBy(func() error {
		return ignoringEINTR(func() error { return unix.Fsync(h.f.descriptor()) })
	})
}

// Copies inside the server move this much at a time, and at most this much per
// request, so that a signal ends a long copy.
const (
	copyChunk = 1 << 20
	copyMax   = 32 << 20
)

// copyTo copies between files, never holding a lock of both: two copies in
// opposite directions would deadlock. A signal ends it after the first chunk at the
// earliest: nothing copied is how the end of the file is told (copy_file_range(2)), and
// the copy of a program that sends itself signals, as Go's do, would be cut short.
func (h *handle) copyTo(ctx context.Context, from int64, to *handle, at, size int64) (done int64, err error) {
	buf := make([]byte, min(size, copyChunk))
	for size = min(size, copyMax); done < size && (done == 0 || ctx.Err() == nil); {
		if err = h.f.barErr(); err != nil {
			break
		}
		n, rerr := h.view().ReadAt(buf[:min(size-done, copyChunk)], from+done)
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			err = rerr
			break
		}
		if n == 0 {
			break
		}
		w, werr := to.write(buf[:n], at+done)
		done += int64(w)
		if err = werr; err != nil || rerr != nil {
			break
		}
	}
	if done > 0 {
		return done, nil
	}
	return 0, err
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

func handleOf(fh fusefs.FileHandle) *handle {
	h, _ := fh.(*handle)
	return h
}
