package fsck

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

const (
	block  = 4096
	record = block + crypt.RecordOverhead
	tail   = 100
	blocks = 10
	size   = blocks*block + tail
)

// A vault is the Keys of a test: it knows every data key that was made.
type vault struct {
	mu    sync.Mutex
	keys  map[crypt.FileID]*crypt.Key // guarded by mu
	calls int                         // guarded by mu
	fail  func(h *crypt.Header) error
}

func (v *vault) Open(_ context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls++
	if v.fail != nil {
		if err := v.fail(h); err != nil {
			return nil, err
		}
	}
	if h.Find("local:test") == nil {
		return nil, crypt.ErrKeyRejected
	}
	k := v.keys[h.File]
	if k == nil {
		return nil, crypt.ErrDamaged
	}
	return crypt.Unlock(h.Identity, k)
}

// A stage is a volume on disk with real contents.
type stage struct {
	t     *testing.T
	dir   string
	vault *vault
	key   *crypt.Secrets // of the volume
	id    crypt.VolumeID
}

func newStage(t *testing.T, names volume.NamesMode) *stage {
	t.Helper()
	s := &stage{t: t, dir: filepath.Join(t.TempDir(), "vol"), vault: &vault{keys: map[crypt.FileID]*crypt.Key{}}}
	_, err := rand.Read(s.id[:])
	require.NoError(t, err)
	h, secrets := s.header(crypt.UseVolume)
	s.key = secrets
	raw, err := h.Marshal()
	require.NoError(t, err)
	require.NoError(t, volume.Create(s.dir, volume.Settings{
		Format: volume.Format, ID: s.id, BlockSize: block, Names: names, Keys: []string{"local:test"}, Header: raw,
	}, secrets))
	t.Cleanup(secrets.Wipe)
	return s
}

func (s *stage) header(use crypt.Use) (*crypt.Header, *crypt.Secrets) {
	s.t.Helper()
	id, err := crypt.NewIdentity(s.id, use, 12)
	require.NoError(s.t, err)
	k, err := crypt.RandomKey()
	require.NoError(s.t, err)
	s.t.Cleanup(k.Wipe)
	secrets, err := crypt.Commit(&id, k)
	require.NoError(s.t, err)
	s.vault.keys[id.File] = k
	return &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("a wrapped key")}}}, secrets
}

// open is the volume, locked.
func (s *stage) open() *volume.Volume {
	s.t.Helper()
	v, err := volume.Open(s.dir)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { v.Close() })
	return v
}

// unlocked is the volume with its key.
func (s *stage) unlocked() *volume.Volume {
	s.t.Helper()
	v := s.open()
	k, err := s.key.Clone()
	require.NoError(s.t, err)
	require.NoError(s.t, v.Unlock(k))
	return v
}

func (s *stage) root(v *volume.Volume) *volume.Dir {
	s.t.Helper()
	d, err := v.Root()
	require.NoError(s.t, err)
	s.t.Cleanup(d.Close)
	return d
}

func (s *stage) mkdir(d *volume.Dir, name string) *volume.Dir {
	s.t.Helper()
	require.NoError(s.t, d.Mkdir(name, 0o755))
	sub, err := d.OpenDir(name)
	require.NoError(s.t, err)
	s.t.Cleanup(sub.Close)
	return sub
}

// file makes a file of n bytes of noise, and returns where it lies.
func (s *stage) file(d *volume.Dir, name string, n int) string {
	s.t.Helper()
	fd, err := d.Create(name, unix.O_RDWR|unix.O_EXCL, 0o644)
	require.NoError(s.t, err)
	defer unix.Close(fd)
	s.write(fd, func(f *crypt.File) {
		_, err := f.WriteAt(noise(n), 0)
		require.NoError(s.t, err)
	})
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	require.NoError(s.t, err)
	return path
}

// write gives a new file its key and has it written.
func (s *stage) write(fd int, f func(*crypt.File)) {
	s.t.Helper()
	c, err := crypt.NewFile(volume.NewBacking(fd), block, 0, nil)
	require.NoError(s.t, err)
	defer c.Close()
	h, secrets := s.header(crypt.UseFile)
	c.Prime(&crypt.Fresh{Header: h, Secrets: secrets})
	f(c)
	require.NoError(s.t, c.Settle())
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = mathrand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// stored is where an entry lies.
func (s *stage) stored(d *volume.Dir, name string) string {
	s.t.Helper()
	at, err := d.StoredPath(name)
	require.NoError(s.t, err)
	return filepath.Join(s.dir, at)
}

// check runs a check of the unlocked volume and returns what it found, one line each,
// sorted.
func (s *stage) check(o Options) ([]string, Report) {
	s.t.Helper()
	o.Keys = s.vault
	return s.run(s.unlocked(), o)
}

// keyless runs a check without any key.
func (s *stage) keyless() []string {
	s.t.Helper()
	found, _ := s.run(s.open(), Options{})
	return found
}

func (s *stage) run(v *volume.Volume, o Options) (found []string, r Report) {
	s.t.Helper()
	o.Jobs = 4
	o.Finding = func(f Finding) { found = append(found, line(f)) }
	r, err := Run(context.Background(), v, o)
	require.NoError(s.t, err)
	slices.Sort(found)
	require.NoError(s.t, v.Close())
	return found, r
}

func line(f Finding) string {
	text := f.Path + " " + string(f.Kind)
	if f.Range != nil {
		text += fmt.Sprintf(" %d-%d", f.Range.From, f.Range.To)
	}
	if f.Level != Damage {
		text += " " + string(f.Level)
	}
	if f.Did != "" {
		text += ": " + f.Did
	}
	return text
}

func (s *stage) xattr(path, name string) []byte {
	s.t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, buf)
	require.NoError(s.t, err)
	return buf[:n]
}

func (s *stage) setXattr(path, name string, value []byte) {
	s.t.Helper()
	require.NoError(s.t, unix.Lsetxattr(path, name, value, 0))
}

// rewrite changes stored contents and leaves the inode.
func (s *stage) rewrite(path string, change func(raw []byte) []byte) {
	s.t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(s.t, err)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	require.NoError(s.t, err)
	_, err = f.Write(change(raw))
	require.NoError(s.t, err)
	require.NoError(s.t, f.Close())
}

// frozen remembers every name, byte, attribute and time of the backing tree but the
// access times, and returns what there is now that was not, and the other way round.
func (s *stage) frozen() func() []string {
	s.t.Helper()
	before := s.everything()
	return func() (diff []string) {
		after := s.everything()
		for k, v := range before {
			if after[k] != v {
				diff = append(diff, "- "+k)
			}
		}
		for k, v := range after {
			if before[k] != v {
				diff = append(diff, "+ "+k)
			}
		}
		slices.Sort(diff)
		return diff
	}
}

func (s *stage) everything() map[string]string {
	s.t.Helper()
	all := map[string]string{}
	require.NoError(s.t, filepath.WalkDir(s.dir, func(path string, _ os.DirEntry, err error) error {
		require.NoError(s.t, err)
		var st unix.Stat_t
		require.NoError(s.t, unix.Lstat(path, &st))
		rel, _ := filepath.Rel(s.dir, path)
		text := fmt.Sprint(st.Mode, st.Ino, st.Size, st.Uid, st.Nlink, st.Mtim, st.Ctim)
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			raw, err := os.ReadFile(path)
			require.NoError(s.t, err)
			text += string(raw)
		}
		all[rel] = text
		return nil
	}))
	return all
}
