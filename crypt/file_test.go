package crypt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

const bs = MinBlockSize

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>8) ^ seed | 1 // never a run of zeros
	}
	return b
}

func readAll(t testing.TB, f *File) []byte {
	t.Helper()
	b := make([]byte, f.Size()+1)
	n, err := f.ReadAt(b, 0)
	require.ErrorIs(t, err, io.EOF)
	require.EqualValues(t, f.Size(), n)
	return b[:n]
}

// Sizes around the edges, crossed with step sizes, against a byte slice.
func TestSizesAndSteps(t *testing.T) {
	for _, block := range []int{MinBlockSize, 16 << 10, MaxBlockSize} {
		for _, size := range []int{0, 1, 31, 32, 33, block - 1, block, block + 1, 2*block - 1, 2 * block, 2*block + 1, 5*block + 17} {
			for _, step := range []int{block/3 + 1, block - 1, block, block + 1, 3 * block, size + 1} {
				want := pattern(size, byte(step))
				m, v := newMem(), vault{}
				f := v.open(t, m, block)
				v.prime(t, f, block)
				for at := 0; at < size; at += step {
					n, err := f.WriteAt(want[at:min(size, at+step)], int64(at))
					require.NoError(t, err)
					require.Equal(t, min(size, at+step)-at, n)
				}
				require.NoError(t, f.Sync())
				require.True(t, bytes.Equal(want, readAll(t, f)), "block %d size %d step %d", block, size, step)
				require.EqualValues(t, StoredSize(int64(size), block), len(m.data))
				require.EqualValues(t, size, PlainSize(int64(len(m.data)), block))
				again := v.open(t, m, block)
				require.NoError(t, again.EndErr())
				require.True(t, bytes.Equal(want, readAll(t, again)))
				f.Close()
				again.Close()
			}
		}
	}
}

// oracle runs random operations on a File and on a byte slice.
type oracle struct {
	t     testing.TB
	rnd   *rand.Rand
	block int
	max   int
	m     *memBacking
	v     vault
	f     *File
	want  []byte
	log   []string
}

func newOracle(t testing.TB, seed uint64, block, limit int) *oracle {
	o := &oracle{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), block: block, max: limit, m: newMem(), v: vault{}}
	o.f = o.v.open(t, o.m, block)
	return o
}

func (o *oracle) offset() int {
	n := o.rnd.IntN(o.max)
	if o.rnd.IntN(2) == 0 { // near a record edge
		n = n/o.block*o.block + o.rnd.IntN(5) - 2
	}
	return min(o.max-1, max(0, n))
}

func (o *oracle) length() int {
	switch o.rnd.IntN(4) {
	case 0:
		return 1 + o.rnd.IntN(100)
	case 1:
		return o.block * (1 + o.rnd.IntN(3))
	}
	return 1 + o.rnd.IntN(2*o.block)
}

func (o *oracle) grow(n int) {
	if n > len(o.want) {
		o.want = append(o.want, make([]byte, n-len(o.want))...)
	}
}

func (o *oracle) step() {
	off, n := o.offset(), o.length()
	if o.f.NeedsKey() {
		o.v.prime(o.t, o.f, o.block)
	}
	op := o.rnd.IntN(20)
	o.log = append(o.log, fmt.Sprintf("op %d off %d n %d size %d", op, off, n, len(o.want)))
	switch {
	case op < 7:
		p := pattern(n, byte(o.rnd.Uint32()))
		m, err := o.f.WriteAt(p, int64(off))
		o.ok(err)
		require.Equal(o.t, n, m)
		o.grow(off + n)
		copy(o.want[off:], p)
	case op < 12:
		o.read(off, n)
	case op < 14:
		if o.rnd.IntN(30) == 0 {
			off = 0
		}
		o.ok(o.f.Truncate(int64(off)))
		o.grow(off)
		o.want = o.want[:off:off]
	case op == 14:
		o.ok(o.f.Punch(int64(off), int64(n)))
		o.clear(off, n)
	case op == 15:
		keep := o.rnd.IntN(2) == 0
		o.ok(o.f.Zero(int64(off), int64(n), keep))
		if !keep {
			o.grow(off + n)
		}
		o.clear(off, n)
	case op == 16:
		o.ok(o.f.Allocate(int64(off), int64(n), false))
		o.grow(off + n)
	case op == 17:
		o.ok(o.f.Sync())
		require.False(o.t, o.f.Pending())
	case op == 18: // a new mount: another epoch
		o.ok(o.f.Sync())
		o.f.Close()
		o.f = o.v.open(o.t, o.m, o.block)
		o.ok(o.f.EndErr())
	default: // the next seal draws a new epoch
		if c := o.f.cipher.Load(); c != nil {
			c.mu.Lock()
			c.left = 0
			c.mu.Unlock()
		}
	}
	require.EqualValues(o.t, len(o.want), o.f.Size(), "%v", o.tailLog())
}

