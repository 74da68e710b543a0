package fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

var bothModes = []volume.NamesMode{volume.NamesEncrypted, volume.NamesPlain}

// furnish makes one of everything that is lawful.
func (s *stage) furnish() {
	s.t.Helper()
	v := s.unlocked()
	defer v.Close()
	root := s.root(v)
	s.file(root, "file", size)
	s.file(root, "other", size)
	s.file(root, strings.Repeat("long", 60), 5000)
	for _, n := range []int{1, block - 1, block, block + 1, 3 << 20} {
		s.file(root, fmt.Sprint(n), n)
	}
	sub := s.mkdir(root, "sub")
	s.mkdir(root, strings.Repeat("dir", 70))
	s.file(sub, "below", size)
	require.NoError(s.t, sub.Symlink("the target", "link"))
	require.NoError(s.t, sub.Mknod("fifo", unix.S_IFIFO|0o600, 0))
	require.NoError(s.t, sub.Mknod("empty", unix.S_IFREG|0o600, 0))
	fd, err := sub.OpenPath("below")
	require.NoError(s.t, err)
	defer unix.Close(fd)
	require.NoError(s.t, root.Link(fd, "second name"))
	require.NoError(s.t, v.Setxattr(fd, "user.mine", []byte("value"), 0))
	require.NoError(s.t, v.Setxattr(v.Fd(), "user.of-the-root", []byte("value"), 0))
	s.sparse(root, "sparse")
}

// sparse makes a file with a declared hole of 8 MiB between two blocks.
func (s *stage) sparse(d *volume.Dir, name string) string {
	s.t.Helper()
	fd, err := d.Create(name, unix.O_RDWR|unix.O_EXCL, 0o644)
	require.NoError(s.t, err)
	defer unix.Close(fd)
	s.write(fd, func(f *crypt.File) {
		_, err := f.WriteAt(noise(block), 0)
		require.NoError(s.t, err)
		require.NoError(s.t, f.Truncate(8<<20))
		_, err = f.WriteAt(noise(100), 8<<20)
		require.NoError(s.t, err)
	})
	return s.stored(d, name)
}

// A clean volume has no finding, at any depth of the check, and is not touched.
func TestClean(t *testing.T) {
	for _, names := range bothModes {
		s := newStage(t, names)
		s.furnish()
		diff := s.frozen()
		found, r := s.check(Options{Data: true})
		require.Empty(t, found)
		require.EqualValues(t, 10, r.Files, "a file with two links counts once")
		require.EqualValues(t, 10, r.Opened)
		require.EqualValues(t, 10, s.vault.calls, "one question to the key service a file")
		require.EqualValues(t, 1, r.Empty)
		require.EqualValues(t, 2, r.Dirs)
		require.EqualValues(t, 1, r.Symlinks)
		require.EqualValues(t, 1, r.Others)
		require.EqualValues(t, 3*size+5000+1+3*block+3<<20+8<<20+100, r.Bytes, "every byte is read, holes too")
		found, r = s.check(Options{})
		require.Empty(t, found)
		require.Zero(t, r.Bytes)
		require.Empty(t, s.keyless())
		require.Empty(t, diff())
	}
}

