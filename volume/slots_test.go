package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// slotDir is a directory in memory.
func slotDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(SlotDir, "kmsfs-test-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// errKilled stands for SIGKILL in the middle of a write.
var errKilled = errors.New("killed")

// killable is a backing file with slots, whose process dies after some more bytes.
type killable struct {
	*Stored
	slots *Slots
	inode Inode
	left  int64 // bytes until death; <0: none is near
}

func (k *killable) TakeSlot(n int64, use crypt.SlotUse) crypt.Slot {
	return k.slots.Take(k.inode, n, use)
}

func (k *killable) WriteAt(p []byte, off int64) (int, error) {
	if k.left < 0 || int64(len(p)) <= k.left {
		return k.Stored.WriteAt(p, off)
	}
	_, _ = k.Stored.WriteAt(p[:k.left], off)
	panic(errKilled)
}

// victim is a volume with one file and a daemon that will be killed.
type victim struct {
	t    *testing.T
	key  *testKey
	file *crypt.Secrets
	v    *Volume
	dir  string // of the slots
	b    *killable
	f    *crypt.File
}

func newVictim(t *testing.T) *victim {
	v, key := newVolume(t, NamesEncrypted)
	x := &victim{t: t, key: key, v: v, dir: slotDir(t)}
	require.NoError(t, v.Lock("test"))
	slots, err := v.OpenSlots(x.dir)
	require.NoError(t, err)
	fd, err := mkdir(t, root(t, v), "sub").Create("file", unix.O_RDWR|unix.O_EXCL, 0o600)
	require.NoError(t, err)
	var st unix.Statx_t
	require.NoError(t, unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st))
	x.b = &killable{NewBacking(fd), slots, InodeOf(&st), -1}
	x.f, err = crypt.NewFile(x.b, 4096, 0, nil)
	require.NoError(t, err)
	id, err := crypt.NewIdentity(v.ID(), crypt.UseFile, 12)
	require.NoError(t, err)
	data, err := crypt.RandomKey()
	require.NoError(t, err)
	s, err := crypt.Commit(&id, data)
	require.NoError(t, err)
	x.file, err = s.Clone()
	require.NoError(t, err)
	h := &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}
	x.f.Prime(&crypt.Fresh{Header: h, Secrets: s})
	return x
}

// killed writes, and dies after some bytes have reached the file.
func (x *victim) killed(p []byte, off, after int64) {
	x.t.Helper()
	x.b.left = after
	require.PanicsWithValue(x.t, errKilled, func() { _, _ = x.f.WriteAt(p, off) })
	// What the kernel does for a process that is gone.
	require.NoError(x.t, unix.Munmap(x.b.slots.mem))
	x.b.slots.f.Close()
	unix.Close(x.b.Fd())
	x.v.lock.file.Close()
	x.v.lock.file = nil
}

// next is the next daemon.
func (x *victim) next() (*Volume, Replay) {
	x.t.Helper()
	v := openVolume(x.t, x.v.Path(), x.key)
	require.NoError(x.t, v.Lock("test"))
	return v, v.ReplaySlots(x.t.Context(), x.dir)
}

// read opens the file of a volume and reads it.
func (x *victim) read(v *Volume) ([]byte, error) {
	fd, err := openDir(x.t, root(x.t, v), "sub").Open("file", unix.O_RDONLY)
	require.NoError(x.t, err)
	defer unix.Close(fd)
	var st unix.Stat_t
	require.NoError(x.t, unix.Fstat(fd, &st))
	s, err := x.file.Clone()
	require.NoError(x.t, err)
	f, err := crypt.NewFile(NewBacking(fd), 4096, st.Size, s)
	require.NoError(x.t, err)
	defer f.Close()
	p := make([]byte, f.Size())
	_, err = f.ReadAt(p, 0)
	return p, err
}

// TestReplayAfterKill: a write that a killed daemon had half done is finished by the
// next, through a table and memory that only the file has; and the file is removed.
func TestReplayAfterKill(t *testing.T) {
	x := newVictim(t)
	old := bytes.Repeat([]byte{1}, 1<<20+100)
	_, err := x.f.WriteAt(old, 0)
	require.NoError(t, err)
	x.killed(bytes.Repeat([]byte{2}, 1<<20), 4096, 300_000)

	unreplayed := openVolume(t, x.v.Path(), x.key)
	_, err = x.read(unreplayed)
	require.ErrorIs(t, err, crypt.ErrDamaged, "the write tore nothing: the test proves nothing")

	v, r := x.next()
	require.Equal(t, Replay{Found: 1, Finished: 1}, r)
	got, err := x.read(v)
	require.NoError(t, err)
	require.True(t, bytes.Equal(append(old[:4096:4096], bytes.Repeat([]byte{2}, 1<<20)...), got))
	require.NoFileExists(t, v.slotPath(x.dir))
}

