package integration

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// allowedKiB is what harm may cost in memory: 48 MiB, besides the 64 MiB of garbage that a
// daemon lets stand before it collects (heapFloor in cmd/kmsfs).
const allowedKiB = (48 + 64) << 10

// TestMutations harms a volume at random, some places at once, and uses all of it
// through fsck and a mount: nothing panics or hangs, each byte that can be read is the
// one that was written there, whatever can't be read says so by a documented errno,
// everything can be deleted, no key is used that is not trusted, and the memory that it
// takes is bounded. What no scheme of this kind notices (SECURITY.md, "Not detected") is
// done too, and the oracle knows of it.
//
// KMSFS_TEST_MUTATIONS is how many volumes to harm, KMSFS_TEST_SEED repeats one.
func TestMutations(t *testing.T) {
	rounds := fromEnv(t, "KMSFS_TEST_MUTATIONS", 16)
	if testing.Short() {
		rounds = min(rounds, 4)
	}
	first := uint64(time.Now().UnixNano())
	if s := os.Getenv("KMSFS_TEST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		first, rounds = n, 1
	}
	f := newFuzzed(t)
	f.round(nil) // what it takes when nothing is wrong
	f.most = f.peak + allowedKiB
	for i := range rounds {
		seed := first + uint64(i)
		f.name = fmt.Sprintf("KMSFS_TEST_SEED=%d", seed)
		f.round(rand.New(rand.NewPCG(seed, 3)))
	}
	require.NotZero(t, f.errors, "nothing was noticed of all the harm")
	t.Logf("mutations tried: %d in %d volumes (from KMSFS_TEST_SEED=%d on), bytes compared: %d, reads refused: %d, mounts refused: %d, wrong bytes: 0; the daemon took %d MiB at most, %d MiB unharmed",
		f.mutations, rounds, first, f.compared, f.errors, f.refused, f.peak>>10, (f.most-allowedKiB)>>10)
}

// A fuzzed is a volume that is harmed again and again, and what is known of it.
type fuzzed struct {
	t    *testing.T
	e    *harness.Env
	kms  *harness.KMS
	v    *harness.Volume
	key  string
	name string // how to repeat the round

	pristine string            // a copy of the backing directory
	files    map[string][]byte // by path: what is in it
	older    map[string][]byte // what was in it before
	links    map[string]string
	stored   map[string]string // by path: where it lies, beneath the backing directory

	rnd                                  *rand.Rand
	done                                 []string       // of this round
	lets                                 lets           // what of it can't be noticed
	good                                 map[string]int // by path: how many bytes could be read
	mutations, compared, errors, refused int
	peak, most                           int // KiB
}

func newFuzzed(t *testing.T) *fuzzed {
	t.Helper()
	e := harness.New(t)
	kms := e.KMS()
	f := &fuzzed{t: t, e: e, kms: kms, key: kms.NewKey(), files: map[string][]byte{}, older: map[string][]byte{},
		links: map[string]string{}, stored: map[string]string{}, pristine: filepath.Join(e.Root, "pristine")}
	f.v = e.Init("volume", "--key", f.key)
	f.v.Damaged()
	f.v.Mount()
	f.furnish()
	f.v.Umount()
	e.Do("cp", "-a", f.v.Dir, f.pristine)
	f.name = "unharmed"
	return f
}

