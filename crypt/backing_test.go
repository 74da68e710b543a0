package crypt

import (
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// memBacking is a stored file in memory. Punched and skipped ranges are tracked
// per byte, so that SEEK_DATA tells the truth; faults are injected by limits.
type memBacking struct {
	mu     sync.Mutex
	data   []byte
	hole   []bool // true where nothing was written
	header []byte
	mark   []byte

	room      int // bytes that may still be allocated; <0: no limit
	noPunch   bool
	headerErr error
	refusal   error // of every change, of what is there already too: a full store that copies on write
	tear      int   // if above 0, so many bytes of a write arrive before the store is full so
	syncs     int
	reads     int
	writes    int
}

func newMem() *memBacking { return &memBacking{room: -1} }

func (m *memBacking) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	if off >= int64(len(m.data)) {
		return 0, io.EOF
	}
	n := copy(p, m.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memBacking) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes++
	if m.refusal != nil {
		return 0, m.refusal
	}
	if n := m.tear; n > 0 && n < len(p) {
		m.tear, m.refusal = 0, syscall.EDQUOT
		m.resize(max(len(m.data), int(off)+n))
		copy(m.data[off:], p[:n])
		clear(m.hole[off : int(off)+n])
		return n, m.refusal
	}
	if m.room < 0 {
		m.resize(max(len(m.data), int(off)+len(p)))
		copy(m.data[off:], p)
		clear(m.hole[off : int(off)+len(p)])
		return len(p), nil
	}
	for i, v := range p {
		at := int(off) + i
		fresh := at >= len(m.data) || m.hole[at]
		if fresh && m.room == 0 {
			return i, syscall.ENOSPC
		}
		m.resize(max(len(m.data), at+1))
		if fresh && m.room > 0 {
			m.room--
		}
		m.data[at], m.hole[at] = v, false
	}
	return len(p), nil
}

func (m *memBacking) resize(n int) {
	if k := n - len(m.data); k > 0 {
		m.data, m.hole = append(m.data, make([]byte, k)...), append(m.hole, make([]bool, k)...)
		fill(m.hole[n-k:])
	}
	m.data, m.hole = m.data[:n], m.hole[:n]
}

// fill sets all of b. A loop would take a good part of the time of the faults at length.
func fill(b []bool) {
	if len(b) > 0 {
		b[0] = true
	}
	for n := 1; n < len(b); n *= 2 {
		copy(b[n:], b[:n])
	}
}

func (m *memBacking) Truncate(n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refusal != nil {
		return m.refusal
	}
	if int(n) < len(m.data) {
		m.data, m.hole = append([]byte(nil), m.data[:n]...), append([]bool(nil), m.hole[:n]...)
	}
	m.resize(int(n))
	return nil
}

func (m *memBacking) Sync() error { m.mu.Lock(); defer m.mu.Unlock(); m.syncs++; return nil }

func (m *memBacking) SetHeader(raw []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.headerErr != nil {
		return m.headerErr
	}
	m.header, m.mark = raw, nil
	return nil
}

func (m *memBacking) SparseMark() ([]byte, error) { return m.mark, nil }
func (m *memBacking) SetSparseMark(b []byte) error {
	m.mark = append([]byte(nil), b...)
	return nil
}

func (m *memBacking) PunchHole(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.noPunch {
		return errors.ErrUnsupported
	}
	if to := min(off+n, int64(len(m.data))); off < to {
		clear(m.data[off:to])
		fill(m.hole[off:to])
	}
	return nil
}

func (m *memBacking) Allocate(_, _ int64) error { return nil }

func (m *memBacking) SeekData(off int64) (int64, error) { return m.seek(off, false) }
func (m *memBacking) SeekHole(off int64) (int64, error) {
	n, err := m.seek(off, true)
	if err != nil {
		return int64(len(m.data)), nil
	}
	return n, nil
}

func (m *memBacking) seek(off int64, hole bool) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := off; i < int64(len(m.data)); i++ {
		if m.hole[i] == hole {
			return i, nil
		}
	}
	return 0, syscall.ENXIO
}

var testVolume = VolumeID{1, 2, 3}

func log2(blockSize int) uint8 {
	n := uint8(0)
	for 1<<n < blockSize {
		n++
	}
	return n
}

// newFresh makes a data key under a made-up local copy.
func newFresh(t testing.TB, blockSize int) *Fresh {
	t.Helper()
	id, err := NewIdentity(testVolume, UseFile, log2(blockSize))
	require.NoError(t, err)
	key, err := RandomKey()
	require.NoError(t, err)
	defer key.Wipe()
	s, err := Commit(&id, key)
	require.NoError(t, err)
	return &Fresh{Header: &Header{Identity: id, Copies: []Copy{{Key: "local:test", Blob: []byte("blob")}}}, Secrets: s}
}

// vault stands for the key service: it keeps the keys of every file id.
type vault map[FileID]*Secrets

func (v vault) prime(t testing.TB, f *File, blockSize int) {
	t.Helper()
	k := newFresh(t, blockSize)
	s, err := k.Secrets.Clone()
	require.NoError(t, err)
	v[k.Header.File] = s
	if !f.Prime(k) {
		k.Secrets.Wipe()
	}
}

// open opens the backing file as a new process would.
func (v vault) open(t testing.TB, m *memBacking, blockSize int) *File {
	t.Helper()
	f := v.reopen(t, m, blockSize)
	t.Cleanup(f.Close)
	return f
}

// reopen is open for who opens so many in one test that he has to close them himself.
func (v vault) reopen(t testing.TB, m *memBacking, blockSize int) *File {
	t.Helper()
	var s *Secrets
	if len(m.data) > 0 {
		h, err := ParseHeader(m.header)
		require.NoError(t, err)
		s, err = v[h.File].Clone()
		require.NoError(t, err)
	}
	f, err := NewFile(m, blockSize, int64(len(m.data)), s)
	require.NoError(t, err)
	return f
}

// newTestFile makes a file of the given contents, closed and opened again.
func newTestFile(t testing.TB, blockSize int, contents []byte) (*memBacking, vault, *File) {
	t.Helper()
	m, v := newMem(), vault{}
	f := v.open(t, m, blockSize)
	if len(contents) > 0 {
		v.prime(t, f, blockSize)
		_, err := f.WriteAt(contents, 0)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
	}
	f.Close()
	return m, v, v.open(t, m, blockSize)
}
