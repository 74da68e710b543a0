package headers

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
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

func newStage(t *testing.T, names volume.NamesMode, keys ...string) *stage {
	t.Helper()
	s := &stage{t: t, dir: filepath.Join(t.TempDir(), "vol"), vault: &vault{keys: map[crypt.FileID]*crypt.Key{}}}
	_, err := rand.Read(s.id[:])
	require.NoError(t, err)
	h, secrets := s.header(crypt.UseVolume, keys...)
	s.key = secrets
	raw, err := h.Marshal()
	require.NoError(t, err)
	require.NoError(t, volume.Create(s.dir, volume.Settings{
		Format: volume.Format, ID: s.id, BlockSize: crypt.DefaultBlockSize, Names: names, Keys: keys, Header: raw,
	}, secrets))
	t.Cleanup(secrets.Wipe)
	return s
}

func (s *stage) header(use crypt.Use, keys ...string) (*crypt.Header, *crypt.Secrets) {
	s.t.Helper()
	id, err := crypt.NewIdentity(s.id, use, 12)
	require.NoError(s.t, err)
	k, err := crypt.RandomKey()
	require.NoError(s.t, err)
	s.t.Cleanup(k.Wipe)
	secrets, err := crypt.Commit(&id, k)
	require.NoError(s.t, err)
	s.vault.keys[id.File] = k
	h := &crypt.Header{Identity: id}
	for _, name := range keys {
		h.Copies = append(h.Copies, crypt.Copy{Key: name, Blob: []byte("a copy under " + name)})
	}
	return h, secrets
}

func (s *stage) path(name string) string { return filepath.Join(s.dir, name) }

// file makes a file of size bytes, sealed under a key of its own.
func (s *stage) file(name string, size int, keys ...string) *crypt.Header {
	s.t.Helper()
	require.NoError(s.t, os.MkdirAll(filepath.Dir(s.path(name)), 0o755))
	f, err := os.Create(s.path(name))
	require.NoError(s.t, err)
	defer f.Close()
	h, secrets := s.header(crypt.UseFile, keys...)
	c, err := crypt.NewFile(volume.NewBacking(int(f.Fd())), 4096, 0, nil)
	require.NoError(s.t, err)
	defer c.Close()
	require.True(s.t, c.Prime(&crypt.Fresh{Header: h, Secrets: secrets}))
	_, err = c.WriteAt(bytes.Repeat([]byte(name[:1]), size), 0)
	require.NoError(s.t, err)
	return h
}

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

// export writes the volume to a new file.
func (s *stage) export() (file string, r ExportReport) {
	s.t.Helper()
	var b bytes.Buffer
	r, err := Export(context.Background(), s.open(), &b, nil)
	require.NoError(s.t, err)
	return s.put(b.Bytes()), r
}

// put makes a file of a stream.
func (s *stage) put(raw []byte) string {
	s.t.Helper()
	file := filepath.Join(s.t.TempDir(), "export")
	require.NoError(s.t, os.WriteFile(file, raw, 0o600))
	return file
}

// stream makes a file of records that nobody exported.
func (s *stage) stream(recs ...*Record) string {
	s.t.Helper()
	settings, err := s.open().EncodeSettings()
	require.NoError(s.t, err)
	return s.put(write(s.t, s.id, settings, recs...))
}

// bring imports with the vault's keys, into v if it is given.
func (s *stage) bring(file string, o Options) (Report, map[string]error) {
	s.t.Helper()
	return s.into(s.open(), file, o)
}

func (s *stage) into(v *volume.Volume, file string, o Options) (Report, map[string]error) {
	s.t.Helper()
	src, err := OpenSource(context.Background(), file)
	require.NoError(s.t, err)
	defer src.Close()
	bad := map[string]error{}
	o.Event = func(e Event, planned bool) {
		if e.Outcome.problem() && (!planned || o.DryRun) {
			bad[e.Path] = e.Err
		}
	}
	o.SaveTo = file + ".replaced"
	r, err := Import(context.Background(), v, src, o)
	require.NoError(s.t, err)
	require.Equal(s.t, !o.DryRun, r.Durable)
	return r, bad
}

// strip removes what a copy without attributes loses.
func (s *stage) strip(names ...string) {
	s.t.Helper()
	if len(names) == 0 {
		names = []string{crypt.HeaderXattr, crypt.SparseXattr, volume.DirXattr}
	}
	require.NoError(s.t, filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		for _, n := range names {
			_ = unix.Lremovexattr(path, n)
		}
		return err
	}))
}

