package crypt

import (
	"bytes"
	"fmt"
	"io"
	"math"
)

// A TailKeeper is what a Backing may have besides: a durable place for the end of the
// file. A partial record that ends a file is rewritten whole when the file grows, so a
// power cut in between can tear bytes that were durable long ago. Hence what stands
// there is made durable elsewhere before it is written over, and put back by the next
// mount if neither the old end nor the new one is whole (RecoverTails).
type TailKeeper interface {
	// KeepTail returns when t is durable, or what was kept since the last BeginSync
	// will do (Covers). On error nothing may be written there.
	KeepTail(t Tail) error
	// Disturb is called before the stored bytes from..to are written in place. What
	// was kept there and is no longer needed must not come back after it.
	Disturb(from, to int64) error
	// BeginSync says that all that was written so far is about to be made durable:
	// what is written from now on needs a tail kept after it. No write is under way.
	// end is told how it went, and whether what was kept before may be forgotten.
	// That is so after a sync that failed only if again, asked for the stored offset of
	// each tail, has written anew what stands there: fsync(2) takes what it could not
	// write for written, and the next one ends well without it.
	BeginSync(again func(off int64) bool) (end func(error))
}

// A Tail is how a stored file ended at some time: one record or two from Off to the
// end. Only ciphertext.
type Tail struct {
	File    FileID // the generation that the records belong to
	Off     int64  // stored offset
	Records []byte
	Cut     bool // not how the file ends, but how it might after a cut
}

// Covers reports whether t, kept since the file was last durable, makes it needless to
// keep next: it is that end, or the file has grown from it since.
func (t *Tail) Covers(next *Tail) bool {
	return t.File == next.File && (t.Off == next.Off || t.Off < next.Off && !t.Cut)
}

// TailSize is the most that a Tail holds, in stored bytes: a full record, and an empty
// one behind it.
func TailSize(blockSize int) int64 { return newLayout(blockSize).record + RecordOverhead }

// size is the stored size of the file that ends so.
func (t *Tail) size() int64 { return t.Off + int64(len(t.Records)) }

// ofCut reports whether t was kept for a cut into a full block.
func (t *Tail) ofCut(l layout) bool { return int64(len(t.Records)) > l.record }

func (t *Tail) sane(l layout) bool {
	n := int64(len(t.Records))
	return t.Off >= 0 && t.Off%l.record == 0 && n <= l.record+RecordOverhead &&
		t.Off <= l.stored(l.max())-n && n%l.record >= RecordOverhead
}

// guard comes before records of blocks first..last are put into a file of size bytes.
// If that touches the partial record at the end, which may be durable, the record is
// kept first.
func (f *File) guard(first, last, size int64) error {
	if f.tails == nil || f.young.Load() {
		return nil
	}
	tail := f.l.tail(size)
	if last < tail {
		return f.tails.Disturb(f.l.offset(first), f.l.offset(last+1))
	}
	if size%f.l.block == 0 {
		return f.disturbAll()
	}
	f.grown.Store(true)
	if err := f.saveTail(tail, f.tail, false); err != nil {
		return err
	}
	// Where this end comes back, those that were let go find their own record good: at
	// its place, and before it where nothing is written now.
	if err := f.tails.Disturb(f.l.offset(min(first, tail)), f.l.offset(tail)); err != nil {
		return err
	}
	return f.tails.Disturb(f.l.offset(tail)+1, math.MaxInt64)
}

// disturbAll comes before a write that may leave a bad end and keeps none: nothing that
// was let go may come back then.
func (f *File) disturbAll() error { return f.tails.Disturb(0, math.MaxInt64) }

func (f *File) saveTail(block int64, records []byte, cut bool) error {
	t := Tail{File: f.cipher.Load().secrets.id.File, Off: f.l.offset(block), Records: records, Cut: cut}
	if err := f.tails.KeepTail(t); err != nil {
		return fmt.Errorf("keeping the old end of the file: %w", err)
	}
	return nil
}

