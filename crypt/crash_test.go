package crypt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// A backing file that records what reaches it, and in which order; crashes are
// played on the record: kill -9 anywhere, and what a power cut may leave on a
// journaling file system.

type opKind int

const (
	opWrite opKind = iota
	opTruncate
	opSync
	opHeader
	opMark
	opPunch
	opBegin // of a flight in a slot
	opEnd
	opKeep  // a tail is durable
	opFree  // it is let go, not durably
	opFlush // now durably
)

type op struct {
	kind   opKind
	off, n int64
	data   []byte
	flight Flight
	slot   int
	tail   Tail
}

// recorder is a memBacking that keeps a record. slots and inner are how many slots
// there are, for those who don't wait and for those who do; one is for mending.
type recorder struct {
	*memBacking
	opsMu        sync.Mutex // an end is kept while the file is synced
	ops          []op
	slots, inner int
	taken        map[int]bool
}

func (r *recorder) record(o op) {
	r.opsMu.Lock()
	defer r.opsMu.Unlock()
	r.ops = append(r.ops, o)
}

// count is how many things are recorded.
func (r *recorder) count() int {
	r.opsMu.Lock()
	defer r.opsMu.Unlock()
	return len(r.ops)
}

func newRecorder(slots, inner int) *recorder {
	return &recorder{memBacking: newMem(), slots: slots, inner: inner, taken: map[int]bool{}}
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	n, err := r.memBacking.WriteAt(p, off)
	r.record(op{kind: opWrite, off: off, data: bytes.Clone(p[:n])})
	return n, err
}

func (r *recorder) Truncate(n int64) error {
	r.record(op{kind: opTruncate, n: n})
	return r.memBacking.Truncate(n)
}

func (r *recorder) Sync() error {
	r.record(op{kind: opSync})
	return r.memBacking.Sync()
}

func (r *recorder) SetHeader(raw []byte) error {
	r.record(op{kind: opHeader, data: raw})
	return r.memBacking.SetHeader(raw)
}

func (r *recorder) SetSparseMark(mark []byte) error {
	r.record(op{kind: opMark, data: bytes.Clone(mark)})
	return r.memBacking.SetSparseMark(mark)
}

func (r *recorder) PunchHole(off, n int64) error {
	r.record(op{kind: opPunch, off: off, n: n})
	return r.memBacking.PunchHole(off, n)
}

func (r *recorder) TakeSlot(n int64, use SlotUse) Slot {
	if r.slots+r.inner == 0 {
		return nil
	}
	at := [...]int{0, r.slots, r.slots + r.inner, r.slots + r.inner + 1}
	first, last := at[use], at[use+1]
	for i := first; i < last; i++ {
		if !r.taken[i] {
			r.taken[i] = true
			return &recordedSlot{r: r, i: i, mem: make([]byte, n, SlotSize(bs))}
		}
	}
	return nil
}

type recordedSlot struct {
	r     *recorder
	i     int
	mem   []byte
	begun bool
}

func (s *recordedSlot) Bytes() []byte { return s.mem }

func (s *recordedSlot) Begin(fl Flight) {
	s.begun = true
	s.r.record(op{kind: opBegin, slot: s.i, flight: fl, data: bytes.Clone(s.mem[:fl.Len])})
}

func (s *recordedSlot) End() {
	if s.begun {
		s.begun = false
		s.r.record(op{kind: opEnd, slot: s.i})
	}
}

func (s *recordedSlot) Free() {
	s.End()
	delete(s.r.taken, s.i)
}

// A keeper is a recorder that keeps tails, too.
type keeper struct {
	*recorder
	mu     sync.Mutex
	kept   []*keptTail // guarded by mu
	onSync func()      // happens while the file is being made durable
	noCut  bool        // truncations fail
	unread int         // counts down to the read that fails
}

func (k *keeper) ReadAt(p []byte, off int64) (int, error) {
	if k.unread--; k.unread == 0 {
		return 0, syscall.EIO
	}
	return k.recorder.ReadAt(p, off)
}

type keptTail struct {
	op         // opKeep
	stale bool // a sync has begun since
	lost  bool // and failed
	freed bool // or ended well
}

func newKeeper() *keeper { return &keeper{recorder: newRecorder(0, 0)} }

func (k *keeper) KeepTail(t Tail) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, e := range k.kept {
		if !e.stale && e.tail.Covers(&t) {
			return nil
		}
	}
	t.Records = bytes.Clone(t.Records)
	e := &keptTail{op: op{kind: opKeep, slot: len(k.kept), tail: t}}
	k.kept = append(k.kept, e)
	k.record(e.op)
	return nil
}

func (k *keeper) Disturb(from, to int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if slices.ContainsFunc(k.kept, func(e *keptTail) bool { return e.freed && from <= e.tail.Off && e.tail.Off < to }) {
		k.record(op{kind: opFlush})
	}
	return nil
}

