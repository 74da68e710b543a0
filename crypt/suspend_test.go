package crypt

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

// secretsOf opens the keys of what is stored now.
func (v vault) secretsOf(t testing.TB, m *memBacking) *Secrets {
	t.Helper()
	h, err := ParseHeader(m.header)
	require.NoError(t, err)
	s, err := v[h.File].Clone()
	require.NoError(t, err)
	return s
}

// TestSuspendKeepsAllButTheKeys: random operations against a byte slice, with the keys
// gone in between. Without them every operation that needs one fails and changes
// nothing, on disk or in memory; afterwards nothing is missing, pending gaps and a
// partial end included.
func TestSuspendKeepsAllButTheKeys(t *testing.T) {
	for seed := range uint64(8) {
		o := newOracle(t, seed, bs, 40*bs)
		for range steps(t, 150) {
			o.step()
			if o.rnd.IntN(5) == 0 {
				o.interrupt()
			}
		}
		require.NoError(t, o.f.Sync())
		require.True(t, bytes.Equal(o.want, readAll(t, o.f)))
		o.f.Close()
		again := o.v.open(t, o.m, bs)
		require.True(t, bytes.Equal(o.want, readAll(t, again)), "after a fresh open")
		again.Close()
	}
}

// interrupt suspends the file, shows that it is, and resumes.
func (o *oracle) interrupt() {
	t, size := o.t, int64(len(o.want))
	if unused := o.f.Suspend(); unused != nil {
		unused.Secrets.Wipe()
	}
	if size == 0 {
		require.False(t, o.f.Suspended(), "a file without bytes has nothing to come back to")
		return
	}
	require.True(t, o.f.Suspended())
	require.Equal(t, size, o.f.Size())
	before, mark, pending := bytes.Clone(o.m.data), bytes.Clone(o.m.mark), o.f.Pending()
	last := (size - 1) / bs
	for what, op := range map[string]func() error{
		"append":      func() error { _, err := o.f.WriteAt([]byte("x"), size); return err },
		"past a gap":  func() error { _, err := o.f.WriteAt([]byte("x"), size+3*bs); return err },
		"overwrite":   func() error { _, err := o.f.WriteAt(pattern(bs, 1), last*bs/2); return err },
		"shrink":      func() error { return o.f.Truncate(size/2 + size%2) },
		"grow":        func() error { return o.f.Truncate(size + 5) },
		"grow widely": func() error { return o.f.Truncate(size + 2*zeroLimit) },
		"punch":       func() error { return o.f.Punch(0, size) },
		"zero":        func() error { return o.f.Zero(0, size+bs, false) },
	} {
		if what == "shrink" && size == 1 {
			continue // that size is its own
		}
		require.ErrorIs(t, op(), ErrWiped, what)
	}
	if pending {
		require.ErrorIs(t, o.f.Settle(), ErrWiped)
	}
	// What is read is an error or right: a gap, and a hole that the mark vouches
	// for, are zeros without any key.
	got := make([]byte, size)
	n, err := o.f.ReadAt(got, 0)
	if err != io.EOF && err != nil {
		require.ErrorIs(t, err, ErrWiped)
	}
	require.True(t, bytes.Equal(o.want[:n], got[:n]))
	require.Equal(t, size, o.f.Size())
	require.Equal(t, pending, o.f.Pending())
	require.True(t, bytes.Equal(before, o.m.data), "the stored bytes changed: %v", o.tailLog())
	require.True(t, bytes.Equal(mark, o.m.mark))
	require.NoError(t, o.f.Resume(o.v.secretsOf(t, o.m)))
	require.False(t, o.f.Suspended())
	require.True(t, bytes.Equal(o.want, readAll(t, o.f)), "after it resumed: %v", o.tailLog())
}

// TestResumeWantsTheSameKeys: no other key gets at an open file, and none is kept.
func TestResumeWantsTheSameKeys(t *testing.T) {
	before := LiveKeys()
	m, v, f := newTestFile(t, bs, pattern(3*bs, 1))
	s := v.secretsOf(t, m)
	s.SetUnder([]string{"some key"})
	unused := f.Suspend()
	require.Nil(t, unused)
	require.ErrorIs(t, f.Resume(newFresh(t, bs).Secrets), ErrDamaged)
	require.ErrorIs(t, f.Resume(nil), ErrDamaged)
	require.True(t, f.Suspended())
	require.NoError(t, f.Resume(s))
	require.Equal(t, []string{"some key"}, f.Under())
	require.Empty(t, f.FreshUnder())
	require.NoError(t, f.Resume(v.secretsOf(t, m)), "a second time")
	f.Close()
	for _, s := range v {
		s.Wipe()
	}
	require.LessOrEqual(t, LiveKeys(), before) // keys that another test left behind may go meanwhile
}

// TestSuspendedFileCanBeEmptied: to cut it to nothing needs no key, and what follows
// is a new generation.
func TestSuspendedFileCanBeEmptied(t *testing.T) {
	m, v, f := newTestFile(t, bs, pattern(3*bs, 1))
	f.Suspend()
	require.NoError(t, f.Truncate(0))
	require.False(t, f.Suspended())
	v.prime(t, f, bs)
	_, err := f.WriteAt([]byte("new"), 0)
	require.NoError(t, err)
	require.Equal(t, []byte("new"), readAll(t, f))
	f.Close()
	again := v.open(t, m, bs)
	require.Equal(t, []byte("new"), readAll(t, again))
	again.Close()
}

// TestSuspendKeepsTheSparseMark: a mark that could not be checked without the keys
// is not taken for a wrong one later.
func TestSuspendKeepsTheSparseMark(t *testing.T) {
	m, v, f := newTestFile(t, bs, pattern(10, 1))
	require.NoError(t, f.Truncate(4*zeroLimit))
	want := readAll(t, f)
	f.Close()
	f = v.open(t, m, bs) // knows nothing of the mark yet
	f.Suspend()
	_, err := f.ReadAt(make([]byte, bs), 2*zeroLimit)
	require.ErrorIs(t, err, ErrWiped)
	require.NoError(t, f.Resume(v.secretsOf(t, m)))
	require.True(t, bytes.Equal(want, readAll(t, f)))
	f.Close()
}

// TestExtractIsHKDF: what is written here in place of the library's function does what
// that does.
func TestExtractIsHKDF(t *testing.T) {
	for n := range 100 {
		secret, salt := pattern(n+14, 1), pattern(16, byte(n))
		want, err := hkdf.Extract(sha256.New, secret, salt)
		require.NoError(t, err)
		require.Equal(t, want, Extract(secret, salt))
	}
}