// guardCut is guard for a cut from old to size bytes. In the middle of a block, that
// block's record becomes the tail. If it is a full one, it is kept with an empty end:
// so the file would end behind it.
func (f *File) guardCut(c *sealer, size, old int64) error {
	if f.tails == nil || f.young.Load() {
		return nil
	}
	if size%f.l.block == 0 {
		return f.disturbAll()
	}
	block := f.l.tail(size)
	if block == f.l.tail(old) {
		return f.guard(block, block, old)
	}
	r, err := c.start(1)
	if err != nil {
		return err
	}
	records := make([]byte, f.l.record, f.l.record+RecordOverhead)
	n, err := f.b.ReadAt(records, f.l.offset(block))
	if n < len(records) && (err == nil || err == io.EOF) {
		err = ErrDamaged
	}
	if n < len(records) {
		return fmt.Errorf("reading the record of the new end: %w", err)
	}
	if err := f.saveTail(block, r.seal(records, block+1, nil), true); err != nil {
		return err
	}
	return f.disturbAll()
}

// SyncBy runs a call that makes the file durable, and lets go of what was kept for the
// case that it had not been. An end that is in memory only is put back first (Torn), or
// the call is not made: what it made durable would be the torn one.
//
// A file whose end was written over since the last sync is likely to be again, a log
// say. So its end is kept meanwhile: the next write finds that done. That fails only for
// a reason which that write will meet itself.
func (f *File) SyncBy(sync func() error) error {
	end, keep, err := f.beginSync()
	if err != nil {
		return err
	}
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		keep()
	}()
	err = sync()
	end(err) // before the wait, which may be one for room
	<-kept
	return err
}

// beginSync returns how to keep the next end, too.
func (f *File) beginSync() (end func(error), keep func(), err error) {
	f.shape.Lock() // no write is under way that relies on what was kept before
	defer f.shape.Unlock()
	if err := f.whole(); err != nil {
		return nil, nil, err
	}
	keep = func() {}
	if f.tails == nil {
		return func(error) {}, keep, nil
	}
	f.startEra()
	size, c := f.size.Load(), f.cipher.Load()
	if f.grown.Swap(false) && c != nil && f.EndErr() == nil && size%f.l.block != 0 {
		next := Tail{File: c.secrets.id.File, Off: f.l.offset(f.l.tail(size)), Records: bytes.Clone(f.tail)}
		era := f.era
		keep = func() { f.keepNext(next, era) }
	}
	return f.tails.BeginSync(f.putAgain), keep, nil
}

// putAgain hands the block at a stored offset, and what was appended since, to the store
// once more. It reports whether that was done for the block: never if it is not authentic,
// for the store may have thrown away what it could not write. shape is held exclusively.
func (f *File) putAgain(off int64) bool {
	stored := f.l.stored(f.size.Load())
	if stored <= off {
		return true // cut off since
	}
	if f.suspended || f.EndErr() != nil || !f.againAt(off, stored) {
		return false
	}
	for off += f.l.record; off < stored; off += f.l.record {
		f.againAt(off, stored) // gaps are not authentic
	}
	return true
}

// againAt writes one authentic record as it stands in a file of stored bytes.
func (f *File) againAt(off, stored int64) bool {
	block := off / f.l.record
	record := make([]byte, min(f.l.record, stored-off))
	if n, _ := f.b.ReadAt(record, off); n < len(record) || n < RecordOverhead {
		return false
	}
	c := f.cipher.Load()
	return f.open(c.opener(), make([]byte, len(record)-RecordOverhead), block, record) == nil && f.putCopy(record, block) == nil
}

// startEra says that what is kept from now on is newer. shape is held exclusively.
func (f *File) startEra() {
	f.young.Store(false)
	f.era++
}

