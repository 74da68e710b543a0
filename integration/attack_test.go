package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/integration/harness"
)

// The files that attacks hit: ten whole blocks and a tail of 100 bytes.
const (
	block  = 4096
	record = block + 32
	blocks = 10
	tail   = 100
	size   = blocks*block + tail
)

// damage is the reading of one file after an attack.
type damage struct {
	size int64
	bad  []int // blocks that must read EBADMSG; the last one may be the tail
}

// TestBlockAttacks: whoever can write the backing directory can make blocks
// unreadable, and nothing else: EBADMSG on exactly the affected blocks, the right
// bytes everywhere else, and the file can be deleted. Files whose data keys come from one
// intermediate key are as far apart as others.
func TestBlockAttacks(t *testing.T) {
	change := func(f func(raw, other []byte) []byte) func(t *testing.T, v *harness.Volume) {
		return func(t *testing.T, v *harness.Volume) {
			path := filepath.Join(v.Dir, "file")
			raw := contents(t, path)
			require.Len(t, raw, blocks*record+32+tail)
			overwrite(t, path, f(raw, contents(t, filepath.Join(v.Dir, "other"))))
		}
	}
	flip := func(at int) func(t *testing.T, v *harness.Volume) {
		return change(func(raw, _ []byte) []byte { raw[at] ^= 0x10; return raw })
	}
	cut := func(n int) func(t *testing.T, v *harness.Volume) {
		return change(func(raw, _ []byte) []byte { return raw[:n] })
	}
	rec := func(raw []byte, i int) []byte { return raw[i*record : min((i+1)*record, len(raw))] }
	whole := func(bad ...int) damage { return damage{size, bad} }
	rows := []struct {
		name   string
		attack func(t *testing.T, v *harness.Volume)
		want   damage
	}{
		{"nothing", change(func(raw, _ []byte) []byte { return raw }), whole()},
		{"swapped blocks", change(func(raw, _ []byte) []byte {
			a, b := bytes.Clone(rec(raw, 2)), bytes.Clone(rec(raw, 5))
			copy(rec(raw, 2), b)
			copy(rec(raw, 5), a)
			return raw
		}), whole(2, 5)},
		{"block copied over another", change(func(raw, _ []byte) []byte { copy(rec(raw, 3), rec(raw, 4)); return raw }), whole(3)},
		{"block of another file", change(func(raw, other []byte) []byte { copy(rec(raw, 3), rec(other, 3)); return raw }), whole(3)},
		{"tail of another file", change(func(raw, other []byte) []byte { copy(rec(raw, 10), rec(other, 10)); return raw }), whole(10)},
		{"zeroed block", change(func(raw, _ []byte) []byte { clear(rec(raw, 6)); return raw }), whole(6)},
		{"zeroed blocks", change(func(raw, _ []byte) []byte { clear(raw[record : 4*record]); return raw }), whole(1, 2, 3)},
		{"all zeroed", change(func(raw, _ []byte) []byte { clear(raw); return raw }), whole(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)},
		{"zeroed tail", change(func(raw, _ []byte) []byte { clear(rec(raw, 10)); return raw }), whole(10)},
		{"punched block", func(t *testing.T, v *harness.Volume) {
			fd, err := unix.Open(filepath.Join(v.Dir, "file"), unix.O_RDWR, 0)
			require.NoError(t, err)
			defer unix.Close(fd)
			require.NoError(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4*record, record))
		}, whole(4)},
		{"sparse mark planted and block zeroed", func(t *testing.T, v *harness.Volume) {
			change(func(raw, _ []byte) []byte { clear(rec(raw, 6)); return raw })(t, v)
			require.NoError(t, unix.Setxattr(filepath.Join(v.Dir, "file"), crypt.SparseXattr, make([]byte, 32), 0))
		}, whole(6)},
		{"epoch flipped", flip(2*record + 1), whole(2)},
		{"nonce flipped", flip(2*record + 7), whole(2)},
		{"ciphertext flipped", flip(2*record + 500), whole(2)},
		{"tag flipped", flip(3*record - 1), whole(2)},
		{"tail flipped", flip(10*record + 40), whole(10)},
		{"tail cut by a byte", cut(10*record + 32 + tail - 1), damage{size - 1, []int{10}}},
		{"tail cut to an empty record", cut(10*record + 32), damage{blocks * block, []int{9}}},
		{"tail torn", cut(10*record + 20), damage{blocks * block, []int{9}}},
		{"cut at a boundary", cut(6 * record), damage{6 * block, []int{5}}},
		{"cut in a block", cut(6*record + 1000), damage{6*block + 1000 - 32, []int{6}}},
		{"cut to one block", cut(record), damage{block, []int{0}}},
		{"cut to a byte", cut(1), damage{0, nil}},
		{"grown by zeros", change(func(raw, _ []byte) []byte { return append(raw, make([]byte, 50)...) }), damage{size + 50, []int{10}}},
		{"grown by a block", change(func(raw, other []byte) []byte {
			return append(append(raw[:10*record:10*record], rec(other, 3)...), raw[10*record:]...)
		}), damage{size + block, []int{10, 11}}},
		{"a block taken out", change(func(raw, _ []byte) []byte { return append(raw[:3*record:3*record], raw[4*record:]...) }),
			damage{size - block, []int{3, 4, 5, 6, 7, 8, 9}}},
	}
	for _, envelope := range []string{"per-file", "shared"} {
		for _, r := range rows {
			t.Run(envelope+"/"+r.name, func(t *testing.T) {
				e := harness.New(t)
				v := attacked(t, e, "--envelope", envelope)
				r.attack(t, v)
				v.Damaged()
				requireFsckDamage(t, v, "file", r.want)
				v.Mount()
				requireDamage(t, v.Path("file"), r.want)
				require.Equal(t, harness.Noise(size + 1)[1:], harness.ReadAt(t, v.Path("other"), 0, size), "the neighbour")
				deletable(t, v, "file")
				require.NoError(t, os.WriteFile(v.Path("file"), []byte("anew"), 0o600))
				require.Equal(t, "anew", string(harness.ReadAt(t, v.Path("file"), 0, 10)))
			})
		}
	}
}