func (k *keeper) BeginSync(again func(off int64) bool) func(error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var stale []*keptTail
	for _, e := range k.kept {
		e.stale = true
		if e.lost && !e.freed {
			e.lost = !again(e.tail.Off)
		}
		if !e.freed {
			stale = append(stale, e)
		}
	}
	return func(err error) {
		for _, e := range stale {
			e.lost = e.lost || err != nil
			if !e.lost && !e.freed {
				e.freed = true
				k.record(op{kind: opFree, slot: e.slot})
			}
		}
	}
}

func (k *keeper) Truncate(n int64) error {
	if k.noCut {
		return syscall.EIO
	}
	return k.recorder.Truncate(n)
}

func (k *keeper) Sync() error {
	err := k.recorder.Sync()
	if k.onSync != nil {
		k.onSync()
	}
	return err
}

// keptAt are the tails that a power cut after k things leaves, the newest first. One
// that was let go may be there all the same, unless something was made durable in the
// place of tails since.
func (s *story) keptAt(k int, rnd *rand.Rand) (tails []Tail) {
	for i := k - 1; i >= 0; i-- {
		keep := s.r.ops[i]
		if keep.kind != opKeep {
			continue
		}
		there := true
		for j := i + 1; j < k; j++ {
			if s.r.ops[j].kind == opFree && s.r.ops[j].slot == keep.slot {
				flushed := slices.ContainsFunc(s.r.ops[j:k], func(o op) bool { return o.kind == opKeep || o.kind == opFlush })
				there = !flushed && rnd.IntN(2) == 0
			}
		}
		if there {
			tails = append(tails, keep.tail)
		}
	}
	return tails
}

// clone copies the stored file.
func (m *memBacking) clone() *memBacking {
	return &memBacking{
		data: bytes.Clone(m.data), hole: slices.Clone(m.hole), header: m.header, mark: m.mark, room: -1, noPunch: m.noPunch,
	}
}

// apply does what was recorded.
func (m *memBacking) apply(o op) {
	switch o.kind {
	case opWrite:
		_, _ = m.WriteAt(o.data, o.off)
	case opTruncate:
		_ = m.Truncate(o.n)
	case opHeader:
		_ = m.SetHeader(o.data)
	case opMark:
		_ = m.SetSparseMark(o.data)
	case opPunch:
		_ = m.PunchHole(o.off, o.n)
	}
}

// A step is what a user did: the record from start to end, and what he expects to
// read afterwards.
type step struct {
	start, end int
	contents   []byte
	lo, hi     int64 // bytes that the step may have changed
	synced     bool
	pending    [][2]int64 // blocks that were gaps before or after
	cut        bool       // it was a truncation
}

// A story is a sequence of steps on one file.
type story struct {
	t     *testing.T
	r     *recorder
	keeps bool // tails, and the next mount puts them back and cuts bad ends off
	v     vault
	f     *File
	steps []step
}

func newStory(t *testing.T, r *recorder) *story { return newStoryOn(t, r, r) }

func newKeptStory(t *testing.T, k *keeper) *story {
	s := newStoryOn(t, k.recorder, k)
	s.keeps = true
	return s
}

func newStoryOn(t *testing.T, r *recorder, b Backing) *story {
	s := &story{t: t, r: r, v: vault{}}
	f, err := NewFile(b, bs, 0, nil)
	require.NoError(t, err)
	s.f = f
	t.Cleanup(f.Close)
	s.steps = []step{{synced: true}}
	return s
}

func (s *story) last() []byte { return s.steps[len(s.steps)-1].contents }

// do records a step that makes of the contents what change makes of them.
func (s *story) do(lo, hi int64, synced bool, call func() error, change func([]byte) []byte) {
	s.t.Helper()
	before, _ := s.f.pending.list()
	st := step{start: s.r.count(), lo: lo, hi: hi, synced: synced}
	require.NoError(s.t, call())
	st.end = s.r.count()
	st.contents = change(bytes.Clone(s.last()))
	after, _ := s.f.pending.list()
	st.pending = append(before, after...)
	s.steps = append(s.steps, st)
}

func (s *story) write(off int64, n int) {
	s.t.Helper()
	if s.f.NeedsKey() {
		s.v.prime(s.t, s.f, bs)
	}
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rand.N(255) + 1) // never 0, so that false zeros show
	}
	size := int64(len(s.last()))
	s.do(min(off, size), max(off+int64(n), off), false, func() error {
		_, err := s.f.WriteAt(p, off)
		return err
	}, func(b []byte) []byte {
		for int64(len(b)) < off+int64(n) {
			b = append(b, 0)
		}
		copy(b[off:], p)
		return b
	})
}

func (s *story) append(n int) { s.t.Helper(); s.write(int64(len(s.last())), n) }