func (o *oracle) clear(off, n int) {
	if off < len(o.want) {
		clear(o.want[off:min(len(o.want), off+n)])
	}
}

func (o *oracle) read(off, n int) {
	got := make([]byte, n)
	m, err := o.f.ReadAt(got, int64(off))
	want := []byte{}
	if off < len(o.want) {
		want = o.want[off:min(len(o.want), off+n)]
	}
	if len(want) < n {
		require.ErrorIs(o.t, err, io.EOF, "%v", o.tailLog())
	} else {
		o.ok(err)
	}
	require.True(o.t, bytes.Equal(want, got[:m]), "%v", o.tailLog())
}

func (o *oracle) ok(err error) { require.NoError(o.t, err, "%v", o.tailLog()) }

func (o *oracle) tailLog() []string { return o.log[max(0, len(o.log)-12):] }

// steps is how many operations the oracle tries; KMSFS_ORACLE_STEPS raises it.
func steps(t testing.TB, normal int) int {
	if s := os.Getenv("KMSFS_ORACLE_STEPS"); s != "" {
		n, err := strconv.Atoi(s)
		require.NoError(t, err)
		return n
	}
	if testing.Short() {
		return normal / 10
	}
	return normal
}

func TestOracle(t *testing.T) {
	for _, c := range []struct {
		block, limit int
		noPunch      bool
	}{{bs, 6 * bs, false}, {bs, 40 * bs, true}, {MaxBlockSize, 4 * MaxBlockSize, false}} {
		t.Run(fmt.Sprintf("block%d-limit%d", c.block, c.limit), func(t *testing.T) {
			t.Parallel()
			total := steps(t, 60_000) * bs / c.block
			for seed := uint64(0); total > 0; seed++ {
				o := newOracle(t, seed, c.block, c.limit)
				o.m.noPunch = c.noPunch
				n := min(total, 3000)
				for range n {
					o.step()
				}
				o.read(0, o.max)
				o.f.Close()
				total -= n
			}
		})
	}
}

// Large holes: beyond 1 MiB they are declared, and stay holes.
func TestHoles(t *testing.T) {
	big := int64(3 << 20)
	head := pattern(100, 1)
	for name, dig := range map[string]func(f *File) error{
		"truncate": func(f *File) error { return f.Truncate(big) },
		"gap": func(f *File) error {
			if _, err := f.WriteAt([]byte{9}, big-1); err != nil {
				return err
			}
			return f.Settle()
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, v, f := newTestFile(t, bs, head)
			require.NoError(t, dig(f))
			require.NotNil(t, m.mark)
			require.EqualValues(t, StoredSize(big, bs), len(m.data))
			want := make([]byte, big)
			copy(want, head)
			if name == "gap" {
				want[big-1] = 9
			}
			require.NoError(t, f.Sync())
			f = v.open(t, m, bs)
			require.True(t, bytes.Equal(want, readAll(t, f)))
			hole, err := f.SeekHole(0, true)
			require.NoError(t, err)
			require.EqualValues(t, bs, hole)
			data, err := f.SeekData(hole, true)
			require.NoError(t, err)
			require.EqualValues(t, big-bs, data-data%bs)
			all, err := f.SeekHole(0, false)
			require.NoError(t, err)
			require.EqualValues(t, big, all, "all data while someone writes")
			m.mark[0] ^= 1
			f = v.open(t, m, bs)
			_, err = f.ReadAt(make([]byte, bs), bs)
			require.ErrorIs(t, err, ErrDamaged, "zeros under a wrong mark are damage")
		})
	}
}

