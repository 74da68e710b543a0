package fs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// An oracle does random things to the mount and to a plain directory beside it:
// results, errnos, contents and attributes must agree.
type oracle struct {
	t     *testing.T
	r     *rand.Rand
	roots [2]string // mount, plain directory
	open  map[string][2]int
	log   []string
}

var oracleNames = []string{"a", "b", "c", "d/a", "d/b", "d", "e", "e/a", strings.Repeat("long", 60), "d/" + strings.Repeat("x", 255)}

func TestOracle(t *testing.T) {
	for _, mode := range []volume.NamesMode{volume.NamesEncrypted, volume.NamesPlain} {
		for seed := range uint64(4) {
			writeback := seed%2 == 0
			t.Run(fmt.Sprintf("%s/%d", mode, seed), func(t *testing.T) {
				w := newWorld(t, func(s *setup) { s.names, s.opts.Writeback = mode, writeback })
				o := &oracle{t: t, r: rand.New(rand.NewPCG(7, seed)), roots: [2]string{w.mnt, t.TempDir()}, open: make(map[string][2]int)}
				for range 5 {
					for range 300 {
						o.step()
					}
					o.closeAll()
					o.compare()
					w.remount()
					o.compare()
				}
			})
		}
	}
}

// both does op on both sides and compares the errors.
func (o *oracle) both(what string, op func(root string) error) bool {
	o.t.Helper()
	o.log = append(o.log, what)
	a, b := op(o.roots[0]), op(o.roots[1])
	if fmt.Sprint(bare(a)) != fmt.Sprint(bare(b)) {
		o.fail("%s: mount says %v, plain directory says %v", what, a, b)
	}
	return a == nil
}

func bare(err error) error {
	for {
		u, is := err.(interface{ Unwrap() error })
		if !is {
			return err
		}
		err = u.Unwrap()
	}
}

func (o *oracle) fail(format string, args ...any) {
	o.t.Helper()
	o.t.Fatalf("%s\nlast steps:\n%s", fmt.Sprintf(format, args...), strings.Join(o.log[max(0, len(o.log)-30):], "\n"))
}

func (o *oracle) name() string { return oracleNames[o.r.IntN(len(oracleNames))] }

