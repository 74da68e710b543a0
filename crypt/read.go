package crypt

import (
	"errors"
	"io"
	"syscall"
)

// readSize is how much plaintext is read from the store before it is opened: it and its
// records fit in a core's own cache, where the store's copy has just put them.
const readSize = 128 << 10

// ReadAt reads plaintext (io.ReaderAt). Below Size it never returns less than
// was asked for without an error: the kernel would take missing bytes for
// zeros. After ErrDamaged the n bytes before the damage are good.
func (f *File) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	f.readEndAgain()
	for n < len(p) {
		m, err := f.readChunk(p[n:min(len(p), n+readSize)], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (f *File) readChunk(p []byte, off int64) (int, error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if off >= f.size.Load() { // before block numbers of absurd offsets are used
		return 0, f.eof()
	}
	r := f.ranges.lock(off/f.l.block, (off+int64(len(p))-1)/f.l.block, true)
	defer f.ranges.unlock(r)
	size := f.size.Load()
	whole := p
	p = p[:min(int64(len(p)), size-off)]
	n, err := f.read(p, off, size)
	if err == nil && n < len(whole) {
		err = io.EOF
	}
	return n, err
}

// eof is what a read at or past the end yields: a file whose bytes are all
// unusable is not an empty one.
func (f *File) eof() error {
	if err := f.EndErr(); err != nil && f.size.Load() == 0 {
		return err
	}
	return io.EOF
}

// read fills p from off with the blocks' range locked; off+len(p) <= size.
func (f *File) read(p []byte, off, size int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c := f.cipher.Load()
	if c == nil {
		return 0, ErrWiped
	}
	first, last := off/f.l.block, (off+int64(len(p))-1)/f.l.block
	buf := getScratch((last - first + 1) * f.l.record)
	defer putScratch(buf)
	stored := *buf
	if f.isTail(last, size) {
		stored = stored[:(last-first)*f.l.record]
	}
	if len(stored) > 0 {
		m, err := f.b.ReadAt(stored, f.l.offset(first))
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		stored = stored[:m] // what is missing is damage, or a pending gap
	}
	o, n := c.opener(), 0
	for block := first; block <= last; block++ {
		from := max(0, off-block*f.l.block)
		m, err := f.readOne(o, p[n:], block, from, size, stored, block-first)
		if err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}

// isTail reports whether block's record is the one that File keeps in memory.
func (f *File) isTail(block, size int64) bool {
	return block == f.l.tail(size) && f.tail != nil
}

// readOne puts one block's bytes, from its byte from on, at the front of p and
// returns how many. stored are the records read, block's being number i.
func (f *File) readOne(o *opener, p []byte, block, from, size int64, stored []byte, i int64) (int, error) {
	n := f.l.length(block, size)
	want := min(n-from, int64(len(p)))
	if err := f.checkEnd(block, size); err != nil {
		return 0, err
	}
	if f.pending.has(block) {
		clear(p[:want])
		return int(want), nil
	}
	record, err := f.record(block, size, stored, i)
	if err != nil {
		return 0, err
	}
	if want == n { // whole: straight into the caller's buffer
		return int(n), f.open(o, p[:n:n], block, record)
	}
	plain := getScratch(n)
	defer putScratch(plain)
	if err := f.open(o, (*plain)[:n:n], block, record); err != nil {
		return 0, err
	}
	return copy(p[:want], (*plain)[from:]), nil
}

// record is block's stored form: from memory if it ends the file, else number i
// of those read.
func (f *File) record(block, size int64, stored []byte, i int64) ([]byte, error) {
	if f.isTail(block, size) {
		return f.tail, nil
	}
	start := i * f.l.record
	end := start + f.l.length(block, size) + RecordOverhead
	if int64(len(stored)) < end {
		return nil, ErrDamaged // bytes are missing
	}
	return stored[start:end], nil
}

// open decrypts a record, or finds a hole: a full record of stored zeros, which
// only a file that carries a valid sparse mark may have.
func (f *File) open(o *opener, dst []byte, block int64, record []byte) error {
	if int64(len(record)) == f.l.record && isZero(record) {
		marked, err := f.marked(o.s)
		if err != nil {
			return err
		}
		if !marked {
			return ErrDamaged
		}
		clear(dst)
		return nil
	}
	return o.open(dst, block, record)
}

// marked reports whether the file carries a valid sparse mark.
func (f *File) marked(c *sealer) (bool, error) {
	switch f.mark.Load() {
	case markValid:
		return true, nil
	case markAbsent:
		return false, nil
	}
	stored, err := f.b.SparseMark()
	if err != nil {
		return false, err
	}
	valid, err := c.secrets.IsSparseMark(stored)
	if err != nil {
		return false, err // without the keys nothing is learned, and nothing remembered
	}
	known := int32(markAbsent)
	if valid {
		known = markValid
	}
	f.mark.CompareAndSwap(markUnknown, known)
	return valid, nil
}

// plainBlock decrypts one whole block, up to size, into dst.
func (f *File) plainBlock(c *sealer, dst []byte, block, size int64) error {
	n := f.l.length(block, size)
	if n == 0 {
		return nil
	}
	_, err := f.read(dst[:n], block*f.l.block, size)
	return err
}
