package fsck

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

func procFd(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// A key service that refuses or fails leaves files unchecked: that is counted apart
// from damage, and what needs no key is still found.
func TestKeysThatCannotBeHad(t *testing.T) {
	for _, row := range []struct {
		err   error
		level Level
	}{
		{crypt.ErrKeyDenied, Refused}, {crypt.ErrKeyDisabled, Refused}, {crypt.ErrKeyNotFound, Refused},
		{crypt.ErrKeyUnavailable, Unavailable}, {crypt.ErrKeyTimeout, Unavailable},
	} {
		s := newStage(t, volume.NamesPlain)
		root := s.root(s.unlocked())
		s.file(root, "file", size)
		require.NoError(t, os.Truncate(s.file(root, "torn", size), record+5))
		s.vault.fail = func(*crypt.Header) error { return fmt.Errorf("asking: %w", row.err) }
		q, _ := s.quarantine(s.unlocked())
		found, r := s.check(Options{Data: true, Quarantine: q})
		require.ElementsMatch(t, []string{"file key " + string(row.level), "torn key " + string(row.level), "torn end 0-4096", "torn end: moved to 000001/torn"}, found)
		require.EqualValues(t, 2, r.Refused+r.Unavailable)
		require.EqualValues(t, 1, r.Damage)
		require.EqualValues(t, 1, r.Quarantined, "a file that could not be checked stays where it is")
		require.ErrorIs(t, r.KeyErr, row.err)
	}
}

// After many refusals in a row nobody is asked any more, and everything is counted.
func TestStopAsking(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	root := s.root(s.unlocked())
	for i := range stopAsking + 50 {
		s.file(root, fmt.Sprint(i), 10)
	}
	s.vault.fail = func(*crypt.Header) error { return crypt.ErrKeyUnavailable }
	_, r := s.check(Options{})
	require.EqualValues(t, stopAsking+50, r.Unavailable)
	require.Less(t, s.vault.calls, stopAsking+8)
	require.ErrorIs(t, r.KeyErr, crypt.ErrKeyUnavailable)
}

// A rekey during a check is no damage: the key that a header is under is new to it.
func TestRekeyDuringACheck(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	root := s.root(s.unlocked())
	s.file(root, "file", size)
	var once atomic.Bool
	s.vault.fail = func(*crypt.Header) error {
		if !once.Swap(true) {
			v, err := volume.Open(s.dir)
			require.NoError(t, err)
			defer v.Close()
			require.NoError(t, v.Update(func(c *volume.Settings) error {
				h, err := crypt.ParseHeader(c.Header)
				require.NoError(t, err)
				h.Copies = append(h.Copies, crypt.Copy{Key: "local:second", Blob: []byte("b")})
				c.Header, err = h.Marshal()
				c.Keys = []string{"local:second", "local:test"}
				return err
			}))
		}
		return crypt.ErrKeyRejected
	}
	found, r := s.check(Options{})
	require.Equal(t, []string{"file key refused"}, found)
	require.Zero(t, r.Damage)
}

// What is only there at the first look is not told, when somebody may be writing.
func TestSecondLook(t *testing.T) {
	for _, live := range []bool{true, false} {
		s := newStage(t, volume.NamesPlain)
		root := s.root(s.unlocked())
		file := s.file(root, "file", size)
		good, err := os.ReadFile(file)
		require.NoError(t, err)
		damage := func(raw []byte) []byte { raw[3*record+9] ^= 1; raw[6*record+9] ^= 1; return raw }
		s.rewrite(file, damage)
		looks := 0
		s.vault.fail = func(*crypt.Header) error {
			// Between the looks one block is written anew, and the other is not.
			if looks++; looks == 2 {
				f, err := os.OpenFile(file, os.O_WRONLY, 0)
				require.NoError(t, err)
				defer f.Close()
				_, err = f.WriteAt(good[3*record:4*record], 3*record)
				return err
			}
			return nil
		}
		found, r := s.check(Options{Data: true, Live: func() bool { return live }})
		if live {
			require.Equal(t, []string{"file " + span(6, 7)}, found)
			require.EqualValues(t, 1, r.Damage)
		} else {
			require.Equal(t, []string{"file " + span(3, 4), "file " + span(6, 7)}, found, "nobody writes, so one look will do")
			require.Equal(t, 1, looks)
		}
	}
}

// On a live mount, findings in a file that was just written are marked.
func TestBusy(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	root := s.root(s.unlocked())
	fresh, old := s.file(root, "fresh", size), s.file(root, "old", size)
	for _, path := range []string{fresh, old} {
		require.NoError(t, os.Truncate(path, record))
	}
	require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, old, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0))
	busy := map[string]bool{}
	_, err := Run(context.Background(), s.unlocked(), Options{Keys: s.vault, Live: func() bool { return true }, Finding: func(f Finding) { busy[f.Path] = f.Busy }})
	require.NoError(t, err)
	require.Equal(t, map[string]bool{"fresh": true, "old": false}, busy)
}