// attributes are all of ours, by path and name.
func (s *stage) attributes() map[string]string {
	s.t.Helper()
	all := map[string]string{}
	require.NoError(s.t, filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		for _, n := range []string{crypt.HeaderXattr, crypt.SparseXattr, volume.DirXattr} {
			if v, ok := getxattr(path, n); ok {
				all[path+" "+n] = v
			}
		}
		return err
	}))
	return all
}

func getxattr(path, name string) (string, bool) {
	buf := make([]byte, crypt.MaxHeader)
	n, err := unix.Lgetxattr(path, name, buf)
	return string(buf[:max(n, 0)]), err == nil
}

func (s *stage) setHeader(name string, h *crypt.Header) {
	s.t.Helper()
	raw, err := h.Marshal()
	require.NoError(s.t, err)
	require.NoError(s.t, unix.Setxattr(s.path(name), crypt.HeaderXattr, raw, 0))
}

func (s *stage) headerOf(name string) *crypt.Header {
	s.t.Helper()
	raw, ok := getxattr(s.path(name), crypt.HeaderXattr)
	if !ok {
		return nil
	}
	h, err := crypt.ParseHeader([]byte(raw))
	require.NoError(s.t, err)
	return h
}

// tree is a volume with encrypted names, directories, a long name, a marked file
// and an empty one.
func tree(t *testing.T) *stage {
	t.Helper()
	s := newStage(t, volume.NamesEncrypted, oldKey)
	v := s.unlocked()
	d, err := v.Root()
	require.NoError(t, err)
	defer d.Close()
	for _, dir := range []string{"a", "b", strings.Repeat("long", 50)} {
		require.NoError(t, d.Mkdir(dir, 0o755))
		sub, err := d.OpenDir(dir)
		require.NoError(t, err)
		require.NoError(t, sub.Mkdir("sub", 0o755))
		sub.Close()
	}
	n := 0
	require.NoError(t, filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			rel, err := filepath.Rel(s.dir, path)
			require.NoError(t, err)
			n++
			s.file(filepath.Join(rel, fmt.Sprint("file", n)), n*3000, oldKey)
			require.NoError(t, os.WriteFile(filepath.Join(path, "empty"), nil, 0o644))
		}
		return err
	}))
	require.Equal(t, 7, n)
	require.NoError(t, unix.Setxattr(s.path("file1"), crypt.SparseXattr, bytes.Repeat([]byte{1}, markSize), 0))
	return s
}

func TestExportAndImport(t *testing.T) {
	s := tree(t)
	want := s.attributes()
	file, r := s.export()
	require.Equal(t, Counts{Exported: 7, Empty: 7}, r.Files)
	require.Equal(t, Counts{Exported: 6}, r.Dirs)
	s.strip()
	require.Empty(t, s.attributes())

	dry, bad := s.bring(file, Options{Keys: s.vault, DryRun: true})
	require.Empty(t, bad)
	require.Empty(t, s.attributes(), "a dry run changes nothing")
	got, bad := s.into(s.unlocked(), file, Options{Keys: s.vault})
	require.Empty(t, bad)
	require.Equal(t, Counts{Restored: 7}, got.Files)
	require.Equal(t, Counts{Restored: 6}, got.Dirs)
	require.Equal(t, dry.Files, got.Files)
	require.Equal(t, dry.Dirs, got.Dirs)
	require.Zero(t, got.Unverified)
	require.Equal(t, want, s.attributes())

	again, bad := s.bring(file, Options{Keys: s.vault})
	require.Empty(t, bad)
	require.Equal(t, Counts{Present: 7}, again.Files)
	require.Equal(t, Counts{Present: 6}, again.Dirs)
	require.Zero(t, again.Changes())
}

// Export names what has no valid header, and takes the rest.
func TestExportNamesWhatIsLost(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	s.file("good", 5000, oldKey)
	for name, raw := range map[string][]byte{"none": nil, "malformed": []byte("KMSF rubbish")} {
		s.file(name, 5000, oldKey)
		require.NoError(t, unix.Removexattr(s.path(name), crypt.HeaderXattr))
		if raw != nil {
			require.NoError(t, unix.Setxattr(s.path(name), crypt.HeaderXattr, raw, 0))
		}
	}
	foreign := s.file("foreign", 5000, oldKey)
	foreign.Volume[0]++
	s.setHeader("foreign", foreign)
	bad := map[string]error{}
	r, err := Export(context.Background(), s.open(), &bytes.Buffer{}, func(e Event) {
		if e.Outcome == Bad {
			bad[e.Path] = e.Err
		}
	})
	require.NoError(t, err)
	require.Equal(t, Counts{Exported: 1, Bad: 3}, r.Files)
	require.ErrorIs(t, bad["none"], crypt.ErrNoHeader)
	require.ErrorIs(t, bad["malformed"], crypt.ErrDamaged)
	require.ErrorIs(t, bad["foreign"], crypt.ErrForeign)
}

