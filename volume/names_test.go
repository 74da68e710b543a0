package volume

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

var bothModes = []NamesMode{NamesEncrypted, NamesPlain}

func TestNamesOfEveryLength(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := mkdir(t, root(t, v), "d")
		var want []string
		for n := 1; n <= 255; n++ {
			name := strings.Repeat("n", n)
			touch(t, d, name, name)
			want = append(want, name)
		}
		require.Equal(t, want, list(t, d), mode)
		consistent(t, d)
		for _, name := range want {
			got, ok := content(t, d, name)
			require.True(t, ok)
			require.Equal(t, name, got)
		}
		_, err := d.Create(strings.Repeat("n", 256), unix.O_RDWR, 0o600)
		require.ErrorIs(t, err, unix.ENAMETOOLONG)
		if mode == NamesEncrypted {
			require.Len(t, stored(t, d), 255+80, "names from 176 bytes on have a sidecar")
		}
		for _, name := range want {
			require.NoError(t, d.Unlink(name))
		}
		require.Empty(t, stored(t, d))
	}
}

func TestNamesOfEveryByte(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := root(t, v)
		for b := 1; b < 256; b++ {
			for _, name := range []string{"x" + string([]byte{byte(b)}) + "y", longName("x") + string([]byte{byte(b)})} {
				if b == '/' {
					require.ErrorIs(t, d.Mkdir(name, 0o700), unix.EINVAL)
					continue
				}
				touch(t, d, name, "c")
				_, ok := content(t, d, name)
				require.True(t, ok)
			}
		}
		require.Len(t, list(t, d), 2*254)
		consistent(t, d)
	}
}

func TestNamesThatAreNoneAreRefused(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		d := root(t, v)
		mkdir(t, d, "d")
		var st unix.Stat_t
		for _, bad := range []string{"", ".", "..", "a/b", "/etc", "d/..", "a\x00b"} {
			require.ErrorIs(t, d.Lstat(bad, &st), unix.EINVAL, "%q", bad)
			require.ErrorIs(t, d.Mkdir(bad, 0o700), unix.EINVAL, "%q", bad)
			_, err := d.OpenDir(bad)
			require.ErrorIs(t, err, unix.EINVAL, "%q", bad)
			require.ErrorIs(t, d.Rename("d", d, bad, 0), unix.EINVAL, "%q", bad)
		}
	}
}

func TestOurOwnNamesAreHiddenAndRefused(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		require.NoError(t, v.Lock(""))
		d := root(t, v)
		touch(t, d, "file", "x")
		require.Equal(t, []string{"file"}, list(t, d))
		var st unix.Stat_t
		for _, own := range []string{SettingsFile, BackupFile, LockFile, "kmsfs.anything", "kmsfs.damaged.kmsfs.toml"} {
			require.ErrorIs(t, d.Lstat(own, &st), unix.ENOENT, own)
			require.ErrorIs(t, d.Unlink(own), unix.ENOENT, own)
			require.ErrorIs(t, d.Rename(own, d, "stolen", 0), unix.ENOENT, own)
			require.ErrorIs(t, d.Rename("file", d, own, 0), unix.EPERM, own)
			require.ErrorIs(t, d.Mkdir(own, 0o700), unix.EPERM, own)
			require.ErrorIs(t, d.Symlink("x", own), unix.EPERM, own)
			_, err := d.Open(own, unix.O_RDONLY)
			require.ErrorIs(t, err, unix.ENOENT, own)
			_, err = d.Create(own, unix.O_RDWR, 0o600)
			require.ErrorIs(t, err, unix.EPERM, own)
		}
		require.FileExists(t, filepath.Join(v.Path(), SettingsFile))
		sub := mkdir(t, d, "sub")
		touch(t, sub, "kmsfs.toml", "below the root it is a name like any other")
		require.Equal(t, []string{"kmsfs.toml"}, list(t, sub))
		err := sub.Mkdir("kmsfs.damaged.x", 0o700)
		if mode == NamesEncrypted {
			require.ErrorIs(t, err, unix.EPERM)
		} else {
			require.NoError(t, err)
		}
	}
}

func TestStoredNamesShowNothing(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "secret-name", "")
	require.NoError(t, d.Symlink("secret-target", "secret-link"))
	mkdir(t, d, "secret-dir")
	touch(t, d, strings.Repeat("secret", 40), "")
	for _, s := range stored(t, d) {
		require.NotContains(t, s, "secret")
		target, _ := readlinkat(d.fd, s)
		require.NotContains(t, string(target), "secret")
	}
}