func TestPunchGivesSpaceBackAndKeepsEdges(t *testing.T) {
	want := pattern(3<<20, 3)
	m, v, f := newTestFile(t, bs, want)
	off, n := 5*bs+10, 2<<20
	require.NoError(t, f.Punch(int64(off), int64(n)))
	clear(want[off : off+n])
	require.True(t, bytes.Equal(want, readAll(t, f)))
	holes := 0
	for _, h := range m.hole {
		if h {
			holes++
		}
	}
	require.Greater(t, holes, n-2*(bs+RecordOverhead))
	require.True(t, bytes.Equal(want, readAll(t, v.open(t, m, bs))))
}

// Writeback sends the writes of one file in any order, several at once.
func TestWritesInAnyOrder(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		want := pattern(64*bs+int(rnd.IntN(2*bs)), byte(seed))
		m, v, f := newTestFile(t, bs, nil)
		v.prime(t, f, bs)
		var wg sync.WaitGroup
		const piece = 3 * bs
		for _, i := range rnd.Perm((len(want) + piece - 1) / piece) {
			wg.Go(func() {
				_, err := f.WriteAt(want[i*piece:min(len(want), (i+1)*piece)], int64(i*piece))
				require.NoError(t, err)
			})
		}
		wg.Wait()
		require.False(t, f.Pending())
		require.True(t, bytes.Equal(want, readAll(t, f)))
		require.True(t, bytes.Equal(want, readAll(t, v.open(t, m, bs))))
	}
}

// Readers, writers and a truncater at once: blocks are never torn.
func TestConcurrentBlocksAreWhole(t *testing.T) {
	_, v, f := newTestFile(t, bs, bytes.Repeat([]byte{1}, 16*bs))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			for i := 0; i < 300; i++ {
				block := (i*5 + w) % 16
				_, err := f.WriteAt(bytes.Repeat([]byte{byte(2 + w)}, bs), int64(block*bs))
				require.NoError(t, err)
			}
		})
	}
	for range 2 {
		wg.Go(func() {
			p := make([]byte, 4*bs)
			for i := 0; ; i = (i + 3) % 12 {
				select {
				case <-stop:
					return
				default:
				}
				n, err := f.ReadAt(p, int64(i*bs))
				if !errors.Is(err, io.EOF) {
					require.NoError(t, err)
				}
				for at := 0; at+bs <= n; at += bs {
					require.Equal(t, bytes.Repeat(p[at:at+1], bs), p[at:at+bs])
				}
			}
		})
	}
	wg.Go(func() {
		defer close(stop)
		for range 50 {
			require.NoError(t, f.Truncate(10*bs))
			require.NoError(t, f.Truncate(16*bs))
		}
	})
	wg.Wait()
	_ = v
}

// A cut to nothing in the middle of writes starts a new generation: bytes of
// the old one never meet bytes of the new one.
func TestGenerationChangesUnderWriters(t *testing.T) {
	m, v, f := newTestFile(t, bs, pattern(8*bs, 1))
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 400 {
			_, err := f.WriteAt(pattern(2*bs, byte(i)), int64(i%6*bs))
			if err != nil {
				require.ErrorIs(t, err, ErrKeyUnavailable)
			}
		}
	})
	for range 100 {
		v.prime(t, f, bs)
		require.NoError(t, f.Truncate(0))
	}
	wg.Wait()
	require.NoError(t, f.Sync())
	again := v.open(t, m, bs)
	require.NoError(t, again.EndErr())
	require.True(t, bytes.Equal(readAll(t, f), readAll(t, again)))
}

func TestFromNothingIsANewKey(t *testing.T) {
	m, v, f := newTestFile(t, bs, pattern(100, 1))
	first := *f.Identity()
	require.NoError(t, f.Truncate(0))
	require.True(t, f.NeedsKey())
	require.Nil(t, f.Identity())
	_, err := f.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, ErrKeyUnavailable)
	require.ErrorIs(t, f.Truncate(5), ErrKeyUnavailable)
	require.Zero(t, len(m.data))
	v.prime(t, f, bs)
	_, err = f.WriteAt([]byte("x"), 0)
	require.NoError(t, err)
	require.NotEqual(t, first.File, f.Identity().File)
	h, err := ParseHeader(m.header)
	require.NoError(t, err)
	require.Equal(t, h.File, f.Identity().File)
	// An unused key comes back.
	g := v.open(t, newMem(), bs)
	k := newFresh(t, bs)
	require.True(t, g.Prime(k))
	require.False(t, g.Prime(newFresh(t, bs)))
	after := newFresh(t, bs)
	require.Same(t, k, g.Reprime(after), "a rekey exchanges it")
	require.True(t, g.Primed())
	require.Same(t, after, g.Unprime())
	require.Nil(t, g.Unprime())
	require.Same(t, k, g.Reprime(k), "nothing to exchange")
	require.False(t, g.Primed())
}