// A directory that lost its id with entries in it is named; an empty one lost
// nothing.
func TestExportNamesDirectoriesWithoutAnID(t *testing.T) {
	s := tree(t)
	s.strip(volume.DirXattr)
	require.NoError(t, os.Mkdir(s.path("fresh"), 0o700))
	_, r := s.export()
	require.Equal(t, Counts{Bad: 6, Empty: 1}, r.Dirs)
}

// A tree that changes under an export: what went is counted, a key list that
// changed is told.
func TestExportOfALiveTree(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey, newKey)
	for i := range 20 {
		s.file(fmt.Sprintf("f%02d", i), 100, oldKey)
	}
	first := true
	r, err := Export(context.Background(), s.open(), &bytes.Buffer{}, func(e Event) {
		if !first {
			return
		}
		first = false
		for i := range 20 {
			if name := fmt.Sprintf("f%02d", i); name != e.Path {
				require.NoError(t, os.Rename(s.path(name), filepath.Join(t.TempDir(), name)))
			}
		}
		require.NoError(t, s.open().Update(func(set *volume.Settings) error {
			set.Keys = []string{newKey, oldKey}
			return nil
		}))
	})
	require.NoError(t, err)
	require.Equal(t, Counts{Exported: 1, Vanished: 19}, r.Files)
	require.True(t, r.Changed)
}

// What stands rules: a table of what a record does to it.
func TestWhatStandsRules(t *testing.T) {
	type row struct {
		stand func(s *stage, h *crypt.Header) *crypt.Header // nil header: none
		want  Outcome
		force Outcome
		keys  []string // of the header afterwards, without force
	}
	other := func(change func(h *crypt.Header)) func(s *stage, h *crypt.Header) *crypt.Header {
		return func(_ *stage, h *crypt.Header) *crypt.Header {
			c := h.Clone()
			change(c)
			return c
		}
	}
	under := func(keys ...string) func(s *stage, h *crypt.Header) *crypt.Header {
		return other(func(h *crypt.Header) {
			h.Copies = nil
			for _, k := range keys {
				h.Copies = append(h.Copies, crypt.Copy{Key: k, Blob: []byte("now under " + k)})
			}
		})
	}
	// The record has copies under oldKey and newKey; the volume lists newKey and
	// otherKey: oldKey was retired.
	rows := map[string]row{
		"none":               {func(*stage, *crypt.Header) *crypt.Header { return nil }, Restored, Restored, []string{oldKey, newKey}},
		"the same":           {other(func(*crypt.Header) {}), Present, Present, []string{oldKey, newKey}},
		"fewer copies":       {under(otherKey), Added, Added, []string{otherKey, newKey}},
		"only a listed one":  {under(newKey), Present, Present, []string{newKey}},
		"another file id":    {other(func(h *crypt.Header) { h.File[0]++ }), Conflict, Replaced, []string{oldKey, newKey}},
		"another commitment": {other(func(h *crypt.Header) { h.Commitment[0]++ }), Conflict, Replaced, []string{oldKey, newKey}},
		"another volume's":   {other(func(h *crypt.Header) { h.Volume[0]++ }), Conflict, Replaced, []string{oldKey, newKey}},
		"another block size": {other(func(h *crypt.Header) { h.BlockLog2 = 13 }), Restored, Restored, []string{oldKey, newKey}},
	}
	for name, r := range rows {
		for _, force := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/force=%v", name, force), func(t *testing.T) {
				s := newStage(t, volume.NamesPlain, newKey, otherKey)
				h := s.file("file", 5000, oldKey, newKey)
				file, _ := s.export()
				standing := r.stand(s, h)
				s.strip()
				if standing != nil {
					s.setHeader("file", standing)
				}
				before := s.attributes()
				want := r.want
				if force {
					want = r.force
				}
				report, bad := s.bring(file, Options{Keys: s.vault, Force: force})
				require.Equal(t, Counts{want: 1}, report.Files)
				got := s.headerOf("file")
				if want == Conflict {
					require.Len(t, bad, 1)
					require.Equal(t, before, s.attributes(), "a conflict is left as it is")
					return
				}
				require.Empty(t, bad)
				require.Equal(t, h.Identity, got.Identity)
				var keys []string
				for _, c := range got.Copies {
					keys = append(keys, c.Key)
				}
				require.Equal(t, r.keys, keys)
				require.Equal(t, want == Replaced, report.Saved != "")
			})
		}
	}
}

