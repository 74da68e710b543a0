package crypt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// A store that fails: each call that a File makes of its Backing fails once, or from
// then on, with each errno, whole or half-way. What must hold is that of DESIGN 4:
// the operation says so, what is older is there, no byte is wrong, and the file goes
// on.

// A fault is how a call fails.
type fault struct {
	errno syscall.Errno
	// part is how many of a write's n bytes, or of a read's, arrive.
	part func(n int) int
	name string
	// late: all but reads, writes and truncation is carried out, and fails all the same.
	late bool
	// lasts: whatever changes the store fails from then on.
	lasts bool
}

// failing is a memBacking whose call number at fails.
type failing struct {
	*memBacking
	fault
	at    int // from 1; 0: none
	calls int
	hits  []string
}

func (b *failing) strike(what string, changes bool) bool {
	b.calls++
	if b.at == 0 || b.calls < b.at || b.calls > b.at && !(b.lasts && changes) {
		return false
	}
	b.hits = append(b.hits, what)
	return true
}

func (b *failing) ReadAt(p []byte, off int64) (int, error) {
	if !b.strike("read", false) {
		return b.memBacking.ReadAt(p, off)
	}
	n, _ := b.memBacking.ReadAt(p[:b.part(len(p))], off)
	return n, b.errno
}

func (b *failing) WriteAt(p []byte, off int64) (int, error) {
	if !b.strike("write", true) {
		return b.memBacking.WriteAt(p, off)
	}
	n := b.part(len(p))
	if n == 0 {
		return 0, b.errno
	}
	n, _ = b.memBacking.WriteAt(p[:n], off)
	return n, b.errno
}

func (b *failing) Truncate(n int64) error {
	if b.strike("truncate", true) {
		return b.errno
	}
	return b.memBacking.Truncate(n)
}

// call is a call that is carried out or not at all.
func (b *failing) call(what string, f func() error) error {
	if !b.strike(what, true) {
		return f()
	}
	if b.late {
		_ = f()
	}
	return b.errno
}

func (b *failing) Sync() error { return b.call("sync", b.memBacking.Sync) }

func (b *failing) SetHeader(raw []byte) error {
	return b.call("header", func() error { return b.memBacking.SetHeader(raw) })
}

func (b *failing) SparseMark() ([]byte, error) {
	if b.strike("get mark", false) {
		return nil, b.errno
	}
	return b.memBacking.SparseMark()
}

func (b *failing) SetSparseMark(mark []byte) error {
	return b.call("set mark", func() error { return b.memBacking.SetSparseMark(mark) })
}

func (b *failing) PunchHole(off, n int64) error {
	return b.call("punch", func() error { return b.memBacking.PunchHole(off, n) })
}

func (b *failing) Allocate(off, n int64) error {
	return b.call("allocate", func() error { return b.memBacking.Allocate(off, n) })
}

func (b *failing) SeekData(off int64) (int64, error) {
	if b.strike("seek data", false) {
		return 0, b.errno
	}
	return b.memBacking.SeekData(off)
}

func (b *failing) SeekHole(off int64) (int64, error) {
	if b.strike("seek hole", false) {
		return 0, b.errno
	}
	return b.memBacking.SeekHole(off)
}

// A deed is an operation on a File, what it makes of the contents, and the bytes that
// it touches.
type deed struct {
	name   string
	run    func(f *File) error
	change func(b []byte) []byte
	lo, hi int64
}

func deedWrite(off int64, n int, seed byte) deed {
	p := pattern(n, seed)
	return deed{fmt.Sprintf("write %d at %d", n, off), func(f *File) error { _, err := f.WriteAt(p, off); return err },
		func(b []byte) []byte { b = grown(b, off+int64(n)); copy(b[off:], p); return b }, off, off + int64(n)}
}

func deedTruncate(size int64) deed {
	return deed{fmt.Sprintf("truncate to %d", size), func(f *File) error { return f.Truncate(size) },
		func(b []byte) []byte { return grown(b, size)[:size] }, size, 1 << 62}
}

func deedZero(name string, off, n int64, grows bool, run func(f *File) error) deed {
	return deed{name, run, func(b []byte) []byte {
		if grows {
			b = grown(b, off+n)
		}
		clear(b[min(off, int64(len(b))):min(off+n, int64(len(b)))])
		return b
	}, off, off + n}
}

func deedSync() deed {
	return deed{"sync", (*File).Sync, func(b []byte) []byte { return b }, 0, 1 << 62}
}

func deedLook(name string, run func(f *File) error) deed {
	return deed{name, run, func(b []byte) []byte { return b }, 0, 0}
}

