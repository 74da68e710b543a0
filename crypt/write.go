package crypt

import (
	"errors"
	"syscall"
)

// WriteAt writes plaintext (io.WriterAt) and grows the file as needed. A gap
// between the old end and off becomes pending: it reads as zeros, and Settle
// makes that true on disk. On error the n bytes before it are written; an error
// while the file grows puts the old end back.
func (f *File) WriteAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	if off > f.l.max()-int64(len(p)) {
		return 0, ErrTooLarge
	}
	f.readEndAgain()
	for n < len(p) {
		// Chunks end on a block boundary, so that only the outer edges
		// are partial.
		m := min(int64(len(p)-n), chunkSize-(off+int64(n))%f.l.block)
		if err := f.writeChunk(p[n:n+int(m)], off+int64(n)); err != nil {
			return n, err
		}
		n += int(m)
	}
	return n, nil
}

// A write is one chunk on its way to the backing file.
type write struct {
	p           []byte
	off, end    int64
	first, last int64 // blocks
	c           *sealer
	run         run
	buf         buffer // the records of first..last and of an empty end
	records     []byte // of buf, what is to be written
}

// sealWhole seals the blocks that p covers whole; assemble adds the rest.
func (f *File) sealWhole(c *sealer, p []byte, off int64) (*write, error) {
	w := &write{p: p, off: off, end: off + int64(len(p)), c: c}
	w.first, w.last = off/f.l.block, (w.end-1)/f.l.block
	// One record more for an empty end.
	run, err := c.start(w.last - w.first + 2)
	if err != nil {
		return nil, err
	}
	w.run = run
	w.buf = f.getBuffer((w.last-w.first+1)*f.l.record + RecordOverhead)
	for block := w.first; block <= w.last; block++ {
		if f.covers(w, block) {
			start, at := block*f.l.block-off, (block-w.first)*f.l.record
			w.run.seal(w.buf.b[at:at], block, p[start:start+f.l.block])
		}
	}
	return w, nil
}

// covers reports whether w writes all of a full block.
func (f *File) covers(w *write, block int64) bool {
	return block*f.l.block >= w.off && (block+1)*f.l.block <= w.end
}

func (f *File) writeChunk(p []byte, off int64) error {
	for {
		c, err := f.current()
		if err != nil {
			return err
		}
		// Sealed before any lock is taken: writeback sends many writes of
		// a file at once.
		w, err := f.sealWhole(c, p, off)
		if errors.Is(err, ErrWiped) && f.cipher.Load() != c {
			continue // the file was cut to nothing meanwhile
		}
		if err != nil {
			return err
		}
		again, err := f.apply(w)
		w.buf.free()
		if !again {
			return err
		}
	}
}

// apply takes the locks and writes. It asks to start again if the generation
// changed (the file was cut to nothing) since the blocks were sealed.
func (f *File) apply(w *write) (again bool, err error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.cipher.Load() != w.c {
		return true, nil
	}
	// The size only grows while shape is shared, so a write that stays below
	// it needs no tail lock.
	if w.end > f.size.Load() {
		f.tailMu.Lock()
		defer f.tailMu.Unlock()
		if size := f.size.Load(); w.end > size {
			r := f.ranges.lock(min(w.first, f.l.tail(size)), f.l.tail(w.end), false)
			defer f.ranges.unlock(r)
			return false, f.extend(w, size)
		}
	}
	r := f.ranges.lock(w.first, w.last, false)
	defer f.ranges.unlock(r)
	return false, f.overwrite(w, f.size.Load())
}

// overwrite writes inside the file, with the blocks' range locked.
func (f *File) overwrite(w *write, size int64) error {
	if err := f.checkEnd(w.last, size); err != nil {
		return err
	}
	if f.isTail(w.last, size) {
		if err := f.whole(); err != nil {
			return err
		}
	}
	if err := f.assemble(w, size, size); err != nil {
		return err
	}
	if err := f.guard(w.first, w.last, size); err != nil {
		return err
	}
	n, err := f.put(&w.buf, len(w.records), w.first)
	if err != nil {
		defer w.buf.land() // while the range is locked: others may write there then
		f.pending.remove(w.first, w.first+int64(n)/f.l.record)
		f.repairTorn(w, int64(n), size)
		return err
	}
	f.pending.remove(w.first, w.last+1)
	f.keepTail(w.records, w.first, size)
	return nil
}

// repairTorn puts back what a short write tore: the tail, which is in memory,
// or a hole. Any other record had its space already, so that the rest of the new
// one is tried once more; a store that still refuses it has failed for good, and
// the block reads EBADMSG until it is rewritten.
func (f *File) repairTorn(w *write, n, size int64) {
	block, done := w.first+n/f.l.record, n%f.l.record
	if done == 0 || f.pending.has(block) {
		return
	}
	if f.isTail(block, size) {
		if f.mend(&w.buf, f.tail, block, false) != nil {
			f.torn.Store(true)
		}
		return
	}
	rest := make([]byte, f.l.record-done)
	_, err := f.b.ReadAt(rest, f.l.offset(block)+done)
	// The last bytes of a record are zeros now and then, a whole tag never is.
	if ok, _ := f.marked(w.c); ok && err == nil && len(rest) >= tagSize && isZero(rest) {
		_, _ = f.write(make([]byte, done), block)
		return
	}
	_, _ = f.b.WriteAt(w.records[n:n-done+f.l.record], f.l.offset(block)+done)
}

