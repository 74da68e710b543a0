package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// memTails is a file of kept ends in memory, whose syncs can be held up and fail.
type memTails struct {
	writes, syncs atomic.Int64
	gate          chan struct{} // nil: syncs don't wait
	fail          atomic.Bool
}

func (m *memTails) WriteAt(p []byte, _ int64) (int, error) { m.writes.Add(1); return len(p), nil }
func (m *memTails) Close() error                           { return nil }

func (m *memTails) Sync() error {
	m.syncs.Add(1)
	if m.gate != nil {
		<-m.gate
	}
	if m.fail.Load() {
		return unix.EIO
	}
	return nil
}

func aTail(n byte) crypt.Tail {
	return crypt.Tail{File: crypt.FileID{n}, Off: 4128, Records: bytes.Repeat([]byte{n}, 132)}
}

// nowhere is of a file that can't be written again.
func nowhere(int64) bool { return false }

// TestTailsShareASync: those who keep an end while a sync goes on wait for one more,
// and for one only.
func TestTailsShareASync(t *testing.T) {
	m := &memTails{gate: make(chan struct{})}
	tails := newTails(m, 8192)
	var wg sync.WaitGroup
	keep := func(ino uint64) {
		wg.Go(func() { require.NoError(t, tails.Keep(Inode{Ino: ino}, aTail(1))) })
	}
	const others = 40
	keep(0)
	require.Eventually(t, func() bool { return m.syncs.Load() == 1 }, time.Minute, time.Millisecond)
	for i := range others {
		keep(uint64(i) + 1)
	}
	require.Eventually(t, func() bool { return m.writes.Load() == others+1 }, time.Minute, time.Millisecond)
	close(m.gate)
	wg.Wait()
	require.LessOrEqual(t, m.syncs.Load(), int64(others/2))
	require.Equal(t, int64(others+1), tails.Stats().Kept)
}

// TestTailsWaitForRoom: when all slots are taken, who keeps an end asks for everything
// to be made durable and waits for that; if it fails, the write fails.
func TestTailsWaitForRoom(t *testing.T) {
	tails := newTails(&memTails{}, 8192)
	for i := range tailSlots {
		require.NoError(t, tails.Keep(Inode{Ino: uint64(i)}, aTail(1)))
	}
	for i, fail := range []error{unix.EIO, nil} {
		closed := uint64(10 * (i + 1)) // what the first sync lost, the second does not let go
		kept := make(chan error)
		go func() { kept <- tails.Keep(Inode{Ino: 1000}, aTail(1)) }()
		<-tails.Full()
		tails.BeginRest(func(i Inode) bool { return i.Ino >= closed })(fail)
		require.ErrorIs(t, <-kept, fail)
	}
	for i := range 9 { // the others that were freed
		require.NoError(t, tails.Keep(Inode{Ino: uint64(2000 + i)}, aTail(1)))
	}
	require.Empty(t, tails.free, "ends of files in use were let go")
}

// TestFailedSyncsTakeNoSlots: a file whose syncs fail, and whose end is kept anew in
// each, would take all that there are, and wait for itself in the end.
func TestFailedSyncsTakeNoSlots(t *testing.T) {
	tails := newTails(&memTails{}, 8192)
	inode := Inode{Ino: 1}
	require.NoError(t, tails.Keep(inode, aTail(1)))
	for range 2 * tailSlots {
		end := tails.BeginSync(inode, nowhere)
		require.NoError(t, tails.Keep(inode, aTail(1))) // while it goes on
		end(unix.EIO)
		require.NoError(t, tails.Keep(inode, aTail(1)))
	}
	require.Len(t, tails.free, tailSlots-1)

	// What another sync will let go, which goes on still, is not enough.
	first, second := tails.BeginSync(inode, nowhere), tails.BeginSync(inode, nowhere)
	first(unix.EIO)
	kept := tails.Stats().Kept
	require.NoError(t, tails.Keep(inode, aTail(1)))
	require.Equal(t, kept+1, tails.Stats().Kept)
	second(nil)
	require.Len(t, tails.free, tailSlots-1, "the end that was kept last is needed")
	require.NoError(t, tails.Keep(inode, aTail(1)))
	require.Equal(t, kept+1, tails.Stats().Kept)
}

