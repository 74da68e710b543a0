package fs

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"kmsfs/crypt"
)

// KeyLeases is what Keys may have besides: data keys that may be used only for as
// long as the key service allows it. A list of names, as crypt.Secrets.Under has it, is
// what a data key depends on.
type KeyLeases interface {
	// Governing lists what the data key of a header depends on.
	Governing(h *crypt.Header) []string
	// Ended says why data keys that depend on under may not be used any more; nil if
	// they may. It asks nobody.
	Ended(under []string) error
	// Follow has inUse asked what open files depend on, and changed called when Ended
	// may answer differently.
	Follow(inUse func() [][]string, changed func()) (stop func())
}

const (
	// drainWait is how long keys whose lease has ended still seal what the kernel had
	// held back by then.
	drainWait = 10 * time.Second
	drainJobs = 8
	// healAgain is how soon files are given their keys back if that failed.
	healAgain = 5 * time.Second
	healJobs  = 8
)

// A bar is why a file may not be used: the lease that its keys depend on has ended.
// Reads and opens fail from the start; writes only once the keys are gone, for what
// the kernel still holds back was written while it was allowed.
type bar struct {
	err   error
	wiped bool
}

// tenure is what a mount does about leases.
type tenure struct {
	leases  KeyLeases // nil: data keys may be used for ever
	stop    chan struct{}
	kick    chan struct{} // some file may be healed
	running sync.WaitGroup

	mu     sync.Mutex
	drains int           // guarded by mu; under way
	idle   chan struct{} // guarded by mu; closed when there is none
	over   bool          // guarded by mu; the mount ends
	// closed are the dependencies of files that were closed; there are few different
	// ones. Guarded by mu.
	closed map[string][]string
}

func (fs *fileSystem) followLeases() {
	t := &fs.tenure
	t.stop, t.kick, t.idle = make(chan struct{}), make(chan struct{}, 1), make(chan struct{})
	close(t.idle)
	t.closed = map[string][]string{}
	leases, has := fs.keys.(KeyLeases)
	if !has {
		return
	}
	t.leases = leases
	unfollow := leases.Follow(fs.keysInUse, fs.leasesChanged)
	t.running.Go(func() {
		defer unfollow()
		fs.healFiles()
	})
}

// end returns when nothing of it runs any more.
func (t *tenure) end() {
	t.mu.Lock()
	t.over = true
	t.mu.Unlock()
	close(t.stop)
	t.running.Wait()
}

// ended says why keys may not be used that depend on under, or nil.
func (fs *fileSystem) ended(under []string) error {
	if fs.tenure.leases == nil {
		return nil
	}
	return fs.tenure.leases.Ended(under)
}

// keysInUse is what the keys of open files depend on, barred ones too: they are to
// have them back.
func (fs *fileSystem) keysInUse() (lists [][]string) {
	for _, f := range fs.files.all() {
		if v := f.view.Load(); v != nil {
			lists = append(lists, v.Under(), v.FreshUnder())
		}
		fs.files.release(f)
	}
	return lists
}

// leasesChanged stops the use of files whose lease has ended before it returns, and
// sees to the rest afterwards. It waits for no lock that is held over I/O.
func (fs *fileSystem) leasesChanged() {
	var found []barred
	for _, f := range fs.files.all() {
		if b := f.barIfEnded(); b != nil {
			found = append(found, barred{f, b})
		} else {
			fs.files.release(f)
		}
	}
	if len(found) > 0 || fs.tenure.closedEnded() {
		fs.startDrain(found)
	}
	fs.tenure.healSoon()
}

// barIfEnded bars the file if the lease of its keys has ended. It returns the bar if
// it is new: the caller has the file drained. Whoever gives a file keys calls it
// afterwards: so either he sees that the lease has ended, or leasesChanged sees the
// keys.
func (f *file) barIfEnded() *bar {
	v := f.view.Load()
	if v == nil {
		return nil
	}
	b := &bar{err: f.keysEnded(v)}
	if b.err == nil || !f.bar.CompareAndSwap(nil, b) {
		return nil
	}
	return b
}

// keysEnded says why the keys of the file may not be used, or nil.
func (f *file) keysEnded(v *crypt.File) error {
	return cmp.Or(f.fs.ended(v.Under()), f.fs.ended(v.FreshUnder()))
}

