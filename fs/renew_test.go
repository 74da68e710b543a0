package fs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// rekeyed makes the fake key service one whose first key is nextKey now. before, if
// not nil, comes first in each renewal.
func (w *world) rekeyed(before func() error) {
	w.keys.hooks(func() {
		w.keys.check = func(h *crypt.Header) error {
			if h.Find(nextKey) == nil {
				return crypt.ErrKeyRejected
			}
			return nil
		}
		w.keys.renew = func(_ context.Context, h *crypt.Header, s *crypt.Secrets) (*crypt.Header, error) {
			if before != nil {
				if err := before(); err != nil {
					return nil, err
				}
			}
			if len(h.Copies) == 1 && h.Find(nextKey) != nil {
				return nil, nil
			}
			next := h.Clone()
			return next, s.DataKey().Use(func(raw []byte) error {
				next.Copies = []crypt.Copy{{Key: nextKey, Blob: bytes.Clone(raw)}}
				return nil
			})
		}
	})
}

// tmpfile opens a file without a name and writes to it.
func (w *world) tmpfile(data string) *os.File {
	w.t.Helper()
	fd, err := unix.Open(w.mnt, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	require.NoError(w.t, err)
	f := os.NewFile(uintptr(fd), "tmpfile")
	w.t.Cleanup(func() { f.Close() })
	if data != "" {
		_, err = f.WriteString(data)
		require.NoError(w.t, err)
		require.NoError(w.t, f.Sync())
	}
	return f
}

// keysOf lists the keys in the header of an open file of the mount, "" if it has
// no header.
func (w *world) keysOf(f *os.File) (names string) {
	w.t.Helper()
	var st unix.Stat_t
	require.NoError(w.t, unix.Fstat(int(f.Fd()), &st))
	for _, open := range w.srv.fs.files.all() {
		if open.id.ino == st.Ino {
			raw, err := volume.ReadHeader(open.descriptor())
			require.NoError(w.t, err)
			if raw != nil {
				h, err := crypt.ParseHeader(raw)
				require.NoError(w.t, err)
				for _, c := range h.Copies {
					names += c.Key
				}
			}
		}
		w.srv.fs.files.release(open)
	}
	return names
}

// A rekey meets no file without a name; so its header is renewed, and it can get a
// name.
func TestRenewWhatHasNoName(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		w.write("named", []byte("named"))
		w.write("unlinked", []byte("unlinked"))
		w.remount()
		named, err := os.Open(w.path("named"))
		require.NoError(t, err)
		defer named.Close()
		unlinked, err := os.Open(w.path("unlinked")) // its descriptor is read-only, its mode too
		require.NoError(t, err)
		defer unlinked.Close()
		require.NoError(t, unlinked.Chmod(0o400))
		require.NoError(t, os.Remove(w.path("unlinked")))
		full, empty := w.tmpfile("contents"), w.tmpfile("")

		require.NoError(t, w.srv.Renew(t.Context()), "nothing to do")
		require.Equal(t, testKey, w.keysOf(full))
		w.rekeyed(nil)
		require.NoError(t, w.srv.Renew(t.Context()))
		require.Equal(t, nextKey, w.keysOf(full))
		require.Equal(t, nextKey, w.keysOf(unlinked))
		require.Equal(t, "", w.keysOf(empty))
		got := make([]byte, 8)
		_, err = unlinked.ReadAt(got, 0)
		require.NoError(t, err)
		require.Equal(t, "unlinked", string(got))
		renews := w.srv.Stats().KeyRenews
		require.NoError(t, link(int(full.Fd()), w.path("full")))
		require.Equal(t, renews, w.srv.Stats().KeyRenews, "it was renewed already")
		_, err = full.WriteString(" and more")
		require.NoError(t, err)
		require.NoError(t, full.Close())
		require.NoError(t, empty.Close())
		require.NoError(t, unlinked.Close())

		require.Equal(t, testKey, w.keysOf(named), "what has a name is the sweep's")
		require.NoError(t, named.Close())
		w.remount()
		require.Equal(t, "contents and more", string(w.read("full")))
	})
}

