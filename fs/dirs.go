package fs

import (
	"container/list"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// dirCache keeps the open directories of directory nodes, the most recently used
// ones: an O_PATH descriptor each.
type dirCache struct {
	root *cachedDir // never closed before the end
	max  int        // of descriptors here, and of those of orphans

	mu     sync.Mutex
	byNode map[*node]*cachedDir // guarded by mu
	lru    list.List            // guarded by mu; of *cachedDir, last used in front
}

// A cachedDir is an open directory and who uses it.
type cachedDir struct {
	*volume.Dir
	node *node
	elem *list.Element // guarded by dirCache.mu; nil once it left the cache
	refs int           // guarded by dirCache.mu
}

// Bounds on directory descriptors; a quarter of RLIMIT_NOFILE lies between. Some of
// the rest are for what has no bound of its own: connections to KMS, key files,
// listings, names being looked at. Without them no file could be opened nor closed
// for good.
const (
	minDirs = 32
	maxDirs = 4096
	spare   = 64 + walksMost*(levelsMost+1)
)

// share divides RLIMIT_NOFILE among directories and files.
func share() (dirs, files int) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return maxDirs, math.MaxInt
	}
	limit := int(min(lim.Cur, math.MaxInt32))
	dirs = min(maxDirs, max(minDirs, limit/4))
	return dirs, max(1, limit-dirs-spare)
}

func (c *dirCache) init(root *volume.Dir, most int) {
	c.max = most
	c.byNode = make(map[*node]*cachedDir)
	c.lru.Init()
	c.root = &cachedDir{Dir: root, refs: 1}
}

func (c *dirCache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lru.Len() + 1
}

// cached returns the node's directory if it is open, or nil. The caller releases
// it.
func (c *dirCache) cached(n *node) *cachedDir {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n == n.fs.root {
		c.root.refs++
		return c.root
	}
	d := c.byNode[n]
	if d != nil {
		d.refs++
		c.lru.MoveToFront(d.elem)
	}
	return d
}

// acquire opens the node's directory, or finds it open. The caller releases it.
func (c *dirCache) acquire(n *node) (*cachedDir, error) {
	if d := c.cached(n); d != nil {
		return d, nil
	}
	opened, err := n.openDir()
	if err != nil {
		return nil, err
	}
	return c.insert(n, opened), nil
}

// openDir opens a directory through its parent.
func (n *node) openDir() (opened *volume.Dir, err error) {
	err = n.viaName(func(int) error { return unix.ENOENT }, // removed: nothing can be in it
		func(d *volume.Dir, name string) error {
			opened, err = d.OpenDir(name)
			if err != nil {
				return err
			}
			if err = n.checkFd(opened.Fd()); err != nil {
				opened.Close()
			}
			return err
		})
	return opened, err
}

// insert adds an open directory, unless somebody was faster.
func (c *dirCache) insert(n *node, opened *volume.Dir) *cachedDir {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d := c.byNode[n]; d != nil {
		opened.Close()
		d.refs++
		return d
	}
	d := &cachedDir{Dir: opened, node: n, refs: 1}
	d.elem = c.lru.PushFront(d)
	c.byNode[n] = d
	for c.lru.Len() > c.max {
		c.dropLocked(c.lru.Back().Value.(*cachedDir))
	}
	return d
}

// dropLocked takes a directory out of the cache; it is closed when its last user
// is done.
func (c *dirCache) dropLocked(d *cachedDir) {
	if d.elem == nil {
		return
	}
	c.lru.Remove(d.elem)
	d.elem = nil
	delete(c.byNode, d.node)
	if d.refs == 0 {
		d.Close()
	}
}

func (c *dirCache) release(d *cachedDir) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.refs--
	if d.refs == 0 && d.elem == nil {
		d.Close()
	}
}

// forget drops the directory of a node that the kernel no longer knows.
func (c *dirCache) forget(n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d := c.byNode[n]; d != nil {
		c.dropLocked(d)
	}
}

// closeAll ends the cache with the mount.
func (c *dirCache) closeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.lru.Len() > 0 {
		c.dropLocked(c.lru.Back().Value.(*cachedDir))
	}
	c.root.refs--
	if c.root.refs == 0 {
		c.root.Close()
	}
}
