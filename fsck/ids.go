package fsck

import (
	"bufio"
	"bytes"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
)

// What an id names.
const (
	kindFile byte = 'F'
	kindDir  byte = 'D'
)

// An idRecord is a kind, an id and the inode that carries it.
type idRecord [1 + 16 + 8]byte

// A twinID is a kind and an id.
type twinID [1 + 16]byte

func (r *idRecord) id() twinID  { return twinID(r[:17]) }
func (r *idRecord) ino() uint64 { return binary.BigEndian.Uint64(r[17:]) }

// runRecords is how many records are sorted in memory, 1.6 MB of them.
const runRecords = 1 << 16

// maxTwins bounds the ids that are told as standing twice.
const maxTwins = 1 << 14

// idSort finds ids that stand on two inodes: an external merge sort, so that memory
// does not grow with the tree. It is safe for concurrent use.
type idSort struct {
	mu     sync.Mutex
	recent []idRecord  // guarded by mu; not yet in a run
	file   *os.File    // guarded by mu; sorted runs one after another; nil until it is needed
	runs   []io.Reader // guarded by mu; each a part of file
	end    int64       // guarded by mu; of file
	err    error       // guarded by mu; why it is worth nothing
	size   int         // records in a run
}

func newIDSort() (*idSort, error) { return &idSort{size: runRecords}, nil }

func (s *idSort) add(kind byte, id [16]byte, ino uint64) {
	var r idRecord
	r[0] = kind
	copy(r[1:], id[:])
	binary.BigEndian.PutUint64(r[17:], ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return // it would only grow
	}
	s.recent = append(s.recent, r)
	if len(s.recent) >= s.size {
		s.err = s.flushLocked()
	}
}

// flushLocked makes a run of what is in memory.
func (s *idSort) flushLocked() (err error) {
	if s.file == nil {
		if s.file, err = namelessFile(); err != nil {
			return fmt.Errorf("making a temporary file for ids: %w", err)
		}
	}
	sortRecords(s.recent)
	w := bufio.NewWriter(io.NewOffsetWriter(s.file, s.end))
	for i := range s.recent {
		_, _ = w.Write(s.recent[i][:]) // a failure stays until Flush
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing ids to a temporary file: %w", err)
	}
	n := int64(len(s.recent)) * int64(len(idRecord{}))
	s.runs = append(s.runs, io.NewSectionReader(s.file, s.end, n))
	s.end += n
	s.recent = s.recent[:0]
	return nil
}

// namelessFile holds ids only, which the backing directory shows as well.
func namelessFile() (*os.File, error) {
	f, err := os.CreateTemp("", "kmsfs-fsck.")
	if err == nil {
		err = os.Remove(f.Name())
	}
	return f, err
}

func sortRecords(list []idRecord) {
	slices.SortFunc(list, func(a, b idRecord) int { return bytes.Compare(a[:], b[:]) })
}

// twins are the ids that stand on more than one inode, at most maxTwins of them.
func (s *idSort) twins() (map[twinID]bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	m := make(merge, 0, len(s.runs)+1)
	sortRecords(s.recent)
	for _, r := range append(slices.Clone(s.runs), &memoryRun{list: s.recent}) {
		if err := m.enter(bufio.NewReaderSize(r, 4<<10)); err != nil {
			return nil, err
		}
	}
	heap.Init(&m)
	out := map[twinID]bool{}
	var last idRecord
	for len(m) > 0 && len(out) < maxTwins {
		now := m[0].head
		if now.id() == last.id() && now.ino() != last.ino() {
			out[now.id()] = true
		}
		last = now
		if err := m.advance(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (s *idSort) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil {
		s.file.Close()
	}
}

// A memoryRun reads records that are in memory.
type memoryRun struct {
	list []idRecord
	off  int
}

func (m *memoryRun) Read(p []byte) (n int, err error) {
	for n < len(p) && len(m.list) > 0 {
		k := copy(p[n:], m.list[0][m.off:])
		n, m.off = n+k, m.off+k
		if m.off == len(idRecord{}) {
			m.list, m.off = m.list[1:], 0
		}
	}
	if n == 0 && len(p) > 0 {
		err = io.EOF
	}
	return n, err
}

// A merge yields the records of sorted runs in order: a heap of their heads.
type merge []*head

type head struct {
	run  *bufio.Reader
	head idRecord
}

func (m *merge) enter(run *bufio.Reader) error {
	h := &head{run: run}
	ok, err := h.next()
	if ok {
		*m = append(*m, h)
	}
	return err
}

func (m *merge) advance() error {
	ok, err := (*m)[0].next()
	switch {
	case err != nil:
	case ok:
		heap.Fix(m, 0)
	default:
		heap.Pop(m)
	}
	return err
}

func (h *head) next() (bool, error) {
	_, err := io.ReadFull(h.run, h.head[:])
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading ids from a temporary file: %w", err)
	}
	return true, nil
}

// Len, Less, Swap, Push and Pop implement heap.Interface.
func (m merge) Len() int           { return len(m) }
func (m merge) Less(a, b int) bool { return bytes.Compare(m[a].head[:], m[b].head[:]) < 0 }
func (m merge) Swap(a, b int)      { m[a], m[b] = m[b], m[a] }
func (m *merge) Push(x any)        { *m = append(*m, x.(*head)) }
func (m *merge) Pop() any {
	last := (*m)[len(*m)-1]
	*m = (*m)[:len(*m)-1]
	return last
}