// A malformed header is as good as none.
func TestMalformedHeaderIsReplaced(t *testing.T) {
	for _, raw := range []string{"", "KMSF rubbish"} {
		s := newStage(t, volume.NamesPlain, oldKey)
		h := s.file("file", 5000, oldKey)
		file, _ := s.export()
		require.NoError(t, unix.Setxattr(s.path("file"), crypt.HeaderXattr, []byte(raw), 0))
		r, _ := s.bring(file, Options{Keys: s.vault})
		require.Equal(t, Counts{Restored: 1}, r.Files)
		require.Equal(t, h, s.headerOf("file"))
	}
}

// What force replaces is saved before anything is, and can be brought back the
// same way.
func TestForceSavesFirst(t *testing.T) {
	s := tree(t)
	file, _ := s.export()
	s.strip()
	again := s.unlocked()
	d, err := again.Root()
	require.NoError(t, err)
	defer d.Close()
	// Another generation: every directory and file gets something of its own.
	require.NoError(t, filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(s.dir, path)
		switch {
		case e.IsDir() && rel != ".":
			return unix.Setxattr(path, volume.DirXattr, bytes.Repeat([]byte(rel[:1]), volume.DirXattrSize), 0)
		case strings.HasPrefix(e.Name(), "file"):
			s.file(rel, 7000, newKey)
		}
		return err
	}))
	standing := s.attributes()
	r, bad := s.bring(file, Options{Keys: s.vault})
	require.Len(t, bad, 13)
	require.Equal(t, Counts{Conflict: 7}, r.Files)
	require.Equal(t, Counts{Conflict: 6}, r.Dirs)
	require.Equal(t, standing, s.attributes())
	require.NoFileExists(t, file+".replaced")

	// Verified, none of the old headers belongs to the new contents.
	r, bad = s.bring(file, Options{Keys: s.vault, Force: true})
	require.Equal(t, Counts{Mismatch: 7}, r.Files)
	require.Len(t, bad, 7)
	require.Equal(t, Counts{Replaced: 6}, r.Dirs)
	require.NoError(t, os.Remove(file+".replaced"))

	r, bad = s.bring(file, Options{Force: true})
	require.Empty(t, bad)
	require.Equal(t, Counts{Replaced: 7}, r.Files)
	require.Equal(t, 7, r.Unverified)
	require.NotEqual(t, standing, s.attributes())
	info, err := os.Stat(r.Saved)
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode().Perm())

	back, bad := s.bring(r.Saved, Options{Keys: s.vault, Force: true})
	require.Empty(t, bad)
	require.Equal(t, Counts{Replaced: 7}, back.Files)
	for path, want := range standing {
		if !strings.HasSuffix(path, volume.DirXattr) { // those were replaced before, and saved elsewhere
			require.Equal(t, want, s.attributes()[path], path)
		}
	}
}

// If what is to be replaced can't be saved, it stands.
func TestNothingIsReplacedUnsaved(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	s.file("file", 5000, oldKey)
	file, _ := s.export()
	s.file("file", 5000, oldKey)
	standing := s.attributes()
	require.NoError(t, os.WriteFile(file+".replaced", []byte("mine"), 0o600))
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	_, err = Import(context.Background(), s.open(), src, Options{Force: true, SaveTo: file + ".replaced"})
	require.ErrorIs(t, err, fs.ErrExist)
	require.Equal(t, standing, s.attributes())
	raw, err := os.ReadFile(file + ".replaced")
	require.NoError(t, err)
	require.Equal(t, "mine", string(raw))

	// Changed between the saving and the replacing.
	newer := s.file("third", 100, oldKey)
	r, err := Import(context.Background(), s.open(), src, Options{Force: true, SaveTo: file + ".second", Confirm: func(Report) error {
		s.setHeader("file", newer)
		return nil
	}})
	require.NoError(t, err)
	require.Equal(t, Counts{Failed: 1}, r.Files)
	require.Equal(t, newer, s.headerOf("file"))
}

// A refusal at the question changes nothing and leaves nothing.
func TestDeclined(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	s.file("file", 5000, oldKey)
	file, _ := s.export()
	s.file("file", 5000, oldKey)
	standing := s.attributes()
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	declined := errors.New("no")
	_, err = Import(context.Background(), s.open(), src, Options{Force: true, SaveTo: file + ".replaced", Confirm: func(plan Report) error {
		require.Equal(t, Counts{Replaced: 1}, plan.Files)
		return declined
	}})
	require.ErrorIs(t, err, declined)
	require.Equal(t, standing, s.attributes())
	left, err := os.ReadDir(filepath.Dir(file))
	require.NoError(t, err)
	require.Len(t, left, 1, "only the export itself")
}