func TestDirectoryIDs(t *testing.T) {
	v, k := newVolume(t, NamesEncrypted)
	d := root(t, v)
	a, b := mkdir(t, d, "a"), mkdir(t, d, "b")
	require.NotEqual(t, a.id, b.id)
	require.Equal(t, v.rootID, d.id)
	touch(t, a, "f", "x")
	w := openVolume(t, v.Path(), k)
	again := openDir(t, root(t, w), "a")
	require.Equal(t, a.id, again.id, "ids outlive the mount")
	require.Equal(t, []string{"f"}, list(t, again))
	require.NoError(t, d.Rename("a", b, "moved", 0))
	require.Equal(t, []string{"f"}, list(t, openDir(t, b, "moved")), "a directory takes its names along")
}

func TestDirectoryWithoutID(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	a := mkdir(t, d, "a")
	path := dirPath(t, a)
	a.Close()
	require.NoError(t, unix.Removexattr(path, DirXattr))
	a = openDir(t, d, "a") // a power cut after mkdir
	require.NoError(t, a.Err())
	touch(t, a, "f", "x")
	a.Close()
	require.Equal(t, []string{"f"}, list(t, openDir(t, d, "a")), "the fresh id stays")

	b := mkdir(t, d, "b")
	touch(t, b, "f", "x")
	touch(t, b, longName("l"), "x")
	path = dirPath(t, b)
	b.Close()
	require.NoError(t, unix.Removexattr(path, DirXattr))
	checkDamagedDir(t, d, "b")
}

// checkDamagedDir checks that a directory with the two entries "f" and
// longName("l") has lost its names, and can be emptied and removed all the same.
func checkDamagedDir(t *testing.T, d *Dir, name string) {
	t.Helper()
	b, err := d.OpenDir(name)
	require.NoError(t, err)
	require.ErrorIs(t, b.Err(), crypt.ErrDamaged)
	var st unix.Stat_t
	require.ErrorIs(t, b.Lstat("f", &st), crypt.ErrDamaged)
	require.ErrorIs(t, b.Mkdir("new", 0o700), crypt.ErrDamaged)
	require.ErrorIs(t, d.Mkdir("x", 0o700), nil)
	require.ErrorIs(t, d.Rename("x", b, "x", 0), crypt.ErrDamaged)
	require.NoError(t, d.Rmdir("x"))
	names := list(t, b)
	require.Len(t, names, 2)
	for _, n := range names {
		require.True(t, strings.HasPrefix(n, DamagedPrefix), n)
		require.NoError(t, b.Lstat(n, &st))
	}
	require.NoError(t, b.Rename(names[0], d, "rescued", 0))
	require.NoError(t, b.Unlink(names[1]))
	require.Empty(t, stored(t, b))
	b.Close()
	require.NoError(t, d.Rmdir(name))
	require.NoError(t, d.Unlink("rescued"))
	require.NotContains(t, list(t, d), name)
}

func TestForgedDirectoryIDs(t *testing.T) {
	for name, forge := range map[string]func(raw []byte) []byte{
		"id":        func(r []byte) []byte { r[0] ^= 1; return r },
		"mac":       func(r []byte) []byte { r[47] ^= 1; return r },
		"short":     func(r []byte) []byte { return r[:47] },
		"long":      func(r []byte) []byte { return append(r, 0) },
		"very long": func(r []byte) []byte { return append(r, make([]byte, 1000)...) },
		"empty":     func([]byte) []byte { return nil },
	} {
		v, _ := newVolume(t, NamesEncrypted)
		d := root(t, v)
		b := mkdir(t, d, "b")
		touch(t, b, "f", "x")
		touch(t, b, longName("l"), "x")
		path := dirPath(t, b)
		b.Close()
		raw := make([]byte, 48)
		n, err := unix.Getxattr(path, DirXattr, raw)
		require.NoError(t, err)
		require.Equal(t, 48, n)
		require.NoError(t, unix.Setxattr(path, DirXattr, forge(raw), 0))
		t.Log(name)
		checkDamagedDir(t, d, "b")
	}
}