func (o *oracle) step() {
	n, m := o.name(), o.name()
	switch o.r.IntN(16) {
	case 0:
		o.both("mkdir "+n, func(r string) error { return os.Mkdir(filepath.Join(r, n), 0o750) })
	case 1:
		o.both("rmdir "+n, func(r string) error { return unix.Rmdir(filepath.Join(r, n)) })
	case 2:
		o.both("unlink "+n, func(r string) error { return unix.Unlink(filepath.Join(r, n)) })
	case 3:
		flags := []uint{0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[o.r.IntN(3)]
		o.both(fmt.Sprintf("rename %s %s %d", n, m, flags), func(r string) error {
			return unix.Renameat2(unix.AT_FDCWD, filepath.Join(r, n), unix.AT_FDCWD, filepath.Join(r, m), flags)
		})
	case 4:
		o.both("link "+n+" "+m, func(r string) error { return unix.Link(filepath.Join(r, n), filepath.Join(r, m)) })
	case 5:
		o.both("symlink "+n, func(r string) error { return unix.Symlink("to/"+m, filepath.Join(r, n)) })
	case 6:
		size := o.size()
		o.both(fmt.Sprintf("truncate %s %d", n, size), func(r string) error { return unix.Truncate(filepath.Join(r, n), size) })
	case 7:
		mode := uint32(o.r.IntN(0o1000))
		o.both(fmt.Sprintf("chmod %s %o", n, mode), func(r string) error { return unix.Chmod(filepath.Join(r, n), mode) })
	case 8, 9:
		o.openBoth(n)
	default:
		o.useOpen()
	}
}

func (o *oracle) size() int64 {
	edges := []int64{0, 1, 100, 4095, 4096, 4097, 8192, 50_000, 1 << 20, 1<<20 + 5}
	return edges[o.r.IntN(len(edges))]
}

var oracleFlags = []int{unix.O_RDWR, unix.O_RDWR | unix.O_CREAT, unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC, unix.O_RDWR | unix.O_CREAT | unix.O_EXCL,
	unix.O_WRONLY | unix.O_APPEND, unix.O_RDONLY, unix.O_WRONLY | unix.O_CREAT}

func (o *oracle) openBoth(n string) {
	flags := oracleFlags[o.r.IntN(len(oracleFlags))]
	var fds []int
	if !o.both(fmt.Sprintf("open %s %#x", n, flags), func(r string) error {
		fd, err := unix.Open(filepath.Join(r, n), flags|unix.O_NOFOLLOW, 0o644)
		if err == nil {
			fds = append(fds, fd)
		}
		return err
	}) {
		return
	}
	key := fmt.Sprintf("%d:%s", o.r.IntN(4), n)
	o.close(key)
	o.open[key] = [2]int(fds)
}

func (o *oracle) close(key string) {
	for _, fd := range o.open[key] {
		if fd > 0 {
			require.NoError(o.t, unix.Close(fd))
		}
	}
	delete(o.open, key)
}

func (o *oracle) closeAll() {
	for key := range o.open {
		o.close(key)
	}
}

func (o *oracle) useOpen() {
	keys := make([]string, 0, len(o.open))
	for k := range o.open {
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return
	}
	slices.Sort(keys)
	key := keys[o.r.IntN(len(keys))]
	fds := o.open[key]
	var mode uint32
	off, n := o.size()+int64(o.r.IntN(50)), 1+o.r.IntN(20_000)
	data := randomBytes(n)
	var got [2][]byte
	o.log = append(o.log, fmt.Sprintf("on %s: off %d n %d", key, off, n))
	each := func(what string, op func(fd, side int) error) {
		o.both(what+" "+key, func(root string) error {
			side := slices.Index(o.roots[:], root)
			return op(fds[side], side)
		})
	}
	switch o.r.IntN(8) {
	case 0, 1:
		each("pwrite", func(fd, _ int) error { _, err := unix.Pwrite(fd, data, off); return err })
	case 2, 3:
		each("pread", func(fd, side int) error {
			buf := make([]byte, n)
			m, err := unix.Pread(fd, buf, off)
			got[side] = buf[:max(m, 0)]
			return err
		})
	case 4:
		each("ftruncate", func(fd, _ int) error { return unix.Ftruncate(fd, off) })
	case 5:
		mode = []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE}[o.r.IntN(4)]
		each(fmt.Sprintf("fallocate %d", mode), func(fd, _ int) error { return unix.Fallocate(fd, mode, off, int64(n)) })
	case 6:
		each("fsync", func(fd, _ int) error { return unix.Fsync(fd) })
	case 7:
		each("fstat", func(fd, side int) error {
			var st unix.Stat_t
			err := unix.Fstat(fd, &st)
			got[side] = fmt.Appendf(nil, "size %d nlink %d mode %o", st.Size, st.Nlink, st.Mode)
			return err
		})
	}
	if !bytes.Equal(got[0], got[1]) {
		o.fail("%s: the mount reads %d bytes, the plain directory %d, different ones", key, len(got[0]), len(got[1]))
	}
}

// compare walks both trees.
func (o *oracle) compare() {
	o.t.Helper()
	a, b := describe(o.t, o.roots[0]), describe(o.t, o.roots[1])
	if !slices.Equal(a, b) {
		require.Equal(o.t, b, a, "last steps:\n%s", strings.Join(o.log[max(0, len(o.log)-30):], "\n"))
	}
}

func describe(t *testing.T, root string) (all []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		require.NoError(t, err)
		rel, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(p, &st))
		line := fmt.Sprintf("%s mode %o nlink %d", rel, st.Mode, st.Nlink)
		switch {
		case rel == ".":
			return nil // made differently
		case d.Type().IsRegular():
			data, err := os.ReadFile(p)
			require.NoError(t, err)
			line += fmt.Sprintf(" size %d %x", st.Size, sum(data))
			require.EqualValues(t, st.Size, len(data))
		case d.Type()&os.ModeSymlink != 0:
			target, err := os.Readlink(p)
			require.NoError(t, err)
			line += fmt.Sprintf(" size %d -> %s", st.Size, target)
		}
		all = append(all, line)
		return nil
	}))
	return all
}

func sum(b []byte) (h uint64) {
	for _, c := range b {
		h = h*1099511628211 ^ uint64(c)
	}
	return h
}
