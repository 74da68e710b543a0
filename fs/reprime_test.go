package fs

import (
	"context"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A rekey comes while a fresh key is on its way to a file: the key is not used, and
// if there is no other, the call fails and has done nothing.
func TestRekeyOvertakesAKey(t *testing.T) {
	calls := map[string]func(w *world) error{
		"open":     func(w *world) error { return openRaw(w.path("empty"), syscall.O_WRONLY) },
		"create":   func(w *world) error { return openRaw(w.path("new"), syscall.O_WRONLY|syscall.O_CREAT) },
		"tmpfile":  func(w *world) error { return openRaw(w.mnt, unix.O_TMPFILE|unix.O_RDWR) },
		"cut":      func(w *world) error { return openRaw(w.path("full"), syscall.O_WRONLY|syscall.O_TRUNC) },
		"truncate": func(w *world) error { return syscall.Truncate(w.path("empty"), 100) },
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.write("empty", nil)
			w.write("full", []byte("contents"))
			w.remount()
			for _, fail := range []error{crypt.ErrKeyDenied, nil} {
				_, fresh, returned := w.keys.calls()
				w.keys.hooks(func() {
					w.keys.onFresh = func() {
						w.keys.hooks(func() { w.keys.onFresh, w.keys.fail = nil, fail })
						if err := w.srv.Reprime(context.Background()); err != nil {
							t.Error(err)
						}
					}
				})
				err := call(w)
				w.keys.set(nil, nil)
				_, asked, back := w.keys.calls()
				require.Equal(t, fresh+2, asked)
				require.Greater(t, back, returned, "the old key was kept")
				if fail == nil {
					require.NoError(t, err)
					continue
				}
				require.Equal(t, syscall.EACCES, err)
				require.Equal(t, returned+1, back)
				require.Equal(t, "contents", string(w.read("full")))
				_, err = os.Lstat(w.path("new"))
				require.ErrorIs(t, err, os.ErrNotExist)
			}
		})
	}
}

// Two rekeys at once: the key of the first does not replace that of the second.
func TestReprimesOvertakeEachOther(t *testing.T) {
	w := newWorld(t)
	f, err := os.Create(w.path("f"))
	require.NoError(t, err)
	defer f.Close()
	w.keys.hooks(func() {
		w.keys.onFresh = func() { // the second comes while the first waits for its key
			w.keys.hooks(func() { w.keys.onFresh = nil })
			if err := w.srv.Reprime(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	require.NoError(t, w.srv.Reprime(context.Background()))
	_, fresh, returned := w.keys.calls()
	require.Equal(t, 4, fresh, "the create's, the second's, and the first's two")
	require.Equal(t, 3, returned)
}

func link(fd int, path string) error {
	return unix.Linkat(unix.AT_FDCWD, procPath(fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
}

// A file without a name is not met by a rekey, so it gets none afterwards.
func TestLinkAfterRekey(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		tmp := func(data string) int {
			fd, err := unix.Open(w.mnt, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
			require.NoError(t, err)
			t.Cleanup(func() { unix.Close(fd) })
			if data != "" {
				_, err = unix.Write(fd, []byte(data))
				require.NoError(t, err)
				require.NoError(t, unix.Fsync(fd))
			}
			return fd
		}
		retired := func(*crypt.Header) error { return crypt.ErrKeyDisabled }
		full, empty, gap, ok := tmp("contents"), tmp(""), tmp(""), tmp("contents")
		require.NoError(t, unix.Ftruncate(gap, 10_000))
		w.write("named", []byte("x"))
		w.keys.hooks(func() { w.keys.check = retired })
		require.Equal(t, syscall.EKEYREVOKED, link(full, w.path("new")))
		require.Equal(t, syscall.EKEYREVOKED, link(gap, w.path("new")))
		require.NoError(t, link(empty, w.path("empty")))
		require.NoError(t, os.Link(w.path("named"), w.path("named2")), "the rekey meets it")

		checks := 0 // the rekey comes between the check and the link
		w.keys.hooks(func() {
			w.keys.check = func(h *crypt.Header) error {
				if checks++; checks == 1 {
					return nil
				}
				return retired(h)
			}
		})
		require.Equal(t, syscall.EKEYREVOKED, link(full, w.path("new")))
		_, err := os.Lstat(w.path("new"))
		require.ErrorIs(t, err, os.ErrNotExist)

		w.keys.hooks(func() { w.keys.check = nil })
		require.NoError(t, link(ok, w.path("new")))
		require.Equal(t, "contents", string(w.read("new")))
	})
}