// keepNext keeps an end of an era; in another it is an older one, and a write that found
// it kept would rely on it.
func (f *File) keepNext(next Tail, era uint64) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.era == era {
		_ = f.tails.KeepTail(next)
	}
}

// TryBeginSync is for who makes many files durable at once: it says so, unless the file
// is in use just now, or its end is in memory only, and then returns nil.
func (f *File) TryBeginSync() (end func(error)) {
	if f.tails == nil || !f.shape.TryLock() {
		return nil
	}
	defer f.shape.Unlock()
	if f.whole() != nil {
		return nil
	}
	f.startEra()
	return f.tails.BeginSync(f.putAgain)
}

// RecoverTails puts back what was kept of the end of the file b, of stored bytes, where
// a power cut left neither the old end nor a new one. tails are the newest first; the
// last synced state is among them, if anything was written at the end since. It reports
// whether anything was put back. In any case the file is durable when it returns
// without an error, so that nobody needs tails any more: what is good is written again
// as it is, since a sync of the mount before may have failed, and only memory have it.
//
// What is put back authenticates under the file's key. A forged tail does no more than
// whoever could write an old one into the backing file himself.
func RecoverTails(b Backing, blockSize int, stored int64, s *Secrets, tails []Tail) (put bool, err error) {
	id := s.Identity()
	for _, t := range tails {
		clone, err := s.Clone()
		if err != nil {
			return put, err
		}
		f, err := NewFile(b, blockSize, stored, clone)
		if err != nil {
			return put, err
		}
		after, err := f.recoverTail(&t, id.File, stored)
		f.Close()
		if err != nil {
			return put, err
		}
		if after > 0 {
			put, stored = true, after
		}
	}
	return put, b.Sync()
}

// recoverTail puts one tail back unless there is no need, and returns the stored size
// after that; 0 if it did nothing.
func (f *File) recoverTail(t *Tail, id FileID, stored int64) (after int64, err error) {
	if !t.sane(f.l) || t.File != id || stored < t.Off || stored == 0 {
		return 0, nil // with another generation, or where nothing is before it, it has no place
	}
	c := f.cipher.Load()
	good, err := f.isWhole(c, t.Off, stored)
	if err == nil && good && f.EndErr() == nil && !f.putAgain(t.Off) {
		err = fmt.Errorf("writing the end of the file again: %w", io.ErrShortWrite)
	}
	if err != nil || good && f.EndErr() == nil {
		return 0, err
	}
	block := t.Off / f.l.record
	for at := int64(0); at < int64(len(t.Records)); at += f.l.record {
		record := t.Records[at:min(at+f.l.record, int64(len(t.Records)))]
		if f.open(c.opener(), make([]byte, len(record)-RecordOverhead), block+at/f.l.record, record) != nil {
			return 0, nil // it is not from this file, or not what was kept
		}
	}
	records, after := t.Records, t.size()
	if t.ofCut(f.l) && f.EndErr() == nil { // the cut never came to it
		records, after = records[:f.l.record], stored
	}
	if _, err := f.b.WriteAt(records, t.Off); err != nil {
		return 0, fmt.Errorf("putting the old end back: %w", err)
	}
	if err := f.b.Truncate(after); err != nil {
		return 0, fmt.Errorf("cutting the file behind its old end: %w", err)
	}
	return after, nil
}

// isWhole reports whether the record at a stored offset is good in a file of stored
// bytes, or none is there.
func (f *File) isWhole(c *sealer, off, stored int64) (bool, error) {
	n := min(f.l.record, stored-off)
	if n < RecordOverhead {
		return n == 0, nil
	}
	record := make([]byte, n)
	if m, err := f.b.ReadAt(record, off); m < len(record) && err != io.EOF {
		return false, fmt.Errorf("reading a record: %w", err)
	}
	return f.open(c.opener(), make([]byte, n-RecordOverhead), off/f.l.record, record) == nil, nil
}