// An id copied to a second directory would let entries be moved between the two.
func TestOneIDOnTwoLiveDirectories(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	a, b := mkdir(t, d, "a"), mkdir(t, d, "b")
	touch(t, a, "mine", "x")
	raw := make([]byte, 48)
	_, err := unix.Getxattr(dirPath(t, a), DirXattr, raw)
	require.NoError(t, err)
	pathB := dirPath(t, b)
	b.Close()
	require.NoError(t, unix.Setxattr(pathB, DirXattr, raw, 0))
	require.NoError(t, os.Link(storedPath(t, a, "mine"), filepath.Join(pathB, filepath.Base(storedPath(t, a, "mine")))))
	touchRaw(t, pathB, longPrefix+strings.Repeat("0", 64))

	twin, err := d.OpenDir("b")
	require.NoError(t, err)
	var st unix.Stat_t
	require.ErrorIs(t, twin.Lstat("mine", &st), crypt.ErrDamaged)
	twin.Close()
	require.NoError(t, a.Lstat("mine", &st), "the first keeps its names")
	second := openDir(t, d, "a")
	require.NoError(t, second.Err(), "one directory opened twice is no twin")
	checkDamagedDir(t, d, "b")
	a.Close()
	second.Close()
	require.Len(t, v.ids.live, 1, "only the root is registered still")
}

func touchRaw(t *testing.T, dir, name string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
}

// Names moved to another directory behind our back are damage there.
func TestNamesMovedBetweenDirectories(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	a, b := mkdir(t, d, "a"), mkdir(t, d, "b")
	touch(t, a, "f", "x")
	from := storedPath(t, a, "f")
	require.NoError(t, os.Rename(from, filepath.Join(dirPath(t, b), filepath.Base(from))))
	require.Equal(t, []string{DamagedPrefix + filepath.Base(from)}, list(t, b))
	_, ok := content(t, b, "f")
	require.False(t, ok)
	got, ok := content(t, b, DamagedPrefix+filepath.Base(from))
	require.True(t, ok)
	require.Equal(t, "x", got)
	require.NoError(t, b.Rename(DamagedPrefix+filepath.Base(from), a, "f", 0))
	require.Equal(t, []string{"f"}, list(t, a))
	require.Empty(t, list(t, b))
}

func TestDamagedNames(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	for _, d := range []*Dir{root(t, v), mkdir(t, root(t, v), "sub")} {
		huge := strings.Repeat("h", 250) // doesn't fit behind the prefix
		planted := []string{"junk", "with space", "ünïcode", huge, strings.Repeat("0", 64), "kmsfs.long.short", longPrefix + strings.Repeat("1", 64)}
		if d.root {
			planted = append(planted[:5], planted[6]) // kmsfs.* is ours there
		} else {
			planted = append(planted, SettingsFile)
		}
		before := len(list(t, d))
		for _, p := range planted {
			touchRaw(t, dirPath(t, d), p)
		}
		require.Len(t, list(t, d), before+len(planted))
		var st unix.Stat_t
		for _, p := range planted {
			name := damagedName(p)
			require.LessOrEqual(t, len(name), 255)
			require.Contains(t, list(t, d), name)
			require.NoError(t, d.Lstat(name, &st), name)
			require.NoError(t, d.Unlink(name), name)
			require.ErrorIs(t, d.Lstat(name, &st), unix.ENOENT, name)
		}
		require.NoError(t, os.Mkdir(filepath.Join(dirPath(t, d), "junkdir"), 0o700))
		require.NoError(t, d.Rmdir(DamagedPrefix+"junkdir"))
		touch(t, d, "good", "x")
		require.ErrorIs(t, d.Lstat(DamagedPrefix+filepath.Base(storedPath(t, d, "good")), &st), unix.ENOENT, "a good entry has one name")
		for _, none := range []string{"", ".", ".."} {
			require.ErrorIs(t, d.Lstat(DamagedPrefix+none, &st), unix.ENOENT)
		}
		require.NoError(t, d.Unlink("good"))
	}
}

func TestSidecarDamage(t *testing.T) {
	for name, attack := range map[string]func(path string) error{
		"missing":      os.Remove,
		"wrong hash":   func(p string) error { os.Remove(p); return os.Symlink(strings.Repeat("A", 300), p) },
		"short":        func(p string) error { os.Remove(p); return os.Symlink("AAAA", p) },
		"path":         func(p string) error { os.Remove(p); return os.Symlink("/etc/passwd", p) },
		"regular file": func(p string) error { os.Remove(p); return os.WriteFile(p, []byte("x"), 0o600) },
		"FIFO":         func(p string) error { os.Remove(p); return unix.Mkfifo(p, 0o600) },
		"directory":    func(p string) error { os.Remove(p); return os.Mkdir(p, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			v, _ := newVolume(t, NamesEncrypted)
			d := mkdir(t, root(t, v), "d")
			touch(t, d, longName("l"), "x")
			entry := storedPath(t, d, longName("l"))
			require.NoError(t, attack(entry+sidecarSuffix))
			damaged := DamagedPrefix + filepath.Base(entry)
			require.Contains(t, list(t, d), damaged)
			got, ok := content(t, d, damaged)
			require.True(t, ok)
			require.Equal(t, "x", got)
			for _, n := range list(t, d) {
				// What took the sidecar's place goes with the entry.
				if err := d.Unlink(n); err == unix.EISDIR {
					require.NoError(t, d.Rmdir(n), n)
				} else if err != unix.ENOENT {
					require.NoError(t, err, n)
				}
			}
			require.Empty(t, list(t, d))
			require.NoError(t, root(t, v).Rmdir("d"))
		})
	}
}