func (s *story) truncate(size int64) {
	s.t.Helper()
	if size > 0 && s.f.NeedsKey() {
		s.v.prime(s.t, s.f, bs)
	}
	old := int64(len(s.last()))
	s.do(min(size, old), max(size, old), false, func() error { return s.f.Truncate(size) }, func(b []byte) []byte {
		for int64(len(b)) < size {
			b = append(b, 0)
		}
		return b[:size]
	})
	s.steps[len(s.steps)-1].cut = true
}

func (s *story) punch(off, n int64) {
	s.t.Helper()
	s.do(off, off+n, false, func() error { return s.f.Punch(off, n) }, func(b []byte) []byte {
		clear(b[min(off, int64(len(b))):min(off+n, int64(len(b)))])
		return b
	})
}

func (s *story) sync() {
	s.t.Helper()
	s.do(0, 0, true, s.f.Sync, func(b []byte) []byte { return b })
}

// at is the index of the step under way, or just done, when the first k things of
// the record had happened.
func (s *story) at(k int) int {
	for i := len(s.steps) - 1; i > 0; i-- {
		if s.steps[i].start < k {
			return i
		}
	}
	return 0
}

// A crash is what was found after one.
type crash struct {
	name     string
	disk     *memBacking
	versions [][]byte // what each byte may be
	// may say whether a block may be unreadable.
	may   func(block int64) bool
	keeps bool // what may not be unreadable may not be missing, either
}

// judge opens the file and reads it, and counts the blocks that are torn. Every
// readable block is one of the versions', as a whole.
func (s *story) judge(c crash) (torn int) {
	t := s.t
	t.Helper()
	var secrets *Secrets
	if len(c.disk.data) > 0 {
		h, err := ParseHeader(c.disk.header)
		require.NoError(t, err, c.name)
		secrets, err = s.v[h.File].Clone()
		require.NoError(t, err)
	}
	f, err := NewFile(c.disk, bs, int64(len(c.disk.data)), secrets)
	require.NoError(t, err, c.name)
	defer f.Close()
	lo, hi := int64(len(c.versions[0])), int64(0)
	for _, v := range c.versions {
		lo, hi = min(lo, int64(len(v))), max(hi, int64(len(v)))
	}
	if c.keeps {
		require.NoError(t, f.EndErr(), c.name)
	} else if f.EndErr() == nil {
		require.GreaterOrEqual(t, f.Size(), lo, c.name)
		require.LessOrEqual(t, f.Size(), (hi+bs-1)/bs*bs, c.name)
	}
	for block := int64(0); block*bs < max(f.Size(), lo); block++ {
		p := make([]byte, bs)
		n, err := f.ReadAt(p, block*bs)
		if errors.Is(err, io.EOF) && n > 0 {
			err = nil
		}
		if c.keeps && err == nil && !c.may(block) {
			require.GreaterOrEqual(t, int64(n), shortest(c.versions, block), "%s: block %d has lost bytes", c.name, block)
		}
		if c.keeps && errors.Is(err, io.EOF) {
			err = ErrDamaged // it was cut off
		}
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged, "%s: block %d", c.name, block)
			require.True(t, c.may(block), "%s: block %d of %d bytes is lost: %v", c.name, block, f.Size(), err)
			torn++
			continue
		}
		require.True(t, isBlockOf(c.versions, p[:n], block), "%s: wrong bytes in block %d", c.name, block)
	}
	return torn
}

// isBlockOf reports whether p, or more, stands at the block in one of the versions.
func isBlockOf(versions [][]byte, p []byte, block int64) bool {
	return slices.ContainsFunc(versions, func(v []byte) bool {
		return block*bs+int64(len(p)) <= int64(len(v)) && bytes.Equal(v[block*bs:][:len(p)], p)
	})
}

func inRuns(runs [][2]int64, block int64) bool {
	return slices.ContainsFunc(runs, func(r [2]int64) bool { return r[0] <= block && block < r[1] })
}

// kills plays kill -9 after everything that was recorded, and in the middle of every
// write, at each multiple of 512 bytes. What was written stays: the machine lives on.
func (s *story) kills() (crashes, torn int) {
	s.t.Helper()
	disk := newMem()
	disk.noPunch = s.r.noPunch
	inFlight := map[int]op{}
	var order []int
	for k := range len(s.r.ops) + 1 {
		play := func(name string, disk *memBacking) {
			for _, i := range order {
				require.NoError(s.t, inFlight[i].flight.Replay(disk, bs, inFlight[i].data), name)
			}
			crashes++
			torn += s.judge(s.killedAt(name, k, disk))
		}
		play(fmt.Sprintf("killed after %d", k), disk.clone())
		if k == len(s.r.ops) {
			break
		}
		o := s.r.ops[k]
		switch o.kind {
		case opWrite:
			for at := (o.off/512 + 1) * 512; at < o.off+int64(len(o.data)); at += 512 {
				d := disk.clone()
				d.apply(op{kind: opWrite, off: o.off, data: o.data[:at-o.off]})
				play(fmt.Sprintf("killed in write %d at byte %d", k, at), d)
			}
		case opBegin:
			inFlight[o.slot], order = o, append(order, o.slot)
		case opEnd:
			delete(inFlight, o.slot)
			order = slices.DeleteFunc(order, func(i int) bool { return i == o.slot })
		}
		disk.apply(o)
	}
	return crashes, torn
}

