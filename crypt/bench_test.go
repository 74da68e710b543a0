package crypt

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

func BenchmarkSealBlock(b *testing.B) {
	s := newSealer(newFresh(b, bs).Secrets)
	plain, record := pattern(bs, 1), make([]byte, 0, bs+RecordOverhead)
	b.SetBytes(bs)
	b.ReportAllocs()
	r, err := s.start(epochRecords)
	require.NoError(b, err)
	for b.Loop() {
		record = r.seal(record[:0], 7, plain)
	}
}

func BenchmarkOpenBlock(b *testing.B) {
	s := newSealer(newFresh(b, bs).Secrets)
	r, err := s.start(1)
	require.NoError(b, err)
	record, plain := r.seal(nil, 7, pattern(bs, 1)), make([]byte, bs)
	o := s.opener()
	b.SetBytes(bs)
	b.ReportAllocs()
	for b.Loop() {
		require.NoError(b, o.open(plain, 7, record))
	}
}

func BenchmarkWriteAt(b *testing.B) {
	for _, n := range []int{bs, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			_, _, f := newTestFile(b, bs, make([]byte, 1<<20))
			p := pattern(n, 1)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				_, err := f.WriteAt(p, 0)
				require.NoError(b, err)
			}
		})
	}
}

func BenchmarkReadAt(b *testing.B) {
	for _, n := range []int{bs, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			_, _, f := newTestFile(b, bs, pattern(1<<20+1, 1))
			p := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				_, err := f.ReadAt(p, 0)
				require.NoError(b, err)
			}
		})
	}
}

func BenchmarkAppend100(b *testing.B) {
	_, _, f := newTestFile(b, bs, []byte("x"))
	p := pattern(100, 1)
	b.ReportAllocs()
	for b.Loop() {
		_, err := f.WriteAt(p, f.Size())
		require.NoError(b, err)
		if f.Size() > 1<<20 {
			require.NoError(b, f.Truncate(1))
		}
	}
}

func BenchmarkParseHeader(b *testing.B) {
	raw, err := sampleHeader(arnUUID).Marshal()
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		_, err := ParseHeader(raw)
		require.NoError(b, err)
	}
}

func BenchmarkMarshalHeader(b *testing.B) {
	h := sampleHeader(arnUUID)
	b.ReportAllocs()
	for b.Loop() {
		_, err := h.Marshal()
		require.NoError(b, err)
	}
}

func BenchmarkUnlock(b *testing.B) {
	k := newFresh(b, bs)
	b.ReportAllocs()
	for b.Loop() {
		s, err := Unlock(k.Header.Identity, k.Secrets.DataKey())
		require.NoError(b, err)
		s.Wipe()
	}
}
