package fs

import (
	"bytes"
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Keys is where data keys come from: the ring of package keys. Both calls may
// wait for the network; ctx ends with the request (a signal) or its deadline.
type Keys interface {
	// Open opens a header's data key. The caller owns the result.
	Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error)
	// Fresh makes a data key for contents that are yet to be written.
	Fresh(ctx context.Context) (*crypt.Fresh, error)
	// Return takes back a fresh key that was not used. It does not wait.
	Return(*crypt.Fresh)
}

// openKey and freshKey count what is asked of Keys. No lock is held.
func (fs *fileSystem) openKey(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	defer fs.stats.waited(&fs.stats.keyOpens, time.Now())
	s, err := fs.keys.Open(ctx, h)
	return s, interrupted(ctx, err)
}

func (fs *fileSystem) freshKey(ctx context.Context) (*crypt.Fresh, error) {
	defer fs.stats.waited(&fs.stats.keyFresh, time.Now())
	k, err := fs.keys.Fresh(ctx)
	return k, interrupted(ctx, err)
}

// interrupted makes sure that an error caused by a signal is EINTR.
func interrupted(ctx context.Context, err error) error {
	if err != nil && context.Cause(ctx) == context.Canceled {
		return crypt.ErrInterrupted
	}
	return err
}

// A loading is an open that is asking for a file's key.
type loading struct {
	done chan struct{} // closed at the end
	err  error         // set before done is closed
}

// load makes the file's view, asking for its key if it has contents. One request
// at a time does so; the others wait for it and share its outcome, unless it was
// merely interrupted.
func (f *file) load(ctx context.Context) error {
	for {
		f.mu.Lock()
		if f.view.Load() != nil {
			f.mu.Unlock()
			return nil
		}
		l := f.loading
		if l == nil {
			l = &loading{done: make(chan struct{})}
			f.loading = l
			f.mu.Unlock()
			return f.lead(ctx, l)
		}
		f.mu.Unlock()
		select {
		case <-l.done:
			if l.err != nil && !passing(l.err) {
				return l.err
			}
		case <-ctx.Done():
			return interrupted(ctx, context.Cause(ctx))
		}
	}
}

// passing errors say nothing about the file, only about who asked.
func passing(err error) bool {
	return errors.Is(err, crypt.ErrInterrupted) || errors.Is(err, context.Canceled)
}

func (f *file) lead(ctx context.Context, l *loading) error {
	l.err = f.unlock(ctx)
	f.mu.Lock()
	f.loading = nil
	f.mu.Unlock()
	close(l.done)
	return l.err
}

// unlock reads the header, asks for its key with no lock held, and installs the
// view if the header is still the one. A header is read again once if its key
// can't be opened: a rekey may have replaced it just then.
func (f *file) unlock(ctx context.Context) error {
	var failed []byte // the header that failed
	for {
		raw, h, err := f.header()
		if err != nil {
			return err
		}
		var s *crypt.Secrets
		if h != nil {
			if s, err = f.fs.openKey(ctx, h); err != nil {
				if !errors.Is(err, crypt.ErrDamaged) || failed != nil {
					return err
				}
				failed = raw
				if again, rerr := volume.ReadHeader(f.descriptor()); rerr != nil || bytes.Equal(again, failed) {
					return err
				}
				continue
			}
		}
		if done, err := f.installView(s); done || err != nil {
			return err
		}
	}
}

// header reads what is needed to ask for the key; h is nil for an empty file,
// whatever header it carries.
func (f *file) header() (raw []byte, h *crypt.Header, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(f.descriptor(), &st); err != nil {
		return nil, nil, err
	}
	if st.Size == 0 {
		return nil, nil, nil
	}
	if raw, err = volume.ReadHeader(f.descriptor()); err != nil {
		return nil, nil, err
	}
	h, err = f.fs.vol.ParseHeader(raw)
	return raw, h, err
}