// killedAt: the step under way may have happened or not. Without slots what it
// touches may be torn.
func (s *story) killedAt(name string, k int, disk *memBacking) crash {
	i := s.at(k + 1)
	st := s.steps[i]
	versions := [][]byte{st.contents}
	if i > 0 && (k < st.end || st.end == st.start) {
		versions = append(versions, s.steps[i-1].contents)
	}
	end := int64(0)
	for _, v := range versions {
		end = max(end, int64(len(v)))
	}
	return crash{name: name, disk: disk, versions: versions, may: func(block int64) bool {
		if inRuns(st.pending, block) {
			return true
		}
		// The last block goes with a bad end.
		return s.r.slots+s.r.inner == 0 && len(versions) > 1 && (st.lo < (block+1)*bs && block*bs < st.hi || block >= (min(st.lo, end)-1)/bs)
	}}
}

// mixed is a story of everything that users do to files.
func mixed(t *testing.T, r *recorder, seed uint64, steps int) *story {
	return mixedOn(newStory(t, r), seed, steps)
}

func mixedOn(s *story, seed uint64, steps int) *story {
	rnd := rand.New(rand.NewPCG(seed, 1))
	s.write(0, 3*bs+100)
	for range steps {
		size := int64(len(s.last()))
		switch rnd.IntN(12) {
		case 0, 1:
			s.append(1 + rnd.IntN(300))
		case 2:
			s.append(1 + rnd.IntN(3*bs))
		case 3: // to a boundary
			s.append(int(bs - size%bs))
		case 4, 5:
			s.write(rnd.Int64N(size+1), 1+rnd.IntN(2*bs))
		case 6:
			s.write(rnd.Int64N(size/bs+1)*bs, bs*(1+rnd.IntN(3)))
		case 7: // a gap
			s.write(size+rnd.Int64N(3*bs), 1+rnd.IntN(bs))
		case 8:
			s.truncate(rnd.Int64N(size + bs))
		case 9:
			if size > 0 {
				s.punch(rnd.Int64N(size), 1+rnd.Int64N(2*bs))
			}
		case 10:
			s.sync()
		case 11:
			if size > 10*bs {
				s.truncate(rnd.Int64N(2) * 100)
			}
		}
	}
	s.sync()
	return s
}

// TestKilledAnywhere: with slots no block is torn, wherever the process is killed,
// and each block is what it was before or after the step under way. Without them
// some are, and none is wrong.
func TestKilledAnywhere(t *testing.T) {
	for _, tt := range []struct {
		name         string
		slots, inner int
		noPunch      bool
	}{
		{"slots", 4, 1, false},
		{"no slot is free", 0, 2, false},
		{"no punching", 4, 1, true},
		{"none", 0, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			crashes, torn := 0, 0
			for seed := range uint64(6) {
				r := newRecorder(tt.slots, tt.inner)
				r.noPunch = tt.noPunch
				c, n := mixed(t, r, seed, 40).kills()
				crashes, torn = crashes+c, torn+n
				require.Empty(t, r.taken, "a slot was not freed")
			}
			t.Logf("%d crashes, %d unreadable blocks", crashes, torn)
			require.Greater(t, crashes, 500)
			if tt.slots+tt.inner == 0 {
				require.NotZero(t, torn, "the crashes that are played tear nothing")
			}
		})
	}
}

// TestKilledOnAFullDisk: a write that has no room is undone. Whoever is killed before
// that is done leaves the write, its undoing, or what was before; no old byte is lost.
func TestKilledOnAFullDisk(t *testing.T) {
	for _, slots := range []int{0, 2} { // no slot is free, or one is
		for _, full := range []struct {
			name string
			off  int64
			n    int
		}{
			{"append", 2*bs + 100, 3 * bs},
			{"append to a block", 2*bs + 100, 200},
			{"behind a gap", 4*bs + 5, bs},
			{"whole blocks", bs, 4 * bs},
		} {
			for room := range 5 {
				r := newRecorder(slots, 1)
				s := newStory(t, r)
				s.write(0, 2*bs+100)
				s.sync()
				r.room = 10 + room*1100
				s.do(full.off, full.off+int64(full.n), false, func() error {
					_, err := s.f.WriteAt(pattern(full.n, 3), full.off)
					if room == 0 || full.n > 200 {
						require.ErrorIs(t, err, syscall.ENOSPC, full.name)
					}
					return nil
				}, func(b []byte) []byte {
					for int64(len(b)) < full.off+int64(full.n) {
						b = append(b, 0)
					}
					copy(b[full.off:], pattern(full.n, 3))
					return b
				})
				s.steps = append(s.steps, step{start: len(r.ops), end: len(r.ops), contents: s.steps[1].contents})
				s.killsWhileFull(full.name)
			}
		}
	}
}