// Contents that changed places with others are not given the wrong header.
func TestMismatchIsRefused(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	for i, name := range []string{"a", "b", "c", "zeros", "torn"} {
		s.file(name, 9000+i, oldKey)
	}
	file, _ := s.export()
	s.strip()
	require.NoError(t, os.Rename(s.path("a"), s.path("x")))
	require.NoError(t, os.Rename(s.path("b"), s.path("a")))
	require.NoError(t, os.Rename(s.path("x"), s.path("b")))
	require.NoError(t, os.WriteFile(s.path("zeros"), make([]byte, 9100), 0o600))
	require.NoError(t, os.Truncate(s.path("torn"), 2*4128+10)) // the end is gone, the blocks before it are good
	dry, _ := s.bring(file, Options{Keys: s.vault, DryRun: true})
	r, bad := s.bring(file, Options{Keys: s.vault})
	require.Equal(t, Counts{Mismatch: 3, Restored: 2}, r.Files)
	require.Equal(t, r.Files, dry.Files)
	require.Len(t, bad, 3)
	for _, name := range []string{"a", "b", "zeros"} {
		require.ErrorIs(t, bad[name], ErrMismatch)
		require.Nil(t, s.headerOf(name))
	}
	require.NotNil(t, s.headerOf("c"))
	require.NotNil(t, s.headerOf("torn"))
}

// A mark does not make zeros belong to a header.
func TestMarkedZerosAreNoProof(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	h := s.file("file", 3*4096+10, oldKey)
	secrets, err := crypt.Unlock(h.Identity, s.vault.keys[h.File])
	require.NoError(t, err)
	defer secrets.Wipe()
	mark, err := secrets.SparseMark()
	require.NoError(t, err)
	require.NoError(t, unix.Setxattr(s.path("file"), crypt.SparseXattr, mark, 0))
	file, _ := s.export()
	s.strip(crypt.HeaderXattr)
	require.NoError(t, os.WriteFile(s.path("file"), make([]byte, 3*4128+42), 0o600))
	r, _ := s.bring(file, Options{Keys: s.vault})
	require.Equal(t, Counts{Mismatch: 1}, r.Files)
}

// Keys that can't be had: written unverified, or, if verification is required,
// not at all.
func TestKeysThatCantBeHad(t *testing.T) {
	for _, sentinel := range []error{crypt.ErrKeyDenied, crypt.ErrKeyDisabled, crypt.ErrKeyNotFound, crypt.ErrKeyUnavailable, crypt.ErrKeyTimeout} {
		s := newStage(t, volume.NamesPlain, oldKey)
		for i := range 40 {
			s.file(fmt.Sprint("f", i), 100, oldKey)
		}
		file, _ := s.export()
		s.strip()
		s.vault.fail = func(*crypt.Header) error { return fmt.Errorf("asking: %w", sentinel) }
		r, bad := s.bring(file, Options{Keys: s.vault, Require: true})
		require.Equal(t, Counts{Failed: 40}, r.Files)
		require.Len(t, bad, 40)
		require.ErrorIs(t, bad["f7"], sentinel)
		require.Empty(t, s.attributes())

		s.vault.calls = 0
		r, bad = s.bring(file, Options{Keys: s.vault, Jobs: 1})
		require.Empty(t, bad)
		require.Equal(t, Counts{Restored: 40}, r.Files)
		require.Equal(t, 40, r.Unverified)
		require.ErrorIs(t, r.Unreachable, sentinel)
		require.Equal(t, stopAsking, s.vault.calls, "a dead service is not asked for every file")
	}
}

// What is not an outage is no reason to go on unverified: a key that this client
// does not trust, or a blob that does not open.
func TestHeaderThatDoesNotOpenIsRefused(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Outcome
	}{{crypt.ErrKeyRejected, Failed}, {crypt.ErrDamaged, Mismatch}} {
		s := newStage(t, volume.NamesPlain, oldKey)
		s.file("file", 5000, oldKey)
		file, _ := s.export()
		s.strip()
		s.vault.fail = func(*crypt.Header) error { return c.err }
		r, bad := s.bring(file, Options{Keys: s.vault})
		require.Equal(t, Counts{c.want: 1}, r.Files)
		require.ErrorIs(t, bad["file"], c.err)
		require.Nil(t, s.headerOf("file"))
	}
}

