package crypt

import (
	"fmt"
	"io"
)

// A SlotKeeper is what a Backing may have besides: memory that outlives this
// process. A buffered write is not atomic: kill -9 can end it between two pages, and
// the record in which it ends is torn. So records are sealed into a slot, and stay
// there until the backing file has them; whoever comes next finishes the write
// (Flight.Replay). Only ciphertext ever lies in a slot.
type SlotKeeper interface {
	// TakeSlot takes a slot of at least n bytes, nil if there is none.
	TakeSlot(n int64, use SlotUse) Slot
}

// A SlotUse says what a slot is for. Slots are kept apart by it, so that whoever waits
// for one waits for those only who go on to wait for a later use, or for the backing
// store: slots can't deadlock, whatever locks are held.
type SlotUse int

const (
	// SlotTry is taken before any lock, and not waited for.
	SlotTry SlotUse = iota
	// SlotWrite is waited for by who holds no other, and the locks of the write.
	SlotWrite
	// SlotMend is waited for by who has one for a write that failed.
	SlotMend
	SlotUses = int(SlotMend) + 1
)

// A Slot is one such piece of memory, its taker's until Free.
type Slot interface {
	Bytes() []byte
	// Begin says that the write is under way of which Bytes holds the records: from
	// now until End or Free it is finished by others if this process dies.
	Begin(Flight)
	End()
	Free()
}

// A Flight is a write of records on its way to the backing file.
type Flight struct {
	File FileID // the generation that the records belong to
	Off  int64  // stored offset
	Len  int64  // stored bytes
	Ends bool   // the file is to end behind them
}

// Replay finishes the write in the file b. It writes whole records where records
// may lie, and nothing else. They are authenticated when they are read: a forged
// flight does no more than whoever could write to the backing file himself.
func (fl Flight) Replay(b Backing, blockSize int, records []byte) error {
	if !fl.sane(newLayout(blockSize)) || int64(len(records)) != fl.Len {
		return fmt.Errorf("the write makes no sense: %w", ErrDamaged)
	}
	if _, err := b.WriteAt(records, fl.Off); err != nil {
		return fmt.Errorf("writing the records: %w", err)
	}
	if fl.Ends {
		if err := b.Truncate(fl.Off + fl.Len); err != nil {
			return fmt.Errorf("cutting the file behind them: %w", err)
		}
	}
	return nil
}

func (fl Flight) sane(l layout) bool {
	rest := fl.Len % l.record
	return fl.Off >= 0 && fl.Off%l.record == 0 && fl.Len > 0 && fl.Len <= SlotSize(int(l.block)) &&
		fl.Off <= l.stored(l.max())-fl.Len && (rest == 0 || rest >= RecordOverhead)
}

// SlotSize is the most that one write carries, in stored bytes: a chunk that begins
// on a block boundary, and an empty end.
func SlotSize(blockSize int) int64 {
	l := newLayout(blockSize)
	return chunkSize/l.block*l.record + RecordOverhead
}

// A buffer is where records lie on their way: a slot, or where none was free
// ordinary memory.
type buffer struct {
	b    []byte
	heap *[]byte // from getScratch, or nil
	slot Slot    // nil if there is none
}

// getBuffer returns a buffer of n bytes, of any content; give it back with free.
func (f *File) getBuffer(n int64) buffer {
	if f.keeper != nil {
		if s := f.keeper.TakeSlot(n, SlotTry); s != nil {
			return buffer{b: s.Bytes()[:n], slot: s}
		}
	}
	p := getScratch(n)
	return buffer{b: *p, heap: p}
}

// copyBuffer is getBuffer for records that lie elsewhere.
func (f *File) copyBuffer(records []byte) buffer {
	buf := f.getBuffer(int64(len(records)))
	copy(buf.b, records)
	return buf
}

func (b *buffer) free() {
	if b.slot != nil {
		b.slot.Free()
	}
	if b.heap != nil {
		putScratch(b.heap)
	}
	*b = buffer{}
}

// land says that the backing file needs the slot no more.
func (b *buffer) land() {
	if b.slot != nil {
		b.slot.End()
	}
}

// launch says that the first n bytes of buf go to a block's record and those that
// follow. If they lie in ordinary memory they are copied into a slot now: it is
// waited for, as what is locked now is of no concern to those who hold one.
func (f *File) launch(buf *buffer, n, block int64, ends bool) {
	c := f.cipher.Load()
	if f.keeper == nil || c == nil {
		return
	}
	if buf.slot == nil {
		if buf.slot = f.keeper.TakeSlot(n, SlotWrite); buf.slot == nil {
			return
		}
		copy(buf.slot.Bytes(), buf.b[:n])
	}
	buf.slot.Begin(Flight{File: c.secrets.id.File, Off: f.l.offset(block), Len: n, Ends: ends})
}

// put is the one place where records reach the backing file, but for the end of a
// file that is cut (replaceTail). They are the first n bytes of buf. It returns how
// many bytes arrived; until all did, or what they tore is mended, the slot stays.
func (f *File) put(buf *buffer, n int, block int64) (int, error) {
	f.launch(buf, int64(n), block, false)
	m, err := f.write(buf.b[:n], block)
	if err == nil {
		buf.land()
	}
	return m, err
}

func (f *File) write(records []byte, block int64) (int, error) {
	n, err := f.b.WriteAt(records, f.l.offset(block))
	if err == nil && n < len(records) {
		err = io.ErrShortWrite
	}
	return n, err
}

// putCopy is put for records that lie elsewhere.
func (f *File) putCopy(records []byte, block int64) error {
	buf := f.copyBuffer(records)
	defer buf.free()
	_, err := f.put(&buf, len(records), block)
	return err
}

// mend puts a record back that a failed write tore, whose slot is still in flight and
// lands before this one: finished alone it would undo the mending. With ends set the
// file ends behind the record.
func (f *File) mend(failed *buffer, record []byte, block int64, ends bool) error {
	var buf buffer
	defer buf.free()
	defer failed.land()
	if f.keeper != nil {
		if buf.slot = f.keeper.TakeSlot(int64(len(record)), SlotMend); buf.slot != nil {
			copy(buf.slot.Bytes(), record)
			f.launch(&buf, int64(len(record)), block, ends)
		}
	}
	if ends {
		if err := f.b.Truncate(f.l.offset(block) + int64(len(record))); err != nil {
			return err
		}
	}
	_, err := f.write(record, block)
	return err
}
