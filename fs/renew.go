package fs

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Bounds on Renew: whoever asked for it waits, and what is left undone is done when
// such a file gets a name.
const (
	renewWait = 15 * time.Second
	renewJobs = 8
	// renewTries is how often a header may change under a renewal: it does when the
	// file is emptied and written again.
	renewTries = 8
)

// Renew puts the headers of open files that have no name under the key that new
// files get now, as far as Keys can. A rekey calls it on a live mount, after
// Reprime, which sees to what such files have yet to write: its sweep goes over
// names. The error is that of one file of those that keep their old headers; they
// are as usable as before, but get no name while it stays so.
func (s *Server) Renew(ctx context.Context) error {
	fs := s.fs
	if _, can := fs.keys.(KeyRenewer); !can || fs.opts.ReadOnly {
		return nil
	}
	ctx, cancel := within(ctx, renewWait)
	defer cancel()
	var jobs errgroup.Group
	jobs.SetLimit(renewJobs)
	var failed atomic.Int64
	for _, f := range fs.files.all() {
		jobs.Go(func() error {
			defer fs.files.release(f)
			if !f.nameless() {
				return nil
			}
			err := f.renew(ctx)
			if err != nil {
				failed.Add(1)
			}
			return err
		})
	}
	if err := jobs.Wait(); err != nil {
		return fmt.Errorf("renewing the headers of open files without a name (%d failed): %w", failed.Load(), err)
	}
	return nil
}

// nameless reports whether the file has lost its last name, or never had one.
func (f *file) nameless() bool {
	var st unix.Stat_t
	return unix.Fstat(f.descriptor(), &st) == nil && st.Nlink == 0
}

// renew replaces the file's header if Keys has a better one. No lock is held while
// Keys is asked, so it starts over if the header is another by then.
func (f *file) renew(ctx context.Context) (err error) {
	for range renewTries {
		if err = f.renewOnce(ctx); !errors.Is(err, volume.ErrHeaderChanged) {
			break
		}
	}
	return err
}

func (f *file) renewOnce(ctx context.Context) error {
	s, err := f.cloneSecrets()
	if s == nil {
		return err
	}
	defer s.Wipe()
	raw, err := f.ownHeader()
	if err != nil {
		return err
	}
	h, err := f.fs.vol.ParseHeader(raw)
	if err != nil {
		return err
	}
	if h.Identity != s.Identity() {
		return volume.ErrHeaderChanged
	}
	next, err := f.fs.renewKey(ctx, h, s)
	if next == nil {
		return err
	}
	better, err := next.Marshal()
	if err != nil {
		return err
	}
	return f.store.replaceHeader(raw, better)
}

// cloneSecrets copies the keys that the contents are under; nil if there are none,
// because nothing was written yet, or nobody has opened the file.
func (f *file) cloneSecrets() (*crypt.Secrets, error) {
	v := f.view.Load()
	if v == nil {
		return nil, nil
	}
	own := v.Secrets()
	if own == nil {
		return nil, nil
	}
	s, err := own.Clone()
	if b := f.bar.Load(); b != nil && err != nil {
		err = b.err
	} else if errors.Is(err, crypt.ErrWiped) {
		err = volume.ErrHeaderChanged // emptied just now
	}
	return s, err
}

// replaceHeader puts a header of the same identity in place of old. If the file was
// emptied meanwhile, the new one is as little used as the old: what is written next
// brings its own, in either order (volume.ErrHeaderChanged if it came first).
func (s *store) replaceHeader(old, header []byte) error {
	// The header's own lock belongs to the descriptor, which we share.
	s.f.modeMu.Lock()
	defer s.f.modeMu.Unlock()
	s.f.fs.tend.changed()
	return volume.ReplaceHeader(s.f.descriptor(), old, header)
}