// A key service that refuses everything ends an import that must verify.
func TestGivesUp(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	s.file("file", 100, oldKey)
	rec := sampleHeader(t, s.id, 1, oldKey)
	var recs []*Record
	for i := range 3 * giveUp {
		r := *rec
		r.Path = fmt.Sprint("d/f", i)
		recs = append(recs, &r)
		require.NoError(t, os.MkdirAll(s.path("d"), 0o700))
		require.NoError(t, os.WriteFile(s.path(r.Path), []byte("contents"), 0o600))
	}
	file := s.stream(recs...)
	s.vault.fail = func(*crypt.Header) error { return crypt.ErrKeyDenied }
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	_, err = Import(context.Background(), s.open(), src, Options{Keys: s.vault, Require: true})
	require.ErrorIs(t, err, ErrGaveUp)
	require.ErrorIs(t, err, crypt.ErrKeyDenied)
	require.Less(t, s.vault.calls, 2*giveUp)
}

// An export can't put a header where it wants: whatever was planted on the way or
// at the end is left alone.
func TestPlantedOnTheWay(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	for _, name := range []string{"dir/file", "up/file", "link", "fifo", "gone", "isdir", "wasdir/x"} {
		s.file(name, 5000, oldKey)
	}
	file, _ := s.export()
	s.strip()
	outside := t.TempDir()
	target := filepath.Join(outside, "file")
	require.NoError(t, os.WriteFile(target, []byte("not ours"), 0o644))
	for _, name := range []string{"dir", "up", "link", "fifo", "gone", "isdir", "wasdir"} {
		require.NoError(t, os.RemoveAll(s.path(name)))
	}
	require.NoError(t, os.Symlink(outside, s.path("dir")))
	require.NoError(t, os.Symlink("..", s.path("up")))
	require.NoError(t, os.Symlink(target, s.path("link")))
	require.NoError(t, unix.Mkfifo(s.path("fifo"), 0o600))
	require.NoError(t, os.Mkdir(s.path("isdir"), 0o700))
	require.NoError(t, os.WriteFile(s.path("wasdir"), []byte("a file"), 0o600))
	r, bad := s.bring(file, Options{Force: true})
	require.Equal(t, Counts{Failed: 6, Missing: 1}, r.Files)
	require.ErrorIs(t, bad["dir/file"], volume.ErrNotThere)
	require.ErrorIs(t, bad["up/file"], volume.ErrNotThere)
	require.ErrorIs(t, bad["wasdir/x"], volume.ErrNotThere)
	for _, name := range []string{"link", "fifo", "isdir"} {
		require.ErrorIs(t, bad[name], errKind)
	}
	_, ok := getxattr(target, crypt.HeaderXattr)
	require.False(t, ok)
	require.Empty(t, s.attributes())
}

// A whole other volume's export, and single records of another volume.
func TestForeign(t *testing.T) {
	s, other := newStage(t, volume.NamesPlain, oldKey), newStage(t, volume.NamesPlain, oldKey)
	s.file("file", 5000, oldKey)
	other.file("file", 5000, oldKey)
	file, _ := other.export()
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	before := s.attributes()
	_, err = Import(context.Background(), s.open(), src, Options{Force: true})
	require.ErrorIs(t, err, crypt.ErrForeign)
	require.Equal(t, before, s.attributes())

	s.strip()
	rec := sampleHeader(t, other.id, 1, oldKey)
	rec.Path = "file"
	r, bad := s.bring(s.stream(rec), Options{Force: true})
	require.Equal(t, Counts{Foreign: 1}, r.Files)
	require.ErrorIs(t, bad["file"], crypt.ErrForeign)
	require.Nil(t, s.headerOf("file"))
}