func TestEndRule(t *testing.T) {
	want := pattern(3*bs+500, 1)
	for _, size := range []int{3*bs + 500, 3 * bs, 1} {
		m0, v, f := newTestFile(t, bs, want[:size])
		f.Close()
		full := m0.data
		for _, cut := range cuts(len(full)) {
			t.Run(fmt.Sprintf("size%d-cut%d", size, cut), func(t *testing.T) {
				m := newMem()
				_, _ = m.WriteAt(full[:cut], 0)
				m.header = m0.header
				f := v.open(t, m, bs)
				require.Error(t, f.EndErr())
				require.EqualValues(t, PlainSize(int64(cut), bs), f.Size())
				checkBadEnd(t, f, want)
				repairEnd(t, v, m, f, want)
			})
		}
	}
}

// cuts are the stored lengths an attacker or a crash may leave.
func cuts(n int) (out []int) {
	seen := map[int]bool{0: true, n: true}
	for base := 0; base <= n; base += bs + RecordOverhead {
		for _, d := range []int{-33, -32, -31, -1, 0, 1, 16, 31, 32, 33, 100} {
			if c := base + d; c > 0 && c < n && !seen[c] {
				seen[c] = true
				out = append(out, c)
			}
		}
	}
	return out
}

func checkBadEnd(t *testing.T, f *File, want []byte) {
	t.Helper()
	size := f.Size()
	good := f.l.last(size) * bs
	p := make([]byte, good)
	if good > 0 {
		_, err := f.ReadAt(p, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want[:good], p))
		_, err = f.WriteAt(want[:1], good-1)
		require.NoError(t, err, "blocks before the last stay writable")
		_, err = f.WriteAt(want[good-1:good], good-1)
		require.NoError(t, err)
	}
	_, err := f.ReadAt(make([]byte, 1), good)
	require.ErrorIs(t, err, ErrDamaged)
	for _, off := range []int64{good, size, size + 10, size + 10*bs} {
		_, err = f.WriteAt([]byte("x"), off)
		require.ErrorIs(t, err, ErrDamaged, "a write never repairs a bad end")
	}
	require.ErrorIs(t, f.Truncate(size+1), ErrDamaged)
	require.ErrorIs(t, f.Punch(good, 1), onlyIf(size > 0, ErrDamaged))
}

func onlyIf(ok bool, err error) error {
	if ok {
		return err
	}
	return nil
}

func repairEnd(t *testing.T, v vault, m *memBacking, f *File, want []byte) {
	t.Helper()
	good := f.l.last(f.Size()) * bs
	for _, size := range []int64{good, max(0, good-10)} {
		require.NoError(t, f.Truncate(size))
		require.NoError(t, f.EndErr())
		require.True(t, bytes.Equal(want[:size], readAll(t, f)))
	}
	if f.NeedsKey() {
		v.prime(t, f, bs)
	}
	_, err := f.WriteAt([]byte("again"), f.Size())
	require.NoError(t, err)
	require.NoError(t, v.open(t, m, bs).EndErr())
}

