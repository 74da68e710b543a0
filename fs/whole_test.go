package fs

import (
	"bytes"
	"cmp"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A small file comes with its open: no READ follows, and what is read is right up to
// the last byte, whatever the size of the last page.
func TestSmallFilesComeWhole(t *testing.T) {
	log := new(requestLog)
	w := newWorld(t, func(s *setup) {
		s.opts.Debug = true
		s.opts.Logger = slog.New(log)
	})
	want := map[string][]byte{}
	for _, size := range []int{0, 1, 2048, 4095, 4096, 4097, 10000, maxWhole - 1, maxWhole, maxWhole + 1} {
		name := fmt.Sprint(size)
		want[name] = randomBytes(size)
		w.write(name, want[name])
	}
	w.remount()
	log.count()
	for range 2 {
		for name, data := range want {
			if len(data) <= maxWhole {
				require.True(t, bytes.Equal(data, w.read(name)), "%s bytes", name)
			}
		}
		require.Zero(t, log.count()["READ"])
	}
	require.True(t, bytes.Equal(want[fmt.Sprint(maxWhole+1)], w.read(fmt.Sprint(maxWhole+1))))
	require.NotZero(t, log.count()["READ"], "a larger one is asked for")
}

// O_NOATIME and O_DIRECT mean what they say: such opens read nothing ahead.
func TestWholeOnlyWhenCached(t *testing.T) {
	w := newWorld(t)
	w.write("f", randomBytes(3000))
	w.remount()
	old := unix.Timespec{Sec: 1}
	require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, w.stored("f"), []unix.Timespec{old, {Nsec: unix.UTIME_OMIT}}, 0))
	for _, flag := range []int{syscall.O_NOATIME, syscall.O_DIRECT, syscall.O_WRONLY} {
		f, err := os.OpenFile(w.path("f"), flag, 0)
		require.NoError(t, err)
		require.NoError(t, f.Close())
	}
	var st unix.Stat_t
	require.NoError(t, unix.Stat(w.stored("f"), &st))
	require.Equal(t, old, st.Atim)
}

// What can't be authenticated isn't handed over: the read says so, not the open.
func TestDamagedIsNotHandedOver(t *testing.T) {
	w := newWorld(t)
	data := randomBytes(10000)
	w.write("f", data)
	w.unmountKeepingFiles()
	stored := w.storedPaths["f"]
	raw, err := os.ReadFile(stored)
	require.NoError(t, err)
	raw[5000] ^= 1 // in the second block
	require.NoError(t, os.WriteFile(stored, raw, 0o644))
	w.mount()
	f, err := os.Open(w.path("f"))
	require.NoError(t, err)
	defer f.Close()
	got := make([]byte, 4096)
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, data[:4096], got)
	_, err = f.ReadAt(got, 4096)
	require.ErrorIs(t, err, syscall.EBADMSG)
}

// Readers get small files whole while others write, cut and extend them: nothing that
// was written is lost to older pages, and no size comes back.
func TestWholeAgainstWriters(t *testing.T) {
	w := newWorld(t)
	const files = 600
	old, next := bytes.Repeat([]byte("o"), 9000), bytes.Repeat([]byte("n"), 9000)
	name := func(i int) string { return fmt.Sprintf("f%d", i) }
	for i := range files {
		w.write(name(i), old)
	}
	changes := []struct {
		do   func(path string) error
		want []byte
	}{
		{func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt(next[:5000], 2000)
				err = cmp.Or(err, f.Close())
			}
			return err
		}, append(append(bytes.Clone(old[:2000]), next[:5000]...), old[7000:]...)},
		{func(path string) error { return os.Truncate(path, 100) }, old[:100]},
		{func(path string) error { return os.WriteFile(path, next[:50], 0o644) }, next[:50]},
		{func(path string) error { return os.Truncate(path, 9100) }, append(bytes.Clone(old), make([]byte, 100)...)},
	}
	w.remount()
	for i := range files {
		path := w.path(name(i))
		var all sync.WaitGroup
		var failed error
		for range 2 {
			all.Go(func() { _, _ = os.ReadFile(path) })
		}
		all.Go(func() { failed = changes[i%len(changes)].do(path) })
		all.Wait()
		require.NoError(t, failed)
		require.Equal(t, string(changes[i%len(changes)].want), string(w.read(name(i))), "change %d", i%len(changes))
	}
	w.remount()
	for i := range files {
		require.Equal(t, string(changes[i%len(changes)].want), string(w.read(name(i))), "after remount, change %d", i%len(changes))
	}
}