// TestReplayOfReadOnlyFile: git makes its objects 0444 while it has them open.
func TestReplayOfReadOnlyFile(t *testing.T) {
	x := newVictim(t)
	_, err := x.f.WriteAt([]byte("old"), 0)
	require.NoError(t, err)
	require.NoError(t, unix.Fchmod(x.b.Fd(), 0o444))
	x.killed([]byte("new and longer"), 0, 20)
	v, r := x.next()
	require.Equal(t, Replay{Found: 1, Finished: 1}, r)
	got, err := x.read(v)
	require.NoError(t, err)
	require.Equal(t, "new and longer", string(got))
}

// TestReplayIsForTheNextSessionOnly: once another mount was there, which knew nothing
// of the slots, what is in them is out of date.
func TestReplayIsForTheNextSessionOnly(t *testing.T) {
	x := newVictim(t)
	_, err := x.f.WriteAt(make([]byte, 9000), 0)
	require.NoError(t, err)
	x.killed(bytes.Repeat([]byte{2}, 4096), 0, 0)
	between := openVolume(t, x.v.Path(), x.key)
	require.NoError(t, between.Lock("test"))
	between.lock.release()

	v, r := x.next()
	require.Zero(t, r.Found)
	require.Len(t, r.Errs, 1)
	got, err := x.read(v)
	require.NoError(t, err)
	require.Equal(t, make([]byte, 9000), got)
}

// TestReplayGoesOn: whoever is killed while it replays leaves the rest to the next.
func TestReplayGoesOn(t *testing.T) {
	x := newVictim(t)
	_, err := x.f.WriteAt(make([]byte, 9000), 0)
	require.NoError(t, err)
	x.killed(bytes.Repeat([]byte{2}, 4096), 0, 100)
	saved, err := os.ReadFile(x.v.slotPath(x.dir))
	require.NoError(t, err)

	v := openVolume(t, x.v.Path(), x.key)
	require.NoError(t, v.Lock("test"))
	copy(saved[slotSession:], v.lock.session) // all that it did before it was killed
	require.NoError(t, os.WriteFile(v.slotPath(x.dir), saved, 0o600))
	v.lock.file.Close()
	v.lock.file = nil
	_, r := x.next()
	require.Equal(t, Replay{Found: 1, Finished: 1}, r)
}

// TestReplayTouchesNothingElse: a slot whose file is gone, was replaced, or has another
// key by now is passed over; so is one that somebody forged.
func TestReplayTouchesNothingElse(t *testing.T) {
	write := func(x *victim) {
		_, err := x.f.WriteAt(make([]byte, 9000), 0)
		require.NoError(t, err)
		x.killed(bytes.Repeat([]byte{2}, 4096), 0, 0)
	}
	t.Run("another file of the name", func(t *testing.T) {
		x := newVictim(t)
		write(x)
		d := openDir(t, root(t, x.v), "sub")
		touch(t, d, "spare", "") // keeps the inode number from being used again
		require.NoError(t, d.Unlink("file"))
		touch(t, d, "file", "content")
		_, r := x.next()
		require.Equal(t, Replay{Found: 1, Gone: 1}, r)
		got, _ := content(t, d, "file")
		require.Equal(t, "content", got)
	})
	t.Run("another key", func(t *testing.T) {
		x := newVictim(t)
		write(x)
		d := openDir(t, root(t, x.v), "sub")
		before, _ := content(t, d, "file")
		fd := openFile(t, d, "file", unix.O_RDWR)
		require.NoError(t, unix.Fsetxattr(fd, crypt.HeaderXattr, fileHeader(t, x.v, 1), 0))
		_, r := x.next()
		require.Equal(t, Replay{Found: 1, Gone: 1}, r)
		after, _ := content(t, d, "file")
		require.Equal(t, before, after)
	})
	for name, forge := range map[string]func(fl *flight){
		"negative offset":      func(fl *flight) { fl.Off = -4128 },
		"between records":      func(fl *flight) { fl.Off = 100 },
		"beyond all files":     func(fl *flight) { fl.Off = 1<<63 - 1 - (1<<63-1)%4128 },
		"longer than a slot":   func(fl *flight) { fl.Len = 1 << 40 },
		"negative length":      func(fl *flight) { fl.Len = -1 },
		"a part of a record":   func(fl *flight) { fl.Len = 31 },
		"another device":       func(fl *flight) { fl.inode.Dev++ },
		"another birth":        func(fl *flight) { fl.inode.Born++ },
		"another file's key":   func(fl *flight) { fl.File[0]++ },
		"an inode not of ours": func(fl *flight) { fl.inode.Ino = 1 << 60 },
	} {
		t.Run(name, func(t *testing.T) {
			x := newVictim(t)
			write(x)
			x.edit(func(entry []byte) {
				fl, ok, err := parseFlight(entry)
				require.NoError(t, err)
				if ok {
					forge(&fl)
					fl.encode(entry)
				}
			})
			v, r := x.next()
			require.Equal(t, 1, r.Found)
			require.Zero(t, r.Finished)
			require.Equal(t, 1, r.Gone+len(r.Errs))
			got, err := x.read(v)
			require.NoError(t, err)
			require.Equal(t, make([]byte, 9000), got)
		})
	}
	t.Run("checksum", func(t *testing.T) {
		x := newVictim(t)
		write(x)
		x.edit(func(entry []byte) { entry[40] ^= 1 })
		_, r := x.next()
		require.Zero(t, r.Found)
		require.NotEmpty(t, r.Errs)
	})
}

