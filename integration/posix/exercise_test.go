package posix

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

var (
	exerciseSteps = flag.Int("exercise", 3000, "steps of TestExercise for each file system and seed; 100000 is a night's work")
	exerciseSeed  = flag.Uint64("exercise-seed", 1, "where TestExercise begins")
)

// backings are the file systems that a volume may lie on, each on a small disk of
// its own.
var backings = map[string][]string{
	"ext4": {"mkfs.ext4", "-q", "-F", "-I", "512"},
	"xfs":  {"mkfs.xfs", "-q", "-f"},
}

// disk makes a file system in a file, with further options of mkfs, and mounts it.
func disk(t *testing.T, e *harness.Env, kind string, size int64, options ...string) string {
	t.Helper()
	image, dir := filepath.Join(e.Root, kind+".img"), e.Mkdir(kind)
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, size))
	mkfs := slices.Concat(backings[kind], options, []string{image})
	e.Do(mkfs[0], mkfs[1:]...)
	e.Do("mount", "-o", "loop", image, dir)
	t.Cleanup(func() {
		out, err := exec.Command("umount", dir).CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
	require.NoError(t, os.Chmod(dir, 0o755))
	return dir
}

// volumeOn makes a volume with the arguments of kmsfs init on a disk of its own, and
// mounts it.
func volumeOn(t *testing.T, e *harness.Env, kind string, size int64, args ...string) *harness.Volume {
	t.Helper()
	disk(t, e, kind, size)
	e.Must("key", "create", "on-"+kind)
	v := e.Init(kind+"/volume", append(args, "--key", "local:on-"+kind)...)
	v.Mount()
	return v
}

// A kind of volume is one whose contents lie on the disk in a way of their own.
type volumeKind struct{ backing, names, block string }

func (k volumeKind) String() string { return k.backing + "," + k.names + "," + k.block }

func (k volumeKind) volume(t *testing.T, e *harness.Env, size int64) *harness.Volume {
	t.Helper()
	return volumeOn(t, e, k.backing, size, "--names", k.names, "--block-size", k.block)
}

// volumeKinds have each backing file system with the smallest and the largest
// blocks, and each of the two with both kinds of names.
var volumeKinds = []volumeKind{
	{"ext4", "encrypted", "4096"}, {"ext4", "plain", "65536"}, {"xfs", "plain", "4096"}, {"xfs", "encrypted", "65536"},
}

// TestExercise does random things to one file and to a plain one: results and
// contents must agree all the while, and after each remount. A failure names its
// seed and the last steps.
func TestExercise(t *testing.T) {
	for i, kind := range volumeKinds {
		t.Run(kind.String(), func(t *testing.T) {
			e := harness.New(t)
			v := kind.volume(t, e, 512<<20)
			seed := *exerciseSeed + uint64(i)
			x := &exercise{t: t, seed: *exerciseSeed, r: rand.New(rand.NewPCG(seed, 4)), paths: [2]string{v.Path("file"), filepath.Join(e.Root, "file")}}
			for range 3 {
				x.open()
				for range *exerciseSteps / 3 {
					x.step()
				}
				x.close()
				v.Remount()
			}
			x.open()
			x.compare()
			x.close()
		})
	}
}

// maxExercise bounds the file: several mebibytes, so that holes are declared.
const maxExercise = 6 << 20

// An exercise is one run on a pair of files: on the mount, and plain.
type exercise struct {
	t     *testing.T
	seed  uint64
	r     *rand.Rand
	paths [2]string
	fds   [2]int
	tail  [2]int // open to append
	raw   [2]int // open past the cache
	size  int64
	log   []string
}

func (x *exercise) open() {
	for i, p := range x.paths {
		var err error
		x.fds[i], err = harness.Open(p, unix.O_RDWR|unix.O_CREAT, 0o600)
		require.NoError(x.t, err)
		x.tail[i], err = harness.Open(p, unix.O_WRONLY|unix.O_APPEND, 0)
		require.NoError(x.t, err)
		x.raw[i], err = harness.Open(p, unix.O_RDWR|unix.O_DIRECT, 0)
		require.NoError(x.t, err)
	}
}

func (x *exercise) close() {
	for i := range x.fds {
		require.NoError(x.t, errors.Join(unix.Close(x.fds[i]), unix.Close(x.tail[i]), unix.Close(x.raw[i])), "%s", x)
	}
}

// String is what a failure says.
func (x *exercise) String() string {
	return fmt.Sprintf("-exercise-seed %d; the last steps:\n%s", x.seed, strings.Join(x.log[max(0, len(x.log)-40):], "\n"))
}

// both does op to both files; results must be the same.
func (x *exercise) both(what string, op func(i int) (int, error)) {
	x.t.Helper()
	x.log = append(x.log, what)
	n, err := op(0)
	m, plain := op(1)
	require.Equal(x.t, fmt.Sprint(m, errnoOf(plain)), fmt.Sprint(n, errnoOf(err)), "%s\n%s", what, x)
	var st unix.Stat_t
	require.NoError(x.t, unix.Fstat(x.fds[1], &st))
	x.size = st.Size
}

// span picks a range; many begin or end near a block's edge or the file's end.
func (x *exercise) span() (off int64, n int) {
	off, n = x.r.Int64N(maxExercise/2), 1+x.r.IntN(70_000)
	switch x.r.IntN(6) {
	case 0:
		off = off &^ 4095
	case 1:
		off, n = off&^4095, (n+4095)&^4095
	case 2:
		off = max(0, x.size-int64(x.r.IntN(5000)))
	case 3:
		off = x.size
	case 4:
		off, n = x.r.Int64N(20_000), 1+x.r.IntN(5000)
	}
	return min(off, maxExercise-1<<20), n
}

var allocateModes = []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE,
	unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE}