// Whoever opens to write, and whoever cuts the file, waits until it is handed over, and
// nothing is handed over from then on.
func TestWholeKeepsWritersOut(t *testing.T) {
	w := newWorld(t)
	w.write("f", randomBytes(3000))
	w.remount()
	n, f, closed := w.opened("f", os.O_WRONLY)
	done, err := n.handWhole(f)
	require.NoError(t, err)
	require.False(t, done, "there is a writer")
	closed()

	w.remount()
	n, f, _ = w.opened("f", os.O_RDONLY|syscall.O_NOATIME)
	done, err = n.handWhole(f)
	require.NoError(t, err)
	require.True(t, done)
	f.mu.Lock()
	handed := make(chan bool, 1)
	go func() { done, _ := n.handWhole(f); handed <- done }()
	select {
	case <-handed:
		t.Error("it was handed over while the file was being changed")
		close(handed)
	case <-time.After(50 * time.Millisecond):
	}
	f.mu.Unlock()
	<-handed
}

// TestLeaseEndsWhileAFileIsHandedOver: the lease of a small file ends when its open has
// passed all checks, before or after the kernel was given the contents. The open is
// refused, and the kernel keeps none of the pages, which no READ would ask about.
func TestLeaseEndsWhileAFileIsHandedOver(t *testing.T) {
	const size = 9000
	for _, when := range []string{"before the pages", "after the pages"} {
		t.Run(when, func(t *testing.T) {
			w, k := newLeased(t)
			w.write("f", randomBytes(size))
			var handed atomic.Int32
			var srv atomic.Pointer[Server]
			w.opts.storePages = func(n *node, data []byte) (errno syscall.Errno) {
				end := func() {
					before := srv.Load().Stats().Invalidations
					k.end(testKey, true)
					for i := 0; i < 1000 && srv.Load().Stats().Invalidations == before; i++ {
						time.Sleep(time.Millisecond)
					}
					time.Sleep(20 * time.Millisecond) // it is on its way to the kernel
				}
				handed.Add(1)
				if when == "before the pages" {
					end()
				}
				errno = n.WriteCache(0, data)
				if when == "after the pages" {
					end()
				}
				return errno
			}
			w.remount()
			srv.Store(w.srv)
			_, err := os.Open(w.path("f"))
			require.ErrorIs(t, err, unix.EKEYREVOKED)
			require.EqualValues(t, 1, handed.Load())
			w.drained()
			_, err = os.Open(w.path("f"))
			require.ErrorIs(t, err, unix.EKEYREVOKED)
			require.EqualValues(t, 1, handed.Load())

			// An open that hands over nothing, and has the kernel keep what it has.
			eventually(t, func() bool { return w.srv.Stats().OpenFiles == 0 })
			k.end(testKey, false)
			n := w.srv.fs.root.known("f")
			var st unix.Statx_t
			require.NoError(t, unix.Statx(unix.AT_FDCWD, w.stored("f"), unix.AT_STATX_SYNC_AS_STAT, statMask, &st))
			st.Size = size // as statFd has it
			seen := stampOf(&st)
			n.seen.Store(&seen)
			f := w.openFile("f", os.O_RDONLY)
			require.Zero(t, resident(t, f, size))
		})
	}
}

// opened opens a file at the root, and finds what the mount has of it.
func (w *world) opened(name string, flags int) (_ *node, _ *file, closed func()) {
	fd, err := unix.Open(w.path(name), flags, 0o644)
	require.NoError(w.t, err)
	n := w.srv.fs.root.known(name)
	f := w.srv.fs.files.find(n.id)
	w.srv.fs.files.release(f)
	closed = sync.OnceFunc(func() { unix.Close(fd) })
	w.t.Cleanup(closed)
	return n, f, closed
}