// Attacks on stored records: the error touches that block and no other.
func TestAttacksOnRecords(t *testing.T) {
	const rec = bs + RecordOverhead
	want := pattern(6*bs+70, 5)
	attacks := map[string]struct {
		do  func(d []byte) []byte
		bad []int64
	}{
		"flip epoch":      {func(d []byte) []byte { d[2*rec] ^= 1; return d }, []int64{2}},
		"flip nonce":      {func(d []byte) []byte { d[2*rec+5] ^= 1; return d }, []int64{2}},
		"flip ciphertext": {func(d []byte) []byte { d[2*rec+100] ^= 1; return d }, []int64{2}},
		"flip tag":        {func(d []byte) []byte { d[3*rec-1] ^= 1; return d }, []int64{2}},
		"zero":            {func(d []byte) []byte { clear(d[2*rec : 3*rec]); return d }, []int64{2}},
		"swap": {func(d []byte) []byte {
			x := append([]byte(nil), d[rec:2*rec]...)
			copy(d[rec:], d[2*rec:3*rec])
			copy(d[2*rec:], x)
			return d
		}, []int64{1, 2}},
		"move":     {func(d []byte) []byte { copy(d[4*rec:5*rec], d[rec:2*rec]); return d }, []int64{4}},
		"flip end": {func(d []byte) []byte { d[len(d)-1] ^= 1; return d }, []int64{6}},
		"drop a block": {func(d []byte) []byte { return append(d[:rec:rec], d[2*rec:]...) },
			[]int64{1, 2, 3, 4, 5}},
		"append a byte": {func(d []byte) []byte { return append(d, 0) }, []int64{6}},
	}
	for name, a := range attacks {
		t.Run(name, func(t *testing.T) {
			m, v, _ := newTestFile(t, bs, want)
			m.data = a.do(m.data)
			m.hole = make([]bool, len(m.data))
			f := v.open(t, m, bs)
			bad := map[int64]bool{}
			for _, b := range a.bad {
				bad[b] = true
			}
			for block := int64(0); block <= f.l.last(f.Size()); block++ {
				p := make([]byte, f.l.length(block, f.Size()))
				_, err := f.ReadAt(p, block*bs)
				if bad[block] {
					require.ErrorIs(t, err, ErrDamaged, "block %d", block)
					continue
				}
				require.NoError(t, err, "block %d", block)
				require.True(t, bytes.Equal(want[block*bs:block*bs+int64(len(p))], p))
			}
			n, err := f.ReadAt(make([]byte, f.Size()), 0)
			require.ErrorIs(t, err, ErrDamaged)
			require.EqualValues(t, a.bad[0]*bs, n, "what precedes the damage is good")
		})
	}
}

// Replay of earlier ciphertext of the same block is not detected; SECURITY.md
// says so, and this shows it.
func TestReplayIsNotDetected(t *testing.T) {
	old := pattern(3*bs, 1)
	m, v, f := newTestFile(t, bs, old)
	before := append([]byte(nil), m.data...)
	_, err := f.WriteAt(pattern(bs, 9), bs)
	require.NoError(t, err)
	const rec = bs + RecordOverhead
	copy(m.data[rec:2*rec], before[rec:2*rec])
	require.True(t, bytes.Equal(old, readAll(t, v.open(t, m, bs))))
}

// A store that runs full: the failing write reports it, nothing older is lost.
func TestNoSpace(t *testing.T) {
	for room := 0; room < 3*(bs+RecordOverhead); room += 97 {
		for _, size := range []int{0, 100, bs, bs + 100} {
			for _, off := range []int{size, size / 2, size + 3*bs} {
				want := pattern(size, 1)
				m, v, f := newTestFile(t, bs, want)
				if size == 0 {
					v.prime(t, f, bs)
				}
				m.room = room
				_, err := f.WriteAt(pattern(3*bs, 2), int64(off))
				if err == nil {
					continue
				}
				require.ErrorIs(t, err, syscall.ENOSPC)
				require.NoError(t, f.EndErr())
				require.EqualValues(t, size, f.Size())
				require.EqualValues(t, StoredSize(int64(size), bs), len(m.data))
				if off >= size {
					require.True(t, bytes.Equal(want, readAll(t, f)))
				}
				m.room = -1
				again := v.open(t, m, bs)
				require.NoError(t, again.EndErr())
				if off >= size {
					require.True(t, bytes.Equal(want, readAll(t, again)))
				}
			}
		}
	}
}

