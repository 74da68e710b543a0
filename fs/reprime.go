package fs

import (
	"context"
	"errors"

	"kmsfs/crypt"
)

// Reprime gives every open file that holds a fresh key it has not used yet
// another one, from the keys that Keys makes now. A rekey calls it on a live
// mount, after the list of keys changed: a file opened empty long ago would else
// be written under the old key when nobody looks any more.
func (s *Server) Reprime(ctx context.Context) error {
	fs := s.fs
	fs.keyAge.Add(1)
	var failed []error
	for _, f := range fs.files.all() {
		if err := f.reprime(ctx); err != nil {
			failed = append(failed, err)
		}
		fs.files.release(f)
	}
	return errors.Join(failed...)
}

// A freshKey is a fresh key and what keyAge was before it was asked for.
type freshKey struct {
	*crypt.Fresh
	age uint64
}

// outdated reports whether Reprime was called since the key was asked for: it may
// be one under the old list; or whether its lease has ended. Whoever gives a key to a file asks with file.mu held,
// and Reprime looks into each file with file.mu held after it has counted itself.
// So either the giver sees the count, or Reprime sees the key.
func (fs *fileSystem) outdated(k freshKey) bool {
	return fs.keyAge.Load() != k.age || fs.ended(k.Secrets.Under()) != nil
}

// reprime exchanges the file's unused key, if it holds one. No lock is held while
// Keys is asked; the new key may be outdated then, by the next Reprime.
func (f *file) reprime(ctx context.Context) error {
	for f.primed() {
		k, err := f.fs.freshKey(ctx)
		if err != nil {
			return err
		}
		unused, done := f.exchange(k)
		f.fs.keys.Return(unused)
		if done {
			break
		}
	}
	return nil
}

func (f *file) primed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.view.Load()
	return v != nil && v.Primed()
}

// exchange puts k in the place of the key that the file holds, and returns that
// one; or k, if it is of no use.
func (f *file) exchange(k freshKey) (unused *crypt.Fresh, done bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fs.outdated(k) {
		return k.Fresh, false
	}
	v := f.view.Load()
	unused = v.Reprime(k.Fresh)
	f.reconsider(v)
	return unused, true
}
