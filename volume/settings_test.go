package volume

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

func TestCreateAndOpen(t *testing.T) {
	k := newTestKey(t, NamesEncrypted)
	dir := filepath.Join(t.TempDir(), "vol")
	require.NoError(t, Prepare(dir))
	require.NoDirExists(t, dir)
	require.NoError(t, Create(dir, k.settings, k.secrets))
	fi, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700)|os.ModeDir, fi.Mode())

	v, err := Open(dir)
	require.NoError(t, err)
	defer v.Close()
	got := v.Settings()
	require.Len(t, got.MAC, 32)
	got.MAC = nil
	require.Equal(t, k.settings, got)
	require.Equal(t, k.secrets.Identity(), v.Header().Identity)
	require.Empty(t, v.Warning())
	_, err = v.Root()
	require.ErrorIs(t, err, ErrLocked)
	require.NoError(t, v.Unlock(k.clone(t)))
	require.Error(t, v.Unlock(k.clone(t)), "unlocking twice")
	_, err = v.Root()
	require.NoError(t, err)
	a, err := os.ReadFile(filepath.Join(dir, SettingsFile))
	require.NoError(t, err)
	b, err := os.ReadFile(filepath.Join(dir, BackupFile))
	require.NoError(t, err)
	require.Equal(t, string(a), string(b))
}

func TestCreateRefusesWhatIsNotEmpty(t *testing.T) {
	k := newTestKey(t, NamesEncrypted)
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o755))
	file := filepath.Join(dir, "precious")
	require.NoError(t, os.WriteFile(file, []byte("x"), 0o644))
	require.ErrorIs(t, Prepare(dir), ErrNotEmpty)
	err := Create(dir, k.settings, k.secrets)
	require.ErrorIs(t, err, ErrNotEmpty)
	require.ErrorContains(t, err, "precious")
	l, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, l, 1, "nothing may be left behind")
	fi, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o755), fi.Mode().Perm())
	require.Error(t, Prepare(file), "a file is no directory")
	require.Error(t, Prepare(filepath.Join(dir, "no", "parent")))
}

func TestCreateRefusesSettingsThatMakeNoSense(t *testing.T) {
	for name, edit := range map[string]func(*Settings){
		"block size":      func(s *Settings) { s.BlockSize = 5000 },
		"small block":     func(s *Settings) { s.BlockSize = 2048 },
		"other block":     func(s *Settings) { s.BlockSize = 8192 },
		"names":           func(s *Settings) { s.Names = "rot13" },
		"no key":          func(s *Settings) { s.Keys = nil },
		"key twice":       func(s *Settings) { s.Keys = []string{"local:test", "local:test"} },
		"alias":           func(s *Settings) { s.Keys = []string{"arn:aws:kms:us-east-1:111122223333:alias/x"} },
		"key w/o copy":    func(s *Settings) { s.Keys = append(s.Keys, "local:other") },
		"header":          func(s *Settings) { s.Header = []byte("junk") },
		"another volume":  func(s *Settings) { s.ID[0]++ },
		"too many keys":   func(s *Settings) { s.Keys = make([]string, 9) },
		"header's author": func(s *Settings) { *s = newTestKey(t, NamesEncrypted).settings },
	} {
		k := newTestKey(t, NamesEncrypted)
		s := k.settings.clone()
		edit(&s)
		dir := filepath.Join(t.TempDir(), "vol")
		require.Error(t, Create(dir, s, k.secrets), name)
		require.NoDirExists(t, dir, name)
	}
}

