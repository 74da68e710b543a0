package keys

import (
	"sync"
	"syscall"
	"time"
)

// recentFor is how long a local key is kept in memory (in locked memory, as crypt.Key)
// after it was read.
const recentFor = time.Second

// recentKeys are the local keys used within the last second: a tree of small files asks
// for one thousands of times a second, and reading its file costs more than what it is
// read for. Each use looks at the file, so that one which was changed, replaced or
// removed counts at once.
type recentKeys struct {
	mu   sync.Mutex
	keys map[string]*recentKey // guarded by mu; by path
}

type recentKey struct {
	file *keyFile
	as   stamp // of the file when it was read
}

// A stamp is what tells one content of a key file from the next, and who may read it:
// whatever changes one of them moves the ctime, and a new file has another number.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func stampOf(st *syscall.Stat_t) stamp {
	return stamp{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// settled is how old a change must be for every later one to have another time: the
// kernel's clock for files ticks each 1 to 10 ms.
const settled = 100 * time.Millisecond

// get is a key whose file is as it was read, or nil. The caller wipes it.
func (r *recentKeys) get(path string) *keyFile {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.keys[path]
	if k == nil {
		return nil
	}
	var st syscall.Stat_t
	if syscall.Lstat(path, &st) != nil || stampOf(&st) != k.as {
		r.dropLocked(path, k)
		return nil
	}
	return k.file.clone()
}

// put keeps a copy of a key for a second.
func (r *recentKeys) put(path string, as stamp, f *keyFile) {
	if time.Since(time.Unix(as.ctime.Unix())) < settled {
		return
	}
	own := f.clone()
	if own == nil {
		return
	}
	k := &recentKey{own, as}
	r.mu.Lock()
	defer r.mu.Unlock()
	if before := r.keys[path]; before != nil {
		r.dropLocked(path, before)
	}
	if r.keys == nil {
		r.keys = map[string]*recentKey{}
	}
	r.keys[path] = k
	time.AfterFunc(recentFor, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.dropLocked(path, k)
	})
}

// forget wipes them all.
func (r *recentKeys) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for path, k := range r.keys {
		r.dropLocked(path, k)
	}
}

func (r *recentKeys) dropLocked(path string, k *recentKey) {
	k.file.wipe()
	if r.keys[path] == k {
		delete(r.keys, path)
	}
}

// clone is nil if there is no memory for another key.
func (f *keyFile) clone() *keyFile {
	secret, err := f.secret.Clone()
	if err != nil {
		return nil
	}
	return &keyFile{id: f.id, State: f.State, secret: secret}
}