// edit changes each entry of the table that a dead daemon left.
func (x *victim) edit(change func(entry []byte)) {
	x.t.Helper()
	path := x.v.slotPath(x.dir)
	raw, err := os.ReadFile(path)
	require.NoError(x.t, err)
	p := newSlotPlan(x.v)
	for i := range p.count() {
		if entry := raw[slotHead+i*slotEntry:][:slotEntry]; entry[0] == slotInFlight {
			change(entry)
		}
	}
	require.NoError(x.t, os.WriteFile(path, raw, 0o600))
}

// TestSlotFileOfSomebodyElse: whatever stands under the name is neither followed nor
// believed, nor does it keep us from having slots.
func TestSlotFileOfSomebodyElse(t *testing.T) {
	x := newVictim(t)
	_, err := x.f.WriteAt(make([]byte, 9000), 0)
	require.NoError(t, err)
	x.killed(bytes.Repeat([]byte{2}, 4096), 0, 0)
	path := x.v.slotPath(x.dir)
	good, err := os.ReadFile(path)
	require.NoError(t, err)
	for name, plant := range map[string]func(){
		"symlink": func() {
			require.NoError(t, os.WriteFile(path+".aside", good, 0o600))
			require.NoError(t, os.Symlink(path+".aside", path))
		},
		"two links": func() {
			require.NoError(t, os.WriteFile(path+".other", good, 0o600))
			require.NoError(t, os.Link(path+".other", path))
		},
		"not private": func() {
			require.NoError(t, os.WriteFile(path, good, 0o600))
			require.NoError(t, os.Chmod(path, 0o666))
		},
		"cut":     func() { require.NoError(t, os.WriteFile(path, good[:len(good)-1], 0o600)) },
		"no head": func() { require.NoError(t, os.WriteFile(path, good[:10], 0o600)) },
		"fifo":    func() { require.NoError(t, unix.Mkfifo(path, 0o600)) },
		"another volume": func() {
			bad := bytes.Clone(good)
			bad[30]++
			require.NoError(t, os.WriteFile(path, bad, 0o600))
		},
		"another boot": func() {
			bad := bytes.Clone(good)
			bad[50]++
			require.NoError(t, os.WriteFile(path, bad, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.RemoveAll(path))
			plant()
			v := openVolume(t, x.v.Path(), x.key)
			require.NoError(t, v.Lock("test"))
			v.lock.before = x.v.lock.session
			r := v.ReplaySlots(t.Context(), x.dir)
			require.Zero(t, r.Found)
			require.NotEmpty(t, r.Errs)
			s, err := v.OpenSlots(x.dir)
			require.NoError(t, err)
			require.NoError(t, s.Close())
		})
	}
}

// TestSlotsWantMemory: a directory on a disk would make every write two.
func TestSlotsWantMemory(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	dir := t.TempDir()
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(dir, &st))
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("the temporary directory is in memory")
	}
	_, err := v.OpenSlots(dir)
	require.ErrorContains(t, err, "tmpfs")
	require.NoFileExists(t, v.slotPath(dir))
}