// An attack on stored contents, and what a check with --data must find: exactly that.
var contentsRows = []struct {
	name   string
	attack func(raw, other []byte) []byte
	want   []string // after the path
	quick  []string // without --data; nil: the same as want
}{
	{"nothing", func(raw, _ []byte) []byte { return raw }, nil, nil},
	{"swapped blocks", func(raw, _ []byte) []byte {
		a, b := bytes.Clone(rec(raw, 2)), bytes.Clone(rec(raw, 5))
		copy(rec(raw, 2), b)
		copy(rec(raw, 5), a)
		return raw
	}, []string{span(2, 3), span(5, 6)}, []string{}},
	{"block of another file", func(raw, other []byte) []byte { copy(rec(raw, 3), rec(other, 3)); return raw }, []string{span(3, 4)}, []string{}},
	{"tail of another file", func(raw, other []byte) []byte { copy(rec(raw, 10), rec(other, 10)); return raw }, []string{endSpan(10)}, nil},
	{"zeroed block", func(raw, _ []byte) []byte { clear(rec(raw, 6)); return raw }, []string{span(6, 7)}, []string{}},
	{"zeroed blocks", func(raw, _ []byte) []byte { clear(raw[record : 4*record]); return raw }, []string{span(1, 4)}, []string{}},
	{"all zeroed", func(raw, _ []byte) []byte { clear(raw); return raw }, []string{span(0, 10), endSpan(10)}, []string{endSpan(10)}},
	{"epoch flipped", flip(2*record + 1), []string{span(2, 3)}, []string{}},
	{"nonce flipped", flip(2*record + 7), []string{span(2, 3)}, []string{}},
	{"ciphertext flipped", flip(2*record + 500), []string{span(2, 3)}, []string{}},
	{"tag flipped", flip(3*record - 1), []string{span(2, 3)}, []string{}},
	{"tail flipped", flip(10*record + 40), []string{endSpan(10)}, nil},
	{"tail torn", func(raw, _ []byte) []byte { return raw[:10*record+20] }, []string{"end 36864-40960"}, nil},
	{"tail cut to an empty record", func(raw, _ []byte) []byte { return raw[:10*record+32] }, []string{"end 36864-40960"}, nil},
	{"cut at a boundary", func(raw, _ []byte) []byte { return raw[:6*record] }, []string{"end 20480-24576"}, nil},
	{"cut in a block", func(raw, _ []byte) []byte { return raw[:6*record+1000] }, []string{"end 24576-25544"}, nil},
	{"cut to a byte", func(raw, _ []byte) []byte { return raw[:1] }, []string{"end 0-0"}, nil},
	{"grown by zeros", func(raw, _ []byte) []byte { return append(raw, make([]byte, 50)...) }, []string{"end 40960-41110"}, nil},
	{"a block taken out", func(raw, _ []byte) []byte { return append(raw[:3*record:3*record], raw[4*record:]...) },
		[]string{span(3, 9), "end 36864-36964"}, []string{"end 36864-36964"}},
}

func rec(raw []byte, i int) []byte { return raw[i*record : min((i+1)*record, len(raw))] }
func span(from, to int) string     { return fmt.Sprintf("data %d-%d", from*block, to*block) }
func endSpan(b int) string         { return fmt.Sprintf("end %d-%d", b*block, size) }
func flip(at int) func(raw, _ []byte) []byte {
	return func(raw, _ []byte) []byte { raw[at] ^= 0x10; return raw }
}

// Damaged contents are told by path and range, and nothing else is.
func TestContents(t *testing.T) {
	for i, r := range contentsRows {
		t.Run(r.name, func(t *testing.T) {
			s := newStage(t, bothModes[i%2])
			v := s.unlocked()
			root := s.root(v)
			sub := s.mkdir(root, "sub")
			file, other := s.file(sub, "file", size), s.file(root, "other", size)
			theirs, err := os.ReadFile(other)
			require.NoError(t, err)
			s.rewrite(file, func(raw []byte) []byte { return r.attack(raw, theirs) })
			diff := s.frozen()
			found, _ := s.check(Options{Data: true})
			require.ElementsMatch(t, at("sub/file", r.want), found)
			found, _ = s.check(Options{})
			quick := r.quick
			if quick == nil {
				quick = r.want
			}
			require.ElementsMatch(t, at("sub/file", quick), found)
			require.Empty(t, diff(), "it was only looked at")
		})
	}
}

func at(path string, list []string) []string {
	out := []string{}
	for _, text := range list {
		out = append(out, path+" "+text)
	}
	return out
}