// furnish makes a small tree, and for each file an older version of its blocks.
func (f *fuzzed) furnish() {
	t, v := f.t, f.v
	noise, at := harness.Noise(1<<20), 0
	for _, dir := range []string{"", "dir", filepath.Join("dir", longName), "empty"} {
		require.NoError(t, os.MkdirAll(v.Path(dir), 0o755))
		if dir == "empty" {
			continue
		}
		for _, n := range []int{1, 100, block - 1, block, block + 1, 3*block + 77, size} {
			path := filepath.Join(dir, fmt.Sprint("file", n))
			if n == 100 {
				path = filepath.Join(dir, longName+"file")
			}
			at += 8 // no two files begin alike
			require.NoError(t, os.WriteFile(v.Path(path), noise[at+n:at+2*n], 0o644))
			f.older[path] = bytes.Clone(noise[at+n : at+2*n])
			f.files[path] = noise[at : at+n]
		}
	}
	sparse := make([]byte, 3<<20)
	copy(sparse, noise[:9000])
	copy(sparse[2<<20:], noise[100:9100])
	require.NoError(t, os.WriteFile(v.Path("sparse"), sparse[:9000], 0o600))
	require.NoError(t, os.Truncate(v.Path("sparse"), 3<<20))
	harness.WriteAt(t, v.Path("sparse"), 2<<20, sparse[2<<20:2<<20+9000])
	f.files["sparse"] = sparse
	for i := range 2 {
		name := fmt.Sprint("link", i)
		f.links[name] = fmt.Sprint("target of ", i)
		require.NoError(t, os.Symlink(f.links[name], v.Path(name)))
		require.NoError(t, unix.Setxattr(v.Path("dir", fmt.Sprint("file", []int{1, block}[i])), "user.mine", fmt.Appendf(nil, "value %d", i), 0))
	}
	v.Remount()
	f.v.Env.Do("cp", "-a", v.Dir, f.pristine+".older")
	for path, p := range f.older { // under the same data key
		harness.WriteAt(t, v.Path(path), 0, f.files[path])
		_ = p
	}
	for path := range f.files {
		rel, err := filepath.Rel(v.Dir, v.Stored(path))
		require.NoError(t, err)
		f.stored[path] = rel
	}
	for path := range f.links {
		rel, err := filepath.Rel(v.Dir, v.Stored(path))
		require.NoError(t, err)
		f.stored[path] = rel
	}
}

// round harms a fresh copy of the volume and uses it; without rnd it is not harmed.
func (f *fuzzed) round(rnd *rand.Rand) {
	t := f.t
	f.rnd, f.done, f.lets, f.good = rnd, nil, 0, map[string]int{}
	f.restore()
	for n := 0; rnd != nil && n < 1+rnd.IntN(6); n++ {
		m := mutations[rnd.IntN(len(mutations))]
		if m.do(f) {
			f.done = append(f.done, m.name)
			f.mutations++
			f.lets |= m.lets
		}
	}
	unharmed := f.unharmed()
	f.kms.Reset()
	r := f.e.Kmsfs("fsck", f.v.Dir, "--data")
	f.sane(r, 0, statusUsage, statusDamaged, statusRefused)
	if r = f.v.TryMount(); r.Status != 0 {
		require.NotZero(t, f.lets&settings, "%s: a mount is refused, and kmsfs.toml is whole: %v", f.what(), r)
		f.sane(r, statusUsage, statusDamaged, statusRefused)
		f.refused++
		f.trusted()
		return
	}
	walked := make(chan string, 1)
	go func() { walked <- f.walk() }()
	select {
	case wrong := <-walked:
		require.Empty(t, wrong, f.what())
	case <-time.After(5 * time.Minute):
		t.Fatalf("%s: the mount hangs", f.what())
	}
	for _, path := range unharmed {
		require.Equal(t, len(f.files[path]), f.good[path], "%s: bytes of %s, where nothing was harmed", f.what(), path)
	}
	f.peak = max(f.peak, peakOf(t, f.v.Daemons()))
	if f.most > 0 {
		require.Less(t, f.peak, f.most, "%s: KiB of memory", f.what())
	}
	r = f.e.Run("bash", "-c", `rm -rf "$1"/* && test -z "$(ls -A "$1")"`, "bash", f.v.Mnt)
	require.Zero(t, r.Status, "%s: not everything can be deleted: %v", f.what(), r)
	require.Len(t, f.v.Daemons(), 1, "%s: the daemon has died", f.what())
	f.v.Umount()
	f.trusted()
}

func (f *fuzzed) what() string { return fmt.Sprintf("%s (%s)", f.name, strings.Join(f.done, ", ")) }

// sane: a run ended by one of these statuses, without a trace of a crash.
func (f *fuzzed) sane(r harness.Result, statuses ...int) {
	f.t.Helper()
	require.Contains(f.t, statuses, r.Status, "%s: %v", f.what(), r)
	for _, bad := range []string{"panic", "goroutine ", "%!"} {
		require.NotContains(f.t, r.Stderr, bad, f.what())
	}
	log, _ := os.ReadFile(filepath.Join(f.e.Root, "state", "kmsfs", "kmsfs.log"))
	require.NotContains(f.t, string(log), "panic", f.what())
}

