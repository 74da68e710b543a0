package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// SlotDir is where the file with the slots lies: memory that outlives the daemon and
// ends with the machine's. The directory of a login session would not do, since it
// ends with the session.
const SlotDir = "/dev/shm"

// The file with the slots: its head, a table of slotEntry bytes for each slot, and
// then, each on a page of its own, what the slots hold. See docs/FORMAT.md.
const (
	slotMagic   = "KMSFSLOT"
	slotVersion = 1
	slotHead    = 112
	slotEntry   = 96
	slotPage    = 4096
)

// How many slots there are for each use (crypt.SlotUse): small ones for a block or two,
// large ones for whatever one write carries, more of these on larger machines.
const (
	smallTry, smallWrite, smallMend = 32, 7, 1
	largeTry, largeWrite, largeMend = 6, 2, 1
	largeMost                       = 32 // to try

	smallSlots = smallTry + smallWrite + smallMend
)

const (
	slotFree     = 0
	slotInFlight = 1
)

// An Inode names a backing file for as long as anybody may remember it.
type Inode struct {
	Dev, Ino uint64
	Born     int64 // ns; 0 if the backing store keeps no birth time
}

// slotPlan is what the head of the file says.
type slotPlan struct {
	boot         string // of the machine; a slot of an earlier boot is no news
	volume       crypt.VolumeID
	session      string // of kmsfs.lock, whose writes they are
	small, large uint32 // how many
	smallSize    uint32 // bytes each, whole pages
	largeSize    uint32
}

func newSlotPlan(v *Volume) slotPlan {
	large := min(max(largeTry, 2*runtime.NumCPU()), largeMost) + largeWrite + largeMend
	pages := func(n int64) uint32 { return uint32((n + slotPage - 1) / slotPage * slotPage) }
	return slotPlan{
		boot: bootID(), volume: v.ID(), session: v.lock.session, small: smallSlots, large: uint32(large),
		smallSize: pages(2 * (crypt.MinBlockSize + crypt.RecordOverhead)), largeSize: pages(crypt.SlotSize(v.BlockSize())),
	}
}