// reconsider bars the file or lifts its bar after it was given keys, or lost the need
// of them. mu is held.
func (f *file) reconsider(v *crypt.File) {
	if f.fs.tenure.leases == nil {
		return
	}
	missing := v.Suspended() || v.NeedsKey() && f.writers > 0
	if b := f.bar.Load(); b != nil && !missing && f.keysEnded(v) == nil {
		f.bar.Store(nil)
		f.fs.stats.healed.Add(1)
		f.fs.tenure.healSoon() // for refresh
	}
	if b := f.barIfEnded(); b != nil {
		f.fs.files.hold(f)
		f.fs.startDrain([]barred{{f, b}})
	}
}

// barErr says why the file can't be read, or nil.
func (f *file) barErr() error {
	if b := f.bar.Load(); b != nil {
		return b.err
	}
	return nil
}

// sealErr says why nothing can be written to the file, or nil.
func (f *file) sealErr() error {
	if b := f.bar.Load(); b != nil && b.wiped {
		return b.err
	}
	return nil
}

// because gives the reason for an error that comes from the keys being gone.
func (f *file) because(err error) error {
	if b := f.bar.Load(); b != nil && (errors.Is(err, crypt.ErrWiped) || errors.Is(err, crypt.ErrKeyUnavailable)) {
		return b.err
	}
	return err
}

// barred is a file and the bar that its drain is for.
type barred struct {
	file *file
	bar  *bar
}

// startDrain drains the files, each of which is held.
func (fs *fileSystem) startDrain(list []barred) {
	t := &fs.tenure
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over { // all keys are about to be wiped anyway
		go fs.releaseAll(list)
		return
	}
	if t.drains == 0 {
		t.idle = make(chan struct{})
	}
	t.drains++
	t.running.Go(func() {
		defer t.drained()
		defer fs.releaseAll(list)
		fs.drain(list)
	})
}

func (fs *fileSystem) releaseAll(list []barred) {
	for _, x := range list {
		fs.files.release(x.file)
	}
}

func (t *tenure) drained() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.drains--; t.drains == 0 {
		close(t.idle)
	}
}

// Drained returns when the keys of all files whose lease has ended are wiped.
func (s *Server) Drained(ctx context.Context) error {
	t := &s.fs.tenure
	t.mu.Lock()
	idle := t.idle
	t.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// drain takes from the kernel what it has of the files, which makes it write out what
// it had held back, and then wipes their keys. It holds no lock while the kernel
// works: the WRITEs are served meanwhile.
func (fs *fileSystem) drain(list []barred) {
	if len(list) > 0 {
		fs.log.log.Info("files in use lose their keys", "files", len(list))
	}
	fs.invalidate(list)
	for _, x := range list {
		if unused := x.file.wipe(x.bar); unused != nil {
			fs.keys.Return(unused)
		}
	}
	if fs.tenure.closedEnded() {
		fs.dropClosed(fs.root)
	}
}

// invalidate waits until the kernel has dropped the pages of the files, for drainWait
// at most.
func (fs *fileSystem) invalidate(list []barred) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var jobs errgroup.Group
		jobs.SetLimit(drainJobs)
		for _, x := range list {
			if n := x.file.node.Load(); n != nil {
				jobs.Go(func() error { n.dropPages(); return nil })
			}
		}
		_ = jobs.Wait()
	}()
	timer := time.NewTimer(drainWait)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-fs.tenure.stop:
	}
}

// wipe takes the file's keys away, unless the bar was lifted. Gaps are settled while
// that is possible: later they would be damage.
func (f *file) wipe(b *bar) (unused *crypt.Fresh) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.view.Load()
	if f.bar.Load() != b {
		return nil
	}
	if v.Pending() {
		if err := f.settleLocked(v); err != nil {
			f.fs.log.trouble("writing the gaps of a file whose lease has ended", f.id.ino, err)
		}
	}
	f.bar.Store(&bar{b.err, true})
	f.stale.Store(true)
	f.fs.stats.wiped.Add(1)
	return v.Suspend()
}

