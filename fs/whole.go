package fs

import (
	"sync"
	"syscall"
)

// A small file is handed to the kernel whole when it is opened for reading: its page
// cache then answers read(2), and the READ request is saved, which costs more than all
// the rest of it.

// maxWhole is the size of such a file: the kernel would read that much ahead anyway.
const maxWhole = 32 << 10

var wholePool = sync.Pool{New: func() any { return new([maxWhole]byte) }}

// mayHaveWhole reports whether an open with these flags may hand over the file: only
// where the kernel caches what it reads, and only pages that nobody had before, for
// those of an earlier open may be stale.
func (n *node) mayHaveWhole(flags uint32) bool {
	return n.fs.opts.Writeback && flags&(syscall.O_ACCMODE|syscall.O_TRUNC|syscall.O_DIRECT|syscall.O_NOATIME) == 0 && n.seen.Load() == nil
}

// handWhole gives the kernel the contents of a small file, and reports whether it has
// them. What can't be read is left to the READ that says why. err is why the file may not
// be opened after all: its lease ended meanwhile.
func (n *node) handWhole(f *file) (done bool, err error) {
	buf := wholePool.Get().(*[maxWhole]byte)
	defer wholePool.Put(buf)
	if !f.handWhole(n, buf[:]) {
		return false, nil
	}
	if err := f.barErr(); err != nil {
		go n.dropPages() // the drain may have dropped what there was before these came
		return false, err
	}
	return true, nil
}

// handWhole keeps out whoever would write or truncate, by mu: pages that are newer
// than these, or a smaller size, must not be in the kernel yet. The kernel takes the locks
// of the pages, which it may hold for a READ; that does not ask for mu.
func (f *file) handWhole(n *node, buf []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.view.Load()
	if f.writers > 0 || f.shared() || f.barErr() != nil || v.Pending() {
		return false
	}
	size := v.Size()
	if size == 0 || size > maxWhole {
		return false
	}
	data := buf[:size]
	if got, err := v.ReadAt(data, 0); int64(got) != size || err != nil {
		return false
	}
	return n.fs.opts.storePages(n, data) == 0
}