// A full store that copies on write takes no write at all: nothing was torn, and
// nothing needs to be put back, which it would refuse, too.
func TestNoSpaceToCopyOnWrite(t *testing.T) {
	for _, size := range []int{0, 100, bs, bs + 100} {
		for _, off := range []int{0, size, size / 2, size + 3*bs} {
			want := pattern(size, 1)
			m, v, f := newTestFile(t, bs, want)
			if size == 0 {
				v.prime(t, f, bs)
			}
			m.refusal = syscall.EDQUOT
			for range 2 {
				_, err := f.WriteAt(pattern(3*bs, 2), int64(off))
				require.ErrorIs(t, err, syscall.EDQUOT)
				require.NoError(t, f.EndErr())
			}
			require.Error(t, f.Truncate(int64(size+100)))
			require.NoError(t, f.EndErr())
			require.True(t, bytes.Equal(want, readAll(t, f)))
			require.True(t, bytes.Equal(want, readAll(t, v.open(t, m, bs))))
			m.refusal = nil
			_, err := f.WriteAt(pattern(3*bs, 2), int64(off))
			require.NoError(t, err)
			require.EqualValues(t, max(size, off+3*bs), f.Size())
			require.NoError(t, f.Settle())
			readAll(t, v.open(t, m, bs))
		}
	}
}

// A store that copies on write and is full in the middle of a write refuses to take
// back the end that was torn: it is kept, read from memory, and put back by the next
// sync or write that finds room.
func TestTornEndIsPutBackLater(t *testing.T) {
	for _, size := range []int{0, 100, bs, bs + 100} {
		for _, tear := range []int{1, 100, bs, 2*bs + 700} {
			for _, off := range []int{size, size + 3*bs, size / 2} {
				want := pattern(size, 1)
				m, v, f := newTestFile(t, bs, want)
				if size == 0 {
					v.prime(t, f, bs)
				}
				m.tear = tear
				_, err := f.WriteAt(pattern(3*bs, 2), int64(off))
				require.ErrorIs(t, err, syscall.EDQUOT)
				require.EqualValues(t, size, f.Size())
				inside := off < size
				if !inside {
					require.True(t, bytes.Equal(want, readAll(t, f)))
					require.ErrorIs(t, f.Sync(), syscall.EDQUOT)
					_, err = f.WriteAt([]byte("more"), int64(size))
					require.ErrorIs(t, err, syscall.EDQUOT)
					require.True(t, bytes.Equal(want, readAll(t, f)))
				}
				m.refusal = nil
				require.NoError(t, f.Sync())
				require.EqualValues(t, StoredSize(int64(size), bs), len(m.data))
				again := v.open(t, m, bs)
				require.NoError(t, again.EndErr())
				if !inside {
					require.True(t, bytes.Equal(want, readAll(t, again)))
				}
				_, err = f.WriteAt(pattern(3*bs, 2), int64(size))
				require.NoError(t, err)
			}
		}
	}
}

func TestNoSpaceInAHole(t *testing.T) {
	m, v, f := newTestFile(t, bs, pattern(10, 1))
	require.NoError(t, f.Truncate(3<<20))
	want := readAll(t, f)
	m.room = bs + RecordOverhead + 100
	_, err := f.WriteAt(pattern(4*bs, 2), 10*bs)
	require.ErrorIs(t, err, syscall.ENOSPC)
	copy(want[10*bs:], pattern(bs, 2)) // the block that fitted
	require.True(t, bytes.Equal(want, readAll(t, f)))
	require.True(t, bytes.Equal(want, readAll(t, v.open(t, m, bs))))
}

// A write that begins in a hole, passes the end and runs out of space leaves the
// hole whole.
func TestNoSpaceFromAHolePastTheEnd(t *testing.T) {
	m, _, f := newTestFile(t, bs, []byte("x"))
	require.NoError(t, f.Truncate(3<<20))
	m.room = 10_000
	_, err := f.WriteAt(pattern(200_000, 1), 3<<20-100_000)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.EqualValues(t, 3<<20, f.Size())
	readAll(t, f)
}

// A gap needs no space: where zeros can't be sealed it becomes a hole.
func TestSettleWithoutSpace(t *testing.T) {
	m, v, f := newTestFile(t, bs, nil)
	v.prime(t, f, bs)
	_, err := f.WriteAt([]byte("end"), 100_000)
	require.NoError(t, err)
	m.room = bs + RecordOverhead + 5
	require.NoError(t, f.Settle())
	require.False(t, f.Pending())
	want := append(make([]byte, 100_000), "end"...)
	require.True(t, bytes.Equal(want, readAll(t, v.open(t, m, bs))))
}

