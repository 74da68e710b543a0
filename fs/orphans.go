package fs

import (
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// orphanage holds the nodes that keep a descriptor because their last name is
// gone: open files too, since a request may come after their last handle went.
//
// A descriptor's number is given to the next file that is opened as soon as it is
// closed. So a kept one is made known only when it is sure to stay, is closed only
// after the kernel has forgotten the node, and not before the last request that
// uses it is done: else a request would be served from somebody else's file.
type orphanage struct {
	mu    sync.Mutex
	nodes map[*node]struct{} // guarded by mu
}

// An orphan is the O_PATH descriptor kept for a node.
type orphan struct {
	fd   int
	uses int // guarded by orphanage.mu; the node's own, and one for each request
}

// maxOrphans bounds the descriptors kept; without one an inode is ESTALE once its
// name is gone.
const maxOrphans = 1024

// take makes fd the node's descriptor; false if it has one, or there are max.
func (o *orphanage) take(n *node, fd, max int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.nodes == nil {
		o.nodes = make(map[*node]struct{})
	}
	if len(o.nodes) >= max || !n.orphan.CompareAndSwap(nil, &orphan{fd: fd, uses: 1}) {
		return false
	}
	o.nodes[n] = struct{}{}
	return true
}

// acquire returns the node's descriptor, or nil. It stays open until the caller
// releases it.
func (o *orphanage) acquire(n *node) *orphan {
	if n.orphan.Load() == nil {
		return nil // all but a few nodes
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	kept := n.orphan.Load()
	if kept != nil {
		kept.uses++
	}
	return kept
}

func (o *orphanage) release(kept *orphan) {
	o.mu.Lock()
	last := o.releaseLocked(kept)
	o.mu.Unlock()
	last.close()
}

// releaseLocked gives up a use, and returns what the caller closes once mu is free:
// the last close of a removed file is when the backing store frees its blocks, and
// whoever removes the next one would wait for that.
func (o *orphanage) releaseLocked(kept *orphan) (last *orphan) {
	kept.uses--
	if kept.uses > 0 {
		return nil
	}
	return kept
}

// close may be called on nil.
func (kept *orphan) close() {
	if kept != nil {
		unix.Close(kept.fd)
	}
}

// drop gives up the node's descriptor, if it has one.
func (o *orphanage) drop(n *node) {
	if n.orphan.Load() == nil {
		return
	}
	o.mu.Lock()
	last := o.dropLocked(n)
	o.mu.Unlock()
	last.close()
}

func (o *orphanage) dropLocked(n *node) (last *orphan) {
	kept := n.orphan.Swap(nil)
	if kept == nil {
		return nil
	}
	delete(o.nodes, n)
	return o.releaseLocked(kept)
}

// drain gives up all, with the mount.
func (o *orphanage) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for n := range o.nodes {
		o.dropLocked(n).close()
	}
}

// unused says that a node has lost its last name and has no handle: nobody will see
// its times any more, and the kernel stores them once for each file it removes.
func (o *orphanage) unused(n *node) bool {
	if n.orphan.Load() == nil || n.Mode() != syscall.S_IFREG {
		return false
	}
	f := n.fs.files.find(n.id)
	if f != nil {
		n.fs.files.release(f)
	}
	return f == nil
}

func (o *orphanage) len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.nodes)
}

// keepOrphan opens what is about to lose the name, so that requests on it which
// the kernel sends later still find it: fstat of an O_PATH descriptor, an open
// that lost a race against an atomic replace. It returns what to call when the
// outcome is known: only then it is known whether the descriptor is needed, and
// until then requests do not see it. The number of such descriptors is bounded.
func (n *node) keepOrphan(d *volume.Dir, name string) (done func(removed bool)) {
	none := func(bool) {}
	c := n.known(name)
	if c == nil || c.orphan.Load() != nil {
		return none
	}
	fd, err := d.OpenPath(name)
	if err != nil {
		return none
	}
	var st unix.Statx_t
	if n.fs.statFd(fd, &st) != nil || c.check(&st) != nil {
		unix.Close(fd)
		return none
	}
	// The kernel makes no link of what it removes a name of.
	last := st.Nlink == 1
	return func(removed bool) {
		if !removed || !last && !c.nameless(fd) || !n.fs.orphans.take(c, fd, maxOrphans) {
			unix.Close(fd) // nobody else has seen it
		}
	}
}

// nameless says whether what fd refers to has lost its last name. A directory has
// one only, whatever link count the backing file system gives it then.
func (n *node) nameless(fd int) bool {
	var st unix.Statx_t
	return n.fs.statFd(fd, &st) == nil && (st.Nlink == 0 || n.Mode() == syscall.S_IFDIR)
}

// throughOrphan calls op with the descriptor kept for the node, after a check that
// it is the node's; is is false if none is kept.
func (n *node) throughOrphan(op func(fd int) error) (err error, is bool) {
	kept := n.fs.orphans.acquire(n)
	if kept == nil {
		return nil, false
	}
	defer n.fs.orphans.release(kept)
	if err := n.checkFd(kept.fd); err != nil {
		return err, true
	}
	return op(kept.fd), true
}