// TestLostUntilWrittenAgain: a sync that ends well after one that failed lets go of an end
// only if what stands in its place was written again, and not if another one that was under
// way failed.
func TestLostUntilWrittenAgain(t *testing.T) {
	tails := newTails(&memTails{}, 8192)
	inode := Inode{Ino: 1}
	require.NoError(t, tails.Keep(inode, aTail(1)))
	kept := func() int { return tailSlots - len(tails.free) }
	tails.BeginSync(inode, nowhere)(unix.EIO)
	tails.BeginSync(inode, nowhere)(nil)
	tails.BeginRest(func(Inode) bool { return false })(nil)
	require.Equal(t, 1, kept())
	var asked []int64
	again := func(off int64) bool { asked = append(asked, off); return true }
	tails.BeginSync(inode, again)(unix.EIO)
	tails.BeginSync(inode, nowhere)(nil)
	require.Equal(t, 1, kept(), "the sync that was to make it durable failed")
	tails.BeginSync(inode, again)(nil)
	require.Zero(t, kept())
	tails.BeginSync(inode, again)(nil)
	require.Equal(t, []int64{4128, 4128}, asked)

	require.NoError(t, tails.Keep(inode, aTail(1)))
	for _, firstEnds := range []bool{true, false} { // which of two ends first is chance
		first, second := tails.BeginSync(inode, nowhere), tails.BeginSync(inode, nowhere)
		if firstEnds {
			first(unix.EIO)
			second(nil)
		} else {
			second(nil)
			first(unix.EIO)
		}
		require.Equal(t, 1, kept())
		tails.BeginSync(inode, again)(nil)
		require.Zero(t, kept())
		require.NoError(t, tails.Keep(inode, aTail(1)))
	}
	first, second := tails.BeginSync(inode, nowhere), tails.BeginSync(inode, nowhere)
	second(nil)
	require.Equal(t, 1, kept())
	first(nil)
	require.Zero(t, kept())
}

// TestNoRoomForLostEnds: who keeps an end does not wait for room that no sync will make.
func TestNoRoomForLostEnds(t *testing.T) {
	tails := newTails(&memTails{}, 8192)
	for i := range tailSlots {
		require.NoError(t, tails.Keep(Inode{Ino: uint64(i)}, aTail(1)))
	}
	tails.BeginRest(func(Inode) bool { return false })(unix.EIO)
	kept := make(chan error)
	go func() { kept <- tails.Keep(Inode{Ino: 1000}, aTail(1)) }()
	<-tails.Full()
	tails.BeginRest(func(Inode) bool { return false })(nil)
	require.ErrorContains(t, <-kept, "no room")
}

// TestTailThatIsNotDurableIsNone: after a failed sync nothing counts as kept.
func TestTailThatIsNotDurableIsNone(t *testing.T) {
	m := &memTails{}
	tails := newTails(m, 8192)
	m.fail.Store(true)
	require.ErrorIs(t, tails.Keep(Inode{Ino: 1}, aTail(1)), unix.EIO)
	m.fail.Store(false)
	require.NoError(t, tails.Keep(Inode{Ino: 1}, aTail(1)))
	require.EqualValues(t, 2, m.syncs.Load())
	require.NoError(t, tails.Keep(Inode{Ino: 1}, aTail(1)))
	require.EqualValues(t, 2, m.syncs.Load(), "what was kept is kept again")
	require.NoError(t, tails.Keep(Inode{Ino: 1}, aTail(2)))
	require.EqualValues(t, 3, m.syncs.Load(), "another generation needs its own")
}