// TestSlotsAreBounded: who doesn't wait gets none when all are taken, who does gets
// one when one is freed, and no two have the same.
func TestSlotsAreBounded(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	require.NoError(t, v.Lock("test"))
	s, err := v.OpenSlots(slotDir(t))
	require.NoError(t, err)
	defer s.Close()
	const most = 1 << 20
	var held []crypt.Slot
	seen := map[*byte]bool{}
	for {
		got := s.Take(Inode{}, most, crypt.SlotTry)
		if got == nil {
			break
		}
		require.GreaterOrEqual(t, len(got.Bytes()), most)
		require.False(t, seen[&got.Bytes()[0]])
		seen[&got.Bytes()[0]] = true
		held = append(held, got)
	}
	require.GreaterOrEqual(t, len(held), largeTry)
	for range largeWrite {
		held = append(held, s.Take(Inode{}, most, crypt.SlotWrite))
	}
	var wg sync.WaitGroup
	arrived := make(chan crypt.Slot)
	wg.Go(func() { arrived <- s.Take(Inode{}, most, crypt.SlotWrite) })
	s.Take(Inode{}, most, crypt.SlotMend).Free() // kept for who has one already
	select {
	case <-arrived:
		t.Fatal("there was one slot more")
	case <-time.After(50 * time.Millisecond):
	}
	held[len(held)-1].Free()
	require.NotNil(t, <-arrived)
	wg.Wait()
	held[0].Free()
	require.NotNil(t, s.Take(Inode{}, most, crypt.SlotTry))
}

// docTable are the rows of a table in docs/FORMAT.md: offset, bytes, what.
func docTable(t *testing.T, header string) (rows [][3]string) {
	t.Helper()
	raw, err := os.ReadFile("../docs/FORMAT.md")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(raw), "\n"+header+"\n|---|---|---|\n")
	require.True(t, ok, "docs/FORMAT.md has no table %q", header)
	for line := range strings.Lines(rest) {
		cells := strings.Split(strings.Trim(line, "|\n"), "|")
		if len(cells) != 3 {
			break
		}
		rows = append(rows, [3]string{strings.TrimSpace(cells[0]), strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])})
	}
	return rows
}

// documented encodes values as a table says.
func documented(t *testing.T, header string, values []any) (b []byte) {
	t.Helper()
	for i, row := range docTable(t, header) {
		require.Equal(t, strconv.Itoa(len(b)), row[0], row[2])
		size, err := strconv.Atoi(row[1])
		require.NoError(t, err)
		field := make([]byte, size)
		_, err = binary.Encode(field, binary.LittleEndian, values[i])
		require.NoError(t, err, row[2])
		b = append(b, field...)
	}
	return b
}

// TestDocumentedSlots writes a head and an entry as the document says.
func TestDocumentedSlots(t *testing.T) {
	build := func(header string, values []any) []byte { return documented(t, header, values) }
	boot := []byte("01234567-89ab-cdef-0123-456789abcdef")
	id := crypt.VolumeID{7}
	p := slotPlan{boot: string(boot), volume: id, session: "SESSION", small: 1, large: 2, smallSize: 3, largeSize: 4}
	require.Equal(t, build("| offset | bytes | head |", []any{
		[]byte(slotMagic), uint32(slotVersion), uint32(1), uint32(2), uint32(3), uint32(4), id[:], boot, []byte("SESSION"),
	}), p.head())

	entry := make([]byte, slotEntry)
	file := crypt.FileID{9}
	flight{11, Inode{12, 13, 14}, crypt.Flight{File: file, Off: 15, Len: 16, Ends: true}}.encode(entry)
	sum := crc32.Checksum(entry[8:], crc32.MakeTable(crc32.Castagnoli))
	require.Equal(t, build("| offset | bytes | entry |", []any{
		uint32(0), sum, uint64(11), uint64(12), uint64(13), int64(14), int64(15), int64(16), file[:], byte(1), []byte{},
	}), entry)
}

// TestReplayKeepsTheTime: a write that had begun has set the file's mtime, and to finish it
// sets no other: nothing was changed since. One that had not begun changes the file now.
func TestReplayKeepsTheTime(t *testing.T) {
	for _, begun := range []bool{true, false} {
		x := newVictim(t)
		_, err := x.f.WriteAt(bytes.Repeat([]byte{1}, 3*4096+100), 0)
		require.NoError(t, err)
		path := fmt.Sprintf("/proc/self/fd/%d", x.b.Fd())
		stored, err := os.Readlink(path)
		require.NoError(t, err)
		after := int64(0)
		if begun {
			after = 5000
		}
		x.killed(bytes.Repeat([]byte{2}, 3*4096+200), 0, after)
		was := time.Now().Add(-time.Hour).Truncate(time.Microsecond)
		require.NoError(t, os.Chtimes(stored, was, was))
		v, r := x.next()
		require.Equal(t, 1, r.Finished)
		require.Empty(t, r.Errs)
		got, err := x.read(v)
		require.NoError(t, err)
		require.Equal(t, bytes.Repeat([]byte{2}, 3*4096+200), got)
		info, err := os.Stat(stored)
		require.NoError(t, err)
		require.Equal(t, begun, info.ModTime().Equal(was), "%v", info.ModTime())
	}
}