// trusted: KMS was asked for the volume's key only. With a harmed kmsfs.toml a key of
// the same account may have been tried, since rekey may have moved the volume to it.
func (f *fuzzed) trusted() {
	f.t.Helper()
	for _, c := range f.kms.Calls() {
		if c.Error == "InvalidSignatureException" { // five minutes on its way: KMS looked at nothing else
			continue
		}
		if f.lets&settings != 0 {
			require.Contains(f.t, c.Key, kmstest.DefaultAccount, f.what())
			continue
		}
		require.Equal(f.t, f.key, c.Key, f.what())
	}
}

func (f *fuzzed) restore() {
	f.e.Shell(`find "$2" -mindepth 1 -delete; cp -a "$1"/. "$2"`, f.pristine, f.v.Dir)
}

// peakOf is the most memory that processes had so far, in KiB (proc_pid_status(5), VmHWM).
func peakOf(t *testing.T, pids []int) (kib int) {
	t.Helper()
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		require.NoError(t, err)
		_, rest, _ := strings.Cut(string(text), "VmHWM:")
		n, err := strconv.Atoi(strings.Fields(rest)[0])
		require.NoError(t, err)
		kib = max(kib, n)
	}
	return kib
}

// walk reads all that the mount shows, and says what is wrong with it.
func (f *fuzzed) walk() (wrong string) {
	seen := 0
	err := filepath.WalkDir(f.v.Mnt, func(path string, entry os.DirEntry, err error) error {
		if err != nil { // of a directory: all that may fail there is a read of its entries
			return f.refusal(path, err)
		}
		seen++
		rel, _ := filepath.Rel(f.v.Mnt, path)
		info, err := entry.Info()
		if err != nil {
			return f.refusal(path, err)
		}
		switch {
		case info.Mode().IsRegular():
			err = f.read(path, rel, info.Size())
		case info.Mode()&os.ModeSymlink != 0:
			err = f.readlink(path, rel)
		}
		if err == nil {
			err = f.xattrs(path)
		}
		return err
	})
	if err != nil {
		return err.Error()
	}
	if seen == 0 {
		return "the mount shows nothing"
	}
	return ""
}

// documented are the errnos that harm to the backing directory may end in: damage, a
// key that is not trusted, a name that is gone, and what is not a file any more.
var documented = []error{unix.EBADMSG, unix.EKEYREJECTED, unix.ENOENT, unix.ESTALE, unix.ELOOP, unix.ENXIO, unix.ENODATA, unix.ENOTDIR}

func (f *fuzzed) refusal(path string, err error) error {
	for _, e := range documented {
		if f.rnd != nil && errors.Is(err, e) {
			f.errors++
			return nil
		}
	}
	return fmt.Errorf("%s: %w", path, err)
}

// read compares a file block by block.
func (f *fuzzed) read(path, rel string, n int64) error {
	fd, err := harness.Open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return f.refusal(path, err)
	}
	defer unix.Close(fd)
	may := f.versions(rel)
	p := make([]byte, block)
	for at := int64(0); at < min(n, 64<<20); at += block { // a hole may have been made that is longer than a test
		m, err := unix.Pread(fd, p, at)
		if err != nil {
			if err := f.refusal(path, err); err != nil {
				return err
			}
			continue
		}
		may = slices.DeleteFunc(may, func(v []byte) bool { return !holds(v, p[:m], at) && !f.mixed(rel, p[:m], at) })
		if len(may) == 0 {
			return fmt.Errorf("%s: wrong bytes at %d", path, at)
		}
		f.compared += m
		f.good[rel] += m
	}
	return nil
}

// holds reports whether p stands at an offset of v, which may have been cut.
func holds(v, p []byte, at int64) bool {
	return at+int64(len(p)) <= int64(len(v)) && bytes.Equal(v[at:][:len(p)], p)
}