// attacked is an unmounted volume with plain names and two files.
func attacked(t *testing.T, e *harness.Env, init ...string) *harness.Volume {
	t.Helper()
	v := e.Init("volume", append(init, "--key", localKey(e, "one"), "--names", "plain")...)
	v.Mount()
	require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(size), 0o600))
	require.NoError(t, os.WriteFile(v.Path("other"), harness.Noise(size + 1)[1:], 0o600))
	v.Umount()
	return v
}

// overwrite changes contents and leaves inode and header alone.
func overwrite(t *testing.T, path string, raw []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	require.NoError(t, err)
	_, err = f.Write(raw)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

// requireDamage reads a file block by block, through the page cache and around
// it: both must say the same.
func requireDamage(t *testing.T, path string, want damage) {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, want.size, info.Size(), "size")
	if want.size == 0 { // no block is left to say so: the open does
		_, err := harness.Open(path, unix.O_RDONLY, 0)
		require.ErrorIs(t, err, unix.EBADMSG)
		return
	}
	bad := map[int]bool{}
	for _, b := range want.bad {
		bad[b] = true
	}
	content := harness.Noise(size)
	for _, how := range []struct {
		name  string
		flags int
	}{{"buffered", 0}, {"direct", unix.O_DIRECT}} {
		fd, err := harness.Open(path, unix.O_RDONLY|how.flags, 0)
		require.NoError(t, err, "damaged blocks don't keep a file from being opened")
		defer unix.Close(fd)
		for b := 0; int64(b*block) < want.size; b++ {
			n := int(min(block, want.size-int64(b*block)))
			p := make([]byte, n)
			n, err := unix.Pread(fd, p, int64(b*block))
			if bad[b] {
				require.ErrorIs(t, err, unix.EBADMSG, "%s read of block %d", how.name, b)
				continue
			}
			require.NoError(t, err, "%s read of block %d, which nobody touched", how.name, b)
			require.Equal(t, content[b*block:b*block+len(p)], p[:n], "%s read of block %d", how.name, b)
		}
	}
}