// A hole without a mark is damage, however large, and reading it takes no time; with
// the mark it is none.
func TestHoles(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	root := s.root(s.unlocked())
	file, sparse := s.file(root, "file", size), s.sparse(root, "sparse")
	require.NoError(t, os.Truncate(file, 1<<43))
	found, _ := s.check(Options{Data: true})
	plain := crypt.PlainSize(1<<43, block)
	require.Equal(t, []string{
		fmt.Sprintf("file data 40960-%d", plain/block*block),
		fmt.Sprintf("file end %d-%d", plain/block*block, plain),
	}, found, "the old tail reads as a block now")
	// Of the hole, the block at its end holds sealed zeros.
	require.NoError(t, unix.Removexattr(sparse, crypt.SparseXattr))
	require.NoError(t, os.Remove(file))
	found, _ = s.check(Options{Data: true})
	require.Equal(t, []string{fmt.Sprintf("sparse data %d-%d", block, 8<<20-block)}, found)
	s.setXattr(sparse, crypt.SparseXattr, make([]byte, 32))
	found, _ = s.check(Options{Data: true})
	require.Equal(t, []string{fmt.Sprintf("sparse data %d-%d", block, 8<<20-block), "sparse sparse-mark"}, found)
}

func seal(raw []byte) []byte {
	body := raw[:len(raw)-4]
	return binary.LittleEndian.AppendUint32(body, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
}

// Headers that are none, or not this file's. keyless says what is found without keys.
func TestHeaders(t *testing.T) {
	foreign := newStage(t, volume.NamesPlain)
	alien := foreign.xattr(foreign.file(foreign.root(foreign.unlocked()), "file", 9000), crypt.HeaderXattr)
	edit := func(f func(raw []byte)) func(_ *stage, raw, _ []byte) []byte {
		return func(_ *stage, raw, _ []byte) []byte { f(raw); return seal(raw) }
	}
	rows := []struct {
		name          string
		harm          func(s *stage, raw, other []byte) []byte // nil: no header
		want, keyless []string
	}{
		{"stripped", func(*stage, []byte, []byte) []byte { return nil }, []string{"header"}, []string{"header"}},
		{"other version", edit(func(raw []byte) { raw[4]++ }), []string{"header"}, []string{"header"}},
		{"downgraded", edit(func(raw []byte) { raw[4] = 0 }), []string{"header"}, []string{"header"}},
		{"unknown suite", edit(func(raw []byte) { raw[5]++ }), []string{"header"}, []string{"header"}},
		{"other block size", edit(func(raw []byte) { raw[8]++ }), []string{"header"}, []string{"header"}},
		{"other use", edit(func(raw []byte) { raw[9] = 2 }), []string{"header"}, []string{"header"}},
		{"truncated", func(_ *stage, raw, _ []byte) []byte { return raw[:len(raw)/2] }, []string{"header"}, []string{"header"}},
		{"bit flipped", func(_ *stage, raw, _ []byte) []byte { raw[60] ^= 1; return raw }, []string{"header"}, []string{"header"}},
		{"of another volume", func(*stage, []byte, []byte) []byte { return alien }, []string{"header"}, []string{"header"}},
		{"commitment changed", edit(func(raw []byte) { raw[60] ^= 1 }), []string{"key"}, nil},
		{"file id changed", edit(func(raw []byte) { raw[30] ^= 1 }), []string{"key"}, nil},
		{"planted", func(_ *stage, _, other []byte) []byte { return other },
			[]string{"data 0-40960", "duplicate-file-id", endSpan(10)}, []string{"duplicate-file-id"}},
		{"copy under a foreign key", func(s *stage, raw, _ []byte) []byte {
			h, err := crypt.ParseHeader(raw)
			require.NoError(s.t, err)
			h.Copies[0].Key = "local:mallory"
			raw, err = h.Marshal()
			require.NoError(s.t, err)
			return raw
		}, []string{"key"}, nil},
	}
	for i, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			s := newStage(t, bothModes[i%2])
			root := s.root(s.unlocked())
			file, other := s.file(root, "file", size), s.file(root, "other", size)
			raw := r.harm(s, s.xattr(file, crypt.HeaderXattr), s.xattr(other, crypt.HeaderXattr))
			if raw == nil {
				require.NoError(t, unix.Removexattr(file, crypt.HeaderXattr))
			} else {
				s.setXattr(file, crypt.HeaderXattr, raw)
			}
			want, keyless := at("file", r.want), at(filepath.Base(file), r.keyless)
			if r.name == "planted" { // its owner has a twin now
				want, keyless = append(want, "other duplicate-file-id"), append(keyless, filepath.Base(other)+" duplicate-file-id")
			}
			found, _ := s.check(Options{Data: true})
			require.ElementsMatch(t, want, found)
			require.ElementsMatch(t, keyless, s.keyless())
		})
	}
}