// TestLetGoForGood: what was let go is durably so before anything is written at its
// place, and that needs no sync if there was one since.
func TestLetGoForGood(t *testing.T) {
	m := &memTails{}
	tails := newTails(m, 8192)
	inode := Inode{Ino: 1}
	require.NoError(t, tails.Keep(inode, aTail(1)))
	require.NoError(t, tails.Disturb(inode, 0, 1<<40))
	require.EqualValues(t, 1, m.syncs.Load(), "it is needed still")
	tails.BeginSync(inode, nowhere)(nil)
	require.NoError(t, tails.Disturb(inode, 0, 4128))
	require.NoError(t, tails.Disturb(Inode{Ino: 2}, 0, 1<<40))
	require.EqualValues(t, 1, m.syncs.Load())
	require.NoError(t, tails.Disturb(inode, 4128, 4129))
	require.EqualValues(t, 2, m.syncs.Load())
	require.NoError(t, tails.Disturb(inode, 4128, 4129))
	require.EqualValues(t, 2, m.syncs.Load())
	require.Empty(t, tails.byInode)
}

// TestLetGoAgainAfterAFailedSync: a sync that fails may have lost what it was to write,
// and the next one does not try again. Slots in use are not touched.
func TestLetGoAgainAfterAFailedSync(t *testing.T) {
	m := &memTails{}
	tails := newTails(m, 8192)
	for i := range uint64(2) {
		require.NoError(t, tails.Keep(Inode{Ino: i}, aTail(1)))
		tails.BeginSync(Inode{Ino: i}, nowhere)(nil)
		require.NoError(t, tails.Keep(Inode{Ino: 10 + i}, aTail(1))) // in the same slot
	}
	tails.BeginSync(Inode{Ino: 10}, nowhere)(nil)
	m.fail.Store(true)
	for range 2 {
		writes := m.writes.Load()
		require.ErrorIs(t, tails.Disturb(Inode{Ino: 10}, 0, 1<<40), unix.EIO)
		require.Equal(t, writes+1, m.writes.Load())
	}
	m.fail.Store(false)
	writes := m.writes.Load()
	require.NoError(t, tails.Disturb(Inode{Ino: 10}, 0, 1<<40))
	require.Equal(t, writes, m.writes.Load())
	require.Len(t, tails.byInode, 1)
}

// keeping is a backing file whose end is kept.
type keeping struct {
	*killable
	tails *Tails
}

func (k keeping) KeepTail(t crypt.Tail) error  { return k.tails.Keep(k.inode, t) }
func (k keeping) Disturb(from, to int64) error { return k.tails.Disturb(k.inode, from, to) }
func (k keeping) BeginSync(again func(int64) bool) func(error) {
	return k.tails.BeginSync(k.inode, again)
}
func (k keeping) SetSparseMark(mark []byte) error                             { return k.Stored.SetSparseMark(mark) }
func (x *victim) open(context.Context, *crypt.Header) (*crypt.Secrets, error) { return x.file.Clone() }

// torn is a victim whose file had 100 synced bytes, and was torn when it grew.
func torn(t *testing.T) (x *victim, want []byte) {
	x = newVictim(t)
	want = bytes.Repeat([]byte{7}, 100)
	_, err := x.f.WriteAt(want, 0)
	require.NoError(t, err)
	require.NoError(t, x.b.Sync())
	x.f.Close()
	tails, err := x.v.OpenTails(false)
	require.NoError(t, err)
	s, err := x.file.Clone()
	require.NoError(t, err)
	f, err := crypt.NewFile(keeping{x.b, tails}, 4096, 132, s)
	require.NoError(t, err)
	_, err = f.WriteAt(want, 100)
	require.NoError(t, err)
	f.Close()
	_, err = x.b.WriteAt(make([]byte, 150), 50) // what a power cut may leave
	require.NoError(t, err)
	_, err = x.read(x.v)
	require.ErrorIs(t, err, crypt.ErrDamaged)
	x.v.lock.file.Close()
	x.v.lock.file = nil
	return x, want
}