// TestBadEndIsNotRepaired: a write to a file whose end is damaged does not make
// the damage look right; cutting it off, or O_TRUNC, does repair.
func TestBadEndIsNotRepaired(t *testing.T) {
	e := harness.New(t)
	v := attacked(t, e)
	v.Damaged()
	require.NoError(t, os.Truncate(filepath.Join(v.Dir, "file"), 6*record))
	v.Mount()
	fd, err := harness.Open(v.Path("file"), unix.O_RDWR, 0)
	require.NoError(t, err)
	_, err = unix.Pwrite(fd, []byte("more"), 6*block)
	if err == nil { // the kernel may keep it back until it must write
		err = unix.Fsync(fd)
	}
	require.ErrorIs(t, err, unix.EBADMSG)
	_, err = unix.Pwrite(fd, []byte("fine"), 2*block)
	require.NoError(t, err)
	require.NoError(t, unix.Ftruncate(fd, 5*block))
	require.NoError(t, unix.Fsync(fd))
	require.NoError(t, unix.Close(fd))
	v.Remount()
	want := harness.Noise(size)[:5*block]
	copy(want[2*block:], "fine")
	require.Equal(t, want, harness.ReadAt(t, v.Path("file"), 0, size))
}

// TestCopyUnderForeignKey: a copy that some other key wrapped is not even tried.
func TestCopyUnderForeignKey(t *testing.T) {
	e := harness.New(t)
	v := attacked(t, e)
	v.Damaged()
	localKey(e, "mallory")
	path := filepath.Join(v.Dir, "file")
	h, err := harness.HeaderOf(path)
	require.NoError(t, err)
	h.Copies[0].Key = "local:mallory"
	raw, err := h.Marshal()
	require.NoError(t, err)
	setHeader(t, path, raw)
	requireFsckSays(t, v, "file key")
	v.Mount()
	require.ErrorIs(t, harness.Try(v.Path("file"), unix.O_RDONLY, 0), unix.EKEYREJECTED)
	deletable(t, v, "file")
}

// TestNameAttacks moves and edits what carries encrypted names.
func TestNameAttacks(t *testing.T) {
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Mount()
	for _, dir := range []string{"a", "b", "c", "d"} {
		require.NoError(t, os.Mkdir(v.Path(dir), 0o700))
		require.NoError(t, os.WriteFile(v.Path(dir, "file"), []byte(dir), 0o600))
	}
	long := strings.Repeat("long", 60)
	require.NoError(t, os.WriteFile(v.Path("a", long), []byte("long"), 0o600))
	stored := map[string]string{}
	for _, dir := range []string{"a", "b", "c", "d"} {
		stored[dir] = v.Stored(dir, "file")
	}
	storedLong := v.Stored("a", long)
	v.Umount()
	v.Damaged()

	// A name moved to another directory, a name invented, a long name alone.
	moved := filepath.Join(filepath.Dir(stored["b"]), "moved."+filepath.Base(stored["a"])[6:])
	require.NoError(t, os.Rename(stored["a"], moved))
	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(stored["b"]), "invented"), []byte("junk"), 0o600))
	require.NoError(t, os.Remove(storedLong+".n"))
	swapIDs(t, filepath.Dir(stored["c"]), filepath.Dir(stored["d"]))
	name := func(path string) string { return "kmsfs.damaged." + filepath.Base(path) + " name" }
	requireFsckSays(t, v, "b/"+name(moved), "b/kmsfs.damaged.invented name", "b/kmsfs.damaged.invented header",
		"a/"+name(storedLong), "c/"+name(stored["c"]), "d/"+name(stored["d"]), "b/kmsfs.damaged.invented end")
	v.Mount()

	names := readdir(t, v.Path("b"))
	require.Contains(t, names, "file")
	require.Len(t, names, 3)
	for _, name := range append(names, readdir(t, v.Path("a"))...) {
		if name != "file" {
			require.True(t, strings.HasPrefix(name, "kmsfs.damaged."), "%q is shown as if it were right", name)
		}
	}
	require.Len(t, readdir(t, v.Path("a")), 1)
	for _, dir := range []string{"c", "d"} { // swapped ids: the names can't be read in either
		for _, name := range readdir(t, v.Path(dir)) {
			require.True(t, strings.HasPrefix(name, "kmsfs.damaged."), "%q", name)
		}
		_, err := os.Stat(v.Path(dir, "file"))
		require.Error(t, err)
	}
	require.Equal(t, "b", string(harness.ReadAt(t, v.Path("b", "file"), 0, 10)))
	e.Shell(`cd "$1"; ls -lR . >/dev/null; rm -r a b c d; test -z "$(ls -A)"`, v.Mnt)
	entries, err := os.ReadDir(v.Dir)
	require.NoError(t, err)
	for _, entry := range entries {
		require.True(t, strings.HasPrefix(entry.Name(), "kmsfs."), "%s is left in the backing directory", entry.Name())
	}
}

