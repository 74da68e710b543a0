package crypt

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// Backing is a stored file as File sees it: package volume implements it over a
// descriptor, tests over a byte slice. Offsets and sizes are stored ones.
type Backing interface {
	io.ReaderAt
	io.WriterAt
	// Truncate sets the stored size.
	Truncate(stored int64) error
	// Sync makes data and size durable, fdatasync(2).
	Sync() error
	// SetHeader installs the header of a new generation in place of any other,
	// and removes the sparse mark of the old one.
	SetHeader(raw []byte) error
	// SparseMark reads SparseXattr; nil, nil if there is none.
	SparseMark() ([]byte, error)
	// SetSparseMark writes SparseXattr.
	SetSparseMark(mark []byte) error
	// PunchHole deallocates a range, which then reads as zeros;
	// errors.ErrUnsupported if the store can't.
	PunchHole(off, n int64) error
	// Allocate reserves space and keeps the size (fallocate KEEP_SIZE);
	// errors.ErrUnsupported if the store can't.
	Allocate(off, n int64) error
	// SeekData and SeekHole are lseek(2) with SEEK_DATA and SEEK_HOLE; ENXIO
	// past the last data.
	SeekData(off int64) (int64, error)
	SeekHole(off int64) (int64, error)
}

// A File is the plaintext view of one stored file. It is safe for concurrent
// use and holds no position.
//
// Locks, in this order: shape (shared by reads and writes, exclusive for
// whatever changes the file's shape: truncate, holes, settle, a new key), tail
// (held by the one writer that moves the end), ranges (one contiguous range of
// blocks an operation). Nothing waits for KMS under any of them: the key for
// growing from nothing is given in advance, by Prime.
type File struct {
	b      Backing
	l      layout
	keeper SlotKeeper // nil if b has no slots
	tails  TailKeeper // nil if b keeps no tails

	shape  sync.RWMutex
	tailMu sync.Mutex // "tail" in the lock order
	ranges *rangeLock

	size   atomic.Int64           // plaintext; changed with shape held, or with tailMu and the range of both ends
	cipher atomic.Pointer[sealer] // nil while nothing was stored; changed with shape held
	fresh  atomic.Pointer[Fresh]  // for the growth from 0; changed with shape held
	// suspended: cipher is there and wiped, until Resume. Guarded by shape.
	suspended bool
	// young: none of what is stored was ever synced, so that no tail needs to be
	// kept. Set with shape held exclusively.
	young atomic.Bool
	// grown: the end was kept, and written over, since the last sync.
	grown atomic.Bool
	// era counts syncs that have begun, and cuts; guarded by shape.
	era uint64
	// bad is why the end can't be trusted: changed with shape held exclusively,
	// or with tailMu.
	bad atomic.Pointer[error]
	// torn: the end on disk is not tail, which a full store refused to take back.
	// It is good in memory; guarded as tail is (whole).
	torn atomic.Bool
	// tail is the stored record that ends the file; guarded by the range lock
	// on its block, or by shape held exclusively. It saves a read when the end
	// moves, and puts the old end back when a write fails.
	tail []byte
	// pending are whole blocks below the end that no one has written: gaps
	// that writes left. In memory they are zeros; on disk they are anything.
	pending blockSet
	mark    atomic.Int32 // what is known of the sparse mark
}

const (
	markUnknown = iota
	markAbsent
	markValid
)

// Bounds on what is written as sealed zeros instead of being declared a hole,
// in bytes (DESIGN 3.3).
const (
	zeroLimit     = 1 << 20
	allocateLimit = 64 << 20
)

// chunkSize is how much plaintext one backing call carries at most, in bytes.
const chunkSize = 1 << 20

// NewFile makes the view of a stored file of stored bytes. s are its keys, nil
// if and only if it is empty; the File owns and wipes them. The end is
// authenticated with one read: a bad end is no error here, since the blocks
// before it stay readable and truncation repairs it (EndErr).
func NewFile(b Backing, blockSize int, stored int64, s *Secrets) (*File, error) {
	f := &File{b: b, l: newLayout(blockSize), ranges: newRangeLock()}
	f.keeper, _ = b.(SlotKeeper)
	f.tails, _ = b.(TailKeeper)
	if stored == 0 {
		f.young.Store(true)
		s.Wipe() // a header over no bytes is never used again
		return f, nil
	}
	if s == nil {
		return nil, ErrNoHeader
	}
	if id := s.Identity(); id.BlockSize() != blockSize || id.Use != UseFile {
		s.Wipe()
		return nil, fmt.Errorf("the header is for another block size or use: %w", ErrDamaged)
	}
	f.cipher.Store(newSealer(s))
	f.size.Store(f.l.plain(stored))
	if err := f.readEnd(stored); err != nil {
		f.setBad(err)
	}
	return f, nil
}

// readEnd authenticates the record that ends the file and keeps it.
func (f *File) readEnd(stored int64) error {
	n := stored % f.l.record
	if n < RecordOverhead {
		return fmt.Errorf("the end of the file is missing or torn: %w", ErrDamaged)
	}
	record := make([]byte, n)
	block := stored / f.l.record
	if _, err := f.b.ReadAt(record, f.l.offset(block)); err != nil && err != io.EOF {
		return fmt.Errorf("reading the end of the file: %w", err)
	}
	if err := f.cipher.Load().opener().open(make([]byte, n-RecordOverhead), block, record); err != nil {
		return fmt.Errorf("the end of the file does not authenticate: %w", err)
	}
	f.tail = record
	return nil
}

func (f *File) setBad(err error) { f.bad.Store(&err) }