func grown(b []byte, n int64) []byte {
	return append(b, make([]byte, max(0, n-int64(len(b))))...)
}

// script has one of everything that a File does.
func script() []deed {
	const far = 100*bs + 1_500_000
	return []deed{
		deedWrite(0, 100, 1),
		deedWrite(100, 5000, 2),
		deedSync(),
		deedWrite(20_000, 9000, 3), // leaves a gap
		deedSync(),
		deedWrite(bs, 2*bs, 4),
		deedWrite(bs+100, 2*bs, 5),
		deedTruncate(21_000),
		deedTruncate(30_000),
		deedTruncate(7 * bs),
		deedWrite(7*bs, 10, 6),
		deedWrite(5*bs+7, 3*bs, 7), // over the end
		deedZero("zero", 2*bs+5, 3*bs, false, func(f *File) error { return f.Zero(2*bs+5, 3*bs, true) }),
		deedWrite(far, 3000, 8), // a gap that is declared
		deedSync(),
		deedWrite(30*bs+9, 2*bs, 9), // into the hole
		deedZero("punch", 4*bs+1, 40*bs, false, func(f *File) error { return f.Punch(4*bs+1, 40*bs) }),
		deedLook("read", func(f *File) error { _, err := f.ReadAt(make([]byte, 9*bs), bs/2); return err }),
		deedLook("seek", func(f *File) error {
			if _, err := f.SeekHole(0, true); err != nil {
				return err
			}
			_, err := f.SeekData(50*bs, true)
			return err
		}),
		deedZero("zero", far+1000, 10_000, true, func(f *File) error { return f.Zero(far+1000, 10_000, false) }),
		deedTruncate(3*bs + 5),
		deedTruncate(0),
		deedWrite(0, 5000, 10), // under another key
		{"allocate", func(f *File) error { return f.Allocate(0, 9*bs, false) },
			func(b []byte) []byte { return grown(b, 9*bs) }, 5000, 9 * bs},
		deedTruncate(9*bs + zeroLimit + 5*bs), // a hole at once
		deedWrite(2*bs+1, chunkSize+3*bs, 11), // in two chunks
		deedSync(),
	}
}

// A trial plays a script until the fault has struck.
type trial struct {
	t    *testing.T
	b    *failing
	v    vault
	f    *File
	want []byte
	name string
}

// contents are what there is before each deed, and after all of them.
func contents(deeds []deed) (all [][]byte) {
	all = append(all, nil)
	for i, d := range deeds {
		all = append(all, d.change(bytes.Clone(all[i])))
	}
	return all
}

// play reports whether the fault struck, and how many bytes were compared. The states
// are the contents of the deeds.
func play(t *testing.T, deeds []deed, states [][]byte, fl fault, at int) (hit bool, compared int) {
	t.Helper()
	c := &trial{t: t, b: &failing{memBacking: newMem(), fault: fl, at: at}, v: vault{}}
	f, err := NewFile(c.b, bs, 0, nil)
	require.NoError(t, err)
	defer f.Close()
	c.f = f
	for i, d := range deeds {
		if c.f.NeedsKey() {
			c.v.prime(t, c.f, bs)
		}
		c.want = states[i]
		err := d.run(c.f)
		if len(c.b.hits) == 0 {
			require.NoError(t, err, d.name)
			continue
		}
		c.name = fmt.Sprintf("%s, call %d (%v) fails with %v %s", d.name, at, c.b.hits, fl.errno, fl.name)
		if err != nil {
			require.ErrorIs(t, err, fl.errno, c.name)
		}
		c.b.at = 0
		return true, c.after(d, states[i+1], err)
	}
	return false, 0
}

// after judges what a fault has left, in memory and on disk.
func (c *trial) after(d deed, changed []byte, err error) (compared int) {
	versions := [][]byte{c.want, changed}
	if err == nil {
		versions = versions[1:]
	}
	compared = c.look(c.f, d, versions, nil)
	gaps, _ := c.f.pending.list()
	c.reopened(func(f *File) { compared += c.look(f, d, versions, gaps) })
	if c.b.lasts {
		return compared + c.repaired(d, gaps)
	}
	require.NoError(c.t, c.f.EndErr(), c.name)
	if c.f.NeedsKey() {
		c.v.prime(c.t, c.f, bs)
	}
	require.NoError(c.t, d.run(c.f), "%s: tried again", c.name)
	require.NoError(c.t, c.f.Sync(), c.name)
	holds := func(f *File) {
		require.True(c.t, bytes.Equal(changed, readAll(c.t, f)), "%s: the contents after it was tried again", c.name)
		compared += len(changed)
	}
	holds(c.f)
	c.reopened(holds)
	return compared
}