// TestTornEndIsPutBack, and once only.
func TestTornEndIsPutBack(t *testing.T) {
	x, want := torn(t)
	v := openVolume(t, x.v.Path(), x.key)
	r := v.RecoverTails(t.Context(), x.open)
	require.Equal(t, TailRecovery{Found: 1, Put: []uint64{x.b.inode.Ino}}, r)
	got, err := x.read(v)
	require.NoError(t, err)
	require.Equal(t, want, got)
	require.Equal(t, TailRecovery{}, v.RecoverTails(t.Context(), x.open))
}

// TestKeptEndsThatAreNotPutBack: on another file, under another key, or forged.
func TestKeptEndsThatAreNotPutBack(t *testing.T) {
	for name, change := range map[string]func(x *victim){
		"a file that is gone": func(x *victim) {
			require.NoError(t, openDir(t, root(t, x.v), "sub").Unlink("file"))
		},
		"a generation that is gone": func(x *victim) {
			id, err := crypt.NewIdentity(x.v.ID(), crypt.UseFile, 12)
			require.NoError(t, err)
			h := &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}
			raw, err := h.Marshal()
			require.NoError(t, err)
			require.NoError(t, x.b.SetHeader(raw))
		},
		"a flipped bit": func(x *victim) { x.forge(200, false) },
		"a forged one":  func(x *victim) { x.forge(200, true) },
	} {
		t.Run(name, func(t *testing.T) {
			x, _ := torn(t)
			var before unix.Stat_t
			change(x)
			require.NoError(t, unix.Fstat(x.b.Fd(), &before))
			v := openVolume(t, x.v.Path(), x.key)
			r := v.RecoverTails(t.Context(), x.open)
			require.Empty(t, r.Put)
			require.Empty(t, r.Errs)
			var after unix.Stat_t
			require.NoError(t, unix.Fstat(x.b.Fd(), &after))
			require.Equal(t, before.Size, after.Size)
			require.Equal(t, before.Mtim, after.Mtim, "the file was written to")
			require.Zero(t, v.RecoverTails(t.Context(), x.open).Found)
		})
	}
}

// forge changes a byte of the only end that is kept.
func (x *victim) forge(at int, checksum bool) {
	path := filepath.Join(x.v.Path(), TailsFile)
	raw, err := os.ReadFile(path)
	require.NoError(x.t, err)
	slot := raw[tailPage:]
	require.Equal(x.t, byte(tailKept), slot[0])
	slot[tailEntry+at%132] ^= 1
	if checksum {
		sum := crc32.Checksum(slot[8:tailEntry+132], castagnoli)
		copy(slot[4:], []byte{byte(sum), byte(sum >> 8), byte(sum >> 16), byte(sum >> 24)})
	}
	require.NoError(x.t, os.WriteFile(path, raw, 0o600))
}

// TestEndThatCannotBeJudgedIsKept until its key can be had, unless somebody writes
// there first.
func TestEndThatCannotBeJudgedIsKept(t *testing.T) {
	for _, written := range []bool{false, true} {
		x, _ := torn(t)
		v := openVolume(t, x.v.Path(), x.key)
		r := v.RecoverTails(t.Context(), denied)
		require.Equal(t, 1, r.Held)
		require.ErrorContains(t, r.Errs[0], "denied")
		tails, err := v.OpenTails(true)
		require.NoError(t, err)
		if written {
			require.NoError(t, tails.Disturb(x.b.inode, 0, 1))
		}
		require.NoError(t, tails.Close())
		next := openVolume(t, x.v.Path(), x.key)
		if written {
			require.Zero(t, next.RecoverTails(t.Context(), x.open).Found)
		} else {
			require.Len(t, next.RecoverTails(t.Context(), x.open).Put, 1)
		}
		off, err := next.OpenTails(true)
		require.NoError(t, err)
		require.Nil(t, off)
		require.NoFileExists(t, filepath.Join(x.v.Path(), TailsFile))
	}
}

func denied(context.Context, *crypt.Header) (*crypt.Secrets, error) { return nil, errors.New("denied") }