// killsWhileFull plays kill -9 with a disk as full as it was.
func (s *story) killsWhileFull(name string) {
	s.t.Helper()
	st := s.steps[len(s.steps)-2]
	for k := st.start; k <= len(s.r.ops); k++ {
		disk, inFlight := newMem(), []op{}
		for _, o := range s.r.ops[:k] {
			switch o.kind {
			case opBegin:
				inFlight = append(inFlight, o)
			case opEnd:
				inFlight = slices.DeleteFunc(inFlight, func(b op) bool { return b.slot == o.slot })
			}
			disk.apply(o)
		}
		for _, o := range inFlight {
			require.NoError(s.t, o.flight.Replay(disk, bs, o.data))
		}
		s.judge(crash{name: fmt.Sprintf("%s, killed after %d", name, k), disk: disk, versions: [][]byte{s.steps[1].contents, st.contents}, may: func(block int64) bool {
			return name == "behind a gap" && block == 3
		}})
	}
}

// A power cut after k things leaves of what came after the last sync: of the changes to
// sizes and attributes a beginning, as the journal has them in order, where a growth may
// stop at a page; and of every page what it was at any time since, for pages are written
// in any order, and of some pages each sector. What a size says and no page has is
// zeros. Pages that were cut off and came again are new blocks on the disk: they hold
// nothing older.
func (s *story) powerCut(k int, rnd *rand.Rand) *memBacking {
	from := 0 // everything before is durable
	for i, o := range s.r.ops[:k] {
		if o.kind == opSync {
			from = i
		}
	}
	disk := newMem()
	for _, o := range s.r.ops[:from] {
		disk.apply(o)
	}
	journal := from + rnd.IntN(k-from+1)
	states := []*memBacking{disk.clone()}
	after := disk.clone()
	for i := from; i < k; i++ {
		disk.apply(s.r.ops[i])
		states = append(states, disk.clone())
		if i < journal {
			after.apply(s.r.ops[i])
		}
	}
	if before := len(states[max(0, journal-from-1)].data); rnd.IntN(3) == 0 && before < len(after.data)/4096*4096 {
		_ = after.Truncate(int64((before/4096 + 1 + rnd.IntN(len(after.data)/4096-before/4096)) * 4096))
	}
	for page := 0; page < len(after.data); page += 4096 {
		oldest := 0 // the first state that may show
		for i := range journal - from {
			if o := s.r.ops[from+i]; o.kind == opTruncate && o.n <= int64(page) {
				oldest = i + 1
			}
		}
		newest := len(states) - 1
		for i := journal; i < k; i++ {
			if o := s.r.ops[i]; o.kind == opTruncate && o.n <= int64(page) {
				newest = i - from // the blocks of a cut that is not in the journal are not used again
				break
			}
		}
		piece := 4096
		if rnd.IntN(3) == 0 {
			piece = 512
		}
		for at := page; at < min(page+4096, len(after.data)); at += piece {
			from := states[oldest+rnd.IntN(newest-oldest+1)]
			shown := after.data[at:min(at+piece, len(after.data))]
			clear(shown)
			if at < len(from.data) {
				copy(shown, from.data[at:])
			}
		}
	}
	return after
}

// cuts plays power cuts after everything that was recorded, several each.
func (s *story) cuts(rnd *rand.Rand) (crashes, torn int) {
	s.t.Helper()
	for k := range len(s.r.ops) + 1 {
		for range 4 {
			crashes++
			disk := s.powerCut(k, rnd)
			if s.keeps {
				s.recover(disk, s.keptAt(k, rnd))
			}
			torn += s.judge(s.cutAt(k, disk))
		}
	}
	return crashes, torn
}

// cutAt: every step since the last sync may have happened or not. What they touched may
// be unreadable, and what lies beyond it; the last block of a file whose end they moved
// goes with its end.
func (s *story) cutAt(k int, disk *memBacking) crash {
	i := s.at(k + 1)
	first := i
	for first > 0 && !(s.steps[first].synced && s.steps[first].end <= k) {
		first--
	}
	c := crash{name: fmt.Sprintf("power cut after %d", k), disk: disk}
	lo, hi := int64(1)<<60, int64(0)
	end := lo
	for j := first; j <= i; j++ {
		st := s.steps[j]
		c.versions = append(c.versions, st.contents)
		end = min(end, int64(len(st.contents)))
		if j > first && st.hi > st.lo {
			lo, hi = min(lo, st.lo), max(hi, st.hi)
		}
	}
	pending := s.steps[i].pending
	if s.keeps {
		c.may = func(block int64) bool { return inRuns(pending, block) || mayTear(s.steps[first:i+1], block) }
		c.keeps = true
		return c
	}
	c.may = func(block int64) bool {
		touched := lo < (block+1)*bs && block*bs < hi
		return touched || hi >= end/bs*bs && block >= max(0, end-1)/bs || inRuns(pending, block)
	}
	return c
}

