package fsck

import (
	"cmp"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Each kind of damage to kmsfs.toml and its backup; --repair writes a missing one, and
// writes over nothing.
func TestSettings(t *testing.T) {
	main := func(s *stage) string { return filepath.Join(s.dir, volume.SettingsFile) }
	backup := func(s *stage) string { return filepath.Join(s.dir, volume.BackupFile) }
	rows := []struct {
		name     string
		harm     func(s *stage) error
		want     []string
		repaired []string // nil: as want, for nothing is done
	}{
		{"backup missing", func(s *stage) error { return os.Remove(backup(s)) }, []string{"kmsfs.toml.bak settings"}, []string{"kmsfs.toml.bak settings: written from kmsfs.toml"}},
		{"settings missing", func(s *stage) error { return os.Remove(main(s)) }, []string{"kmsfs.toml settings"}, []string{"kmsfs.toml settings: written from kmsfs.toml.bak"}},
		{"backup malformed", func(s *stage) error { return os.WriteFile(backup(s), []byte("x"), 0o600) }, []string{"kmsfs.toml.bak settings"}, nil},
		{"settings malformed", func(s *stage) error { return os.Truncate(main(s), 100) }, []string{"kmsfs.toml settings"}, nil},
		{"backup of another volume", func(s *stage) error {
			raw, err := os.ReadFile(main(newStage(s.t, volume.NamesPlain)))
			require.NoError(s.t, err)
			return os.WriteFile(backup(s), raw, 0o600)
		}, []string{"kmsfs.toml.bak settings"}, nil},
		{"backup older", func(s *stage) error {
			old, err := os.ReadFile(backup(s))
			require.NoError(s.t, err)
			v := s.open()
			require.NoError(s.t, v.Update(func(c *volume.Settings) error {
				h, err := crypt.ParseHeader(c.Header)
				require.NoError(s.t, err)
				h.Copies = append(h.Copies, crypt.Copy{Key: "local:second", Blob: []byte("b")})
				c.Header, err = h.Marshal()
				return err
			}))
			return os.WriteFile(backup(s), old, 0o600)
		}, []string{"kmsfs.toml.bak settings untidy"}, []string{"kmsfs.toml.bak settings untidy: written from kmsfs.toml"}},
		{"backup is a directory", func(s *stage) error { return errors.Join(os.Remove(backup(s)), os.Mkdir(backup(s), 0o700)) }, []string{"kmsfs.toml.bak settings"}, nil},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			s := newStage(t, volume.NamesEncrypted)
			require.NoError(t, r.harm(s))
			diff := s.frozen()
			found, _ := s.check(Options{})
			require.Equal(t, r.want, found)
			require.Equal(t, r.want, s.keyless())
			require.Empty(t, diff())
			found, _ = s.check(Options{Repair: true})
			if r.repaired == nil {
				require.Equal(t, r.want, found)
				require.Empty(t, diff(), "what can't be used is not written over")
				return
			}
			require.Equal(t, r.repaired, found)
			require.Empty(t, must(s.check(Options{})))
			a, err := os.ReadFile(main(s))
			require.NoError(t, err)
			b, err := os.ReadFile(backup(s))
			require.NoError(t, err)
			require.Equal(t, a, b)
		})
	}
}

func must(found []string, _ Report) []string { return found }

// A volume key that does not open is a finding, and the rest is checked without.
func TestVolumeKeyDamaged(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	require.NoError(t, unix.Removexattr(s.file(s.root(s.unlocked()), "file", 10), crypt.HeaderXattr))
	found, _ := s.run(s.open(), Options{VolumeErr: crypt.ErrDamaged})
	require.Equal(t, []string{"file header", "kmsfs.toml settings"}, found)
}

// Repair loses nothing, says what it did, and leaves a clean volume.
func TestRepair(t *testing.T) {
	s := newStage(t, volume.NamesEncrypted)
	v := s.unlocked()
	root := s.root(v)
	sub := s.mkdir(root, "sub")
	long := s.file(sub, strings.Repeat("long", 60), 10)
	longAtRoot := s.file(root, strings.Repeat("long", 60), 10)
	require.NoError(t, os.Remove(long))
	require.NoError(t, os.Remove(longAtRoot))
	kept := s.file(sub, strings.Repeat("kept", 60), 10)
	empty := s.mkdir(root, "empty")
	at, err := os.Readlink(procFd(empty.Fd()))
	require.NoError(t, err)
	require.NoError(t, unix.Removexattr(at, volume.DirXattr))
	bad := s.file(root, "bad", size)
	require.NoError(t, os.Truncate(bad, record))
	found, r := s.check(Options{Repair: true})
	require.ElementsMatch(t, []string{
		"bad end 0-4096",
		"sub/" + filepath.Base(long) + ".n sidecar untidy: removed",
		filepath.Base(longAtRoot) + ".n sidecar untidy: removed",
		"empty directory-id untidy: given a fresh id",
	}, found)
	require.EqualValues(t, 3, r.Repaired)
	require.EqualValues(t, 1, r.Damage)
	require.Zero(t, r.Untidy)
	require.Equal(t, []string{"bad end 0-4096"}, must(s.check(Options{})))
	_, err = os.Lstat(kept + ".n")
	require.NoError(t, err)
	require.NoError(t, s.mkdirErr("empty", "usable"))
}

