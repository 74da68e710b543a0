package rekey

import (
	"fmt"
	"strconv"
	"strings"
)

// A Shard is the part I of N (I from 1) of a tree; the zero value is all of it. A
// file's part follows from its inode number: no worker opens what is another's,
// renames change nothing, and the links of a file fall together.
type Shard struct{ I, N int }

const maxShards = 1 << 20

// ParseShard reads "I/N".
func ParseShard(s string) (Shard, error) {
	left, right, ok := strings.Cut(s, "/")
	i, errI := strconv.Atoi(left)
	n, errN := strconv.Atoi(right)
	if !ok || errI != nil || errN != nil || n < 1 || n > maxShards || i < 1 || i > n {
		return Shard{}, fmt.Errorf("a part is I/N with I from 1 to N, such as 1/4, not %q", s)
	}
	return Shard{i, n}, nil
}

func (s Shard) String() string { return fmt.Sprintf("%d/%d", s.I, s.N) }

// whole reports whether the shard is the whole tree as seen by an ordinary run.
func (s Shard) whole() bool { return s.N == 0 }

// has says whether an inode belongs to the part. The numbers of one directory are
// neighbours: the finalizer of splitmix64 spreads them. Workers of different
// versions may sweep one tree, so it must never change.
func (s Shard) has(ino uint64) bool {
	if s.whole() {
		return true
	}
	x := ino + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	x ^= x >> 31
	return x%uint64(s.N) == uint64(s.I-1)
}
