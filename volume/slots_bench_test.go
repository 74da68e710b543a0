package volume

import (
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// BenchmarkWrite is a write through crypt.File to a backing file in memory, with slots
// and without.
func BenchmarkWrite(b *testing.B) {
	for _, with := range []bool{false, true} {
		for _, n := range []int{100, 4096, 128 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("slots=%t/%d", with, n), func(b *testing.B) {
				f := benchFile(b, with)
				p := make([]byte, n)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					_, err := f.WriteAt(p, 0)
					require.NoError(b, err)
				}
			})
		}
	}
}

func benchFile(b *testing.B, with bool) *crypt.File {
	v, _ := newVolume(b, NamesPlain)
	require.NoError(b, v.Lock("bench"))
	dir := slotDir(b)
	fd, err := unix.Open(dir+"/file", unix.O_RDWR|unix.O_CREAT, 0o600)
	require.NoError(b, err)
	file := os.NewFile(uintptr(fd), "file")
	b.Cleanup(func() { file.Close() })
	var backing crypt.Backing = NewBacking(fd)
	if with {
		slots, err := v.OpenSlots(dir)
		require.NoError(b, err)
		b.Cleanup(func() { slots.Close() })
		backing = &killable{NewBacking(fd), slots, Inode{}, -1}
	}
	f, err := crypt.NewFile(backing, 4096, 0, nil)
	require.NoError(b, err)
	b.Cleanup(f.Close)
	id, err := crypt.NewIdentity(v.ID(), crypt.UseFile, 12)
	require.NoError(b, err)
	data, err := crypt.RandomKey()
	require.NoError(b, err)
	b.Cleanup(data.Wipe)
	s, err := crypt.Commit(&id, data)
	require.NoError(b, err)
	f.Prime(&crypt.Fresh{Header: &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}, Secrets: s})
	_, err = f.WriteAt(make([]byte, 1<<20+1), 0)
	require.NoError(b, err)
	return f
}