// versions are what a file may hold as a whole: what was written, or where that can't be
// noticed, another file.
func (f *fuzzed) versions(rel string) (may [][]byte) {
	if v, ok := f.files[rel]; ok {
		may = append(may, v)
	}
	if f.lets&others != 0 || len(may) == 0 { // moved to a name that can't be read, all is as it was
		for _, v := range f.files {
			may = append(may, v)
		}
	}
	return may
}

// mixed: a block of an earlier version, or one that was zeroed in a file that may have
// holes, can stand among others.
func (f *fuzzed) mixed(rel string, p []byte, at int64) bool {
	moved := f.lets&others != 0 || f.files[rel] == nil
	for path, v := range f.older {
		if f.lets&earlier != 0 && (path == rel || moved) && holds(v, p, at) {
			return true
		}
	}
	return f.lets&holes != 0 && (rel == "sparse" || moved) && len(bytes.Trim(p, "\x00")) == 0
}

// unharmed are the files on whose way nothing is changed: they, their attributes, and
// those of the directories that they are in.
func (f *fuzzed) unharmed() (paths []string) {
	same := func(rel string) bool {
		was, now := filepath.Join(f.pristine, rel), filepath.Join(f.v.Dir, rel)
		sidecar, _ := os.Readlink(was + ".n")
		found, _ := os.Readlink(now + ".n")
		a, errA := os.Lstat(was)
		b, errB := os.Lstat(now)
		return sidecar == found && errA == nil && errB == nil && a.Mode() == b.Mode() &&
			fmt.Sprint(harness.Xattrs(f.t, was)) == fmt.Sprint(harness.Xattrs(f.t, now))
	}
	for path := range f.files {
		rel := f.stored[path]
		if !isRegular(filepath.Join(f.v.Dir, rel)) {
			continue
		}
		was, _ := os.ReadFile(filepath.Join(f.pristine, rel))
		now, err := os.ReadFile(filepath.Join(f.v.Dir, rel))
		ok := err == nil && bytes.Equal(was, now)
		for at := rel; ok && at != "."; at = filepath.Dir(at) {
			ok = same(at)
		}
		if ok {
			paths = append(paths, path)
		}
	}
	return paths
}

func (f *fuzzed) readlink(path, rel string) error {
	target, err := os.Readlink(path)
	if err != nil {
		return f.refusal(path, err)
	}
	for name, to := range f.links {
		if to == target && (name == rel || f.lets&others != 0 || f.links[rel] == "") {
			return nil
		}
	}
	return fmt.Errorf("%s leads to %q", path, target)
}

func (f *fuzzed) xattrs(path string) error {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return f.refusal(path, err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 4096)
		m, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			if err := f.refusal(path, err); err != nil {
				return err
			}
			continue
		}
		if v := string(value[:m]); name != "user.mine" || v != "value 0" && v != "value 1" {
			return fmt.Errorf("%s has the attribute %s = %q", path, name, v)
		}
	}
	return nil
}

// A mutation harms the volume in one place, and reports whether there was one.
type mutation struct {
	name string
	do   func(f *fuzzed) bool
	lets lets
}

// lets is what of a mutation can't be noticed, or where it is done.
type lets int

const (
	holes    lets = 1 << iota // zeros in a file that may have holes
	earlier                   // a block as it was before
	others                    // a file or symlink in the place of another, or nothing
	settings                  // kmsfs.toml is harmed
)

// pick is a random file of the backing directory that has bytes, by its full path.
func (f *fuzzed) pick() string {
	all := make([]string, 0, len(f.files))
	for path := range f.files {
		if isRegular(filepath.Join(f.v.Dir, f.stored[path])) { // and not a FIFO by now
			all = append(all, path)
		}
	}
	if len(all) == 0 {
		return ""
	}
	slices.Sort(all)
	return filepath.Join(f.v.Dir, f.stored[all[f.rnd.IntN(len(all))]])
}

func isRegular(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular()
}

// entry is a random entry of the backing directory but kmsfs's own at the root.
func (f *fuzzed) entry(accept func(name string, mode os.FileMode) bool) string {
	var all []string
	_ = filepath.WalkDir(f.v.Dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && path != f.v.Dir && !(filepath.Dir(path) == f.v.Dir && strings.HasPrefix(entry.Name(), "kmsfs.") && !strings.HasPrefix(entry.Name(), "kmsfs.long.")) && accept(entry.Name(), entry.Type()) {
			all = append(all, path)
		}
		return nil
	})
	if len(all) == 0 {
		return ""
	}
	return all[f.rnd.IntN(len(all))]
}

