package crypt

import (
	"errors"
	"fmt"
	"io"
	"syscall"
)

// Truncate sets the plaintext size. Cutting to nothing drops the data key: what
// is written next goes under a fresh one. Growing fills with zeros; above 1 MiB
// the gap is declared a hole. Cutting to within the authenticated part repairs
// a bad end.
func (f *File) Truncate(size int64) error {
	if size < 0 {
		return syscall.EINVAL
	}
	if size > f.l.max() {
		return ErrTooLarge
	}
	f.readEndAgain()
	f.shape.Lock()
	defer f.shape.Unlock()
	if size == 0 {
		return f.cutAll()
	}
	if err := f.whole(); err != nil {
		return err
	}
	switch old := f.size.Load(); {
	case size == old:
		return f.EndErr()
	case size < old:
		return f.cut(size, old)
	default:
		return f.grow(size, old, zeroLimit)
	}
}

// cutAll empties the file, whatever state it is in.
func (f *File) cutAll() error {
	if err := f.b.Truncate(0); err != nil {
		return err
	}
	if c := f.cipher.Swap(nil); c != nil {
		c.wipe()
	}
	f.suspended = false
	f.young.Store(true)
	f.era++
	f.size.Store(0)
	f.tail = nil
	f.torn.Store(false)
	f.bad.Store(nil)
	f.mark.Store(markUnknown)
	f.pending.remove(0, f.l.max())
	return nil
}

// cut shrinks to a size above 0: the new tail is durable before the old blocks
// go (DESIGN 4a), and what stood in its place comes back if that fails.
func (f *File) cut(size, old int64) error {
	c := f.cipher.Load()
	if c == nil {
		return ErrWiped
	}
	block, keep := f.l.tail(size), size%f.l.block
	if f.EndErr() != nil && size > f.l.last(old)*f.l.block {
		return f.EndErr()
	}
	plain := getScratch(f.l.block)
	defer putScratch(plain)
	if keep > 0 {
		if err := f.plainBlock(c, *plain, block, old); err != nil {
			return err
		}
	}
	r, err := c.start(1)
	if err != nil {
		return err
	}
	tail := r.seal(nil, block, (*plain)[:keep])
	if err := f.guardCut(c, size, old); err != nil {
		return err
	}
	if err := f.replaceTail(tail, block, f.l.stored(size)); err != nil {
		return err
	}
	f.tail = tail
	f.era++
	f.size.Store(size)
	f.torn.Store(false)
	f.bad.Store(nil)
	f.pending.remove(block, f.l.max())
	return nil
}

// replaceTail writes a new tail over a block's record, makes it durable, and
// cuts the file after it. The old end stays in memory if the store refuses to take it
// back (whole).
func (f *File) replaceTail(tail []byte, block, stored int64) error {
	before := make([]byte, len(tail))
	n, err := f.b.ReadAt(before, f.l.offset(block))
	if n < len(before) && errors.Is(err, io.EOF) {
		return fmt.Errorf("the record of the new end is cut short: %w", ErrDamaged)
	}
	if n < len(before) {
		return fmt.Errorf("reading the record of the new end: %w", err)
	}
	buf := f.copyBuffer(tail)
	defer buf.free()
	f.launch(&buf, int64(len(tail)), block, true)
	n, err = f.write(tail, block)
	if err == nil {
		err = f.b.Sync()
	}
	if err == nil {
		err = f.b.Truncate(stored)
	}
	if err != nil {
		buf.land() // else the cut would be finished behind the old record
		if n > 0 && f.mend(&buf, before, block, false) != nil && f.isTail(block, f.size.Load()) {
			f.torn.Store(true)
		}
	}
	return err
}

// grow moves the end from old to size with zeros between: sealed ones up to
// limit bytes, else a declared hole. shape is held exclusively.
func (f *File) grow(size, old, limit int64) error {
	if err := f.EndErr(); err != nil {
		return err
	}
	c, err := f.currentLocked()
	if err != nil {
		return err
	}
	if size-old <= limit {
		return f.appendZeros(c, size, old)
	}
	// The mark goes first: a crash after it leaves the old file.
	if err := f.setMark(c); err != nil {
		return err
	}
	// A write of the last byte alone pads the old tail and puts the new one;
	// what lies between is a hole but for the old empty end.
	at := size - 1
	if size%f.l.block != 0 {
		at = f.l.tail(size) * f.l.block
	}
	if err := f.extendZeros(c, at, size, old); err != nil {
		return err
	}
	gap := f.l.tail(old + f.l.block - 1)
	if err := f.clearStored(gap, min(gap+1, at/f.l.block)); err != nil {
		f.cutBack(old)
		return err
	}
	f.pending.remove(gap, at/f.l.block)
	return nil
}

