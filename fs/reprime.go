package fs

import (
	"context"
	"errors"
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

// reprime exchanges the file's unused key, if it holds one. No lock is held while
// Keys is asked.
func (f *file) reprime(ctx context.Context) error {
	v := f.view.Load()
	if v == nil || !v.Primed() {
		return nil
	}
	k, err := f.fs.freshKey(ctx)
	if err != nil {
		return err
	}
	f.fs.keys.Return(v.Reprime(k))
	return nil
}

// primedAt is called when a key that was fetched at the given age may have been
// handed to a file: a Reprime since then may have missed it.
func (f *file) primedAt(ctx context.Context, age uint64) {
	if f.fs.keyAge.Load() == age {
		return
	}
	if err := f.reprime(ctx); err != nil {
		f.fs.log.trouble("exchanging a fresh key after a rekey", f.id.ino, err)
	}
}