// An allocation that fails half-way leaves an empty file that can be written.
func TestAllocateWithoutSpace(t *testing.T) {
	m, v, f := newTestFile(t, bs, nil)
	v.prime(t, f, bs)
	m.room = 3 << 20
	require.ErrorIs(t, f.Allocate(0, 8<<20, false), syscall.ENOSPC)
	require.Zero(t, f.Size())
	require.Zero(t, len(m.data))
	m.room = -1
	_, err := f.WriteAt([]byte("hello"), 0)
	require.NoError(t, err)
	require.Equal(t, "hello", string(readAll(t, v.open(t, m, bs))))
}

// Appending at a boundary overwrites the empty record and no earlier one; the
// tail comes from memory, so nothing is read.
func TestAppendReadsNothing(t *testing.T) {
	m, _, f := newTestFile(t, bs, pattern(bs, 1))
	reads := m.reads
	before := append([]byte(nil), m.data[:bs+RecordOverhead]...)
	for i := range 100 {
		_, err := f.WriteAt(pattern(100, byte(i)), f.Size())
		require.NoError(t, err)
	}
	require.Equal(t, reads, m.reads)
	require.Equal(t, before, m.data[:bs+RecordOverhead])
}

func TestNonceAndEpochNeverRepeat(t *testing.T) {
	m, v, f := newTestFile(t, bs, nil)
	v.prime(t, f, bs)
	seen := map[string]bool{}
	for range 300 {
		_, err := f.WriteAt(pattern(bs, 1), 0)
		require.NoError(t, err)
		nonce := string(m.data[:16])
		require.False(t, seen[nonce])
		seen[nonce] = true
	}
	f = v.open(t, m, bs)
	epoch := binary.LittleEndian.Uint32(m.data)
	_, err := f.WriteAt(pattern(bs, 1), 0)
	require.NoError(t, err)
	require.NotEqual(t, epoch, binary.LittleEndian.Uint32(m.data), "a mount draws its own epoch")
}

func TestSizesBeyondTheFormat(t *testing.T) {
	_, _, f := newTestFile(t, bs, []byte("x"))
	require.ErrorIs(t, f.Truncate(math.MaxInt64), ErrTooLarge)
	_, err := f.WriteAt([]byte("x"), math.MaxInt64)
	require.ErrorIs(t, err, ErrTooLarge)
	_, err = f.WriteAt([]byte("x"), -1)
	require.ErrorIs(t, err, syscall.EINVAL)
	_, err = f.ReadAt(make([]byte, 1), math.MaxInt64-1)
	require.ErrorIs(t, err, io.EOF)
	require.Positive(t, StoredSize(f.l.max(), bs))
}

// FuzzFile lets the fuzzer choose the operations.
func FuzzFile(f *testing.F) {
	f.Add([]byte("some seeds to begin with"))
	f.Add([]byte{0, 1, 2, 3, 250, 251, 252, 253, 254, 255})
	f.Fuzz(func(t *testing.T, ops []byte) {
		for i := 0; i+4 <= len(ops) && i < 64; i += 4 {
			o := newOracle(t, uint64(binary.LittleEndian.Uint32(ops[i:])), bs, 5*bs)
			for range 30 {
				o.step()
			}
			o.f.Close()
		}
	})
}

// FuzzStored opens damaged files: no panic, and never a wrong byte.
func FuzzStored(f *testing.F) {
	f.Add(uint16(10), byte(1), uint16(5000))
	f.Add(uint16(4100), byte(128), uint16(9000))
	want := pattern(2*bs+300, 1)
	f.Fuzz(func(t *testing.T, at uint16, flip byte, cut uint16) {
		m, v, file := newTestFile(t, bs, want)
		file.Close()
		m.data[int(at)%len(m.data)] ^= flip
		m.data = m.data[:min(len(m.data), 1+int(cut))]
		m.hole = m.hole[:len(m.data)]
		g := v.open(t, m, bs)
		for block := int64(0); block*bs < g.Size(); block++ {
			p := make([]byte, g.l.length(block, g.Size()))
			if _, err := g.ReadAt(p, block*bs); err == nil {
				require.True(t, bytes.Equal(want[block*bs:block*bs+int64(len(p))], p))
			}
		}
	})
}