func readdir(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func swapIDs(t *testing.T, a, b string) {
	t.Helper()
	const xattr = "user.kmsfs.dir"
	get := func(path string) []byte {
		buf := make([]byte, 4096)
		n, err := unix.Getxattr(path, xattr, buf)
		require.NoError(t, err, path)
		return buf[:n]
	}
	x, y := get(a), get(b)
	require.NoError(t, unix.Setxattr(a, xattr, y, 0))
	require.NoError(t, unix.Setxattr(b, xattr, x, 0))
}

// TestForgedDirectoryID: an id that was not made under the volume key is damage.
func TestForgedDirectoryID(t *testing.T) {
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Mount()
	require.NoError(t, os.Mkdir(v.Path("dir"), 0o700))
	require.NoError(t, os.WriteFile(v.Path("dir", "file"), []byte("x"), 0o600))
	stored := v.Stored("dir")
	v.Umount()
	v.Damaged()
	require.NoError(t, unix.Setxattr(stored, "user.kmsfs.dir", make([]byte, 48), 0))
	requireFsckSays(t, v, "dir directory-id")
	v.Mount()
	_, err := os.ReadFile(v.Path("dir", "file"))
	require.Error(t, err)
	e.Shell(`rm -r "$1/dir"`, v.Mnt)
}

// TestNotDetected shows what no scheme of this kind notices; SECURITY.md lists
// it. A test here that begins to fail is good news, and a change of that list.
func TestNotDetected(t *testing.T) {
	noise := harness.Noise(size)
	reads := func(t *testing.T, v *harness.Volume, name string, want []byte) {
		t.Helper()
		require.Equal(t, want, harness.ReadAt(t, v.Path(name), 0, len(want)+1), name)
	}
	rows := []struct {
		name   string
		attack func(t *testing.T, v *harness.Volume, file, other string)
		after  func(t *testing.T, v *harness.Volume)
	}{
		{"files swapped", func(t *testing.T, _ *harness.Volume, file, other string) {
			exchange(t, file, other)
		}, func(t *testing.T, v *harness.Volume) { reads(t, v, "other", noise) }},
		{"earlier block", func(t *testing.T, v *harness.Volume, file, _ string) {
			before := contents(t, file)
			v.Mount()
			harness.WriteAt(t, v.Path("file"), 3*block, []byte("newer"))
			v.Umount()
			harness.WriteAt(t, file, 3*record, before[3*record:4*record])
		}, func(t *testing.T, v *harness.Volume) { reads(t, v, "file", noise) }},
		{"earlier end", func(t *testing.T, v *harness.Volume, file, _ string) {
			before := contents(t, file)
			v.Mount()
			harness.WriteAt(t, v.Path("file"), size, harness.Noise(3*block))
			v.Umount()
			harness.WriteAt(t, file, blocks*record, before[blocks*record:])
			require.NoError(t, os.Truncate(file, int64(len(before))))
		}, func(t *testing.T, v *harness.Volume) { reads(t, v, "file", noise) }},
		{"zeroed block of a sparse file", func(t *testing.T, v *harness.Volume, file, _ string) {
			v.Mount()
			require.NoError(t, os.Truncate(v.Path("file"), 8<<20)) // a hole of this size is declared
			v.Umount()
			harness.WriteAt(t, file, 3*record, make([]byte, record))
		}, func(t *testing.T, v *harness.Volume) {
			require.Equal(t, make([]byte, block), harness.ReadAt(t, v.Path("file"), 3*block, block))
		}},
		{"file cloned", func(t *testing.T, v *harness.Volume, file, _ string) {
			v.Env.Do("cp", "-a", file, file+"2")
		}, func(t *testing.T, v *harness.Volume) { reads(t, v, "file2", noise) }},
		{"cut to nothing", func(t *testing.T, _ *harness.Volume, file, _ string) {
			require.NoError(t, os.Truncate(file, 0))
		}, func(t *testing.T, v *harness.Volume) { reads(t, v, "file", []byte{}) }},
		{"deleted", func(t *testing.T, _ *harness.Volume, file, _ string) {
			require.NoError(t, os.Remove(file))
		}, func(t *testing.T, v *harness.Volume) { require.Equal(t, []string{"other"}, readdir(t, v.Mnt)) }},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			v := attacked(t, harness.New(t))
			v.Damaged()
			r.attack(t, v, filepath.Join(v.Dir, "file"), filepath.Join(v.Dir, "other"))
			if r.name == "file cloned" { // the one thing that a check can tell
				requireFsckSays(t, v, "file duplicate-file-id", "file2 duplicate-file-id")
			} else {
				requireFsckDamage(t, v, "", damage{size: 1})
			}
			v.Mount()
			r.after(t, v)
		})
	}
	t.Run("symlink targets moved", func(t *testing.T) {
		v := local(t)
		v.Damaged()
		require.NoError(t, os.Symlink("to-a", v.Path("a")))
		require.NoError(t, os.Symlink("to-b", v.Path("b")))
		a, b := v.Stored("a"), v.Stored("b")
		v.Umount()
		exchange(t, a, b)
		v.Mount()
		target, err := os.Readlink(v.Path("a"))
		require.NoError(t, err)
		require.Equal(t, "to-b", target)
	})
	t.Run("attribute values moved", func(t *testing.T) {
		v := local(t)
		v.Damaged()
		stored := map[string]string{}
		for _, name := range []string{"a", "b"} {
			require.NoError(t, os.WriteFile(v.Path(name), nil, 0o600))
			require.NoError(t, unix.Setxattr(v.Path(name), "user.x", []byte("of "+name), 0))
			stored[name] = v.Stored(name)
		}
		v.Umount()
		for name, value := range harness.Xattrs(t, stored["b"]) {
			require.NoError(t, unix.Setxattr(stored["a"], name, []byte(value), 0))
		}
		v.Mount()
		require.Equal(t, map[string]string{"user.x": "of b"}, harness.Xattrs(t, v.Path("a")))
	})
}

