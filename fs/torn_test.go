package fs

import (
	"bytes"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A fullStore copies on write, and becomes full in the middle of a write.
type fullStore struct {
	keepingStore
	full atomic.Bool
}

func (s *fullStore) WriteAt(p []byte, off int64) (int, error) {
	if s.full.Swap(true) {
		return 0, syscall.EDQUOT
	}
	n, err := s.keepingStore.WriteAt(p[:len(p)/2], off)
	if err == nil {
		err = syscall.EDQUOT
	}
	return n, err
}

func (s *fullStore) Truncate(n int64) error {
	if s.full.Load() {
		return syscall.EDQUOT
	}
	return s.keepingStore.Truncate(n)
}

// becomesFull makes the store of a file, which is open, a full one.
func (w *world) becomesFull(name string) *crypt.File {
	w.t.Helper()
	var st unix.Statx_t
	require.NoError(w.t, unix.Statx(unix.AT_FDCWD, w.stored(name), 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st))
	f := w.srv.fs.files.find(idOf(&st))
	require.NotNil(w.t, f)
	defer w.srv.fs.files.release(f)
	before := f.view.Load()
	s, err := before.Secrets().Clone()
	require.NoError(w.t, err)
	v, err := crypt.NewFile(&fullStore{keepingStore: keepingStore{&f.store}}, w.vol.BlockSize(), int64(st.Size), s)
	require.NoError(w.t, err)
	f.view.Store(v)
	before.Close()
	return v
}

// An end that the store does not take back before the mount ends is lost from memory:
// the volume is not clean then, and what was kept of the file outlives the last sync.
func TestTornEndOutlivesTheMount(t *testing.T) {
	var synced atomic.Int64
	w := newWorld(t, func(s *setup) { s.opts.Synced = func(time.Time) { synced.Add(1) } })
	want := bytes.Repeat([]byte{7}, 100)
	w.write("f", want)
	var err error
	w.opts.Tails, err = w.vol.OpenTails(false)
	require.NoError(t, err)
	w.remount()
	stored := w.stored("f")
	file, err := os.Open(w.path("f"))
	require.NoError(t, err)
	v := w.becomesFull("f")
	require.Equal(t, syscall.EDQUOT, syscall.Truncate(w.path("f"), 50))
	require.True(t, v.Torn())
	marked := synced.Load()
	require.NoError(t, file.Close())
	require.Equal(t, want, w.read("f"), "nobody keeps the end")

	require.NoError(t, w.srv.Unmount())
	require.ErrorIs(t, w.srv.SyncErr(), syscall.EDQUOT)
	require.Equal(t, marked, synced.Load(), "files that were changed before are not looked at")
	require.NoError(t, w.srv.fs.opts.Slots.Close())
	require.NoError(t, w.opts.Tails.Close())
	w.opts.Tails, w.srv = nil, nil
	var st unix.Stat_t
	require.NoError(t, unix.Stat(stored, &st))
	require.Equal(t, []uint64{st.Ino}, w.vol.RecoverTails(t.Context(), w.keys.Open).Put)
	require.NoError(t, w.vol.Close())
	w.mount()
	require.Equal(t, want, w.read("f"))
}

// Files that are changed when the clock was set back are looked at after an unclean end.
func TestClockSetBack(t *testing.T) {
	since := time.Now()
	_, back := setBack(since, since.Add(time.Second), time.Second)
	require.False(t, back)
	stepped := since.Round(0).Add(-time.Hour) // the wall clock alone goes back
	at, back := setBack(since, stepped, 3*time.Second)
	require.True(t, back)
	require.Equal(t, stepped.Add(-3*time.Second), at)
	_, back = setBack(at, stepped.Add(time.Second), time.Second)
	require.False(t, back, "once is enough")
}

// disk is a backing store whose next sync fails if it is to.
type disk struct {
	syncer
	fail  atomic.Bool
	syncs atomic.Int64
}

func (d *disk) Sync() error {
	defer d.syncs.Add(1)
	if d.fail.Swap(false) {
		return syscall.EIO
	}
	return d.syncer.Sync()
}

// TestFailedSyncKeepsTheMarker: what a sync could not write Linux takes for written, so
// syncs that end well later say nothing of it. What was changed since the last one that
// ended well before is looked at after the mount, however that ends.
func TestFailedSyncKeepsTheMarker(t *testing.T) {
	var marked atomic.Int64
	var d *disk
	w := newWorld(t, func(s *setup) {
		s.opts.Synced = func(since time.Time) { marked.Add(1) }
	})
	w.opts.openSync = func() (syncer, error) {
		s, err := w.vol.OpenSync()
		d = &disk{syncer: s}
		return d, err
	}
	w.remount()
	synced := func() {
		before := d.syncs.Load()
		w.write("f", randomBytes(100))
		eventually(t, func() bool { return d.syncs.Load() > before })
		eventually(t, func() bool { return w.srv.Stats().Syncs >= d.syncs.Load() })
	}
	synced()
	require.Positive(t, marked.Load())
	d.fail.Store(true)
	at := marked.Load()
	for range 2 {
		synced()
		require.Equal(t, at, marked.Load())
	}
	require.NoError(t, w.srv.Unmount())
	require.ErrorIs(t, w.srv.SyncErr(), syscall.EIO)
	require.Equal(t, at, marked.Load())
	require.NoError(t, w.srv.fs.opts.Slots.Close())
	w.srv = nil
	require.NoError(t, w.vol.Close())
	w.opts.openSync = nil
	w.mount()
}
