package crypt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// IsStoredName reports whether a stored name has the form that EncryptName gives:
// what can be told of it without the volume's key.
func IsStoredName(stored string) bool {
	raw, err := decodeName(stored)
	return err == nil && len(raw) > sivSize && len(raw) <= sivSize+MaxName
}

// EndRange is the plaintext range that can't be read while the end of a file of so
// many stored bytes is bad: that of the last block that exists.
func EndRange(stored int64, blockSize int) (from, to int64) {
	l := newLayout(blockSize)
	size := l.plain(stored)
	return l.last(size) * l.block, size
}

// CheckSize judges a stored size by the end rule, without any key.
func CheckSize(stored int64, blockSize int) error {
	switch n := stored % newLayout(blockSize).record; {
	case stored == 0 || n >= RecordOverhead:
		return nil
	case n == 0:
		return fmt.Errorf("the end of the file is missing: %w", ErrDamaged)
	default:
		return fmt.Errorf("the end of the file is torn: %w", ErrDamaged)
	}
}

// CutEnd cuts a bad end off, back to the last record that is good, and returns the
// new size: a full one, or behind it a shorter one that ended the file before it grew
// or after it shrank. It is for who has decided to lose what stands behind that record;
// nothing before it is touched. If no good record is near the file stays as it is. On a
// file whose end is good it does nothing.
func (f *File) CutEnd() (int64, error) {
	f.shape.Lock()
	defer f.shape.Unlock()
	size := f.size.Load()
	c := f.cipher.Load()
	if err := f.EndErr(); !errors.Is(err, ErrDamaged) { // good, or the store would not give it
		return size, err
	}
	if c == nil {
		return size, ErrWiped
	}
	good, err := f.lastGood(c, f.l.tail(size)-1)
	if err != nil {
		return size, err
	}
	block := good + 1
	tail, err := f.shorter(c, block)
	if err != nil {
		return size, err
	}
	if tail == nil {
		if good < 0 {
			return size, fmt.Errorf("no record of the file is good: %w", ErrDamaged)
		}
		r, err := c.start(1)
		if err != nil {
			return size, err
		}
		tail = r.seal(nil, block, nil)
		if err := f.putCopy(tail, block); err != nil {
			return size, err
		}
	}
	if err := f.b.Sync(); err != nil {
		return size, err
	}
	size = block*f.l.block + int64(len(tail)) - RecordOverhead
	if err := f.b.Truncate(f.l.stored(size)); err != nil {
		return f.size.Load(), err
	}
	f.tail = tail
	f.size.Store(size)
	f.bad.Store(nil)
	return size, nil
}

// maxCutBack bounds the search, in records: whoever can write the backing directory
// can make a file as long as he likes.
const maxCutBack = 1 << 18

// maxSalvage bounds what is authenticated in search of a shorter record, in bytes.
const maxSalvage = 64 << 20

// shorter looks for a partial record at the place of a block, whatever stands behind
// it; nil if there is none. A file that grew by a size alone has zeros there, so the
// lengths are tried first that leave nothing else.
func (f *File) shorter(c *sealer, block int64) ([]byte, error) {
	record := make([]byte, f.l.record-1)
	n, err := f.b.ReadAt(record, f.l.offset(block))
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("reading what stands behind the last good block: %w", err)
	}
	record = record[:n]
	used := len(bytes.TrimRight(record, "\x00"))
	plain, o, left := make([]byte, f.l.block), c.opener(), maxSalvage
	opens := func(n int) bool {
		left -= n
		return n >= RecordOverhead && n <= len(record) && o.open(plain[:n-RecordOverhead], block, record[:n]) == nil
	}
	for n := used; n < used+tagSize; n++ { // a tag may end in zeros
		if opens(n) {
			return record[:n], nil
		}
	}
	for n := used - 1; n >= RecordOverhead && left > 0; n-- {
		if opens(n) {
			return record[:n], nil
		}
	}
	return nil, nil
}

// lastGood is the last full record, from block backwards, that opens; -1 if none of
// the file does.
func (f *File) lastGood(c *sealer, block int64) (int64, error) {
	record := make([]byte, f.l.record)
	plain := make([]byte, f.l.block)
	for o, first := c.opener(), max(0, block-maxCutBack); block >= first; block-- {
		n, err := f.b.ReadAt(record, f.l.offset(block))
		if n < len(record) {
			return 0, fmt.Errorf("reading back from the end (%v): %w", err, ErrDamaged)
		}
		if err := f.open(o, plain, block, record); !errors.Is(err, ErrDamaged) {
			return block, err
		}
	}
	if block < 0 {
		return -1, nil
	}
	return 0, fmt.Errorf("no whole block before the end is good: %w", ErrDamaged)
}
