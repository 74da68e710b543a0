package fs

import (
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// A panic ends one request. It leaves no lock behind, and nobody waiting.
func TestPanicsLeaveNothingLocked(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	w.remount()

	// A file without a descriptor panics when it is cut.
	f := newFile(w.srv.fs, fileID{ino: 1})
	require.Panics(t, func() { _ = f.change(t.Context(), change{cut: true}) })
	require.True(t, f.mu.TryLock(), "the file is locked for ever")

	asked, waited := make(chan struct{}), make(chan struct{})
	w.keys.hooks(func() {
		w.keys.onOpen = func(*crypt.Header) error {
			close(asked)
			<-waited
			w.keys.hooks(func() { w.keys.onOpen = nil })
			panic("a bug in Keys")
		}
	})
	var wg sync.WaitGroup
	open := func() {
		if err := openRaw(w.path("f"), syscall.O_RDONLY); err != syscall.EIO {
			t.Errorf("opening: %v, not EIO", err)
		}
	}
	wg.Go(open)
	<-asked
	wg.Go(open)
	require.Eventually(t, func() bool { return w.srv.fs.waiting() == 2 }, 20*time.Second, time.Millisecond)
	time.Sleep(50 * time.Millisecond) // the second waits for the first now
	close(waited)
	wg.Wait()
}

// What stores too little for one byte of plaintext is not an empty file.
func TestTornToNothing(t *testing.T) {
	for _, stored := range []int64{1, crypt.RecordOverhead - 1, crypt.RecordOverhead} {
		everyMode(t, func(t *testing.T, w *world) {
			w.write("f", []byte("contents"))
			path := w.stored("f")
			w.unmount()
			require.NoError(t, os.Truncate(path, stored))
			w.mount()
			info, err := os.Stat(w.path("f"))
			require.NoError(t, err)
			require.Zero(t, info.Size())
			require.Equal(t, syscall.EBADMSG, openRaw(w.path("f"), syscall.O_RDONLY))
			require.Equal(t, syscall.EBADMSG, openRaw(w.path("f"), syscall.O_RDWR))
			require.Equal(t, syscall.EBADMSG, openRaw(w.path("f"), syscall.O_WRONLY|syscall.O_APPEND))
			require.Equal(t, syscall.EBADMSG, syscall.Truncate(w.path("f"), 5))
			info, err = os.Stat(path)
			require.NoError(t, err)
			require.Equal(t, stored, info.Size(), "a failed open changed it")
			w.write("f", []byte("repaired"))
			require.Equal(t, "repaired", string(w.read("f")))
		})
	}
}