func (p *slotPlan) head() []byte {
	b := append(make([]byte, 0, slotHead), slotMagic...)
	b = binary.LittleEndian.AppendUint32(b, slotVersion)
	for _, n := range []uint32{p.small, p.large, p.smallSize, p.largeSize} {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	b = append(b, p.volume[:]...)
	b = append(b, p.boot...)
	b = append(b, p.session...)
	return b[:slotHead:slotHead]
}

const slotSession = 80 // where the session stands in the head

// parseSlotPlan takes only what the session before ours would have written: slots of
// another version, volume or boot are not ours to judge, and of an earlier session
// they are out of date: others may have written to the files since.
func parseSlotPlan(b []byte, v *Volume) (slotPlan, error) {
	p := newSlotPlan(v)
	p.session = v.lock.before
	if len(b) >= slotHead {
		p.large = binary.LittleEndian.Uint32(b[16:]) // the number of CPUs may have changed
	}
	if p.large > largeMost+largeWrite+largeMend || len(b) < slotHead || !bytes.Equal(p.head(), b[:slotHead]) {
		return p, errors.New("it is of another version, volume, boot or session")
	}
	return p, nil
}

func (p *slotPlan) count() int { return int(p.small + p.large) }

// data is where the contents of slot i lie, and how many bytes it holds.
func (p *slotPlan) data(i int) (off, size int64) {
	start := (slotHead + int64(p.count())*slotEntry + slotPage - 1) / slotPage * slotPage
	if i < int(p.small) {
		return start + int64(i)*int64(p.smallSize), int64(p.smallSize)
	}
	return start + int64(p.small)*int64(p.smallSize) + int64(i-int(p.small))*int64(p.largeSize), int64(p.largeSize)
}

func (p *slotPlan) size() int64 {
	off, size := p.data(p.count() - 1)
	return off + size
}

// Slots are the slots of a mounted volume. They are safe for concurrent use.
type Slots struct {
	f     *os.File // flocked while we use it
	mem   []byte
	small int64 // bytes that a small slot holds
	seq   atomic.Uint64
	pools [2][crypt.SlotUses]slotPool // small, large
}

type slotPool struct {
	mu   sync.Mutex
	some sync.Cond // signalled when a slot is freed
	free []*slot   // guarded by mu; the last one freed is the next one taken, its memory is warm
}

// A slot implements crypt.Slot.
type slot struct {
	of    *Slots
	pool  *slotPool
	entry []byte // in the table
	data  []byte
	inode Inode // whose file it is taken for
}

// OpenSlots makes the slots of a volume that we have locked, in the directory dir on
// a tmpfs. What a daemon that died left there must have been replayed.
func (v *Volume) OpenSlots(dir string) (*Slots, error) {
	path := v.slotPath(dir)
	s, err := v.makeSlots(path)
	if err != nil {
		return nil, fmt.Errorf("making %s: %w", path, err)
	}
	return s, nil
}

// slotPath names a file of this user, this volume and this copy of it: a copy of the
// directory has the same id, and may be mounted at the same time.
func (v *Volume) slotPath(dir string) string {
	var st unix.Stat_t
	_ = unix.Fstat(v.root, &st)
	return filepath.Join(dir, fmt.Sprintf("kmsfs-%d-%v-%x-%x", unix.Geteuid(), v.ID(), st.Dev, st.Ino))
}

func (v *Volume) makeSlots(path string) (*Slots, error) {
	if err := unix.Unlink(path); err != nil && err != unix.ENOENT {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	s := &Slots{f: f}
	p := newSlotPlan(v)
	if err := s.prepare(&p); err != nil {
		f.Close()
		_ = unix.Unlink(path)
		return nil, err
	}
	s.small = int64(p.smallSize)
	s.carve(&p)
	return s, nil
}

func (s *Slots) prepare(p *slotPlan) error {
	fd := int(s.f.Fd())
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return err
	}
	if st.Type != unix.TMPFS_MAGIC {
		return errors.New("the directory is not in memory (a tmpfs)")
	}
	for deadline := time.Now().Add(lockWait); ; pauseLock() { // somebody may look at it (CheckUnused)
		err := retry(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			break
		}
		if err != unix.EWOULDBLOCK || time.Now().After(deadline) {
			return err
		}
	}
	// All of it now: memory that is missing later would be a SIGBUS.
	if err := retry(func() error { return unix.Fallocate(fd, 0, 0, p.size()) }); err != nil {
		return err
	}
	mem, err := unix.Mmap(fd, 0, int(p.size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	s.mem = mem
	copy(mem, p.head())
	return nil
}

func (s *Slots) carve(p *slotPlan) {
	for i := range s.pools {
		for use := range s.pools[i] {
			s.pools[i][use].some.L = &s.pools[i][use].mu
		}
	}
	for i := range p.count() {
		off, size := p.data(i)
		kind, use := p.purpose(i)
		pool := &s.pools[kind][use]
		entry := s.mem[slotHead+i*slotEntry:][:slotEntry:slotEntry]
		pool.free = append(pool.free, &slot{of: s, pool: pool, entry: entry, data: s.mem[off:][:size:size]})
	}
}

// purpose says what slot i is for.
func (p *slotPlan) purpose(i int) (kind int, use crypt.SlotUse) {
	write, mend, left := smallWrite, smallMend, int(p.small)-i
	if left <= 0 {
		kind, write, mend, left = 1, largeWrite, largeMend, p.count()-i
	}
	switch {
	case left <= mend:
		use = crypt.SlotMend
	case left <= mend+write:
		use = crypt.SlotWrite
	}
	return kind, use
}

// Take is crypt.SlotKeeper's TakeSlot for one file.
func (s *Slots) Take(inode Inode, n int64, use crypt.SlotUse) crypt.Slot {
	if s == nil {
		return nil
	}
	kind := 0
	if n > s.small {
		kind = 1
	}
	got := s.pools[kind][use].take(use != crypt.SlotTry)
	if got == nil {
		return nil
	}
	got.inode = inode
	return got
}

func (p *slotPool) take(wait bool) *slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	for wait && len(p.free) == 0 {
		p.some.Wait()
	}
	n := len(p.free)
	if n == 0 {
		return nil
	}
	got := p.free[n-1]
	p.free = p.free[:n-1]
	return got
}

// Bytes implements crypt.Slot.
func (s *slot) Bytes() []byte { return s.data }

// Begin implements crypt.Slot.
func (s *slot) Begin(fl crypt.Flight) {
	flight{s.of.seq.Add(1), s.inode, fl}.encode(s.entry)
	// The state goes last, and an atomic store comes after those before it: nobody
	// finds half an entry.
	atomic.StoreUint32(s.state(), slotInFlight)
}

func (s *slot) state() *uint32 { return (*uint32)(unsafe.Pointer(&s.entry[0])) }

// End implements crypt.Slot.
func (s *slot) End() { atomic.StoreUint32(s.state(), slotFree) }

// Free implements crypt.Slot.
func (s *slot) Free() {
	s.End()
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	s.pool.free = append(s.pool.free, s)
	s.pool.some.Signal()
}

// Close removes the file. No write may be under way.
func (s *Slots) Close() error {
	if s == nil {
		return nil
	}
	gone := unix.Unlink(s.f.Name())
	if gone == unix.ENOENT { // somebody cleaned up the directory
		gone = nil
	}
	return errors.Join(unix.Munmap(s.mem), gone, s.f.Close())
}

// A flight is what an entry of the table says.
type flight struct {
	seq   uint64 // of two, the later one has the greater
	inode Inode
	crypt.Flight
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode fills in an entry but for its state. The checksum is over the entry alone:
// the records have tags.
func (f flight) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b[8:], f.seq)
	le.PutUint64(b[16:], f.inode.Dev)
	le.PutUint64(b[24:], f.inode.Ino)
	le.PutUint64(b[32:], uint64(f.inode.Born))
	le.PutUint64(b[40:], uint64(f.Off))
	le.PutUint64(b[48:], uint64(f.Len))
	copy(b[56:], f.File[:])
	b[72] = 0
	if f.Ends {
		b[72] = 1
	}
	le.PutUint32(b[4:], crc32.Checksum(b[8:slotEntry], castagnoli))
}

// parseFlight reads an entry; ok is false if it is free.
func parseFlight(b []byte) (f flight, ok bool, err error) {
	le := binary.LittleEndian
	if le.Uint32(b) != slotInFlight {
		return f, false, nil
	}
	if le.Uint32(b[4:]) != crc32.Checksum(b[8:slotEntry], castagnoli) {
		return f, false, errors.New("its checksum is wrong")
	}
	f.seq = le.Uint64(b[8:])
	f.inode = Inode{le.Uint64(b[16:]), le.Uint64(b[24:]), int64(le.Uint64(b[32:]))}
	f.Off, f.Len = int64(le.Uint64(b[40:])), int64(le.Uint64(b[48:]))
	copy(f.File[:], b[56:])
	f.Ends = b[72] == 1
	return f, true, nil
}

func bootID() string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(boot))
}

// openLeft opens the slots that a daemon of this user left; nil if there are none, or
// they are no use to anybody.
func (v *Volume) openLeft(path string) (*os.File, slotPlan, error) {
	var p slotPlan
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, p, nil
	}
	if err != nil {
		return nil, p, err
	}
	f := os.NewFile(uintptr(fd), path)
	if p, err = v.checkLeft(f); err != nil {
		f.Close()
		return nil, p, err
	}
	return f, p, nil
}

// checkLeft: anybody may put a file into the directory, but only ours counts.
func (v *Volume) checkLeft(f *os.File) (p slotPlan, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return p, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != unix.Geteuid() || st.Mode&0o077 != 0 || st.Nlink != 1 {
		return p, errors.New("it is not a private file of this user")
	}
	head := make([]byte, slotHead)
	if _, err := f.ReadAt(head, 0); err != nil {
		return p, err
	}
	if p, err = parseSlotPlan(head, v); err != nil {
		return p, err
	}
	if st.Size != p.size() {
		return p, errors.New("its size is wrong")
	}
	return p, nil
}