// A file with no bytes is fine whatever header or mark it carries.
func TestEmptyFilesNeedNothing(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	root := s.root(s.unlocked())
	file, other := s.file(root, "file", size), s.file(root, "other", size)
	require.NoError(t, os.Truncate(file, 0))
	s.setXattr(file, crypt.HeaderXattr, s.xattr(other, crypt.HeaderXattr))
	found, r := s.check(Options{Data: true})
	require.Empty(t, found)
	require.EqualValues(t, 1, r.Empty)
	s.setXattr(file, crypt.HeaderXattr, []byte("nonsense"))
	require.Empty(t, s.keyless())
}

// Names, directory ids, symlinks and attributes.
func TestNames(t *testing.T) {
	long := strings.Repeat("long", 60)
	type tree struct {
		*stage
		a, b, fileA, fileB, long, link string // where they lie
	}
	rows := []struct {
		name   string
		attack func(s *tree)
		want   []string
		blind  int // how many findings there are without keys
	}{
		{"nothing", func(*tree) {}, nil, 0},
		{"name moved to another directory", func(s *tree) {
			require.NoError(s.t, os.Rename(s.fileA, filepath.Join(s.b, filepath.Base(s.fileA))))
		}, []string{"b/kmsfs.damaged.FILE-A name"}, 0},
		{"name invented", func(s *tree) { s.file(s.root(s.unlocked()), "x", 10); s.plant("x", "invented") }, []string{"kmsfs.damaged.invented name"}, 1},
		{"name of the right form invented", func(s *tree) {
			s.file(s.root(s.unlocked()), "x", 10)
			s.plant("x", strings.Repeat("A", 40))
		}, []string{"kmsfs.damaged." + strings.Repeat("A", 40) + " name"}, 0},
		{"sidecar gone", func(s *tree) { require.NoError(s.t, os.Remove(s.long+".n")) }, []string{"a/kmsfs.damaged.LONG name"}, 1},
		{"sidecar of another name", func(s *tree) {
			require.NoError(s.t, os.Remove(s.long+".n"))
			require.NoError(s.t, os.Symlink(strings.Repeat("A", 300), s.long+".n"))
		}, []string{"a/kmsfs.damaged.LONG name"}, 1},
		{"entry of a sidecar gone", func(s *tree) { require.NoError(s.t, os.Remove(s.long)) }, []string{"a/SIDECAR sidecar untidy"}, 1},
		{"directory id forged", func(s *tree) { s.setXattr(s.a, volume.DirXattr, make([]byte, 48)) }, []string{"a directory-id"}, 0},
		{"directory id cut", func(s *tree) { s.setXattr(s.a, volume.DirXattr, make([]byte, 47)) }, []string{"a directory-id"}, 1},
		{"directory id gone", func(s *tree) { require.NoError(s.t, unix.Removexattr(s.a, volume.DirXattr)) }, []string{"a directory-id"}, 1},
		{"id of an empty directory gone", func(s *tree) {
			sub := s.mkdir(s.root(s.unlocked()), "c")
			at, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", sub.Fd()))
			require.NoError(s.t, err)
			require.NoError(s.t, unix.Removexattr(at, volume.DirXattr))
		}, []string{"c directory-id untidy"}, 1},
		{"directory id duplicated", func(s *tree) { s.setXattr(s.b, volume.DirXattr, s.xattr(s.a, volume.DirXattr)) },
			[]string{"a duplicate-directory-id", "b duplicate-directory-id", "b/kmsfs.damaged.FILE-B name"}, 2},
		{"directory ids swapped", func(s *tree) {
			a, b := s.xattr(s.a, volume.DirXattr), s.xattr(s.b, volume.DirXattr)
			s.setXattr(s.a, volume.DirXattr, b)
			s.setXattr(s.b, volume.DirXattr, a)
		}, []string{"a/kmsfs.damaged.FILE-A name", "a/kmsfs.damaged.LONG name", "a/kmsfs.damaged.LINK name", "b/kmsfs.damaged.FILE-B name"}, 0},
		{"symlink planted", func(s *tree) {
			require.NoError(s.t, os.Remove(s.link))
			require.NoError(s.t, os.Symlink("/etc/passwd", s.link))
		}, []string{"a/link symlink"}, 0},
		{"attribute name planted", func(s *tree) { s.setXattr(s.fileA, crypt.UserXattrPrefix+"QUJD", []byte("v")) }, []string{"a/file xattr"}, 0},
		{"attribute value edited", func(s *tree) {
			for _, name := range strings.Split(strings.TrimRight(s.list(s.fileA), "\x00"), "\x00") {
				if strings.HasPrefix(name, crypt.UserXattrPrefix) {
					s.setXattr(s.fileA, name, []byte("0123456789abcdefgh"))
				}
			}
		}, []string{"a/file xattr"}, 0},
		{"attribute in plain planted", func(s *tree) { s.setXattr(s.a, "user.stray", []byte("v")) }, []string{"a xattr untidy"}, 0},
		{"attribute of the root planted", func(s *tree) { s.setXattr(s.dir, crypt.UserXattrPrefix+"QUJD", []byte("v")) }, []string{". xattr"}, 0},
		{"file cloned", func(s *tree) {
			s.file(s.root(s.unlocked()), "twin", size)
			raw, err := os.ReadFile(s.fileA)
			require.NoError(s.t, err)
			twin := s.stored(s.root(s.unlocked()), "twin")
			s.rewrite(twin, func([]byte) []byte { return raw })
			s.setXattr(twin, crypt.HeaderXattr, s.xattr(s.fileA, crypt.HeaderXattr))
		}, []string{"a/file duplicate-file-id", "twin duplicate-file-id"}, 2},
		{"device planted under a made-up name", func(s *tree) {
			require.NoError(s.t, unix.Mknod(filepath.Join(s.dir, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		}, []string{"kmsfs.damaged.null name"}, 1},
		{"fifo planted as a sidecar", func(s *tree) {
			require.NoError(s.t, os.Remove(s.long+".n"))
			require.NoError(s.t, unix.Mkfifo(s.long+".n", 0o600))
		}, []string{"a/kmsfs.damaged.LONG name", "a/kmsfs.damaged.SIDECAR name"}, 2},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			s := &tree{stage: newStage(t, volume.NamesEncrypted)}
			v := s.unlocked()
			root := s.root(v)
			a, b := s.mkdir(root, "a"), s.mkdir(root, "b")
			s.fileA, s.fileB, s.long = s.file(a, "file", size), s.file(b, "file", size), s.file(a, long, 10)
			require.NoError(t, a.Symlink("target", "link"))
			s.a, s.b, s.link = filepath.Dir(s.fileA), filepath.Dir(s.fileB), s.stored(a, "link")
			fd, err := a.OpenPath("file")
			require.NoError(t, err)
			defer unix.Close(fd)
			require.NoError(t, v.Setxattr(fd, "user.mine", []byte("mine"), 0))
			r.attack(s)
			want := []string{}
			sub := strings.NewReplacer("FILE-A", filepath.Base(s.fileA), "FILE-B", filepath.Base(s.fileB), "LONG", filepath.Base(s.long),
				"SIDECAR", filepath.Base(s.long)+".n", "LINK", filepath.Base(s.link))
			for _, text := range r.want {
				want = append(want, sub.Replace(text))
			}
			diff := s.frozen()
			found, _ := s.check(Options{Data: true})
			require.ElementsMatch(t, want, found)
			require.Len(t, s.keyless(), r.blind)
			require.Empty(t, diff())
		})
	}
}

func (s *stage) list(path string) string {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	require.NoError(s.t, err)
	return string(buf[:n])
}

// plant gives the entry of a plain name in the root a stored name.
func (s *stage) plant(name, stored string) {
	s.t.Helper()
	require.NoError(s.t, os.Rename(s.stored(s.root(s.unlocked()), name), filepath.Join(s.dir, stored)))
}