// TestPowerCutAnywhere: whatever a power cut leaves, no byte is wrong, no zeros are
// false, and what was synced and not touched since is there, but for the last block of a
// file whose end was being moved.
func TestPowerCutAnywhere(t *testing.T) {
	crashes, torn := 0, 0
	for seed := range uint64(12) {
		s := mixed(t, newRecorder(0, 0), seed, 40)
		c, n := s.cuts(rand.New(rand.NewPCG(seed, 2)))
		crashes, torn = crashes+c, torn+n
	}
	t.Logf("%d crashes, %d unreadable blocks", crashes, torn)
	require.Greater(t, crashes, 2000)
	require.NotZero(t, torn, "the crashes that are played tear nothing")
}

// recover is what the next mount does.
func (s *story) recover(disk *memBacking, tails []Tail) {
	s.t.Helper()
	if len(disk.data) == 0 {
		return
	}
	h, err := ParseHeader(disk.header)
	require.NoError(s.t, err)
	_, err = RecoverTails(disk, bs, int64(len(disk.data)), s.v[h.File], tails)
	require.NoError(s.t, err)
	f := s.v.open(s.t, disk, bs)
	defer f.Close()
	if _, err := f.CutEnd(); err != nil { // nothing of it was ever durable
		require.ErrorIs(s.t, err, ErrDamaged)
		require.NoError(s.t, f.Truncate(0))
	}
}

// mayTear says whether a power cut may tear a block, though tails are kept: it was not
// durable, or a full one that was written in place, or it was cut off. steps begin with
// the last one that was synced.
func mayTear(steps []step, block int64) bool {
	if int64(len(steps[0].contents)) <= block*bs {
		return true
	}
	for i, st := range steps[1:] {
		size, now := int64(len(steps[i].contents)), int64(len(st.contents))
		switch {
		case now <= block*bs:
			return true
		case st.cut && now < size:
		case size >= (block+1)*bs && st.lo < (block+1)*bs && block*bs < st.hi:
			return true
		}
	}
	return false
}

// shortest is how many bytes a block has in the version that has the fewest.
func shortest(versions [][]byte, block int64) int64 {
	n := int64(bs)
	for _, v := range versions {
		n = min(n, max(0, int64(len(v))-block*bs))
	}
	return n
}

// appendLog appends and syncs as a program does that keeps a log.
func appendLog(s *story, records int) {
	for range records {
		s.append(100)
		s.sync()
	}
}

// TestLogSurvivesPowerCuts: a log to which 100 bytes are appended and synced, again and
// again, loses no record that was synced, in whatever a power cut leaves. Without kept
// tails it does.
func TestLogSurvivesPowerCuts(t *testing.T) {
	s := newKeptStory(t, newKeeper())
	appendLog(s, 100)
	crashes, torn := s.cuts(rand.New(rand.NewPCG(1, 3)))
	t.Logf("%d power cuts, %d records durable at the end", crashes, len(s.last())/100)
	require.Zero(t, torn)
	require.Greater(t, crashes, 1000)

	bare := newStory(t, newRecorder(0, 0))
	appendLog(bare, 100)
	_, torn = bare.cuts(rand.New(rand.NewPCG(1, 3)))
	require.NotZero(t, torn, "the crashes that are played tear nothing")
}

// TestPowerCutWithTails: with kept tails a power cut tears no block but full ones that
// were being written in place, whatever users do; every file ends well afterwards.
func TestPowerCutWithTails(t *testing.T) {
	crashes, torn := 0, 0
	for seed := range uint64(16) {
		s := mixedOn(newKeptStory(t, newKeeper()), seed, 40)
		c, n := s.cuts(rand.New(rand.NewPCG(seed, 4)))
		crashes, torn = crashes+c, torn+n
	}
	t.Logf("%d crashes, %d unreadable blocks", crashes, torn)
	require.Greater(t, crashes, 2000)
}

// TestWritesDuringASync: a sync covers what was written before it. What is written
// while it goes on must not rest on a tail that it will let go.
func TestWritesDuringASync(t *testing.T) {
	k := newKeeper()
	s := newKeptStory(t, k)
	appendLog(s, 3)
	inner := func() { s.append(70) }
	for range 60 {
		s.append(50)
		start := k.count()
		k.onSync = inner
		before := s.last()
		require.NoError(t, s.f.Sync())
		k.onSync = nil
		// What came before the sync is durable where the sync ended, the inner
		// append not.
		for i := start; i < len(k.ops); i++ {
			if k.ops[i].kind == opFree {
				again := s.steps[len(s.steps)-1]
				again.start, again.end = i, i
				s.steps = append(s.steps, step{start: i, end: i, contents: before, synced: true}, again)
				break
			}
		}
	}
	_, torn := s.cuts(rand.New(rand.NewPCG(1, 5)))
	require.Zero(t, torn)
}