// dropClosed drops the pages that the kernel kept of files that nobody has open. They
// can't be reached without an open, which asks, but they are plaintext.
func (fs *fileSystem) dropClosed(n *node) {
	if under := n.under.Load(); under != nil && fs.ended(*under) != nil {
		n.under.Store(nil)
		n.seen.Store(nil)
		n.dropPages()
	}
	for _, c := range n.Children() {
		if c, is := c.Operations().(*node); is {
			fs.dropClosed(c)
		}
	}
}

// closing notes what the keys of a file depended on that the kernel may keep pages of.
func (n *node) closing(v *crypt.File) {
	t := &n.fs.tenure
	if v == nil || t.leases == nil || v.Under() == nil {
		return
	}
	under := v.Under()
	n.under.Store(&under)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed[strings.Join(under, " ")] = under
}

// closedEnded reports whether there may be pages of closed files whose lease has
// ended.
func (t *tenure) closedEnded() bool {
	t.mu.Lock()
	lists := slices.Collect(maps.Values(t.closed))
	t.mu.Unlock()
	return slices.ContainsFunc(lists, func(under []string) bool { return t.leases.Ended(under) != nil })
}

// healSoon has barred files looked at.
func (t *tenure) healSoon() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// healFiles gives barred files their keys back when the lease is there again. It does so
// by itself, for reads and writes never wait for a key service.
func (fs *fileSystem) healFiles() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { <-fs.tenure.stop; cancel() }()
	again := time.NewTicker(healAgain)
	defer again.Stop()
	for {
		select {
		case <-fs.tenure.stop:
			return
		case <-fs.tenure.kick:
		case <-again.C:
		}
		fs.heal(ctx)
	}
}

func (fs *fileSystem) heal(ctx context.Context) {
	var jobs errgroup.Group
	jobs.SetLimit(healJobs)
	for _, f := range fs.files.all() {
		if f.bar.Load() == nil && !f.stale.Load() {
			fs.files.release(f)
			continue
		}
		jobs.Go(func() error {
			defer fs.files.release(f)
			if f.bar.Load() == nil {
				f.refresh()
				return nil
			}
			if !f.mayHeal() {
				return nil
			}
			if err := f.heal(ctx); err != nil && !passing(err) && !errors.Is(err, crypt.ErrKeyDisabled) {
				fs.log.trouble("getting back the key of an open file", f.id.ino, err)
			}
			return nil
		})
	}
	_ = jobs.Wait()
}

// mayHeal reports whether it is worth asking for the file's keys: the lease is there,
// or a rekey has put the file under another.
func (f *file) mayHeal() bool {
	v := f.view.Load()
	if f.fs.ended(v.Under()) == nil {
		return true
	}
	under := f.governing()
	return under != nil && f.fs.ended(under) == nil
}

// governing is what the header on disk says that the file's key depends on; nil if it
// is not to be had.
func (f *file) governing() []string {
	raw, err := f.ownHeader()
	if err != nil {
		return nil
	}
	h, err := f.fs.vol.ParseHeader(raw)
	if err != nil {
		return nil
	}
	return f.fs.tenure.leases.Governing(h)
}

func (f *file) heal(ctx context.Context) error {
	ctx, cancel := within(ctx, f.fs.opts.Deadline)
	defer cancel()
	if err := f.load(ctx); err != nil {
		return err
	}
	if err := f.change(ctx, change{}); err != nil {
		return err
	}
	f.refresh()
	return nil
}

// refresh drops what the kernel kept of writes that failed while the keys were gone:
// it shows pages that it could not write as if it had.
func (f *file) refresh() {
	if n := f.node.Load(); n != nil && f.bar.Load() == nil && f.stale.Swap(false) {
		n.dropPages()
	}
}

// dropPages has the kernel write out and drop what it keeps of the file's contents. It
// may wait for requests, so no lock is held.
func (n *node) dropPages() {
	n.fs.stats.invalidations.Add(1)
	n.NotifyContent(0, 0)
}

// Regovern notes on which leases open files depend now. A rekey calls it on a live
// mount, after the list of keys or headers changed.
func (s *Server) Regovern() {
	fs := s.fs
	if fs.tenure.leases == nil {
		return
	}
	for _, f := range fs.files.all() {
		v := f.view.Load()
		if v != nil && v.Secrets() != nil {
			if under := f.governing(); under != nil {
				v.Secrets().SetUnder(under)
			}
		}
		fs.files.release(f)
	}
	fs.leasesChanged()
}
