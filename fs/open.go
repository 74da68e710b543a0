package fs

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Keys is where data keys come from: the ring of package keys. Open and Fresh may
// wait for the network; ctx ends with the request (a signal) or its deadline.
type Keys interface {
	// Open opens a header's data key. The caller owns the result.
	Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error)
	// Fresh makes a data key for contents that are yet to be written.
	Fresh(ctx context.Context) (*crypt.Fresh, error)
	// Return takes back a fresh key that was not used. It does not wait.
	Return(*crypt.Fresh)
}

// KeyChecker is what Keys may have besides. Check says whether a header is under
// the key that new files get now, from what is known here: it asks nobody. A rekey
// walks over names, so it does not meet a file that has none; if that got one later,
// it could be left under the retired key. So Link asks.
type KeyChecker interface {
	Check(h *crypt.Header) error
}

// KeyRenewer is what Keys may have besides, to put such a file under that key after
// all. Renew makes the header that a file whose data key is s ought to have; nil if
// h, the one it has, will do. It may wait for the network.
type KeyRenewer interface {
	Renew(ctx context.Context, h *crypt.Header, s *crypt.Secrets) (*crypt.Header, error)
}

// KeyPlacer is what Keys may have besides, to say where keys are. Local reports whether
// all keys that may open a header's data key (of a nil header: that make new ones) are on
// this machine, so that no network is waited for.
type KeyPlacer interface {
	Local(h *crypt.Header) bool
}

func (fs *fileSystem) local(h *crypt.Header) bool {
	keys, can := fs.keys.(KeyPlacer)
	return can && keys.Local(h)
}

// openKey, freshKey and renewKey count what is asked of Keys. No lock is held.
func (fs *fileSystem) openKey(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	ctx, cancel := heeding(ctx, !fs.local(h))
	defer cancel()
	defer fs.stats.waited(&fs.stats.keyOpens, time.Now())
	s, err := fs.keys.Open(ctx, h)
	return s, interrupted(ctx, err)
}

func (fs *fileSystem) freshKey(ctx context.Context) (k freshKey, err error) {
	ctx, cancel := heeding(ctx, !fs.local(nil))
	defer cancel()
	defer fs.stats.waited(&fs.stats.keyFresh, time.Now())
	k.age = fs.keyAge.Load()
	k.Fresh, err = fs.keys.Fresh(ctx)
	return k, interrupted(ctx, err)
}

// renewKey answers nil if there is nothing to renew, or nobody who could.
func (fs *fileSystem) renewKey(ctx context.Context, h *crypt.Header, s *crypt.Secrets) (*crypt.Header, error) {
	keys, can := fs.keys.(KeyRenewer)
	if !can {
		return nil, nil
	}
	ctx, cancel := heeding(ctx, !fs.local(h) || !fs.local(nil))
	defer cancel()
	defer fs.stats.waited(&fs.stats.keyRenews, time.Now())
	next, err := keys.Renew(ctx, h, s)
	return next, interrupted(ctx, err)
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
	done   chan struct{} // closed at the end
	err    error         // set before done is closed
	late   bool          // it failed when the time of its own request was over; as err
	remote chan struct{} // closed once the network may be waited for
	far    sync.Once     // closes remote
}

func (l *loading) goesFar() { l.far.Do(func() { close(l.remote) }) }

// await returns at the end of l: the error is that of a caller who leaves before, as he
// may only when the network is waited for.
func (l *loading) await(ctx context.Context) error {
	select {
	case <-l.done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-l.done:
		return nil
	case <-l.remote:
		return interrupted(ctx, context.Cause(ctx))
	}
}

// load makes the file's view, asking for its key if it has contents. One request
// at a time does so; the others wait for it and share its outcome, unless it was
// merely interrupted, or its time was over and theirs is not.
func (f *file) load(ctx context.Context) error {
	for {
		l, leads := f.join()
		if l == nil {
			return nil
		}
		if leads {
			return f.lead(ctx, l)
		}
		if err := l.await(ctx); err != nil {
			return err
		}
		if l.err != nil && !l.late && !passing(l.err) {
			return l.err
		}
	}
}

// join finds the open that is asking for the key, or makes the caller the one that
// does; there is none if the view exists already.
func (f *file) join() (l *loading, leads bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.view.Load() != nil && f.bar.Load() == nil {
		return nil, false
	}
	if f.loading != nil {
		return f.loading, false
	}
	f.loading = &loading{done: make(chan struct{}), remote: make(chan struct{})}
	return f.loading, true
}

// passing errors say nothing about the file, only about who asked.
func passing(err error) bool {
	return errors.Is(err, crypt.ErrInterrupted) || errors.Is(err, context.Canceled)
}

// errPanicked is what those hear who waited for an open that panicked: a panic ends
// one request, and must leave no other waiting.
var errPanicked = errors.New("asking for the file's key failed by a bug in kmsfs")

func (f *file) lead(ctx context.Context, l *loading) error {
	l.err = errPanicked
	defer f.loaded(l)
	l.err = f.unlock(ctx, l)
	l.late = l.err != nil && ctx.Err() != nil
	return l.err
}

func (f *file) loaded(l *loading) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.loading = nil
	close(l.done)
}