// TestFailedCutCoversNothing: what was kept for a cut that failed is not how the file
// ends, so the next append needs more.
func TestFailedCutCoversNothing(t *testing.T) {
	k := newKeeper()
	s := newKeptStory(t, k)
	s.write(0, 3*bs+100)
	s.sync()
	k.noCut = true
	s.do(0, 0, false, func() error {
		require.ErrorIs(t, s.f.Truncate(bs+100), syscall.EIO)
		return nil
	}, func(b []byte) []byte { return b })
	k.noCut = false
	s.append(100)
	for seed := range uint64(20) {
		s.cuts(rand.New(rand.NewPCG(seed, 6)))
	}
}

// TestUnreadNewEndIsNoDamage: a store that does not give the record that a cut will end in
// makes the cut fail with its own error, and changes nothing.
func TestUnreadNewEndIsNoDamage(t *testing.T) {
	k := newKeeper()
	s := newKeptStory(t, k)
	s.write(0, 3*bs+100)
	s.sync()
	for at := 1; ; at++ {
		k.unread = at
		err := s.f.Truncate(bs + 100)
		if k.unread > 0 { // it has fewer reads
			require.NoError(t, err)
			require.Greater(t, at, 1)
			break
		}
		require.ErrorIs(t, err, syscall.EIO)
		require.NotErrorIs(t, err, ErrDamaged)
		require.Equal(t, s.last(), readAll(t, s.f))
	}
	k.unread = 0
	s.truncate(bs + 100)
	require.Equal(t, s.last(), readAll(t, s.f))
}

// TestEndsThatWereLetGoStayAway: an end that was let go, and that a power cut may bring
// back, is not put back where a later write tore the record at its place.
func TestEndsThatWereLetGoStayAway(t *testing.T) {
	for name, tell := range map[string]func(s *story){
		"the file was cut, and grows over it": func(s *story) {
			s.write(0, 6*bs+100)
			s.sync()
			s.append(10)
			s.truncate(2*bs + 50)
			s.append(10)
			s.sync()
			s.append(6 * bs)
		},
		"its block is full, and written with the end": func(s *story) {
			s.write(0, 2*bs+100)
			s.sync()
			s.append(2 * bs)
			s.sync()
			s.write(2*bs+10, 3*bs)
		},
		"the end is on a boundary": func(s *story) {
			s.write(0, 2*bs+100)
			s.sync()
			s.append(bs - 100)
			s.sync()
			s.append(3 * bs)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newKeptStory(t, newKeeper())
			tell(s)
			k, rnd := len(s.r.ops), rand.New(rand.NewPCG(1, 7))
			for range 1500 { // of the last write, many
				disk := s.powerCut(k, rnd)
				s.recover(disk, s.keptAt(k, rnd))
				s.judge(s.cutAt(k, disk))
			}
		})
	}
}

// A forgetful store is one whose sync fails as Linux does: of each write since the one
// before only the first half reached the disk, and all count as written from then on.
type forgetful struct {
	*keeper
	disk  *memBacking // what is durable
	done  int         // so many things that were recorded are, or are given up
	fails bool
}

func (f *forgetful) Sync() error {
	f.opsMu.Lock()
	defer f.opsMu.Unlock()
	for _, o := range f.ops[f.done:] {
		if f.fails && o.kind == opWrite {
			o.data = o.data[:len(o.data)/2]
		}
		f.disk.apply(o)
	}
	f.done = len(f.ops)
	if f.fails {
		return syscall.EIO
	}
	return nil
}

// forgetfulLog is a file of 100 synced bytes that grew by 150 when a sync failed.
func forgetfulLog(t *testing.T) (*story, *forgetful) {
	k := newKeeper()
	b := &forgetful{keeper: k, disk: newMem()}
	s := newStoryOn(t, k.recorder, b)
	s.write(0, 100)
	s.sync()
	s.append(150)
	b.fails = true
	require.ErrorIs(t, s.f.Sync(), syscall.EIO)
	b.fails = false
	return s, b
}

// afterPowerCut is what the next mount makes of the disk.
func (f *forgetful) afterPowerCut(s *story) []byte {
	var tails []Tail
	for _, e := range slices.Backward(f.kept) {
		if !e.freed {
			tails = append(tails, e.tail)
		}
	}
	disk := f.disk.clone()
	s.recover(disk, tails)
	again := s.v.open(s.t, disk, bs)
	require.NoError(s.t, again.EndErr())
	return readAll(s.t, again)
}

// requireSynced: the first 100 bytes are there, and if more is, it is what was written.
func (f *forgetful) requireSynced(s *story) {
	s.t.Helper()
	got := f.afterPowerCut(s)
	require.GreaterOrEqual(s.t, len(got), 100)
	require.True(s.t, bytes.HasPrefix(s.last(), got))
}