// A kmsfs.toml in the stream that is another volume's, or none at all, is refused
// at once.
func TestStreamWithOtherSettings(t *testing.T) {
	s, other := newStage(t, volume.NamesPlain, oldKey), newStage(t, volume.NamesPlain, oldKey)
	settings, err := other.open().EncodeSettings()
	require.NoError(t, err)
	for _, raw := range [][]byte{settings, []byte("nonsense"), nil} {
		_, err := OpenSource(context.Background(), s.put(write(t, s.id, raw)))
		require.ErrorIs(t, err, ErrStream)
	}
	_, err = OpenSource(context.Background(), t.TempDir())
	require.ErrorIs(t, err, errNotRegular)
	fifo := filepath.Join(t.TempDir(), "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	_, err = OpenSource(context.Background(), fifo)
	require.ErrorIs(t, err, errNotRegular)
}

// Marks come with the header they belong to, and with no other.
func TestSparseMarks(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	mark := func(name string, b byte) {
		require.NoError(t, unix.Setxattr(s.path(name), crypt.SparseXattr, bytes.Repeat([]byte{b}, markSize), 0))
	}
	for _, name := range []string{"lost", "only", "kept", "other"} {
		s.file(name, 5000, oldKey)
		mark(name, 1)
	}
	s.file("short", 5000, oldKey)
	require.NoError(t, unix.Setxattr(s.path("short"), crypt.SparseXattr, []byte("x"), 0))
	file, _ := s.export()
	require.NoError(t, unix.Removexattr(s.path("lost"), crypt.HeaderXattr))
	mark("lost", 9) // belongs to no header
	require.NoError(t, unix.Removexattr(s.path("only"), crypt.SparseXattr))
	mark("kept", 2)
	s.file("other", 5000, oldKey)
	r, _ := s.bring(file, Options{Keys: s.vault})
	require.Equal(t, Counts{Restored: 1, Marked: 1, Present: 2, Conflict: 1}, r.Files)
	for name, want := range map[string]byte{"lost": 1, "only": 1, "kept": 2} {
		got, ok := getxattr(s.path(name), crypt.SparseXattr)
		require.True(t, ok)
		require.Equal(t, string(bytes.Repeat([]byte{want}, markSize)), got, name)
	}
	_, ok := getxattr(s.path("other"), crypt.SparseXattr)
	require.False(t, ok)
	for _, rec := range recordsOf(t, file) {
		require.Equal(t, rec.Path != "short", len(rec.Mark) > 0, rec.Path)
	}
}

func recordsOf(t *testing.T, file string) []*Record {
	t.Helper()
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	recs, err := readAll(NewReader(f))
	require.NoError(t, err)
	return recs
}

// An empty file gets no header, a directory's forged id is refused by who has the
// volume key, and a malformed one is replaced.
func TestDirectoriesAndEmptyFiles(t *testing.T) {
	s := tree(t)
	want := s.attributes()
	file, _ := s.export()
	recs := recordsOf(t, file)
	s.strip()
	require.NoError(t, os.Truncate(s.path("file1"), 0))
	var forged string
	for _, rec := range recs {
		if rec.Kind == KindDir && forged == "" {
			rec.Value[20] ^= 1
			forged = rec.Path
		} else if rec.Kind == KindDir {
			require.NoError(t, unix.Setxattr(s.path(rec.Path), volume.DirXattr, []byte("short"), 0))
		}
	}
	r, bad := s.into(s.unlocked(), s.stream(recs...), Options{Keys: s.vault})
	require.Equal(t, Counts{Mismatch: 1, Restored: 5}, r.Dirs)
	require.Equal(t, Counts{Empty: 1, Restored: 6}, r.Files)
	require.ErrorIs(t, bad[forged], crypt.ErrDamaged)
	got := s.attributes()
	require.NotContains(t, got, s.path(forged)+" "+volume.DirXattr)
	require.NotContains(t, got, s.path("file1")+" "+crypt.HeaderXattr)
	for path, value := range got {
		require.Equal(t, want[path], value, path)
	}
}

// With plain names directories have no ids, and none is written.
func TestPlainNamesHaveNoIDs(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	s.file("dir/file", 100, oldKey)
	file, r := s.export()
	require.Empty(t, r.Dirs)
	rec := &Record{Kind: KindDir, Path: "dir", Value: make([]byte, volume.DirXattrSize)}
	got, _ := s.bring(s.stream(append(recordsOf(t, file), rec)...), Options{Force: true})
	require.Equal(t, Counts{Present: 1}, got.Dirs)
	_, ok := getxattr(s.path("dir"), volume.DirXattr)
	require.False(t, ok)
}

// A lost kmsfs.toml comes back, with its backup, before any header.
func TestSettingsAreRestored(t *testing.T) {
	s := tree(t)
	want := s.attributes()
	file, _ := s.export()
	settings, err := os.ReadFile(s.path(volume.SettingsFile))
	require.NoError(t, err)
	s.strip()
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	_, err = volume.OpenLost(s.dir, src.Settings)
	require.ErrorIs(t, err, fs.ErrExist)
	require.NoError(t, os.Remove(s.path(volume.SettingsFile)))
	_, err = volume.OpenLost(s.dir, src.Settings)
	require.ErrorIs(t, err, fs.ErrExist, "its backup is enough")
	require.NoError(t, os.Remove(s.path(volume.BackupFile)))
	lost, err := volume.OpenLost(s.dir, src.Settings)
	require.NoError(t, err)
	defer lost.Close()
	r, _ := s.into(lost, file, Options{Keys: s.vault, Lost: true, DryRun: true})
	require.True(t, r.Settings)
	require.NoFileExists(t, s.path(volume.SettingsFile))
	r, bad := s.into(lost, file, Options{Keys: s.vault, Lost: true})
	require.Empty(t, bad)
	require.True(t, r.Settings)
	for _, name := range []string{volume.SettingsFile, volume.BackupFile} {
		got, err := os.ReadFile(s.path(name))
		require.NoError(t, err)
		require.Equal(t, settings, got)
	}
	require.Equal(t, want, s.attributes())
	s.unlocked() // the MAC of the settings holds
}

// A header that changes between the plan and the writing is never overwritten.
func TestCompareAndSet(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey, newKey)
	h := s.file("file", 5000, oldKey)
	file, _ := s.export()
	s.strip()
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	standing := h.Clone()
	standing.Copies = []crypt.Copy{{Key: newKey, Blob: []byte("rekeyed meanwhile")}}
	keys := &vault{keys: s.vault.keys, fail: func(*crypt.Header) error { // after the file was looked at
		s.setHeader("file", standing)
		return nil
	}}
	r, err := Import(context.Background(), s.open(), src, Options{Keys: keys})
	require.NoError(t, err)
	require.Equal(t, Counts{Added: 1}, r.Files, "begun anew, and the copy under a listed key added")
	got := s.headerOf("file")
	require.Equal(t, standing.Copies[0], got.Copies[0])
	require.Len(t, got.Copies, 2)
}