func (s *stage) mkdirErr(dir, name string) error {
	d, err := s.root(s.unlocked()).OpenDir(dir)
	require.NoError(s.t, err)
	defer d.Close()
	return d.Mkdir(name, 0o755)
}

// Without the volume's key a directory can't be given an id; nothing is pretended.
func TestRepairWithoutKeys(t *testing.T) {
	s := newStage(t, volume.NamesEncrypted)
	empty := s.mkdir(s.root(s.unlocked()), "empty")
	at, err := os.Readlink(procFd(empty.Fd()))
	require.NoError(t, err)
	require.NoError(t, unix.Removexattr(at, volume.DirXattr))
	found, r := s.run(s.open(), Options{Repair: true})
	require.Equal(t, []string{filepath.Base(at) + " directory-id untidy"}, found)
	require.Zero(t, r.Repaired)
}

// A bad end is cut back to the last good block; good files and blocks stay as they are.
func TestCutEnds(t *testing.T) {
	for name, row := range map[string]struct {
		change func(raw []byte) []byte
		want   []string
		left   int
	}{
		"torn":               {func(raw []byte) []byte { return raw[:10*record+20] }, []string{"file end 36864-40960: cut back to 40960 bytes"}, 10 * block},
		"missing":            {func(raw []byte) []byte { return raw[:6*record] }, []string{"file end 20480-24576: cut back to 24576 bytes"}, 6 * block},
		"tail flipped":       {func(raw []byte) []byte { raw[10*record+40] ^= 1; return raw }, []string{"file end 40960-41060: cut back to 40960 bytes"}, 10 * block},
		"zeros at the end":   {func(raw []byte) []byte { clear(raw[8*record:]); return raw }, []string{"file data 32768-40960: cut off", "file end 40960-41060: cut back to 32768 bytes"}, 8 * block},
		"damage before, too": {func(raw []byte) []byte { raw[40] ^= 1; return raw[:5*record] }, []string{"file data 0-4096", "file end 16384-20480: cut back to 20480 bytes"}, 5 * block},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, volume.NamesPlain)
			root := s.root(s.unlocked())
			file := s.file(root, "file", size)
			s.file(root, "other", size)
			s.rewrite(file, row.change)
			before, err := os.ReadFile(file)
			require.NoError(t, err)
			found, _ := s.check(Options{Data: true, CutEnds: true})
			require.Equal(t, row.want, found)
			after, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, before[:row.left/block*record], after[:len(after)-32], "the blocks before the cut")
			found, _ = s.check(Options{})
			require.Empty(t, found)
		})
	}
	t.Run("nothing is good", func(t *testing.T) {
		s := newStage(t, volume.NamesPlain)
		file := s.file(s.root(s.unlocked()), "file", size)
		s.rewrite(file, func(raw []byte) []byte { clear(raw); return raw })
		diff := s.frozen()
		found, r := s.check(Options{CutEnds: true})
		require.Equal(t, []string{"file end 40960-41060"}, found)
		require.Zero(t, r.Repaired)
		require.Empty(t, diff())
	})
}

func (s *stage) quarantine(v *volume.Volume) (*Quarantine, string) {
	s.t.Helper()
	dir := filepath.Join(filepath.Dir(s.dir), "quarantine")
	q, err := OpenQuarantine(v, dir)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { q.Close() })
	return q, dir
}

// What can't be used is moved with all its names and attributes, each to a place of
// its own; everything else stays, and the manifest tells.
func TestQuarantine(t *testing.T) {
	for _, names := range bothModes {
		s := newStage(t, names)
		v := s.unlocked()
		root := s.root(v)
		a, b := s.mkdir(root, "a"), s.mkdir(root, "b")
		long := strings.Repeat("long", 60)
		paths := map[string]string{"header": s.file(a, "file", size), "end": s.file(b, "file", size), "data": s.file(b, long, size)}
		s.file(root, "good", size)
		fd, err := a.OpenPath("file")
		require.NoError(t, err)
		defer unix.Close(fd)
		require.NoError(t, v.Setxattr(fd, "user.mine", []byte("mine"), 0))
		require.NoError(t, root.Link(fd, "second name of it"))
		require.NoError(t, unix.Removexattr(paths["header"], crypt.HeaderXattr))
		require.NoError(t, os.Truncate(paths["end"], record))
		s.rewrite(paths["data"], func(raw []byte) []byte { raw[100] ^= 1; return raw })
		attrs := s.list(paths["header"])
		diff := s.frozen()
		q, dir := s.quarantine(v)
		found, r := s.check(Options{Data: true, Quarantine: q})
		require.EqualValues(t, 4, r.Quarantined, "three files, one of them under two names")
		require.EqualValues(t, 3, r.Damage)
		require.Len(t, found, 7)
		require.Empty(t, must(s.check(Options{Data: true})))
		for _, line := range diff() {
			st, err := os.Lstat(filepath.Join(s.dir, line[2:]))
			require.True(t, err != nil || st.IsDir(), "%s: only entries that were moved, and their directories, differ", line)
		}
		requireManifest(t, s, dir, paths, attrs)
	}
}