// What Renew missed, or could not do, is done when the file gets a name; if it can't
// be done then either, there is no name.
func TestLinkRenews(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		var denied atomic.Bool
		denied.Store(true)
		files := []*os.File{w.tmpfile("0"), w.tmpfile("1")}
		w.rekeyed(func() error {
			if denied.Load() {
				return crypt.ErrKeyDenied
			}
			return nil
		})
		err := w.srv.Renew(t.Context())
		require.ErrorIs(t, err, crypt.ErrKeyDenied)
		require.ErrorContains(t, err, "(2 failed)")
		require.Equal(t, syscall.EACCES, link(int(files[0].Fd()), w.path("0")))
		require.NoFileExists(t, w.path("0"))
		require.Equal(t, testKey, w.keysOf(files[0]))
		denied.Store(false)
		for i, f := range files {
			name := string(rune('0' + i))
			require.NoError(t, link(int(f.Fd()), w.path(name)))
			require.Equal(t, nextKey, w.keysOf(f))
			require.NoError(t, f.Close())
		}
		w.remount()
		require.Equal(t, "0", string(w.read("0")))
		require.Equal(t, "1", string(w.read("1")))
	})
}

// The rekey begins, and its sweep passes by, while the file gets its name.
func TestRekeyOvertakesALink(t *testing.T) {
	w := newWorld(t)
	f := w.tmpfile("contents")
	w.rekeyed(nil)
	check := w.keys.check
	var checks atomic.Int64
	w.keys.hooks(func() {
		w.keys.check = func(h *crypt.Header) error {
			if checks.Add(1) == 1 {
				return nil // the list is adopted a moment later
			}
			return check(h)
		}
	})
	require.NoError(t, link(int(f.Fd()), w.path("new")))
	require.Equal(t, nextKey, w.keysOf(f))
	require.EqualValues(t, 3, checks.Load())

	f = w.tmpfile("contents")
	checks.Store(0)
	w.keys.hooks(func() { w.keys.check = check })
	w.rekeyed(func() error { return errors.New("asking KMS failed") })
	w.keys.hooks(func() {
		w.keys.check = func(h *crypt.Header) error {
			if checks.Add(1) == 1 {
				return nil
			}
			return check(h)
		}
	})
	require.Equal(t, syscall.EIO, link(int(f.Fd()), w.path("other")))
	require.NoFileExists(t, w.path("other"))
}

// While Keys is asked nothing is locked: the file is emptied, or written anew under
// another key, or its header replaced by somebody else.
func TestRenewIsOvertaken(t *testing.T) {
	for name, c := range map[string]struct {
		meanwhile func(f *os.File) error
		want      string
		calls     int64
	}{
		"emptied": {func(f *os.File) error { return f.Truncate(0) }, "", 1},
		"written anew": {func(f *os.File) error {
			return errors.Join(f.Truncate(0), rewrite(f, "anew"), f.Sync())
		}, "anew", 2},
		"cut": {func(f *os.File) error { return errors.Join(f.Truncate(3), f.Sync()) }, "con", 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			f := w.tmpfile("contents")
			var calls atomic.Int64
			w.rekeyed(func() error {
				if calls.Add(1) == 1 {
					return c.meanwhile(f)
				}
				return nil
			})
			require.NoError(t, w.srv.Renew(t.Context()))
			require.Equal(t, c.calls, calls.Load())
			require.NoError(t, link(int(f.Fd()), w.path("f")))
			if c.want != "" {
				require.Equal(t, nextKey, w.keysOf(f))
			}
			require.NoError(t, f.Close())
			w.remount()
			require.Equal(t, c.want, string(w.read("f")))
		})
	}
}

func rewrite(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// A link waits for Keys no longer than a create, and a signal ends it.
func TestLinkWaitsBriefly(t *testing.T) {
	w := newWorld(t, func(s *setup) { s.opts.CreateWait = 200 * time.Millisecond })
	f := w.tmpfile("contents")
	w.rekeyed(nil)
	w.keys.hooks(func() {
		w.keys.renew = func(ctx context.Context, _ *crypt.Header, _ *crypt.Secrets) (*crypt.Header, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	start := time.Now()
	require.Equal(t, syscall.ETIMEDOUT, retryEINTR(func() error { return link(int(f.Fd()), w.path("f")) }))
	require.Less(t, time.Since(start), time.Second)
	require.NoFileExists(t, w.path("f"))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, w.srv.Renew(ctx), context.DeadlineExceeded)
}

// Keys that can't renew: nothing is done, and the link is refused as it was.
func TestKeysThatCannotRenew(t *testing.T) {
	w := newWorld(t)
	w.unmount()
	w.opts.Keys = struct {
		Keys
		KeyChecker
	}{w.keys, w.keys}
	w.mount()
	f := w.tmpfile("contents")
	w.rekeyed(nil)
	require.NoError(t, w.srv.Renew(t.Context()))
	require.Equal(t, syscall.EKEYREJECTED, link(int(f.Fd()), w.path("f")))
	require.Equal(t, testKey, w.keysOf(f))
}
