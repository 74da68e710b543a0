package fs

import (
	"sync"
	"syscall"
)

// fileTable finds the open files by backing inode, so that hard links, renames
// and handles share one.
type fileTable struct {
	mu   sync.Mutex
	byID map[fileID]*file // guarded by mu
	max  int              // guarded by mu; files with descriptors
}

// room refuses another file when there are too many: the descriptors that are left
// are needed to get keys for those that are open, and to let go of them.
func (t *fileTable) room(id fileID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[id] == nil && len(t.byID) >= t.max {
		return syscall.ENFILE
	}
	return nil
}

// acquire finds the file of a backing inode, or makes one that nobody has opened
// yet. The caller releases it.
func (t *fileTable) acquire(fs *fileSystem, id fileID) *file {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.byID[id]
	if f == nil {
		f = newFile(fs, id)
		t.byID[id] = f
	}
	f.refs++
	return f
}

// hold counts one more use of a file that the caller uses.
func (t *fileTable) hold(f *file) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f.refs++
}

// find returns the file of a backing inode if it is in use, or nil. The caller
// releases it.
func (t *fileTable) find(id fileID) *file {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.byID[id]
	if f != nil {
		f.refs++
	}
	return f
}

// release gives up a use; the last one wipes the keys and closes the file.
func (t *fileTable) release(f *file) {
	t.mu.Lock()
	f.refs--
	last := f.refs == 0
	if last {
		delete(t.byID, f.id)
	}
	t.mu.Unlock()
	if last {
		f.close()
	}
}

func (t *fileTable) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byID)
}

// all returns every file in use; the caller releases each.
func (t *fileTable) all() []*file { return t.allAnd(func(func(fileID) bool) {}) }

// allAnd is all, and calls rest while no other file comes into use.
func (t *fileTable) allAnd(rest func(inUse func(fileID) bool)) []*file {
	t.mu.Lock()
	defer t.mu.Unlock()
	rest(func(id fileID) bool { return t.byID[id] != nil })
	list := make([]*file, 0, len(t.byID))
	for _, f := range t.byID {
		f.refs++
		list = append(list, f)
	}
	return list
}

// drain closes every file, with the mount: the kernel does not wait for the
// RELEASE requests that it has queued.
func (t *fileTable) drain(end func(*file)) {
	t.mu.Lock()
	list := t.byID
	t.byID = make(map[fileID]*file)
	t.mu.Unlock()
	for _, f := range list {
		end(f)
		f.close()
	}
}
