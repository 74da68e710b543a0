package crypt

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestIsStoredName(t *testing.T) {
	n := testNames(t, 1)
	for _, plain := range []string{"a", strings.Repeat("x", MaxName)} {
		require.True(t, IsStoredName(n.EncryptName(DirID{1}, plain)))
	}
	for _, s := range []string{"", "plain", "kmsfs.long.x", strings.Repeat("A", 21), strings.Repeat("A", 22), strings.Repeat("A", 24) + "=",
		strings.Repeat("A", 25) + "\n", strings.Repeat("A", 400)} {
		require.False(t, IsStoredName(s), "%q", s)
	}
}

// cutCopy is a stored file cut short, seen by a new process.
func cutCopy(t *testing.T, v vault, m0 *memBacking, cut int) (*memBacking, *File) {
	t.Helper()
	m := newMem()
	_, _ = m.WriteAt(m0.data[:cut], 0)
	m.header = m0.header
	return m, v.open(t, m, bs)
}

// Arithmetic says what an open says, and the range is what can't be read then.
func TestCheckSize(t *testing.T) {
	m0, v, f := newTestFile(t, bs, pattern(3*bs+10, 1))
	f.Close()
	require.NoError(t, CheckSize(0, bs))
	require.NoError(t, CheckSize(int64(len(m0.data)), bs))
	seen := map[bool]int{}
	for _, cut := range cuts(len(m0.data)) {
		_, f := cutCopy(t, v, m0, cut)
		missing := cut%(bs+RecordOverhead) < RecordOverhead
		seen[missing]++
		require.Equal(t, missing, CheckSize(int64(cut), bs) != nil, "cut to %d", cut)
		require.Error(t, f.EndErr())
		from, to := EndRange(int64(cut), bs)
		require.Equal(t, f.Size(), to)
		for _, off := range []int64{from, to - 1} {
			if off >= 0 && to > 0 {
				_, err := f.ReadAt(make([]byte, 1), off)
				require.ErrorIs(t, err, ErrDamaged, "cut to %d", cut)
			}
		}
		if from > 0 {
			_, err := f.ReadAt(make([]byte, 1), from-1)
			require.NoError(t, err, "the block before it, cut to %d", cut)
		}
	}
	require.Len(t, seen, 2)
}

// Cut anywhere, then cut back: every whole block is kept, and the file is well again.
func TestCutEnd(t *testing.T) {
	want := pattern(3*bs+10, 1)
	m0, v, f := newTestFile(t, bs, want)
	same, err := f.CutEnd()
	require.NoError(t, err)
	require.EqualValues(t, len(want), same, "a good end is left alone")
	f.Close()
	for _, cut := range cuts(len(m0.data)) {
		m, f := cutCopy(t, v, m0, cut)
		size, err := f.CutEnd()
		if cut < bs+RecordOverhead {
			require.ErrorIs(t, err, ErrDamaged)
			require.Equal(t, m0.data[:cut], m.data, "where nothing is good, nothing is lost")
			continue
		}
		require.NoError(t, err)
		require.EqualValues(t, cut/(bs+RecordOverhead)*bs, size)
		require.NoError(t, f.EndErr())
		g := v.open(t, m, bs)
		require.NoError(t, g.EndErr())
		require.True(t, bytes.Equal(want[:size], readAll(t, g)), "cut to %d", cut)
		_, err = g.WriteAt([]byte("more"), size)
		require.NoError(t, err)
		require.NoError(t, v.open(t, m, bs).EndErr())
	}
}

// The search for a good block has an end, however long somebody made the file.
func TestCutEndIsBounded(t *testing.T) {
	m0, v, f := newTestFile(t, bs, pattern(2*bs, 1))
	f.Close()
	m, _ := cutCopy(t, v, m0, len(m0.data))
	h, err := ParseHeader(m.header)
	require.NoError(t, err)
	s, err := v[h.File].Clone()
	require.NoError(t, err)
	far := &endless{memBacking: m}
	g, err := NewFile(far, bs, 1<<50, s)
	require.NoError(t, err)
	defer g.Close()
	_, err = g.CutEnd()
	require.ErrorIs(t, err, ErrDamaged)
	require.LessOrEqual(t, far.zeros, maxCutBack+2)
}

// endless is a stored file with zeros behind its end.
type endless struct {
	*memBacking
	zeros int
}

func (e *endless) ReadAt(p []byte, off int64) (int, error) {
	if off < int64(len(e.data)) {
		return e.memBacking.ReadAt(p, off)
	}
	e.zeros++
	clear(p)
	return len(p), nil
}