func exchange(t *testing.T, a, b string) {
	t.Helper()
	require.NoError(t, unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE))
}

func contents(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	return raw
}

// TestPlantedThings: FIFOs, devices and symlinks planted in the backing directory
// in the place of a file don't hang the mount or lead it outside.
func TestPlantedThings(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(outside, []byte("secret"), 0o600))
	for name, plant := range map[string]func(path string) error{
		"fifo":         func(path string) error { return unix.Mkfifo(path, 0o600) },
		"symlink":      func(path string) error { return os.Symlink(outside, path) },
		"directory":    func(path string) error { return os.Mkdir(path, 0o700) },
		"device":       func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
		"plain file":   func(path string) error { return os.WriteFile(path, []byte("secret"), 0o600) },
		"another link": func(path string) error { return os.Link(outside, path) },
	} {
		t.Run(name, func(t *testing.T) {
			v := local(t)
			v.Damaged()
			require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(9000), 0o600))
			v.Remount()
			// The kernel knows it as a file now.
			require.Equal(t, harness.Noise(9000)[:10], harness.ReadAt(t, v.Path("file"), 0, 10))
			stored := v.Stored("file")
			require.NoError(t, os.Rename(stored, filepath.Join(v.Env.Root, "kept")))
			require.NoError(t, plant(stored))
			for range 2 { // the second time the kernel may have looked again
				done := make(chan string, 1)
				go func() { done <- tryRead(v.Path("file")) }()
				require.True(t, harness.Eventually(slack, func() bool { return len(done) == 1 }), "the open hangs")
				require.NotContains(t, <-done, "secret")
			}
			v.Env.Shell(`ls -la "$1" || true; rm -rf "$1/file"; test -z "$(ls -A "$1")"`, v.Mnt)
		})
	}
	content, err := os.ReadFile(outside)
	require.NoError(t, err)
	require.Equal(t, "secret", string(content))
}

// tryRead reads what it can without waiting for the other end of a FIFO.
func tryRead(path string) string {
	fd, err := harness.Open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	p := make([]byte, 100)
	n, _ := unix.Read(fd, p)
	return string(p[:max(n, 0)])
}