func anything(string, os.FileMode) bool      { return true }
func directory(_ string, m os.FileMode) bool { return m.IsDir() }
func sidecar(name string, m os.FileMode) bool {
	return m&os.ModeSymlink != 0 && strings.HasSuffix(name, ".n")
}
func symlink(name string, m os.FileMode) bool { return m&os.ModeSymlink != 0 && !sidecar(name, m) }
func regular(_ string, m os.FileMode) bool    { return m.IsRegular() }

// edit rewrites a file in place.
func (f *fuzzed) edit(path string, change func(raw []byte) []byte) bool {
	raw, err := os.ReadFile(path)
	if err != nil || len(raw) == 0 {
		return false
	}
	raw = change(raw)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return false
	}
	defer file.Close()
	_, err = file.Write(raw)
	return err == nil
}

// scramble is a random change of bytes: some flipped, a range zeroed, filled with noise,
// cut out, doubled, or all that is behind a point cut off.
func (f *fuzzed) scramble(raw []byte) []byte {
	r, n := f.rnd, len(raw)
	from := r.IntN(n)
	to := from + 1 + r.IntN(min(n-from, 1+r.IntN(3*record)))
	switch r.IntN(7) {
	case 0:
		raw[from] ^= 1 << r.IntN(8)
	case 1:
		clear(raw[from:to])
	case 2:
		for i := from; i < to; i++ {
			raw[i] = byte(r.Uint32())
		}
	case 3:
		return append(raw[:from:from], raw[to:]...)
	case 4:
		return slices.Insert(raw, from, bytes.Clone(raw[from:to])...)
	case 5:
		return raw[:max(1, from)] // to nothing is another mutation
	default:
		return append(raw, raw[from:to]...)
	}
	return raw
}

func (f *fuzzed) xattr(path, name string, change func(raw []byte) []byte) bool {
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, buf)
	if err != nil || n == 0 {
		return false
	}
	return unix.Lsetxattr(path, name, change(bytes.Clone(buf[:n])), 0) == nil
}

// swapXattr exchanges an attribute of two files.
func swapXattr(a, b, name string) bool {
	x, y := make([]byte, 4096), make([]byte, 4096)
	n, errA := unix.Lgetxattr(a, name, x)
	m, errB := unix.Lgetxattr(b, name, y)
	return errA == nil && errB == nil && unix.Lsetxattr(a, name, y[:m], 0) == nil && unix.Lsetxattr(b, name, x[:n], 0) == nil
}