// reopened shows what is on disk as a new process finds it. There are too many faults to
// keep all those files until the test ends.
func (c *trial) reopened(look func(f *File)) {
	f := c.v.reopen(c.t, c.b.clone(), bs)
	defer f.Close()
	look(f)
}

// look reads all blocks: each is of one of the versions. After a fault that lasts, one
// block that was being written may be lost, and the end.
func (c *trial) look(f *File, d deed, versions [][]byte, gaps [][2]int64) (compared int) {
	lo, hi := int64(1<<62), int64(0)
	for _, v := range versions {
		lo, hi = min(lo, int64(len(v))), max(hi, int64(len(v)))
	}
	mayLose := func(block int64) bool {
		old := int64(len(c.want))
		return inRuns(gaps, block) || c.b.lasts &&
			(block >= max(0, old-1)/bs || block >= d.lo/bs && block <= d.hi/bs)
	}
	if !c.b.lasts {
		require.NoError(c.t, f.EndErr(), c.name)
	}
	if f.EndErr() == nil {
		require.GreaterOrEqual(c.t, f.Size(), lo, c.name)
		require.LessOrEqual(c.t, f.Size(), (hi+bs-1)/bs*bs, c.name)
	}
	p, lost := make([]byte, bs), 0
	for block := int64(0); block*bs < max(f.Size(), lo); block++ {
		n, err := f.ReadAt(p, block*bs)
		if err != nil && !(errors.Is(err, io.EOF) && n > 0) {
			require.ErrorIs(c.t, err, ErrDamaged, "%s: block %d", c.name, block)
			require.True(c.t, mayLose(block), "%s: block %d of %d bytes is lost: %v", c.name, block, f.Size(), err)
			if !inRuns(gaps, block) && block*bs < int64(len(c.want)) {
				lost++
			}
			continue
		}
		require.True(c.t, isBlockOf(versions, p[:n], block), "%s: wrong bytes in block %d", c.name, block)
		compared += n
	}
	require.LessOrEqual(c.t, lost, 2, "%s: more is lost than one block and the end", c.name)
	return compared
}

// repaired: a file whose store was away for good can be cut and used again.
func (c *trial) repaired(d deed, gaps [][2]int64) int {
	f := c.v.reopen(c.t, c.b.clone(), bs)
	defer f.Close()
	size := max(0, min(int64(len(c.want))-1, d.lo)/bs-1) * bs // before what may be lost
	if len(gaps) > 0 {
		size = min(size, gaps[0][0]*bs)
	}
	require.NoError(c.t, f.Truncate(size), c.name)
	if f.NeedsKey() {
		c.v.prime(c.t, f, bs)
	}
	_, err := f.WriteAt([]byte("goes on"), size)
	require.NoError(c.t, err, c.name)
	require.NoError(c.t, f.Sync(), c.name)
	want := append(bytes.Clone(c.want[:size]), "goes on"...)
	require.True(c.t, bytes.Equal(want, readAll(c.t, f)), "%s: repaired", c.name)
	return len(want)
}

// faultsOf are the ways to fail; parts of writes in the order of how much they tear.
func faultsOf(errno syscall.Errno) (all []fault) {
	for _, f := range []fault{
		{part: func(int) int { return 0 }},
		{part: func(n int) int { return n / 2 }, name: "half-way"},
		{part: func(n int) int { return n - 1 }, name: "a byte before the end"},
		{part: func(n int) int { return n / (bs + RecordOverhead) * (bs + RecordOverhead) }, name: "after whole records"},
		{part: func(int) int { return 0 }, name: "late", late: true},
		{part: func(int) int { return 0 }, name: "for good", lasts: true},
		{part: func(n int) int { return n / 2 }, name: "half-way and for good", lasts: true},
	} {
		f.errno = errno
		all = append(all, f)
	}
	return all
}

// TestStoreFailsAnywhere: KMSFS_TEST_FAULT_SCRIPTS adds that many random scripts, and
// tries each errno at each call, not one in turn. -run TestStoreFailsAnywhere/all/^N$
// repeats the Nth of them.
func TestStoreFailsAnywhere(t *testing.T) {
	t.Parallel()
	random := fromEnv(t, "KMSFS_TEST_FAULT_SCRIPTS", 0)
	var scripts, faults, compared atomic.Int64
	t.Run("all", func(t *testing.T) {
		for n := range 1 + random {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				deeds := script()
				if n > 0 {
					deeds = randomScript(uint64(n - 1))
				}
				failAnywhere(t, deeds, random == 0, &faults, &compared)
				scripts.Add(1)
			})
		}
	})
	if t.Failed() {
		return
	}
	t.Logf("faults injected: %d in %d scripts, bytes compared: %d, losses: 0", faults.Load(), scripts.Load(), compared.Load())
}

