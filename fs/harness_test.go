package fs

import (
	"bytes"
	"context"
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

const (
	testKey = "local:test"
	nextKey = "local:next" // after a rekey
)

// fakeKeys wraps data keys by storing them: tests attack fs, not it.
type fakeKeys struct {
	volume crypt.VolumeID
	log2   uint8

	mu                     sync.Mutex
	opens, fresh, returned int                       // guarded by mu
	fail                   error                     // guarded by mu; what every call answers
	block                  chan struct{}             // guarded by mu; calls wait until it is closed
	onOpen                 func(*crypt.Header) error // guarded by mu
	onFresh                func()                    // guarded by mu; before a fresh key is handed out
	check                  func(*crypt.Header) error // guarded by mu; what Check answers
	// renew is what Renew answers; nil: every header will do. Guarded by mu.
	renew func(context.Context, *crypt.Header, *crypt.Secrets) (*crypt.Header, error)
}

func (k *fakeKeys) enter(ctx context.Context, count *int) error {
	k.mu.Lock()
	*count++
	fail, block := k.fail, k.block
	k.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fail
}

func (k *fakeKeys) Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	if err := k.enter(ctx, &k.opens); err != nil {
		return nil, err
	}
	k.mu.Lock()
	hook := k.onOpen
	k.mu.Unlock()
	if hook != nil {
		if err := hook(h); err != nil {
			return nil, err
		}
	}
	c := h.Find(testKey)
	if c == nil {
		c = h.Find(nextKey)
	}
	if c == nil || len(c.Blob) != crypt.KeySize {
		return nil, crypt.ErrKeyRejected
	}
	key, err := crypt.NewKey(bytes.Clone(c.Blob))
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return crypt.Unlock(h.Identity, key)
}

func (k *fakeKeys) Fresh(ctx context.Context) (*crypt.Fresh, error) {
	if err := k.enter(ctx, &k.fresh); err != nil {
		return nil, err
	}
	k.mu.Lock()
	hook := k.onFresh
	k.mu.Unlock()
	if hook != nil {
		hook()
	}
	return makeKey(k.volume, crypt.UseFile, k.log2)
}

func (k *fakeKeys) Check(h *crypt.Header) error {
	k.mu.Lock()
	check := k.check
	k.mu.Unlock()
	if check == nil {
		return nil
	}
	return check(h)
}

func (k *fakeKeys) Renew(ctx context.Context, h *crypt.Header, s *crypt.Secrets) (*crypt.Header, error) {
	k.mu.Lock()
	renew := k.renew
	k.mu.Unlock()
	if renew == nil {
		return nil, nil
	}
	return renew(ctx, h, s)
}

// hooks changes the hooks under the lock.
func (k *fakeKeys) hooks(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
}

func (k *fakeKeys) Return(f *crypt.Fresh) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.returned++
	f.Secrets.Wipe()
}

func (k *fakeKeys) set(fail error, block chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail, k.block = fail, block
}

func (k *fakeKeys) calls() (opens, fresh, returned int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.opens, k.fresh, k.returned
}

func makeKey(id crypt.VolumeID, use crypt.Use, log2 uint8) (*crypt.Fresh, error) {
	raw := make([]byte, crypt.KeySize)
	rand.Read(raw)
	key, err := crypt.NewKey(bytes.Clone(raw))
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	ident, err := crypt.NewIdentity(id, use, log2)
	if err != nil {
		return nil, err
	}
	s, err := crypt.Commit(&ident, key)
	if err != nil {
		return nil, err
	}
	return &crypt.Fresh{Header: &crypt.Header{Identity: ident, Copies: []crypt.Copy{{Key: testKey, Blob: raw}}}, Secrets: s}, nil
}

// A world is a mounted volume.
type world struct {
	t       *testing.T
	backing string
	mnt     string
	keys    *fakeKeys
	opts    Options
	vol     *volume.Volume
	srv     *Server

	storedPaths map[string]string // set by unmountKeepingFiles
}

type setup struct {
	names     volume.NamesMode
	blockSize int
	opts      Options
}

// newWorld makes a volume and mounts it, with the writeback cache unless tune says
// otherwise. Everything goes away with the test, whatever becomes of it.
func newWorld(t *testing.T, tune ...func(*setup)) *world {
	t.Helper()
	require.FileExists(t, "/proc/self/mountinfo")
	_, err := os.Stat("/dev/fuse")
	require.NoError(t, err, "these tests need FUSE")
	s := setup{names: volume.NamesEncrypted, blockSize: crypt.DefaultBlockSize, opts: Options{Writeback: true}}
	for _, f := range tune {
		f(&s)
	}
	base := t.TempDir()
	w := &world{t: t, backing: filepath.Join(base, "backing"), mnt: filepath.Join(base, "mnt")}
	require.NoError(t, os.Mkdir(w.mnt, 0o755))
	w.create(s)
	w.opts = s.opts
	w.mount()
	t.Cleanup(w.end)
	return w
}