// TestFailedSyncIsMadeGood: a sync that ends well after one that failed makes durable what
// the first one lost of the end. Before, between and after the two the bytes that had been
// synced stay.
func TestFailedSyncIsMadeGood(t *testing.T) {
	s, b := forgetfulLog(t)
	b.requireSynced(s)
	require.NoError(t, s.f.Sync())
	require.Equal(t, s.last(), b.afterPowerCut(s))
	require.True(t, b.kept[0].freed)

	s, b = forgetfulLog(t)
	b.fails = true
	s.append(2 * bs)
	require.ErrorIs(t, s.f.Sync(), syscall.EIO)
	b.fails = false
	require.NoError(t, s.f.Sync())
	require.Equal(t, s.last(), b.afterPowerCut(s))

	s, b = forgetfulLog(t) // the file goes on to grow, and a sync of all comes first
	s.append(2 * bs)
	end := s.f.TryBeginSync()
	require.NoError(t, b.Sync())
	end(nil)
	require.Equal(t, s.last(), b.afterPowerCut(s))
}

// TestLostEndStaysKept: if the store has thrown away what it could not write, or there are
// no keys to tell, a sync that ends well lets go of nothing.
func TestLostEndStaysKept(t *testing.T) {
	for name, lose := range map[string]func(s *story, b *forgetful){
		"read from the disk again": func(_ *story, b *forgetful) { clear(b.data[len(b.data)/2:]) },
		"no keys":                  func(s *story, _ *forgetful) { s.f.Suspend() },
	} {
		t.Run(name, func(t *testing.T) {
			s, b := forgetfulLog(t)
			lose(s, b)
			require.NoError(t, b.SyncOf(s.f))
			require.False(t, b.kept[0].freed)
			b.requireSynced(s)
		})
	}
}

// SyncOf is fsync(2) of a file with nothing pending.
func (f *forgetful) SyncOf(v *File) error { return v.SyncBy(f.Sync) }

// TestRecoveryWritesAgain: after a mount was killed whose sync had failed, only memory may
// have the end that its successor finds good.
func TestRecoveryWritesAgain(t *testing.T) {
	s, b := forgetfulLog(t)
	_, err := RecoverTails(b, bs, int64(len(b.data)), s.v[s.f.Identity().File], []Tail{b.kept[0].tail})
	require.NoError(t, err)
	b.kept = nil
	require.Equal(t, s.last(), b.afterPowerCut(s))
}

// TestTornEndIsNotSynced: while the end is in memory only, no sync makes the torn one
// durable and lets go of the old one that is kept.
func TestTornEndIsNotSynced(t *testing.T) {
	for name, tear := range map[string]func(f *File) error{
		"append": func(f *File) error { _, err := f.WriteAt(make([]byte, 2*bs), 250); return err },
		"write":  func(f *File) error { _, err := f.WriteAt(make([]byte, 100), 0); return err },
		"cut":    func(f *File) error { return f.Truncate(200) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper()
			s := newKeptStory(t, k)
			s.write(0, 100)
			s.sync()
			s.append(150)
			k.tear = 60
			require.ErrorIs(t, tear(s.f), syscall.EDQUOT)
			require.True(t, s.f.Torn())
			require.Equal(t, s.last(), readAll(t, s.f))
			require.Nil(t, s.f.TryBeginSync())
			synced := false
			sync := func() error { synced = true; return nil }
			require.ErrorIs(t, s.f.SyncBy(sync), syscall.EDQUOT)
			require.False(t, synced)
			require.False(t, k.kept[0].stale)
			k.refusal = nil
			require.NoError(t, s.f.SyncBy(sync))
			require.True(t, synced)
			require.True(t, k.kept[0].freed)
			require.Equal(t, s.last(), readAll(t, s.v.open(t, k.memBacking, bs)))
		})
	}
}

// TestLateKeptEndIsNone: of two syncs that overlap, the first one may come to keep the
// end when the second has begun. The end is an older one by then.
func TestLateKeptEndIsNone(t *testing.T) {
	for name, newer := range map[string]func(s *story) func(){
		"sync": func(s *story) func() {
			end, _, err := s.f.beginSync()
			require.NoError(t, err)
			return func() { end(nil) }
		},
		"sync of all": func(s *story) func() {
			end := s.f.TryBeginSync()
			return func() { end(nil) }
		},
		"cut": func(s *story) func() { s.truncate(20); return func() {} },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper()
			s := newKeptStory(t, k)
			appendLog(s, 2)
			s.append(10)
			first, late, err := s.f.beginSync()
			require.NoError(t, err)
			s.append(10)
			ended := newer(s)
			before := len(k.kept)
			late()
			first(nil)
			ended()
			require.Len(t, k.kept, before, "an older end is kept as the newest one")
		})
	}
}