var mutations = []mutation{
	{name: "contents", do: func(f *fuzzed) bool { return f.edit(f.pick(), f.scramble) }, lets: holes},
	{name: "record moved", do: func(f *fuzzed) bool {
		other, _ := os.ReadFile(f.pick())
		return f.edit(f.pick(), func(raw []byte) []byte {
			from, to := f.rnd.IntN(len(other)/record+1)*record, f.rnd.IntN(len(raw)/record+1)*record
			copy(raw[min(to, len(raw)):], other[min(from, len(other)):min(from+record, len(other))])
			return raw
		})
	}, lets: holes}, // it may have been one
	{name: "zeroed record", do: func(f *fuzzed) bool {
		return f.edit(f.pick(), func(raw []byte) []byte {
			at := f.rnd.IntN(len(raw)/record+1) * record
			clear(raw[min(at, len(raw)):min(at+record, len(raw))])
			return raw
		})
	}, lets: holes},
	{name: "length", do: func(f *fuzzed) bool { return os.Truncate(f.pick(), 1+f.rnd.Int64N(1<<f.rnd.IntN(32))) == nil }, lets: holes},
	{name: "cut to nothing", do: func(f *fuzzed) bool { return os.Truncate(f.pick(), 0) == nil }, lets: others},
	{name: "earlier record", do: func(f *fuzzed) bool {
		path := f.pick()
		rel, _ := filepath.Rel(f.v.Dir, path)
		old, err := os.ReadFile(filepath.Join(f.pristine+".older", rel))
		if err != nil || path == "" {
			return false
		}
		return f.edit(path, func(raw []byte) []byte {
			at := f.rnd.IntN(len(raw)/record+1) * record
			copy(raw[min(at, len(raw)):], old[min(at, len(old)):min(at+record, len(old))])
			return raw
		})
	}, lets: earlier},
	{name: "header", do: func(f *fuzzed) bool { return f.xattr(f.pick(), crypt.HeaderXattr, f.scramble) }},
	{name: "header with its checksum", do: func(f *fuzzed) bool {
		return f.xattr(f.pick(), crypt.HeaderXattr, func(raw []byte) []byte {
			if raw = f.scramble(raw); len(raw) < 8 {
				return raw
			}
			return sealCRC(raw)
		})
	}},
	{name: "header of another file", do: func(f *fuzzed) bool { return swapXattr(f.pick(), f.pick(), crypt.HeaderXattr) }},
	{name: "header stripped", do: func(f *fuzzed) bool { return unix.Removexattr(f.pick(), crypt.HeaderXattr) == nil }},
	{name: "header of noise", do: func(f *fuzzed) bool {
		return f.xattr(f.pick(), crypt.HeaderXattr, func([]byte) []byte { return harness.Noise(1 + f.rnd.IntN(3000)) })
	}},
	{name: "header under foreign keys", do: func(f *fuzzed) bool {
		foreign := f.kms.Create(kmstest.KeySpec{Account: otherAccount})
		return f.xattr(f.pick(), crypt.HeaderXattr, func(raw []byte) []byte {
			h, err := crypt.ParseHeader(raw)
			if err != nil {
				return raw
			}
			switch f.rnd.IntN(3) {
			case 0:
				h.Copies[0].Key = foreign
			case 1:
				h.Copies = append([]crypt.Copy{{Key: foreign, Blob: h.Copies[0].Blob}}, h.Copies...)
			default:
				h.Copies[0].Blob = harness.Noise(1 + f.rnd.IntN(500))
			}
			if changed, err := h.Marshal(); err == nil {
				return changed
			}
			return raw
		})
	}},
	{name: "sparse mark", do: func(f *fuzzed) bool {
		return unix.Setxattr(f.pick(), crypt.SparseXattr, harness.Noise(1+f.rnd.IntN(64)), 0) == nil
	}},
	{name: "sparse mark of another file", do: func(f *fuzzed) bool {
		mark := make([]byte, 4096)
		n, err := unix.Getxattr(filepath.Join(f.v.Dir, f.stored["sparse"]), crypt.SparseXattr, mark)
		return err == nil && unix.Setxattr(f.pick(), crypt.SparseXattr, mark[:n], 0) == nil
	}},
	{name: "directory id", do: func(f *fuzzed) bool { return f.xattr(f.entry(directory), dirXattr, f.scramble) }},
	{name: "directory id of another", do: func(f *fuzzed) bool { return swapXattr(f.entry(directory), f.entry(directory), dirXattr) }},
	{name: "directory id stripped", do: func(f *fuzzed) bool { return unix.Removexattr(f.entry(directory), dirXattr) == nil }},
	{name: "name", do: func(f *fuzzed) bool {
		path := f.entry(anything)
		if path == "" {
			return false
		}
		name := []byte(filepath.Base(path))
		name[f.rnd.IntN(len(name))] = "ABab01-_."[f.rnd.IntN(9)]
		return os.Rename(path, filepath.Join(filepath.Dir(path), string(name))) == nil
	}, lets: others}, // if it hits another
	{name: "name of noise", do: func(f *fuzzed) bool {
		path := f.entry(anything)
		return path != "" && os.Rename(path, filepath.Join(filepath.Dir(path), strings.Repeat("x", 1+f.rnd.IntN(254)))) == nil
	}, lets: others},
	{name: "moved to another directory", do: func(f *fuzzed) bool {
		path, dir := f.entry(anything), f.entry(directory)
		return path != "" && dir != "" && os.Rename(path, filepath.Join(dir, filepath.Base(path))) == nil
	}},
	{name: "names exchanged", do: func(f *fuzzed) bool {
		a, b := f.entry(anything), f.entry(anything)
		return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE) == nil
	}, lets: others},
	{name: "deleted", do: func(f *fuzzed) bool { return os.Remove(f.entry(anything)) == nil }, lets: others},
	{name: "sidecar deleted", do: func(f *fuzzed) bool { return os.Remove(f.entry(sidecar)) == nil }},
	{name: "sidecar that says something else", do: func(f *fuzzed) bool {
		path := f.entry(sidecar)
		target, err := os.Readlink(path)
		if err != nil {
			return false
		}
		other, err := os.Readlink(f.entry(sidecar))
		if err != nil || f.rnd.IntN(2) == 0 {
			other = string(f.scramble([]byte(target)))
		}
		other = strings.ReplaceAll(other, "\x00", "A")
		return os.Remove(path) == nil && os.Symlink(other[:min(len(other), 4000)], path) == nil
	}},
	{name: "sidecar that is a file", do: func(f *fuzzed) bool {
		path := f.entry(sidecar)
		return path != "" && os.Remove(path) == nil && os.WriteFile(path, harness.Noise(50), 0o600) == nil
	}},
	{name: "symlink", do: func(f *fuzzed) bool {
		path := f.entry(symlink)
		target, err := os.Readlink(path)
		if err != nil {
			return false
		}
		to := strings.ReplaceAll(string(f.scramble([]byte(target))), "\x00", "A")
		return to != "" && os.Remove(path) == nil && os.Symlink(to[:min(len(to), 4000)], path) == nil
	}},
	{name: "symlink to outside", do: func(f *fuzzed) bool {
		path := f.entry(anything)
		return path != "" && os.Remove(path) == nil && os.Symlink("/etc/passwd", path) == nil
	}},
	{name: "fifo", do: func(f *fuzzed) bool {
		path := f.entry(regular)
		return path != "" && os.Remove(path) == nil && unix.Mkfifo(path, 0o600) == nil
	}},
	{name: "planted file", do: func(f *fuzzed) bool {
		dir := f.entry(directory)
		return dir != "" && os.WriteFile(filepath.Join(dir, fmt.Sprint("planted", f.rnd.IntN(9))), harness.Noise(f.rnd.IntN(9000)), 0o600) == nil
	}},
	{name: "user attribute", do: func(f *fuzzed) bool {
		path := f.entry(regular)
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			return false
		}
		for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
			if strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.kmsfs") {
				return f.xattr(path, name, f.scramble)
			}
		}
		return unix.Setxattr(path, "user.kmsfs.u.planted", harness.Noise(20), 0) == nil
	}},
	{name: "kmsfs.toml", do: func(f *fuzzed) bool { return f.edit(filepath.Join(f.v.Dir, "kmsfs.toml"), f.scramble) }, lets: settings},
	{name: "kmsfs.toml.bak", do: func(f *fuzzed) bool { return f.edit(filepath.Join(f.v.Dir, "kmsfs.toml.bak"), f.scramble) }, lets: settings},
	{name: "both settings", do: func(f *fuzzed) bool {
		same := f.rnd.Uint64()
		for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
			g := &fuzzed{rnd: rand.New(rand.NewPCG(same, 4))}
			f.edit(filepath.Join(f.v.Dir, name), g.scramble)
		}
		return true
	}, lets: settings},
	{name: "settings deleted", do: func(f *fuzzed) bool {
		return os.Remove(filepath.Join(f.v.Dir, []string{"kmsfs.toml", "kmsfs.toml.bak"}[f.rnd.IntN(2)])) == nil
	}, lets: settings},
	{name: "settings with a foreign key", do: func(f *fuzzed) bool {
		foreign := f.kms.Create(kmstest.KeySpec{Account: otherAccount})
		for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
			f.edit(filepath.Join(f.v.Dir, name), func(raw []byte) []byte { return bytes.ReplaceAll(raw, []byte(f.key), []byte(foreign)) })
		}
		return true
	}, lets: settings},
	{name: "lock file", do: func(f *fuzzed) bool {
		return os.WriteFile(filepath.Join(f.v.Dir, "kmsfs.lock"), harness.Noise(f.rnd.IntN(5000)), 0o600) == nil
	}},
}

// dirXattr is where a directory keeps its id.
const dirXattr = "user.kmsfs.dir"