func plainNames(s *setup) { s.names = volume.NamesPlain }

func (w *world) create(s setup) {
	var id crypt.VolumeID
	rand.Read(id[:])
	settings := volume.Settings{Format: 1, ID: id, BlockSize: s.blockSize, Names: s.names, Keys: []string{testKey}}
	fresh, err := makeKey(id, crypt.UseVolume, settings.BlockLog2())
	require.NoError(w.t, err)
	settings.Header, err = fresh.Header.Marshal()
	require.NoError(w.t, err)
	require.NoError(w.t, volume.Create(w.backing, settings, fresh.Secrets))
	fresh.Secrets.Wipe()
	w.keys = &fakeKeys{volume: id, log2: settings.BlockLog2()}
}

func (w *world) mount() {
	w.t.Helper()
	v, err := volume.Open(w.backing)
	require.NoError(w.t, err)
	secrets, err := w.keys.unlockVolume(v.Header())
	require.NoError(w.t, err)
	require.NoError(w.t, v.Unlock(secrets))
	w.vol = v
	o := w.opts
	o.Slots, err = v.OpenSlots(volume.SlotDir)
	require.NoError(w.t, err)
	o.Volume, o.Mountpoint = v, w.mnt
	if o.Keys == nil {
		o.Keys = w.keys
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(testWriter{w.t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	w.srv, err = Mount(o)
	require.NoError(w.t, err)
}

func (k *fakeKeys) unlockVolume(h *crypt.Header) (*crypt.Secrets, error) {
	key, err := crypt.NewKey(bytes.Clone(h.Find(testKey).Blob))
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return crypt.Unlock(h.Identity, key)
}

// unmount must succeed: the tests close what they open.
func (w *world) unmount() {
	w.t.Helper()
	require.NoError(w.t, w.srv.Unmount())
	require.Zero(w.t, w.srv.fs.files.len(), "files still open after unmount")
	require.Zero(w.t, w.srv.fs.orphans.len(), "descriptors kept after unmount")
	require.NoError(w.t, w.srv.fs.opts.Slots.Close(), "slots")
	require.NoError(w.t, w.vol.Close())
	w.srv = nil
}

// unmountKeepingFiles unmounts and notes where each file at the root is stored.
func (w *world) unmountKeepingFiles() {
	w.t.Helper()
	w.storedPaths = make(map[string]string)
	entries, err := os.ReadDir(w.mnt)
	require.NoError(w.t, err)
	for _, e := range entries {
		w.storedPaths[e.Name()] = w.stored(e.Name())
	}
	w.unmount()
}

func (w *world) remount() {
	w.t.Helper()
	w.unmount()
	w.mount()
}

func (w *world) end() {
	if w.srv == nil {
		return
	}
	if err := w.srv.Unmount(); err != nil {
		w.t.Errorf("unmounting at the end: %v", err)
		_ = unix.Unmount(w.mnt, unix.MNT_DETACH)
		return
	}
	require.NoError(w.t, w.srv.fs.opts.Slots.Close(), "slots")
}

func (w *world) path(name string) string { return filepath.Join(w.mnt, name) }

func (w *world) write(name string, data []byte) {
	w.t.Helper()
	require.NoError(w.t, os.WriteFile(w.path(name), data, 0o644))
}

func (w *world) read(name string) []byte {
	w.t.Helper()
	data, err := os.ReadFile(w.path(name))
	require.NoError(w.t, err)
	return data
}

// stored finds the backing file of a name by its inode number.
func (w *world) stored(name string) string {
	w.t.Helper()
	var st unix.Stat_t
	require.NoError(w.t, unix.Lstat(w.path(name), &st))
	var found string
	require.NoError(w.t, filepath.WalkDir(w.backing, func(p string, d os.DirEntry, err error) error {
		if info, ierr := d.Info(); err == nil && ierr == nil && info.Sys().(*syscall.Stat_t).Ino == st.Ino {
			found = p
		}
		return err
	}))
	require.NotEmpty(w.t, found)
	return found
}

// testWriter logs through the test, and keeps quiet once it is over.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}
