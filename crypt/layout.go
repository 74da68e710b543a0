package crypt

import "math"

// Record geometry: pure arithmetic, no I/O. A stored file is a row of records;
// every record but the last holds a full block of plaintext:
//
//	key epoch (4) | nonce (12) | ciphertext (n) | tag (16)
//
// and the last one, which every non-empty file has, holds fewer (n < block
// size, possibly none): the end rule (DESIGN 3.3).
const (
	epochSize = 4
	tagSize   = 16
	// RecordOverhead is what a record is longer than its plaintext, in bytes.
	RecordOverhead = 32
)

type layout struct {
	block  int64 // plaintext bytes of a full record
	record int64 // stored bytes of a full record
}

func newLayout(blockSize int) layout {
	return layout{block: int64(blockSize), record: int64(blockSize) + RecordOverhead}
}

// max is the largest plaintext size whose stored size fits into an int64.
func (l layout) max() int64 { return (math.MaxInt64/l.record - 1) * l.block }

// plain is the plaintext size that stat reports for any stored size: whole
// blocks, and what a partial record holds.
func (l layout) plain(stored int64) int64 {
	return stored/l.record*l.block + max(0, stored%l.record-RecordOverhead)
}

// stored is the size of a well-formed file with size bytes of plaintext.
func (l layout) stored(size int64) int64 {
	if size == 0 {
		return 0
	}
	return size/l.block*l.record + RecordOverhead + size%l.block
}

// offset is where the record of a block starts.
func (l layout) offset(block int64) int64 { return block * l.record }

// length is how many plaintext bytes a block has in a file of size bytes.
func (l layout) length(block, size int64) int64 {
	return min(l.block, max(0, size-block*l.block))
}

// last is the block that holds a file's last byte; 0 for an empty file.
func (l layout) last(size int64) int64 { return max(0, size-1) / l.block }

// tail is the block whose record ends a non-empty file: a partial one.
func (l layout) tail(size int64) int64 { return size / l.block }

// PlainSize is the plaintext size of a stored file, by arithmetic alone: stat
// and readdir need no key. It is defined for damaged sizes too.
func PlainSize(stored int64, blockSize int) int64 { return newLayout(blockSize).plain(stored) }

// StoredSize is the size on disk of a file with plain bytes.
func StoredSize(plain int64, blockSize int) int64 { return newLayout(blockSize).stored(plain) }