// EndErr says why the file's end can't be trusted, or nil.
func (f *File) EndErr() error {
	if p := f.bad.Load(); p != nil {
		return *p
	}
	return nil
}

// readEndAgain tries once more to read an end that the store would not give: that is
// no damage, and may be over. No lock is held.
func (f *File) readEndAgain() {
	unread := func() bool { err := f.EndErr(); return err != nil && !errors.Is(err, ErrDamaged) }
	if !unread() {
		return
	}
	f.shape.Lock()
	defer f.shape.Unlock()
	if !unread() || f.suspended {
		return
	}
	if err := f.readEnd(f.l.stored(f.size.Load())); err != nil {
		f.setBad(err)
		return
	}
	f.bad.Store(nil)
}

// checkEnd fails if the end is bad and block is the last one that exists, or
// lies beyond it.
func (f *File) checkEnd(block, size int64) error {
	if p := f.bad.Load(); p != nil && block >= f.l.last(size) {
		return *p
	}
	return nil
}

// Size is the plaintext size in bytes: authoritative while the File lives.
func (f *File) Size() int64 { return f.size.Load() }

// NeedsKey reports whether growing the file would need a key it has not got.
func (f *File) NeedsKey() bool {
	f.shape.RLock()
	defer f.shape.RUnlock()
	return f.cipher.Load() == nil && f.fresh.Load() == nil
}

// Prime gives the file the key under which it will grow from nothing, and
// reports whether it took it: it holds one at most.
func (f *File) Prime(k *Fresh) bool {
	f.shape.Lock()
	defer f.shape.Unlock()
	return f.fresh.CompareAndSwap(nil, k)
}

// Unprime takes back a key that was not needed, or returns nil.
func (f *File) Unprime() *Fresh {
	f.shape.Lock()
	defer f.shape.Unlock()
	return f.fresh.Swap(nil)
}

// Primed reports whether the file holds a key it has not used yet.
func (f *File) Primed() bool {
	f.shape.RLock()
	defer f.shape.RUnlock()
	return f.fresh.Load() != nil
}

// Reprime exchanges a key that the file holds and has not used for k, after a
// rekey, and returns the old one; or k itself, if it holds none.
func (f *File) Reprime(k *Fresh) *Fresh {
	f.shape.Lock()
	defer f.shape.Unlock()
	if f.fresh.Load() == nil {
		return k
	}
	return f.fresh.Swap(k)
}

// Identity is the current generation's, or nil while nothing is stored.
func (f *File) Identity() *Identity {
	c := f.cipher.Load()
	if c == nil {
		return nil
	}
	id := c.secrets.Identity()
	return &id
}

// Secrets are the current generation's keys, or nil while nothing is stored.
// The File owns them.
func (f *File) Secrets() *Secrets {
	if c := f.cipher.Load(); c != nil {
		return c.secrets
	}
	return nil
}

// current returns the ciphers to write with, installing a fresh generation if
// nothing is stored: bytes are never added to an empty file under a header
// found on disk (DESIGN 3.3), so a planted header is never used.
func (f *File) current() (*sealer, error) {
	if c := f.cipher.Load(); c != nil {
		return c, nil
	}
	f.shape.Lock()
	defer f.shape.Unlock()
	return f.currentLocked()
}

// currentLocked is current with shape held exclusively.
func (f *File) currentLocked() (*sealer, error) {
	if c := f.cipher.Load(); c != nil {
		return c, nil
	}
	fresh := f.fresh.Load()
	if fresh == nil {
		return nil, fmt.Errorf("growing an empty file without a fresh data key: %w", ErrKeyUnavailable)
	}
	raw, err := fresh.Header.Marshal()
	if err != nil {
		return nil, err
	}
	if err := f.b.SetHeader(raw); err != nil {
		return nil, fmt.Errorf("installing a header: %w", err)
	}
	c := newSealer(fresh.Secrets)
	f.cipher.Store(c)
	f.fresh.Store(nil)
	f.mark.Store(markAbsent)
	return c, nil
}

// Sync settles pending gaps and makes everything durable: fsync(2) of the view.
func (f *File) Sync() error {
	if err := f.Settle(); err != nil {
		return err
	}
	return f.SyncBy(f.b.Sync)
}

// Close wipes the keys. It neither settles nor closes the backing file.
func (f *File) Close() {
	f.shape.Lock()
	defer f.shape.Unlock()
	if fresh := f.fresh.Swap(nil); fresh != nil {
		fresh.Secrets.Wipe()
	}
	if c := f.cipher.Load(); c != nil {
		c.wipe()
	}
}

// Scratch buffers hold records and blocks on their way: small ones for a block
// or two, large ones for a chunk. Two pools, so that a small write does not pin
// a large buffer.
var smallScratch, largeScratch sync.Pool

const (
	smallCap = 2 * (MinBlockSize + RecordOverhead)
	largeCap = chunkSize + (chunkSize/MinBlockSize+2)*RecordOverhead + 2*MinBlockSize
)

func scratchPool(n int) (*sync.Pool, int) {
	if n <= smallCap {
		return &smallScratch, smallCap
	}
	return &largeScratch, max(n, largeCap)
}

// getScratch returns a buffer of n bytes, of any content; give it back with
// putScratch.
func getScratch(n int64) *[]byte {
	pool, size := scratchPool(int(n))
	if p, ok := pool.Get().(*[]byte); ok && int64(cap(*p)) >= n {
		*p = (*p)[:n]
		return p
	}
	b := make([]byte, n, size)
	return &b
}

func putScratch(p *[]byte) {
	pool, _ := scratchPool(cap(*p))
	pool.Put(p)
}