// unlock reads the header, asks for its key with no lock held, and installs the
// view. A header is read again once if its key can't be opened: a rekey may have
// replaced it just then.
func (f *file) unlock(ctx context.Context, l *loading) error {
	var failed []byte // the header that failed
	for {
		raw, h, err := f.header()
		if err != nil {
			return err
		}
		var s *crypt.Secrets
		if h != nil {
			if !f.fs.local(h) {
				l.goesFar()
			}
			if s, err = f.fs.openKey(ctx, h); err != nil {
				if !errors.Is(err, crypt.ErrDamaged) || failed != nil {
					return err
				}
				failed = raw
				if again, rerr := f.ownHeader(); rerr != nil || bytes.Equal(again, failed) {
					return err
				}
				continue
			}
		}
		return f.installView(s)
	}
}

// ownHeader reads the header, though the file may be one that we may write and not
// read. No chmod meanwhile.
func (f *file) ownHeader() ([]byte, error) {
	f.modeMu.Lock()
	defer f.modeMu.Unlock()
	return volume.OwnHeader(f.descriptor())
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
	if raw, err = f.ownHeader(); err != nil {
		return nil, nil, err
	}
	h, err = f.fs.vol.ParseHeader(raw)
	return raw, h, err
}

// installView makes the view with the secrets obtained; it takes them over. They are
// those of the file's contents, unless it was emptied meanwhile: whoever did that left a
// view, or no contents. (What was changed in the backing directory will not
// authenticate.)
func (f *file) installView(s *crypt.Secrets) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fs.ended(s.Under()); err != nil {
		s.Wipe()
		return err // its lease ended while it was on its way
	}
	if v := f.view.Load(); v != nil {
		return f.resume(v, s)
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.descriptor(), &st); err != nil {
		s.Wipe()
		return err
	}
	if st.Size == 0 {
		return f.setView(0, s)
	}
	return f.setContents(st.Size, s)
}

// resume gives a view its keys back that it lost when their lease ended; it takes
// over s. mu is held.
func (f *file) resume(v *crypt.File, s *crypt.Secrets) error {
	if err := v.Resume(s); err != nil {
		return err
	}
	f.reconsider(v)
	return nil
}

// setContents makes the view of a file that stores something. If what it stores is
// less than one byte of plaintext, and not authentic, there is no good block to
// read and none to fail on: it would look empty. So the open fails; to cut the
// file to nothing needs no view. mu is held.
func (f *file) setContents(stored int64, s *crypt.Secrets) error {
	// Opening is not reading: checking the end must not move the access time.
	_, _ = unix.FcntlInt(uintptr(f.descriptor()), unix.F_SETFL, unix.O_NONBLOCK|unix.O_NOATIME)
	defer unix.FcntlInt(uintptr(f.descriptor()), unix.F_SETFL, unix.O_NONBLOCK)
	return f.setView(stored, s)
}

// setView makes the view. mu is held.
func (f *file) setView(stored int64, s *crypt.Secrets) error {
	v, err := crypt.NewFile(f.store.backing(), f.fs.vol.BlockSize(), stored, s)
	if err != nil {
		return err
	}
	if err := v.EndErr(); err != nil && v.Size() == 0 {
		v.Close()
		return err
	}
	f.view.Store(v)
	f.reconsider(v)
	return nil
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
func (f *file) change(ctx context.Context, c change) error {
	var k freshKey
	for {
		unused, missing, err := f.tryChange(c, k)
		if unused != nil {
			f.fs.keys.Return(unused)
		}
		if !missing {
			return err
		}
		if k, err = f.fs.freshKey(ctx); err != nil {
			return err
		}
	}
}

// tryChange makes the change unless a key is missing, which must be asked for with
// no lock held; one that was fetched before the last rekey is none. It returns the
// key if it was not taken.
func (f *file) tryChange(c change, k freshKey) (unused *crypt.Fresh, missing bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.needsKey(c) && (k.Fresh == nil || f.fs.outdated(k)) {
		return k.Fresh, true, nil
	}
	unused, err = f.changeLocked(c, k.Fresh)
	if v := f.view.Load(); v != nil {
		f.reconsider(v)
		f.keepTorn(v)
	}
	return unused, false, f.because(err)
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
	todo := c.cut
	if c.cut && c.size == 0 && v == nil {
		// Nobody has it open: its contents go without their key, damaged or not.
		if err := f.store.Truncate(0); err != nil {
			return fresh, err
		}
		if err := f.setView(0, nil); err != nil {
			return fresh, err
		}
		v, todo = f.view.Load(), false // nothing may fail any more
	}
	// The key goes first: a write may follow the cut at once.
	if fresh != nil && f.needsKey(c) && v.Prime(fresh) {
		fresh = nil
	}
	if todo {
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

// open readies the file for a new handle with these flags of open(2).
func (f *file) open(ctx context.Context, n *node, flags uint32) error {
	write, trunc := writes(flags), flags&unix.O_TRUNC != 0
	if err := f.ready(n, wanted(flags)); err != nil {
		return err
	}
	if !trunc {
		if err := f.load(ctx); err != nil {
			return err
		}
		if f.view.Load().Size() > 0 {
			if err := f.barErr(); err != nil {
				return err
			}
		}
	}
	if !write && !trunc {
		return nil
	}
	return f.change(ctx, change{writer: write, cut: trunc})
}