// extend writes past the end, with tailMu and the range of both ends held.
// Whatever fails, the old end is put back.
func (f *File) extend(w *write, size int64) error {
	if err := f.EndErr(); err != nil {
		return err
	}
	if err := f.whole(); err != nil {
		return err
	}
	if err := f.assemble(w, size, w.end); err != nil {
		return err
	}
	if err := f.guard(min(w.first, f.l.tail(size)), w.last, size); err != nil {
		return err
	}
	padded, err := f.padTail(w, size)
	if err != nil {
		return err
	}
	if n, err := f.put(&w.buf, len(w.records), w.first); err != nil {
		defer w.buf.land() // while the range is locked: others may write there then
		if w.first+int64(n)/f.l.record < f.l.tail(size) {
			f.repairTorn(w, int64(n), size)
		}
		return f.putBack(&w.buf, size, padded || n > 0, err)
	}
	if gap := f.l.tail(size + f.l.block - 1); gap < w.first {
		f.pending.add(gap, w.first)
	}
	f.pending.remove(w.first, w.last+1)
	f.size.Store(w.end)
	f.keepTail(w.records, w.first, w.end)
	return nil
}

// padTail makes the old partial tail a full block, if the write starts beyond
// it. A new empty end goes with it in the same call, so that a crash between
// this write and the next one leaves a well-formed file.
func (f *File) padTail(w *write, size int64) (padded bool, err error) {
	tail := f.l.tail(size)
	if w.first <= tail || size%f.l.block == 0 {
		return false, nil
	}
	plain := getScratch(f.l.block)
	defer putScratch(plain)
	clear(*plain)
	if err := f.plainBlock(w.c, *plain, tail, size); err != nil {
		return false, err
	}
	r, err := w.c.start(2)
	if err != nil {
		return false, err
	}
	buf := f.getBuffer(f.l.record + RecordOverhead)
	defer buf.free()
	records := r.seal(buf.b[:0], tail, *plain)
	records = r.seal(records, tail+1, nil)
	if n, err := f.put(&buf, len(records), tail); err != nil {
		return false, f.putBack(&buf, size, n > 0, err)
	}
	return true, nil
}

// putBack restores the old end after a failed growth, and returns why it failed. A
// store that copies on write (btrfs) and is full, or over quota, may refuse that, too,
// so an end that nothing was written over (not torn) is left alone, and one that can't
// be put back now is put back later (whole).
func (f *File) putBack(failed *buffer, size int64, torn bool, cause error) error {
	var err error
	switch {
	case size == 0:
		err = f.b.Truncate(0)
	case torn:
		err = f.mend(failed, f.tail, f.l.tail(size), true)
	default:
		failed.land()
	}
	f.torn.Store(err != nil)
	return cause
}

// whole puts back the end that the store refused to take back when a write had failed
// half-way. Until it does, reads find the end in memory, and whatever changes or syncs
// the end asks here first. The range of the end is locked, or shape exclusively.
func (f *File) whole() error {
	if !f.torn.Load() {
		return nil
	}
	size := f.size.Load()
	if size == 0 {
		if err := f.b.Truncate(0); err != nil {
			return err
		}
		f.torn.Store(false)
		return nil
	}
	block := f.l.tail(size)
	if err := f.b.Truncate(f.l.offset(block) + int64(len(f.tail))); err != nil {
		return err
	}
	if err := f.putCopy(f.tail, block); err != nil {
		return err
	}
	f.torn.Store(false)
	return nil
}

// assemble completes w.records: it seals the edge blocks, which need what was
// there before, and the empty end if the file will end at a boundary.
func (f *File) assemble(w *write, size, newSize int64) error {
	n := (w.last-w.first)*f.l.record + RecordOverhead + f.l.length(w.last, newSize)
	w.records = w.buf.b[:n]
	for _, block := range [2]int64{w.first, w.last} {
		if !f.covers(w, block) {
			if err := f.edge(w, block, size, newSize); err != nil {
				return err
			}
		}
		if w.first == w.last {
			break
		}
	}
	if newSize > size && newSize%f.l.block == 0 {
		w.records = w.run.seal(w.records, w.last+1, nil)
	}
	return nil
}

// edge seals a block that w covers in part, or whose record is partial.
func (f *File) edge(w *write, block, size, newSize int64) error {
	start, had, n := block*f.l.block, f.l.length(block, size), f.l.length(block, newSize)
	from, to := max(w.off, start), min(w.end, start+f.l.block)
	buf := getScratch(n)
	defer putScratch(buf)
	plain := *buf
	clear(plain)
	if from > start && had > 0 || to < start+had {
		if err := f.plainBlock(w.c, plain, block, size); err != nil {
			return err
		}
	}
	copy(plain[from-start:], w.p[from-w.off:to-w.off])
	at := (block - w.first) * f.l.record
	w.run.seal(w.buf.b[at:at], block, plain)
	return nil
}

// keepTail remembers the record that ends the file, if it is among records.
func (f *File) keepTail(records []byte, first, size int64) {
	if at := (f.l.tail(size) - first) * f.l.record; at >= 0 && at < int64(len(records)) {
		f.tail = append(f.tail[:0], records[at:]...)
	}
}