// installView makes the view with the secrets obtained, if they are still those
// of the file: it may have been emptied meanwhile. It takes over s; done is false
// if the header has to be read again.
func (f *file) installView(s *crypt.Secrets) (done bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.view.Load() != nil {
		s.Wipe()
		return true, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.descriptor(), &st); err != nil {
		s.Wipe()
		return false, err
	}
	if st.Size > 0 {
		_, h, err := f.header()
		if err != nil || s == nil || h == nil || h.Identity != s.Identity() {
			s.Wipe()
			return false, err
		}
	}
	if st.Size == 0 {
		return true, f.setView(0, s)
	}
	// Opening is not reading: checking the end must not move the access time.
	_, _ = unix.FcntlInt(uintptr(f.descriptor()), unix.F_SETFL, unix.O_NONBLOCK|unix.O_NOATIME)
	defer unix.FcntlInt(uintptr(f.descriptor()), unix.F_SETFL, unix.O_NONBLOCK)
	return true, f.setView(st.Size, s)
}

// setView makes the view. mu is held.
func (f *file) setView(stored int64, s *crypt.Secrets) error {
	v, err := crypt.NewFile(&f.store, f.fs.vol.BlockSize(), stored, s)
	if err == nil {
		f.view.Store(v)
	}
	return err
}

// A change is what an open or a truncate does to a file that is ready.
type change struct {
	writer bool  // a handle that may write joins
	cut    bool  // the size becomes size
	size   int64 // meant only if cut
}

// change obtains a fresh key if the file will need one, before anything is cut,
// and then makes the change under the lock. Whoever writes into an empty file
// needs a key that is at hand already: writes never wait for KMS.
func (f *file) change(ctx context.Context, c change) (err error) {
	var fresh *crypt.Fresh
	defer func() {
		if fresh != nil {
			f.fs.keys.Return(fresh)
		}
	}()
	age := f.fs.keyAge.Load()
	for {
		f.mu.Lock()
		if f.needsKey(c) && fresh == nil {
			f.mu.Unlock()
			if fresh, err = f.fs.freshKey(ctx); err != nil {
				return err
			}
			continue
		}
		fresh, err = f.changeLocked(c, fresh)
		f.mu.Unlock()
		if err == nil {
			f.primedAt(ctx, age)
		}
		return err
	}
}

// needsKey says whether the file has to be given a fresh key for a change.
func (f *file) needsKey(c change) bool {
	v := f.view.Load()
	if c.cut && c.size == 0 {
		return c.writer || f.writers > 0
	}
	return v != nil && v.NeedsKey() && (c.writer || f.writers > 0 || c.cut)
}

// changeLocked makes the change and returns the key if it was not taken.
func (f *file) changeLocked(c change, fresh *crypt.Fresh) (*crypt.Fresh, error) {
	v := f.view.Load()
	if c.cut && c.size == 0 && v == nil {
		// Nobody has it open: its contents go without their key, damaged or not.
		if err := f.store.Truncate(0); err != nil {
			return fresh, err
		}
		if err := f.setView(0, nil); err != nil {
			return fresh, err
		}
		v = f.view.Load()
	}
	// The key goes first: a write may follow the cut at once.
	if fresh != nil && f.needsKey(c) && v.Prime(fresh) {
		fresh = nil
	}
	if c.cut {
		if err := v.Truncate(c.size); err != nil {
			return f.unprime(v, fresh), err
		}
	}
	if c.writer {
		f.writers++
	}
	return f.unprime(v, fresh), nil
}

// unprime takes a key back that no writer will use.
func (f *file) unprime(v *crypt.File, fresh *crypt.Fresh) *crypt.Fresh {
	if f.writers > 0 || fresh != nil {
		return fresh
	}
	return v.Unprime()
}

// truncate sets the size. It needs the key unless nothing is to be left.
func (f *file) truncate(ctx context.Context, size int64) error {
	if size > 0 {
		if err := f.load(ctx); err != nil {
			return err
		}
	}
	return f.change(ctx, change{cut: true, size: size})
}

// open readies the file for a new handle.
func (f *file) open(ctx context.Context, n *node, write, trunc bool) error {
	if err := f.ready(n, write || trunc); err != nil {
		return err
	}
	if !trunc {
		if err := f.load(ctx); err != nil {
			return err
		}
	}
	if !write && !trunc {
		return nil
	}
	return f.change(ctx, change{writer: write, cut: trunc})
}