func (f *File) appendZeros(c *sealer, size, old int64) error {
	for at := old; at < size; {
		end := min(size, at+chunkSize-at%f.l.block)
		if err := f.extendZeros(c, at, end, f.size.Load()); err != nil {
			f.cutBack(old)
			return err
		}
		at = end
	}
	return nil
}

// cutBack undoes a growth that failed half-way. If even that fails, the end is bad.
func (f *File) cutBack(old int64) {
	if err := f.tryCutBack(old); err != nil {
		f.setBad(fmt.Errorf("the end could not be put back after the file could not grow (%v): %w", err, ErrDamaged))
	}
}

func (f *File) tryCutBack(old int64) error {
	if f.size.Load() == old {
		return nil
	}
	if old > 0 {
		return f.cut(old, f.size.Load())
	}
	// Unlike cutAll, this keeps the generation: this process installed it for
	// this growth, its writer holds no other, and no byte is left under it.
	if err := f.b.Truncate(0); err != nil {
		return err
	}
	f.size.Store(0)
	f.tail = nil
	f.pending.remove(0, f.l.max())
	return nil
}

// zeros is plaintext for holes; nobody writes to it.
var zeros [chunkSize]byte

// extendZeros writes zeros from at to end, where end lies beyond the size and
// end-at is at most a chunk. shape is held exclusively.
func (f *File) extendZeros(c *sealer, at, end, size int64) error {
	w, err := f.sealWhole(c, zeros[:end-at], at)
	if err != nil {
		return err
	}
	defer w.buf.free()
	return f.extend(w, size)
}

// overwriteZeros writes zeros inside the file, any number. shape is held
// exclusively.
func (f *File) overwriteZeros(c *sealer, at, end int64) error {
	for at < end {
		to := min(end, at+chunkSize-at%f.l.block)
		w, err := f.sealWhole(c, zeros[:to-at], at)
		if err != nil {
			return err
		}
		err = f.overwrite(w, f.size.Load())
		w.buf.free()
		if err != nil {
			return err
		}
		at = to
	}
	return nil
}

// Punch zeroes a range inside the file and gives its space back where it can
// (fallocate PUNCH_HOLE|KEEP_SIZE): above 1 MiB, or in a file that has holes
// already, whole blocks become holes; else sealed zeros.
func (f *File) Punch(off, n int64) error {
	if off < 0 || n <= 0 {
		return syscall.EINVAL
	}
	f.readEndAgain()
	f.shape.Lock()
	defer f.shape.Unlock()
	if err := f.whole(); err != nil {
		return err
	}
	return f.zero(off, n)
}

// Zero is fallocate ZERO_RANGE: the range reads as zeros, and unless keepSize
// is set the file grows to hold it.
func (f *File) Zero(off, n int64, keepSize bool) error {
	if off < 0 || n <= 0 {
		return syscall.EINVAL
	}
	if off > f.l.max()-n {
		return ErrTooLarge
	}
	f.readEndAgain()
	f.shape.Lock()
	defer f.shape.Unlock()
	if err := f.whole(); err != nil {
		return err
	}
	if err := f.zero(off, n); err != nil {
		return err
	}
	return f.allocate(off, n, keepSize)
}

// Allocate reserves space for a range and, unless keepSize is set, grows the
// file to hold it (fallocate modes KEEP_SIZE and 0). Growth up to 64 MiB is
// written as sealed zeros.
func (f *File) Allocate(off, n int64, keepSize bool) error {
	if off < 0 || n <= 0 {
		return syscall.EINVAL
	}
	if off > f.l.max()-n {
		return ErrTooLarge
	}
	f.readEndAgain()
	f.shape.Lock()
	defer f.shape.Unlock()
	return f.allocate(off, n, keepSize)
}

func (f *File) allocate(off, n int64, keepSize bool) error {
	from := f.l.offset(off / f.l.block)
	if err := f.b.Allocate(from, f.l.stored(off+n)-from); err != nil {
		return err
	}
	if old := f.size.Load(); !keepSize && off+n > old {
		return f.grow(off+n, old, allocateLimit)
	}
	return nil
}

// zero clears a range as far as the file reaches, with shape held exclusively.
func (f *File) zero(off, n int64) error {
	size := f.size.Load()
	if off >= size {
		return nil
	}
	end := off + min(n, size-off)
	c := f.cipher.Load()
	if c == nil {
		return ErrWiped
	}
	if err := f.checkEnd((end-1)/f.l.block, size); err != nil {
		return err
	}
	// Whole records that are not the tail can become holes.
	lo, hi := (off+f.l.block-1)/f.l.block, min(end/f.l.block, f.l.tail(size))
	marked, err := f.marked(c)
	if err != nil {
		return err
	}
	if lo >= hi || !marked && end-off <= zeroLimit {
		return f.overwriteZeros(c, off, end)
	}
	// Partly covered records first, then the mark, then the hole.
	if err := f.overwriteZeros(c, off, lo*f.l.block); err != nil {
		return err
	}
	if err := f.overwriteZeros(c, hi*f.l.block, end); err != nil {
		return err
	}
	return f.declare(c, lo, hi)
}