// failAnywhere has each call of a script fail in each way, with each errno or one in turn.
func failAnywhere(t *testing.T, deeds []deed, inTurn bool, faults, compared *atomic.Int64) {
	errnos := []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO}
	states := contents(deeds)
	for way := range faultsOf(0) {
		for at, hit := 1, true; hit; at++ {
			for i, errno := range errnos {
				if inTurn && i != (at+way)%len(errnos) {
					continue
				}
				var n int
				if hit, n = play(t, deeds, states, faultsOf(errno)[way], at); hit {
					faults.Add(1)
					compared.Add(int64(n))
				}
			}
			require.True(t, hit || at > 20, "it does not call the store")
		}
	}
}

// TestTornRecordIsNoHole: what a short write left of a record may be zeros by chance, if
// it is a few bytes; the block is what it was or what it was to be all the same, and never
// a hole, in a file that may have holes.
func TestTornRecordIsNoHole(t *testing.T) {
	const block, last = 2, 3*(bs+RecordOverhead) - 1
	m, v, f := newTestFile(t, bs, pattern(4*bs, 1))
	require.NoError(t, f.Truncate(4*bs+2*zeroLimit)) // which declares a hole
	require.NotEmpty(t, m.mark)
	for tries := 0; tries == 0 || m.data[last] != 0; tries++ { // some 256 times
		require.Less(t, tries, 100_000)
		_, err := f.WriteAt(pattern(bs, 2), block*bs)
		require.NoError(t, err)
	}
	b := &failing{memBacking: m, fault: faultsOf(syscall.EIO)[2], at: 2} // a byte before the end
	torn, err := NewFile(b, bs, int64(len(m.data)), v.secretsOf(t, m))
	require.NoError(t, err)
	defer torn.Close()
	_, err = torn.WriteAt(pattern(bs, 3), block*bs)
	require.ErrorIs(t, err, syscall.EIO)
	require.Equal(t, []string{"write"}, b.hits)
	for _, f := range []*File{torn, v.open(t, m, bs)} {
		got := make([]byte, bs)
		_, err = f.ReadAt(got, block*bs)
		require.NoError(t, err)
		require.True(t, isBlockOf([][]byte{pattern(bs, 2), pattern(bs, 3)}, got, 0), "wrong bytes")
	}
}

// TestUnreadEndIsNoDamage: an end that the store would not give is read again when it
// is needed, and never cut off as a bad one.
func TestUnreadEndIsNoDamage(t *testing.T) {
	want := pattern(3*bs+50, 1)
	m, v, _ := newTestFile(t, bs, want)
	unread := func(at int) *File {
		b := &failing{memBacking: m, fault: faultsOf(syscall.EIO)[0], at: at}
		f, err := NewFile(b, bs, int64(len(m.data)), v.secretsOf(t, m))
		require.NoError(t, err)
		t.Cleanup(f.Close)
		return f
	}
	f := unread(1)
	require.ErrorIs(t, f.EndErr(), syscall.EIO)
	size, err := f.CutEnd()
	require.ErrorIs(t, err, syscall.EIO)
	require.EqualValues(t, len(want), size)
	require.Equal(t, want, readAll(t, f))
	require.NoError(t, f.EndErr())
	f = unread(1)
	_, err = f.WriteAt([]byte("more"), int64(len(want)))
	require.NoError(t, err)
	require.Equal(t, append(bytes.Clone(want), "more"...), readAll(t, f))

	m.data = m.data[:len(m.data)-1] // now it is a bad one
	stored := bytes.Clone(m.data)
	for at := 2; at < 4; at++ { // the last good record, and the mark
		f = unread(at)
		_, err := f.CutEnd()
		if err == nil {
			require.Equal(t, 3, at)
			break
		}
		require.Equal(t, stored, m.data, "something was cut off")
	}
}

// randomScript is a dozen deeds drawn from script, with writes in between.
func randomScript(seed uint64) (deeds []deed) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	all := slices.DeleteFunc(script(), func(d deed) bool { return d.name == "read" || d.name == "seek" })
	for range 12 {
		deeds = append(deeds, all[rnd.IntN(len(all))])
		if rnd.IntN(2) == 0 {
			deeds = append(deeds, deedWrite(rnd.Int64N(12*bs), 1+rnd.IntN(3*bs), byte(rnd.Uint32())))
		}
	}
	return deeds
}

// fromEnv is a number from the environment, for longer runs.
func fromEnv(t testing.TB, name string, normal int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return normal
	}
	n, err := strconv.Atoi(s)
	require.NoError(t, err, name)
	return n
}
