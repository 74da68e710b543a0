package fs

import (
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// orphanage holds the nodes that keep a descriptor because their last name is
// gone: open files too, since a request may come after their last handle went.
type orphanage struct {
	mu    sync.Mutex
	nodes map[*node]struct{} // guarded by mu
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
	if len(o.nodes) >= max || !n.orphan.CompareAndSwap(0, int64(fd)+1) {
		return false
	}
	o.nodes[n] = struct{}{}
	return true
}

// drop closes the node's descriptor, if it has one.
func (o *orphanage) drop(n *node) {
	if n.orphan.Load() == 0 {
		return // all but a few nodes
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dropLocked(n)
}

func (o *orphanage) dropLocked(n *node) {
	if fd := n.orphan.Swap(0) - 1; fd >= 0 {
		delete(o.nodes, n)
		unix.Close(int(fd))
	}
}

// drain closes all, with the mount.
func (o *orphanage) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for n := range o.nodes {
		o.dropLocked(n)
	}
}

func (o *orphanage) len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.nodes)
}

// keepOrphan opens what is about to lose the name, so that requests on it which
// the kernel sends later still find it: fstat of an O_PATH descriptor, an open
// that lost a race against an atomic replace. It returns what to call when the
// outcome is known. The number of such descriptors is bounded.
func (n *node) keepOrphan(d *volume.Dir, name string) (done func(removed bool)) {
	none := func(bool) {}
	c := n.known(name)
	if c == nil || c.orphan.Load() != 0 {
		return none
	}
	fd, err := d.OpenPath(name)
	if err != nil {
		return none
	}
	var st unix.Statx_t
	if n.fs.statFd(fd, &st) != nil || c.check(&st) != nil || !n.fs.orphans.take(c, fd, maxOrphans) {
		unix.Close(fd)
		return none
	}
	return func(removed bool) {
		// With a name left it is reached by that one.
		if !removed || n.fs.statFd(fd, &st) != nil || st.Nlink > 0 && c.Mode() != syscall.S_IFDIR {
			n.fs.orphans.drop(c)
		}
	}
}