// A file system without user xattrs is refused with the reason. ramfs has none.
func TestNoUserXattrsIsRefused(t *testing.T) {
	k := newTestKey(t, NamesEncrypted)
	dir := t.TempDir()
	if err := unix.Mount("ramfs", dir, "ramfs", 0, ""); err != nil {
		t.Skipf("mounting ramfs needs root: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	require.ErrorIs(t, Prepare(dir), ErrNoXattrs)
	require.ErrorIs(t, Create(dir, k.settings, k.secrets), ErrNoXattrs)
	_, err := Open(dir)
	require.ErrorIs(t, err, ErrNoXattrs)
}

func TestMountTableKnowsKmsfs(t *testing.T) {
	dev, fstype := mountOf("36 35 0:98 / /mnt rw,nosuid shared:1 master:2 - fuse.kmsfs /back rw,user_id=0")
	require.Equal(t, "0:98", dev)
	require.Equal(t, "fuse.kmsfs", fstype)
	for _, bad := range []string{"", "36 35", "a b c", " - "} {
		_, fstype = mountOf(bad)
		require.Empty(t, fstype)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	_, err := Open(filepath.Join(t.TempDir(), "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Open(t.TempDir())
	require.ErrorIs(t, err, ErrNotVolume)
}

func TestSettingsFileDamage(t *testing.T) {
	k := newTestKey(t, NamesEncrypted)
	s := k.settings.clone()
	s.MAC = make([]byte, 32)
	data, err := s.encode()
	require.NoError(t, err)
	good := string(data)
	_, err = parseSettings(data)
	require.NoError(t, err)
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":  {good + "\nsurprise = 1\n", "surprise"},
		"syntax":       {strings.Replace(good, "format = 1", "format = ", 1), "line 3"},
		"type":         {strings.Replace(good, "format = 1", "format = 'x'", 1), "line 3"},
		"format":       {strings.Replace(good, "format = 1", "format = 2", 1), "format 2"},
		"volume":       {strings.Replace(good, "volume = '05", "volume = 'zz", 1), "volume id"},
		"empty":        {"", "format 0"},
		"huge":         {good + strings.Repeat("#", maxSettings), "limit"},
		"twice":        {good + "format = 1\n", "line"},
		"header":       {strings.Replace(good, "header = 'S", "header = 'T", 1), "header"},
		"other volume": {strings.Replace(good, "volume = '05", "volume = '06", 1), "not this volume"},
	} {
		require.NotEqual(t, good, c.text, name)
		_, err := parseSettings([]byte(c.text))
		require.ErrorIs(t, err, crypt.ErrDamaged, name)
		require.ErrorContains(t, err, c.want, name)
	}
	_, err = parseSettings([]byte(good + "\nsurprise = 1\n"))
	require.Regexp(t, `line \d+: unknown key "surprise"`, err.Error())
}

func TestBackupServesWhenTheSettingsAreDamaged(t *testing.T) {
	v, k := newVolume(t, NamesEncrypted)
	file, backup := filepath.Join(v.Path(), SettingsFile), filepath.Join(v.Path(), BackupFile)
	good, err := os.ReadFile(file)
	require.NoError(t, err)
	for _, damage := range []func() error{
		func() error { return os.WriteFile(file, []byte("junk"), 0o600) },
		func() error { return os.Remove(file) },
		func() error { return os.Symlink(backup, file) },
		func() error { return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o600)) },
	} {
		require.NoError(t, damage())
		w, err := Open(v.Path())
		require.NoError(t, err)
		require.Contains(t, w.Warning(), BackupFile)
		require.NoError(t, w.Unlock(k.clone(t)))
		require.NoError(t, w.Close())
	}
	require.NoError(t, v.Update(func(*Settings) error { return nil }))
	now, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(good), string(now), "an update repairs")

	require.NoError(t, os.WriteFile(file, []byte("junk"), 0o600))
	require.NoError(t, os.WriteFile(backup, []byte("junk"), 0o600))
	_, err = Open(v.Path())
	require.ErrorIs(t, err, crypt.ErrDamaged)
	require.NoError(t, os.Remove(file))
	_, err = Open(v.Path())
	require.ErrorIs(t, err, crypt.ErrDamaged)
}

func TestUnlockDetectsChangedSettings(t *testing.T) {
	v, k := newVolume(t, NamesEncrypted)
	for name, edit := range map[string][2]string{
		"names": {"names = 'encrypted'", "names = 'plain'"},
		"mac":   {"mac = '", "mac = '00"},
	} {
		data, err := os.ReadFile(filepath.Join(v.Path(), BackupFile))
		require.NoError(t, err)
		text := strings.Replace(string(data), edit[0], edit[1], 1)
		if name == "mac" {
			i := strings.Index(text, edit[1]) + len(edit[1])
			text = text[:i] + text[i+2:]
		}
		require.NotEqual(t, string(data), text)
		require.NoError(t, os.WriteFile(filepath.Join(v.Path(), SettingsFile), []byte(text), 0o600))
		w, err := Open(v.Path())
		require.NoError(t, err, name)
		require.ErrorIs(t, w.Unlock(k.clone(t)), crypt.ErrDamaged, name)
		require.False(t, w.Unlocked())
		require.NoError(t, w.Close())
	}
	other := newTestKey(t, NamesEncrypted)
	w, err := Open(v.Path())
	require.NoError(t, err)
	defer w.Close()
	require.ErrorIs(t, w.Unlock(other.clone(t)), crypt.ErrDamaged, "another key")
}

func TestUpdateMovesKeysWithoutTheVolumeKey(t *testing.T) {
	v, k := newVolume(t, NamesEncrypted)
	locked, err := Open(v.Path())
	require.NoError(t, err)
	defer locked.Close()
	addKey := func(s *Settings) error {
		h, err := crypt.ParseHeader(s.Header)
		require.NoError(t, err)
		h.Copies = append([]crypt.Copy{{Key: "local:new", Blob: []byte("b")}}, h.Copies...)
		s.Header, err = h.Marshal()
		s.Keys = append([]string{"local:new"}, s.Keys...)
		return err
	}
	require.NoError(t, locked.Update(addKey))
	require.Equal(t, []string{"local:new", "local:test"}, locked.Settings().Keys)
	changed, err := v.Reload()
	require.NoError(t, err)
	require.True(t, changed)
	require.Equal(t, []string{"local:new", "local:test"}, v.Settings().Keys)
	require.Len(t, v.Header().Copies, 2)
	changed, err = v.Reload()
	require.NoError(t, err)
	require.False(t, changed)
	openVolume(t, v.Path(), k) // the MAC still holds
	require.Equal(t, v.Digest(), locked.Digest())

	for name, edit := range map[string]func(*Settings){
		"id":         func(s *Settings) { s.ID[0]++ },
		"block size": func(s *Settings) { s.BlockSize = 8192 },
		"names":      func(s *Settings) { s.Names = NamesPlain },
		"no copy":    func(s *Settings) { s.Keys = append(s.Keys, "local:third") },
		"no keys":    func(s *Settings) { s.Keys = nil },
		"mac":        func(s *Settings) { s.MAC[0]++ },
		"volume key": func(s *Settings) { s.Header = newTestKey(t, NamesEncrypted).settings.Header },
	} {
		require.Error(t, locked.Update(func(s *Settings) error { edit(s); return nil }), name)
	}
	boom := errors.New("boom")
	require.ErrorIs(t, locked.Update(func(*Settings) error { return boom }), boom)
	require.Equal(t, []string{"local:new", "local:test"}, locked.Settings().Keys)
	changed, err = v.Reload()
	require.NoError(t, err)
	require.False(t, changed, "a refused update wrote something")
}

func TestUpdatesDoNotLoseEachOther(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	var wg sync.WaitGroup
	for range 4 {
		w, err := Open(v.Path())
		require.NoError(t, err)
		defer w.Close()
		wg.Go(func() {
			for range 5 {
				err := w.Update(func(s *Settings) error {
					h, err := crypt.ParseHeader(s.Header)
					if err == nil {
						h.Padding++
						s.Header, err = h.Marshal()
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	_, err := v.Reload()
	require.NoError(t, err)
	require.Equal(t, 20, v.Header().Padding)
}

func TestLockNamesItsHolder(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, v.Lock("mount on /mnt/x"))
	require.NoError(t, v.Lock("again"), "it is ours already")
	w, err := Open(v.Path())
	require.NoError(t, err)
	defer w.Close()
	err = w.Lock("mount on /mnt/y")
	var held *LockedError
	require.ErrorAs(t, err, &held)
	require.Equal(t, os.Getpid(), held.Holder.PID)
	require.NotEmpty(t, held.Holder.BootID)
	require.Equal(t, "mount on /mnt/x", held.Holder.Owner)
	require.ErrorContains(t, err, "mount on /mnt/x")

	// A program we start doesn't inherit the lock.
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	v.lock.release()
	require.NoError(t, w.Lock(""))

	require.NoError(t, os.WriteFile(filepath.Join(v.Path(), LockFile), []byte("junk"), 0o600))
	require.ErrorAs(t, v.Lock(""), &held)
	require.Nil(t, held.Holder)
}

func TestLockFileIsNotFollowed(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	outside := filepath.Join(t.TempDir(), "outside")
	require.NoError(t, os.WriteFile(outside, []byte("keep"), 0o600))
	require.NoError(t, os.Symlink(outside, filepath.Join(v.Path(), LockFile)))
	require.ErrorIs(t, v.Lock(""), unix.ELOOP)
	require.NoError(t, os.Remove(filepath.Join(v.Path(), LockFile)))
	require.NoError(t, unix.Mkfifo(filepath.Join(v.Path(), LockFile), 0o600))
	require.Error(t, v.Lock(""))
	require.NoError(t, os.Remove(filepath.Join(v.Path(), LockFile)))
	require.NoError(t, os.Link(outside, filepath.Join(v.Path(), LockFile)))
	require.ErrorContains(t, v.Lock(""), "2 names")
	got, err := os.ReadFile(outside)
	require.NoError(t, err)
	require.Equal(t, "keep", string(got))
}

func FuzzSettings(f *testing.F) {
	k := newTestKey(f, NamesEncrypted)
	s := k.settings.clone()
	s.MAC = make([]byte, 32)
	data, err := s.encode()
	require.NoError(f, err)
	f.Add(data)
	f.Add([]byte("format = 1"))
	f.Add([]byte("keys = [['"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseSettings(data)
		if err != nil {
			require.ErrorIs(t, err, crypt.ErrDamaged)
			return
		}
		out, err := s.encode()
		require.NoError(t, err)
		again, err := parseSettings(out)
		require.NoError(t, err)
		require.Equal(t, s, again)
	})
}

// A live mount goes on while a rekey changes the settings (for -race).
func TestUseDuringUpdates(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	id, digest := v.ID(), v.Digest()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 3 {
			if err := v.Update(func(s *Settings) error { return nil }); err != nil {
				t.Error(err)
			}
			if _, err := v.Reload(); err != nil {
				t.Error(err)
			}
		}
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		st := unix.Stat_t{Mode: unix.S_IFREG, Size: 33}
		v.StatToPlain(&st)
		require.EqualValues(t, 1, st.Size)
		require.Equal(t, id, v.ID())
		require.Equal(t, digest, v.Digest())
		require.Equal(t, NamesEncrypted, v.Names())
	}
}