func (x *exercise) step() {
	off, n := x.span()
	at := fmt.Sprintf("%d at %d of %d", n, off, x.size)
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(x.r.Uint32())
	}
	switch x.r.IntN(17) {
	case 0, 1, 2:
		x.both("write "+at, func(i int) (int, error) { return unix.Pwrite(x.fds[i], data, off) })
	case 3:
		if x.size < maxExercise/2 {
			x.both("append "+at, func(i int) (int, error) { return unix.Write(x.tail[i], data) })
		}
	case 4, 5:
		x.read(at, off, n)
	case 6:
		x.both("truncate "+at, func(i int) (int, error) { return 0, unix.Ftruncate(x.fds[i], off) })
	case 7, 8:
		mode := allocateModes[x.r.IntN(len(allocateModes))]
		if x.r.IntN(4) == 0 {
			n += 2 << 20 // more than is filled with sealed zeros
		}
		x.both(fmt.Sprintf("fallocate %#x %d at %d of %d", mode, n, off, x.size), func(i int) (int, error) {
			return 0, unix.Fallocate(x.fds[i], mode, off, int64(n))
		})
	case 9, 10:
		x.mapped(at, off, data)
	case 11:
		x.copyRange(at, off, n)
	case 12:
		x.both("fsync", func(i int) (int, error) { return 0, unix.Fsync(x.fds[i]) })
	case 13:
		if x.r.IntN(10) == 0 {
			x.compare()
		}
	case 14:
		x.refused(off, n)
	case 15, 16:
		x.direct(off, data)
	}
}

func (x *exercise) read(at string, off int64, n int) {
	x.t.Helper()
	var got [2][]byte
	x.both("read "+at, func(i int) (int, error) {
		got[i] = make([]byte, n)
		return unix.Pread(x.fds[i], got[i], off)
	})
	x.same(got[0], got[1], off)
}

// mapped reads and writes through memory, inside the file.
func (x *exercise) mapped(at string, off int64, data []byte) {
	x.t.Helper()
	if off >= x.size {
		return
	}
	data = data[:min(int64(len(data)), x.size-off)]
	start := off &^ 4095
	store := x.r.IntN(2) == 0
	var got [2][]byte
	x.both(fmt.Sprintf("mmap, write %v, %s", store, at), func(i int) (int, error) {
		m, err := unix.Mmap(x.fds[i], start, int(off-start)+len(data), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return 0, err
		}
		got[i] = bytes.Clone(m[off-start:])
		if store {
			copy(m[off-start:], data)
		}
		return len(m), unix.Munmap(m)
	})
	x.same(got[0], got[1], off)
}

func (x *exercise) compare() {
	x.t.Helper()
	x.read("all", 0, maxExercise+1<<20)
}

func (x *exercise) same(got, want []byte, off int64) {
	x.t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		require.Equal(x.t, want[i], got[i], "byte %d\n%s", off+int64(i), x)
	}
}