// declare makes whole blocks lo..hi-1 a hole that the sparse mark permits.
func (f *File) declare(c *sealer, lo, hi int64) error {
	if err := f.setMark(c); err != nil {
		return err
	}
	if err := f.clearStored(lo, hi); err != nil {
		return err
	}
	f.pending.remove(lo, hi)
	return nil
}

func (f *File) setMark(c *sealer) error {
	if ok, err := f.marked(c); ok || err != nil {
		return err
	}
	mark, err := c.secrets.SparseMark()
	if err != nil {
		return err
	}
	if err := f.b.SetSparseMark(mark); err != nil {
		return err
	}
	f.mark.Store(markValid)
	return nil
}

// clearStored makes the records of blocks lo..hi-1 stored zeros.
func (f *File) clearStored(lo, hi int64) error {
	if lo >= hi {
		return nil
	}
	if f.tails != nil {
		if err := f.tails.Disturb(f.l.offset(lo), f.l.offset(hi)); err != nil {
			return err
		}
	}
	err := f.b.PunchHole(f.l.offset(lo), (hi-lo)*f.l.record)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	for block := lo; block < hi; block++ {
		if err := f.putCopy(zeros[:f.l.record], block); err != nil {
			return err
		}
	}
	return nil
}

// Pending reports whether writes left gaps that Settle has to deal with.
func (f *File) Pending() bool {
	_, n := f.pending.list()
	return n > 0 || f.Torn()
}

// Torn reports whether the end of the file is in memory only, because the store had no
// room to take it back when a write had failed half-way. Settle tries again.
func (f *File) Torn() bool { return f.torn.Load() }

// Settle makes pending gaps true on disk: up to 1 MiB in all is sealed as
// zeros, more is declared a hole, mark first; so is what the store has no room
// for, since a hole needs none. A crash before it leaves gaps that read EBADMSG,
// never unauthenticated zeros.
func (f *File) Settle() error {
	if !f.Pending() {
		return nil
	}
	f.shape.Lock()
	defer f.shape.Unlock()
	if err := f.whole(); err != nil {
		return err
	}
	c := f.cipher.Load()
	if c == nil {
		return nil
	}
	runs, blocks := f.pending.list()
	marked, err := f.marked(c)
	if err != nil {
		return err
	}
	for _, r := range runs {
		declare := marked || blocks*f.l.block > zeroLimit
		if !declare {
			err = f.overwriteZeros(c, r[0]*f.l.block, r[1]*f.l.block)
			declare = errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
		}
		if declare {
			err = f.declare(c, r[0], r[1])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// SeekData is lseek(2) SEEK_DATA. With asIs unset, while someone writes, all of
// the file counts as data: the kernel asks before it flushes dirty pages, and
// cp would skip them.
func (f *File) SeekData(off int64, asIs bool) (int64, error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	size := f.size.Load()
	if off < 0 || off >= size {
		return 0, syscall.ENXIO
	}
	if sparse, err := f.mapped(asIs); err != nil || !sparse {
		return off, err
	}
	at, err := f.b.SeekData(f.l.offset(off / f.l.block))
	if err != nil {
		return 0, err
	}
	return max(off, min(at/f.l.record, f.l.tail(size))*f.l.block), nil
}

// SeekHole is lseek(2) SEEK_HOLE; the end of the file counts as a hole.
func (f *File) SeekHole(off int64, asIs bool) (int64, error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	size := f.size.Load()
	if off < 0 || off >= size {
		return 0, syscall.ENXIO
	}
	if sparse, err := f.mapped(asIs); err != nil || !sparse {
		return size, err
	}
	// The first whole record inside a hole of the backing file; the tail is
	// always data.
	for block := off / f.l.block; block < f.l.tail(size); {
		hole, err := f.b.SeekHole(f.l.offset(block))
		if err != nil {
			return 0, err
		}
		data, err := f.b.SeekData(hole)
		if errors.Is(err, syscall.ENXIO) {
			break // damage: the tail is gone; reads will say so
		}
		if err != nil {
			return 0, err
		}
		first := max(block, (hole+f.l.record-1)/f.l.record)
		if f.l.offset(first+1) <= data {
			return max(off, first*f.l.block), nil
		}
		block = max(block+1, data/f.l.record)
	}
	return size, nil
}

// mapped reports whether holes may be told from data.
func (f *File) mapped(asIs bool) (bool, error) {
	c := f.cipher.Load()
	if !asIs || c == nil || f.Pending() {
		return false, nil
	}
	return f.marked(c)
}