// TestEndThatCannotBeJudgedOutlivesSyncs: what they make durable is the torn end.
func TestEndThatCannotBeJudgedOutlivesSyncs(t *testing.T) {
	x, want := torn(t)
	v := openVolume(t, x.v.Path(), x.key)
	require.Equal(t, 1, v.RecoverTails(t.Context(), denied).Held)
	tails, err := v.OpenTails(false)
	require.NoError(t, err)
	tails.BeginSync(x.b.inode, nowhere)(nil)
	tails.BeginRest(func(Inode) bool { return false })(nil)
	require.NoError(t, tails.Close())
	next := openVolume(t, x.v.Path(), x.key)
	require.Len(t, next.RecoverTails(t.Context(), x.open).Put, 1)
	got, err := x.read(next)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// TestEndThatIsKeptIsNotCutOff: KMS may be back by the time that bad ends are cut off.
func TestEndThatIsKeptIsNotCutOff(t *testing.T) {
	x, want := torn(t)
	v := openVolume(t, x.v.Path(), x.key)
	require.Equal(t, 1, v.RecoverTails(t.Context(), denied).Held)
	require.Equal(t, EndRecovery{Looked: 1, Left: 1, Later: []uint64{x.b.inode.Ino}}, v.RecoverEnds(t.Context(), &Marker{}, x.open))
	require.Len(t, v.RecoverTails(t.Context(), x.open).Put, 1)
	got, err := x.read(v)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// TestEndOfAFileThatWasNotFound: a directory that could not be read when the volume was
// mounted may be in use later. What is written there must not go back.
func TestEndOfAFileThatWasNotFound(t *testing.T) {
	for _, off := range []bool{false, true} {
		x, want := torn(t)
		v := openVolume(t, x.v.Path(), x.key)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r := v.RecoverTails(ctx, x.open)
		require.Equal(t, 1, r.Held)
		require.ErrorIs(t, r.Errs[0], context.Canceled)
		tails, err := v.OpenTails(off)
		require.NoError(t, err)
		if off { // nothing is kept
			tail := aTail(1)
			tail.Off = 0
			require.NoError(t, tails.Keep(x.b.inode, tail))
		} else {
			require.NoError(t, tails.Disturb(x.b.inode, 0, int64(len(want))))
		}
		require.NoError(t, tails.Close())
		require.Zero(t, openVolume(t, x.v.Path(), x.key).RecoverTails(t.Context(), x.open).Found)
	}
}

// TestHeldEndsLeaveNoRoom: those of an earlier mount are not dropped for those of now. If
// they leave too little room nothing new is kept, and nobody waits for a place.
func TestHeldEndsLeaveNoRoom(t *testing.T) {
	for n, keeping := range map[int]bool{mostHeld: true, mostHeld + 1: false, tailSlots: false} {
		tails := newTails(&memTails{}, 8192)
		var list []heldTail
		for i := range n {
			list = append(list, heldTail{slot: i, seq: uint64(i), inode: Inode{Ino: uint64(i)}})
		}
		tails.hold(list)
		require.Len(t, tails.held, n)
		require.Len(t, tails.free, tailSlots-n)
		require.Equal(t, keeping, tails.Keeping())
		require.NoError(t, tails.Keep(Inode{Ino: 1000}, aTail(1)))
		require.Equal(t, keeping, tails.Stats().Kept == 1)
	}
}

// TestManyEndsAreComparedAtOnce: a mount waits for one answer of the key service, not for
// one after the other, and no longer than it is to.
func TestManyEndsAreComparedAtOnce(t *testing.T) {
	x, want := torn(t)
	v := openVolume(t, x.v.Path(), x.key)
	raw, err := os.ReadFile(filepath.Join(x.v.Path(), TailsFile))
	require.NoError(t, err)
	stored, err := filepath.Glob(filepath.Join(x.v.Path(), "*", "*"))
	require.NoError(t, err)
	require.Len(t, stored, 1)
	for i := range recoverJobs { // clones, each with an end of its own that is kept
		other := filepath.Join(x.v.Path(), fmt.Sprint("other", i))
		require.NoError(t, exec.Command("cp", "--preserve=xattr", stored[0], other).Run())
		var st unix.Stat_t
		require.NoError(t, unix.Stat(other, &st))
		slot := raw[tailPage+(i+1)*8192:][:8192]
		copy(slot, raw[tailPage:tailPage+8192])
		binary.LittleEndian.PutUint64(slot[16:], st.Ino)
		n := binary.LittleEndian.Uint32(slot[32:])
		binary.LittleEndian.PutUint32(slot[4:], crc32.Checksum(slot[8:tailEntry+n], castagnoli))
	}
	require.NoError(t, os.WriteFile(filepath.Join(x.v.Path(), TailsFile), raw, 0o600))
	waiting, go_ := make(chan bool, 100), make(chan bool)
	all := make(chan TailRecovery)
	go func() {
		all <- v.RecoverTails(t.Context(), func(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
			waiting <- true
			<-go_
			return x.open(ctx, h)
		})
	}()
	for range recoverJobs {
		select {
		case <-waiting:
		case <-time.After(time.Minute):
			t.Fatal("one waits for the other")
		}
	}
	close(go_)
	r := <-all
	require.Equal(t, recoverJobs+1, r.Found)
	require.Len(t, r.Put, recoverJobs+1)
	require.Empty(t, r.Errs)
	got, err := x.read(v)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// TestPlantedTails: whatever stands under the name, nothing is written outside the
// volume, and the volume can be used.
func TestPlantedTails(t *testing.T) {
	for name, plant := range map[string]func(path, other string) error{
		"symlink":   func(path, other string) error { return os.Symlink(other, path) },
		"hard link": func(path, other string) error { return os.Link(other, path) },
		"fifo":      func(path, _ string) error { return unix.Mkfifo(path, 0o600) },
		"short":     func(path, _ string) error { return os.WriteFile(path, []byte(tailMagic), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			v, _ := newVolume(t, NamesPlain)
			path, other := filepath.Join(v.Path(), TailsFile), filepath.Join(v.Path(), "other")
			good := make([]byte, tailsSize(4096))
			copy(good, v.tailsHead())
			require.NoError(t, os.WriteFile(other, good, 0o600))
			require.NoError(t, plant(path, other))
			require.Zero(t, v.RecoverTails(t.Context(), nil).Found)
			tails, err := v.OpenTails(false)
			require.NoError(t, err)
			require.NoError(t, tails.Keep(Inode{Ino: 1}, aTail(1)))
			require.NoError(t, tails.Close())
			left, err := os.ReadFile(other)
			require.NoError(t, err)
			require.True(t, bytes.Equal(good, left), "somebody's file was written to")
		})
	}
}

// TestDocumentedTails writes a head and an entry as the document says.
func TestDocumentedTails(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	id := v.ID()
	require.Equal(t, documented(t, "| offset | bytes | head of kmsfs.tails |", []any{
		[]byte(tailMagic), uint32(tailVersion), uint32(tailSlots), uint32(tailSlotSize(4096)), id[:],
	}), v.tailsHead())
	tail := aTail(3)
	e := keptTail{inode: Inode{Ino: 12}}
	got := e.encode(&tail, 11)
	sum := crc32.Checksum(got[8:], castagnoli)
	file := crypt.FileID{3}
	require.Equal(t, documented(t, "| offset | bytes | kept end |", []any{
		uint32(1), sum, uint64(11), uint64(12), uint64(4128), uint32(132), uint32(0), file[:], []byte{},
	}), got[:tailEntry])
	require.Equal(t, tail.Records, got[tailEntry:])
	h, ok := parseTail(append(got, make([]byte, 100)...))
	require.True(t, ok)
	require.Equal(t, heldTail{seq: 11, inode: Inode{Ino: 12}, tail: tail}, h)
}