func TestSidecarIsPutRight(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := mkdir(t, root(t, v), "d")
	entry := storedPath(t, d, longName("l"))
	require.NoError(t, os.Symlink("forged", entry+sidecarSuffix))
	touch(t, d, longName("l"), "x")
	require.Equal(t, []string{longName("l")}, list(t, d))
	_, err := d.Create(longName("l"), unix.O_RDWR|unix.O_EXCL, 0o600)
	require.ErrorIs(t, err, unix.EEXIST)
	consistent(t, d)
	require.Len(t, stored(t, d), 2)
}

func TestFailedCreationLeavesNoSidecar(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := mkdir(t, root(t, v), "d")
	require.Error(t, d.Link(d.Fd(), longName("l")), "a directory can't be linked")
	require.Error(t, d.Rename("missing", d, longName("l"), 0))
	require.Error(t, d.Symlink(strings.Repeat("t", 4090), longName("l")))
	require.Empty(t, stored(t, d))
}

func TestRmdirClearsOrphans(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	for _, name := range []string{"short", longName("d")} {
		sub := mkdir(t, d, name)
		orphan := filepath.Join(dirPath(t, sub), longPrefix+strings.Repeat("a", 64)+sidecarSuffix)
		require.NoError(t, os.Symlink("whatever", orphan))
		require.Empty(t, list(t, sub))
		touch(t, sub, "f", "x")
		require.ErrorIs(t, d.Rmdir(name), unix.ENOTEMPTY)
		_, err := os.Lstat(orphan)
		require.NoError(t, err, "a directory in use keeps everything")
		require.NoError(t, sub.Unlink("f"))
		require.NoError(t, d.Mkdir("over", 0o700))
		require.NoError(t, d.Rename("over", d, name, 0), "a rename over an empty directory")
		require.NoError(t, os.Symlink("whatever", filepath.Join(dirPath(t, openDir(t, d, name)), longPrefix+strings.Repeat("a", 64)+sidecarSuffix)))
		require.NoError(t, d.Rmdir(name))
	}
	require.Empty(t, stored(t, d))
}

func TestConcurrentIDsAgree(t *testing.T) {
	v, k := newVolume(t, NamesEncrypted)
	d := root(t, v)
	w := openVolume(t, v.Path(), k)
	e := root(t, w)
	for i := range 30 {
		name := fmt.Sprintf("d%d", i)
		require.NoError(t, d.Mkdir(name, 0o700))
		require.NoError(t, unix.Removexattr(storedPath(t, d, name), DirXattr))
		ids := make([]crypt.DirID, 8)
		var wg sync.WaitGroup
		for j := range ids {
			from := []*Dir{d, e}[j%2]
			wg.Go(func() {
				sub, err := from.OpenDir(name)
				if err != nil || sub.Err() != nil {
					t.Error(err)
					return
				}
				ids[j] = sub.id
				sub.Close()
			})
		}
		wg.Wait()
		for _, id := range ids {
			require.Equal(t, ids[0], id)
		}
	}
}

func TestConcurrentMkdirAndLookups(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	fds := openFDs(t)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 40 {
				name := fmt.Sprintf("%s-%d", longName("m")[:150+j], j)
				err := d.Mkdir(name, 0o700)
				if err != nil && err != unix.EEXIST {
					t.Error(i, err)
				}
				sub, err := d.OpenDir(name)
				if err != nil && err != unix.ENOENT {
					t.Error(i, err)
				} else if err == nil {
					if sub.Err() != nil {
						t.Error(sub.Err())
					}
					sub.Close()
				}
				if err := d.Rmdir(name); err != nil && err != unix.ENOENT {
					t.Error(i, err)
				}
			}
		})
	}
	wg.Wait()
	require.Empty(t, stored(t, d))
	require.LessOrEqual(t, openFDs(t), fds)
}