// A file whose contents can't be read is not damaged, and says so.
func TestUnreadable(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	root := s.root(s.unlocked())
	s.file(root, "file", size)
	s.vault.fail = func(*crypt.Header) error { return errors.New("something else") }
	found, r := s.check(Options{})
	require.Equal(t, []string{"file access unread"}, found)
	require.EqualValues(t, 1, r.Unread)
	require.Zero(t, r.Damage)
}

// The end of its context ends a check, in the middle of a file too.
func TestCancel(t *testing.T) {
	s := newStage(t, volume.NamesPlain)
	s.file(s.root(s.unlocked()), "file", 8<<20)
	ctx, cancel := context.WithCancel(context.Background())
	_, err := Run(ctx, s.unlocked(), Options{Keys: s.vault, Data: true, Progress: func(int64, int64) { cancel() }})
	require.ErrorIs(t, err, context.Canceled)
	require.LessOrEqual(t, s.vault.calls, 1)
}

// Ids that stand twice are found across sorted runs, and one inode is no twin of
// itself.
func TestIDSort(t *testing.T) {
	for _, n := range []int{0, 1, 6, 7, 8, 100} {
		s := &idSort{size: 7}
		want := map[twinID]bool{}
		for i := range n {
			id := [16]byte{byte(i), byte(i >> 8), 1}
			s.add(kindFile, id, uint64(i))
			s.add(kindDir, id, uint64(i)) // another kind of thing
			s.add(kindFile, id, uint64(i))
			if i%3 == 0 {
				s.add(kindFile, id, uint64(i+1000))
				want[twinID(append([]byte{kindFile}, id[:]...))] = true
			}
		}
		got, err := s.twins()
		require.NoError(t, err)
		require.Equal(t, want, got)
		s.close()
	}
}

// Whatever there is, no key, descriptor or goroutine is left.
func TestNothingIsLeft(t *testing.T) {
	s := newStage(t, volume.NamesEncrypted)
	s.furnish()
	found, _ := s.check(Options{Data: true})
	require.Empty(t, found)
	keys, fds, routines := crypt.LiveKeys(), openFDs(t), runtime.NumGoroutine()
	for range 3 {
		s.vault.fail = nil
		_, _ = s.check(Options{Data: true})
		s.vault.fail = func(*crypt.Header) error { return crypt.ErrKeyDenied }
		_, _ = s.check(Options{Data: true})
	}
	require.Equal(t, keys, crypt.LiveKeys())
	require.LessOrEqual(t, openFDs(t), fds)
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > routines && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // the runtime's own come and go
	}
	require.LessOrEqual(t, runtime.NumGoroutine(), routines)
}

func openFDs(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(l)
}

// Every range of findings is bounded; what is beyond is told as one.
func TestSpansAreBounded(t *testing.T) {
	var s spans
	for i := range int64(2 * maxSpans) {
		s.add(10*i, 10*i+1)
	}
	require.Len(t, s.list, maxSpans)
	require.EqualValues(t, 10*(2*maxSpans-1)+1, s.list[maxSpans-1].To)
}

// Random flips of random stored files are all found, each in its block and nowhere
// else; so are flips of headers and names, whatever they turn into.
func FuzzFlips(f *testing.F) {
	f.Add(uint32(0), uint32(5), byte(1))
	f.Add(uint32(1), uint32(9*record+4000), byte(0x80))
	f.Add(uint32(2), uint32(40), byte(0xff))
	f.Add(uint32(0), uint32(10*record+130), byte(3))
	f.Fuzz(func(t *testing.T, which, where uint32, mask byte) {
		if mask == 0 {
			return
		}
		s := newStage(t, volume.NamesPlain)
		root := s.root(s.unlocked())
		name := []string{"x", "y", "z"}[which%3]
		for _, n := range []string{"x", "y", "z"} {
			s.file(root, n, size)
		}
		path := filepath.Join(s.dir, name)
		at := int(where) % (blocks*record + 32 + tail)
		s.rewrite(path, func(raw []byte) []byte { raw[at] ^= mask; return raw })
		want := name + " " + span(at/record, at/record+1)
		if at/record == blocks {
			want = name + " " + endSpan(blocks)
		}
		require.Equal(t, []string{want}, must(s.check(Options{Data: true})))

		raw := s.xattr(path, crypt.HeaderXattr)
		raw[int(where)%len(raw)] ^= mask
		s.setXattr(path, crypt.HeaderXattr, raw)
		found := must(s.check(Options{Data: true}))
		require.Len(t, found, 1)
		require.True(t, strings.HasPrefix(found[0], name+" "), found[0])
	})
}
