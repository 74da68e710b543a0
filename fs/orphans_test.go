package fs

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Nobody sees a descriptor that may be closed again: its number would be another
// file's by the time it is used.
func TestOrphanIsKnownOnlyIfItStays(t *testing.T) {
	w := newWorld(t)
	w.write("a", []byte("contents"))
	require.NoError(t, os.Link(w.path("a"), w.path("b")))
	require.NoError(t, os.MkdirAll(w.path("d/full"), 0o755))
	root := w.srv.fs.root
	dir := w.srv.fs.dirs.root.Dir
	for name, removed := range map[string]bool{
		"b": true,  // a link is left
		"a": false, // a failed unlink
		"d": false, // a failed rmdir
	} {
		c := root.known(name)
		require.NotNil(t, c, name)
		done := root.keepOrphan(dir, name)
		require.Nil(t, c.orphan.Load(), "%s: seen before the outcome is known", name)
		done(removed)
		require.Nil(t, c.orphan.Load(), name)
	}
	require.NoError(t, os.Remove(w.path("b")))
	require.ErrorIs(t, os.Remove(w.path("d")), unix.ENOTEMPTY)
	require.Zero(t, w.srv.fs.orphans.len())
}

// orphaned makes a file, opens it with O_PATH, and removes it.
func (w *world) orphaned(name string) (n *node, close func()) {
	w.t.Helper()
	w.write(name, []byte("contents"))
	fd, err := unix.Open(w.path(name), unix.O_PATH|unix.O_CLOEXEC, 0)
	require.NoError(w.t, err)
	n = w.srv.fs.root.known(name)
	require.NotNil(w.t, n)
	require.NoError(w.t, os.Remove(w.path(name)))
	return n, func() { unix.Close(fd) }
}

// A request that uses a kept descriptor has it until it is done, whatever the
// kernel forgets meanwhile.
func TestOrphanOutlivesForget(t *testing.T) {
	w := newWorld(t)
	n, done := w.orphaned("f")
	defer done()
	orphans := &w.srv.fs.orphans
	var st unix.Statx_t
	err, is := n.throughOrphan(func(fd int) error {
		n.OnForget()
		orphans.drain()
		require.Nil(t, orphans.acquire(n), "given away after the kernel forgot the node")
		other, err := unix.Open(w.backing, unix.O_PATH|unix.O_CLOEXEC, 0) // would get the number
		require.NoError(t, err)
		defer unix.Close(other)
		return w.srv.fs.statFd(fd, &st)
	})
	require.True(t, is)
	require.NoError(t, err)
	require.NoError(t, n.check(&st), "the descriptor is another file's")
	require.Zero(t, orphans.len())

	n, done2 := w.orphaned("g")
	defer done2()
	kept := orphans.acquire(n)
	require.NotNil(t, kept)
	n.OnForget()
	require.Equal(t, 1, kept.uses)
	orphans.release(kept)
	require.Zero(t, kept.uses, "never closed")
}

// The kernel stores the times of each file that it has removed. That is answered
// without a look at the file, unless somebody has it open, who could see them.
func TestTimesOfTheRemovedAreNotStored(t *testing.T) {
	w := newWorld(t)
	in := &fuse.SetAttrIn{}
	in.Valid = fuse.FATTR_MTIME | fuse.FATTR_CTIME
	in.Mtime = 1234
	mtime := func(n *node) (sec int64) {
		var st unix.Statx_t
		_, is := n.throughOrphan(func(fd int) error { return w.srv.fs.statFd(fd, &st) })
		require.True(t, is)
		return st.Mtime.Sec
	}
	n, done := w.orphaned("closed")
	defer done()
	require.Eventually(t, func() bool { return w.srv.fs.files.len() == 0 }, 10*time.Second, 100*time.Microsecond)
	require.Zero(t, n.Setattr(t.Context(), nil, in, new(fuse.AttrOut)))
	require.NotEqual(t, int64(1234), mtime(n))

	w.write("open", []byte("contents"))
	f, err := os.Open(w.path("open"))
	require.NoError(t, err)
	defer f.Close()
	n = w.srv.fs.root.known("open")
	require.NoError(t, os.Remove(w.path("open")))
	require.Zero(t, n.Setattr(t.Context(), nil, in, new(fuse.AttrOut)))
	require.Equal(t, int64(1234), mtime(n))
}

// If a kept descriptor were another file's after all, nothing of that is served.
func TestOrphanIsChecked(t *testing.T) {
	w := newWorld(t, plainNames)
	n, done := w.orphaned("f")
	defer done()
	w.write("secret", []byte("another file's contents"))
	other, err := w.srv.fs.dirs.root.Open("secret", unix.O_RDWR)
	require.NoError(t, err)
	defer unix.Close(other)
	require.NoError(t, unix.Dup3(other, n.orphan.Load().fd, unix.O_CLOEXEC)) // the number is reused
	// The kernel lets go of handles behind close(2); until then the open file serves.
	require.Eventually(t, func() bool { return w.srv.fs.files.len() == 0 }, 10*time.Second, 100*time.Microsecond)

	var st unix.Statx_t
	require.ErrorIs(t, n.stat(&st), errMoved)
	_, err = n.reach()
	require.ErrorIs(t, err, errMoved)
	_, _, err = newFile(w.srv.fs, n.id).openBacking(n, unix.O_RDONLY)
	require.ErrorIs(t, err, errMoved)
}

// One of two links comes and goes while the other is read.
func TestLinksComeAndGo(t *testing.T) {
	w := newWorld(t)
	w.write("a", []byte("AAAA"))
	w.write("x", []byte("another file"))
	var stop atomic.Bool
	var wg sync.WaitGroup
	again := func(op func()) {
		wg.Go(func() {
			for !stop.Load() && !t.Failed() {
				op()
			}
		})
	}
	again(func() {
		// The kernel counts links itself, and if a GETATTR is answered during an
		// unlink it counts the same one twice: then link(2) is ENOENT there, and
		// does not reach us.
		if err := os.Link(w.path("a"), w.path("b")); errors.Is(err, unix.ENOENT) {
			return
		} else if err != nil {
			t.Error(err)
		} else if err := os.Remove(w.path("b")); err != nil {
			t.Error(err)
		}
	})
	again(func() { _, _ = os.ReadFile(w.path("x")) }) // takes the numbers that become free
	for range 2 {
		again(func() {
			if data, err := os.ReadFile(w.path("a")); err != nil || string(data) != "AAAA" {
				t.Errorf("%q, %v", data, err)
			}
		})
	}
	again(func() {
		if info, err := os.Lstat(w.path("a")); err != nil || info.Size() != 4 {
			t.Errorf("%v, %v", info, err)
		}
	})
	time.Sleep(3 * time.Second)
	stop.Store(true)
	wg.Wait()
}