// Links share one header: restored once.
func TestHardLinks(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	s.file("one", 5000, oldKey)
	require.NoError(t, os.Link(s.path("one"), s.path("two")))
	file, r := s.export()
	require.Equal(t, Counts{Exported: 2}, r.Files)
	s.strip()
	r2, bad := s.bring(file, Options{Keys: s.vault})
	require.Empty(t, bad)
	require.Equal(t, 2, r2.Files[Restored]+r2.Files[Present])
	require.NotZero(t, r2.Files[Restored])
	s.file("one", 5000, oldKey)
	r2, bad = s.bring(file, Options{Force: true})
	require.Empty(t, bad)
	require.Equal(t, 2, r2.Files[Replaced]+r2.Files[Present])
}

// The whole of a file is checked before anything is changed.
func TestAlteredFileChangesNothing(t *testing.T) {
	s := tree(t)
	file, _ := s.export()
	s.strip()
	raw, err := os.ReadFile(file)
	require.NoError(t, err)
	bad := bytes.Clone(raw)
	bad[len(bad)-20] ^= 1
	for _, b := range [][]byte{bad, raw[:len(raw)-1], raw[:len(raw)/2], nil} {
		_, err := OpenSource(context.Background(), s.put(b))
		require.ErrorIs(t, err, ErrStream)
	}
	// Altered between the check and the writing.
	src, err := OpenSource(context.Background(), file)
	require.NoError(t, err)
	defer src.Close()
	require.NoError(t, os.WriteFile(file, write(t, s.id, []byte("other")), 0o600))
	_, err = Import(context.Background(), s.open(), src, Options{})
	require.ErrorIs(t, err, ErrStream)
	require.Empty(t, s.attributes())
}

// Memory does not grow with the tree.
func TestMemoryIsBounded(t *testing.T) {
	s := newStage(t, volume.NamesPlain, oldKey)
	h := s.file("file", 10, oldKey)
	raw, err := h.Marshal()
	require.NoError(t, err)
	const dirs, each = 20, 300
	for i := range dirs {
		require.NoError(t, os.Mkdir(s.path(fmt.Sprint("d", i)), 0o700))
		for k := range each {
			name := s.path(fmt.Sprintf("d%d/f%d", i, k))
			require.NoError(t, os.WriteFile(name, []byte("x"), 0o600))
			require.NoError(t, unix.Setxattr(name, crypt.HeaderXattr, raw, 0))
		}
	}
	// watch compares what is in use after a tenth of the files with the end.
	watch := func() (event func(), grown func() int64) {
		var n, early, late int64
		inUse := func() int64 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc)
		}
		return func() {
			switch n++; n {
			case dirs * each / 10:
				early = inUse()
			case dirs * each:
				late = inUse()
			}
		}, func() int64 { require.NotZero(t, late); return late - early }
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "export"))
	require.NoError(t, err)
	defer out.Close()
	event, grown := watch()
	_, err = Export(context.Background(), s.open(), out, func(Event) { event() })
	require.NoError(t, err)
	require.Less(t, grown(), int64(dirs*each*20), "bytes kept per file of an export")

	s.strip()
	src, err := OpenSource(context.Background(), out.Name())
	require.NoError(t, err)
	defer src.Close()
	event, grown = watch()
	r, err := Import(context.Background(), s.open(), src, Options{Event: func(Event, bool) { event() }})
	require.NoError(t, err)
	require.Equal(t, dirs*each+1, r.Files[Restored])
	require.Less(t, grown(), int64(dirs*each*20), "bytes kept per file of an import")
}