func requireManifest(t *testing.T, s *stage, dir string, paths map[string]string, attrs string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, ManifestFile))
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	require.Len(t, lines, 4)
	moved := map[string]manifestLine{}
	for _, text := range lines {
		var m manifestLine
		require.NoError(t, json.Unmarshal([]byte(text), &m))
		require.Equal(t, filepath.Base(m.Stored), filepath.Base(m.Entry), "the stored name is kept")
		_, err := os.Lstat(filepath.Join(dir, m.Entry))
		require.NoError(t, err)
		moved[filepath.Join(s.dir, m.Stored)] = m
	}
	for kind, path := range paths {
		m, ok := moved[path]
		require.True(t, ok, kind)
		require.Equal(t, []Kind{Kind(kind)}, m.Kinds)
		if kind == "header" {
			require.Equal(t, attrs, s.list(filepath.Join(dir, m.Entry)))
		}
		if strings.HasPrefix(filepath.Base(path), "kmsfs.long.") {
			_, err := os.Lstat(filepath.Join(dir, m.Entry) + ".n")
			require.NoError(t, err, "the long name goes with it")
		}
	}
}

// A quarantine is never written over, and lies beside the volume in its file system.
func TestQuarantinePlaces(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	v := s.unlocked()
	for range 2 {
		file := s.file(s.root(s.unlocked()), "file", size)
		require.NoError(t, os.Truncate(file, record))
		q, dir := s.quarantine(v)
		_, r := s.check(Options{Quarantine: q})
		require.EqualValues(t, 1, r.Quarantined)
		require.FileExists(t, filepath.Join(dir, "000001", "file"))
	}
	require.FileExists(t, filepath.Join(filepath.Dir(s.dir), "quarantine", "000002", "file"))
	require.NoError(t, os.Mkdir(filepath.Join(s.dir, "in"), 0o700))
	for _, inside := range []string{s.dir, filepath.Join(s.dir, "new"), filepath.Join(s.dir, "in"), filepath.Join(s.dir, "in", "new")} {
		_, err := OpenQuarantine(v, inside)
		require.ErrorIs(t, err, ErrInside, inside)
	}
	_, err := OpenQuarantine(v, "/dev/shm/kmsfs-fsck-test")
	require.ErrorIs(t, err, ErrOtherStore)
	require.NoDirExists(t, "/dev/shm/kmsfs-fsck-test")
}

// TestPlantedQuarantine: a quarantine that others may write to is none. Nothing is written
// into somebody's file through it, nobody waits for what was planted there, and a symlink
// leads no damaged file back into the volume.
func TestPlantedQuarantine(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	v := s.unlocked()
	beside := filepath.Dir(s.dir)
	precious := filepath.Join(beside, "precious")
	require.NoError(t, os.WriteFile(precious, []byte("mine"), 0o600))
	for name, plant := range map[string]func(dir string) error{
		"fifo":          func(dir string) error { return unix.Mkfifo(filepath.Join(dir, ManifestFile), 0o600) },
		"hard link":     func(dir string) error { return os.Link(precious, filepath.Join(dir, ManifestFile)) },
		"symlink":       func(dir string) error { return os.Symlink(precious, filepath.Join(dir, ManifestFile)) },
		"anybody's":     func(dir string) error { return os.Chmod(dir, 0o777) },
		"a group's":     func(dir string) error { return os.Chmod(dir, 0o770) },
		"somebody's":    func(dir string) error { return os.Chown(dir, 65534, -1) },
		"leads back in": func(dir string) error { return cmp.Or(os.Remove(dir), os.Symlink(s.dir, dir)) },
	} {
		dir := filepath.Join(beside, "q "+name)
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, plant(dir))
		opened := make(chan error, 1)
		go func() {
			q, err := OpenQuarantine(v, dir)
			if err == nil {
				err = errors.Join(q.note(manifestLine{}), q.Close())
				if err == nil {
					err = errors.New("nothing is wrong with it")
				}
				t.Errorf("%s: %v", name, err)
			}
			opened <- err
		}()
		select {
		case err := <-opened:
			require.Error(t, err, name)
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: it waits", name)
		}
	}
	got, err := os.ReadFile(precious)
	require.NoError(t, err)
	require.Equal(t, "mine", string(got))
}
