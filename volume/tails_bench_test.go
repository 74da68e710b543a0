package volume

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// BenchmarkSync is what a program does that keeps a log (appends of 100 bytes, each
// synced), or pages (of 4 KiB), on the file system of the temporary directory: with the
// end kept and without, with slots and without. BenchmarkSync/raw is the same on the
// file itself.
func BenchmarkSync(b *testing.B) {
	for _, n := range []int{100, 4096} {
		b.Run(fmt.Sprintf("raw/%d", n), func(b *testing.B) {
			f := newBenchTails(b, false, false).killable
			p := make([]byte, n)
			for at := int64(0); b.Loop(); at += int64(n) {
				_, err := f.WriteAt(p, at)
				require.NoError(b, err)
				require.NoError(b, f.Sync())
			}
		})
		for _, with := range []struct{ slots, tails bool }{{false, false}, {true, false}, {true, true}} {
			b.Run(fmt.Sprintf("slots=%t,tails=%t/%d", with.slots, with.tails, n), func(b *testing.B) {
				f := benchLog(b, newBenchTails(b, with.slots, with.tails))
				p := make([]byte, n)
				for b.Loop() {
					_, err := f.WriteAt(p, f.Size())
					require.NoError(b, err)
					require.NoError(b, f.Sync())
				}
			})
		}
	}
}

// BenchmarkAppend is the same with one sync in a thousand.
func BenchmarkAppend(b *testing.B) {
	for _, with := range []struct{ slots, tails bool }{{false, false}, {true, false}, {true, true}} {
		b.Run(fmt.Sprintf("slots=%t,tails=%t", with.slots, with.tails), func(b *testing.B) {
			f := benchLog(b, newBenchTails(b, with.slots, with.tails))
			p := make([]byte, 100)
			for i := 0; b.Loop(); i++ {
				_, err := f.WriteAt(p, f.Size())
				require.NoError(b, err)
				if i%1000 == 999 {
					require.NoError(b, f.Sync())
				}
			}
		})
	}
}

// newBenchTails is an empty backing file; keeping keeps nothing if there are no tails.
func newBenchTails(b *testing.B, slots, tails bool) keeping {
	v, _ := newVolume(b, NamesPlain)
	require.NoError(b, v.Lock("bench"))
	fd, err := unix.Open(v.Path()+"/file", unix.O_RDWR|unix.O_CREAT, 0o600)
	require.NoError(b, err)
	b.Cleanup(func() { unix.Close(fd) })
	k := keeping{killable: &killable{NewBacking(fd), nil, Inode{Ino: 1}, -1}}
	if slots {
		k.slots, err = v.OpenSlots(slotDir(b))
		require.NoError(b, err)
		b.Cleanup(func() { k.slots.Close() })
	}
	if tails {
		k.tails, err = v.OpenTails(false)
		require.NoError(b, err)
		b.Cleanup(func() { k.tails.Close() })
	}
	return k
}

func benchLog(b *testing.B, k keeping) *crypt.File {
	f, err := crypt.NewFile(k, 4096, 0, nil)
	require.NoError(b, err)
	b.Cleanup(f.Close)
	id, err := crypt.NewIdentity(crypt.VolumeID{1}, crypt.UseFile, 12)
	require.NoError(b, err)
	data, err := crypt.RandomKey()
	require.NoError(b, err)
	b.Cleanup(data.Wipe)
	s, err := crypt.Commit(&id, data)
	require.NoError(b, err)
	f.Prime(&crypt.Fresh{Header: &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}, Secrets: s})
	return f
}
