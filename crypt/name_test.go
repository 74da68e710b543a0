package crypt

import (
	"encoding/base64"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// testNames has fixed keys, so that failures and fuzz corpora repeat.
func testNames(t testing.TB, fill byte) *Names {
	t.Helper()
	raw := make([]byte, KeySize)
	for i := range raw {
		raw[i] = fill
	}
	key, err := NewKey(raw)
	require.NoError(t, err)
	defer key.Wipe()
	id := Identity{Use: UseVolume, BlockLog2: 12, Volume: VolumeID{1}, File: FileID{2}}
	s, err := Commit(&id, key)
	require.NoError(t, err)
	defer s.Wipe()
	n, err := NewNames(s)
	require.NoError(t, err)
	return n
}

func TestNamesWantAVolumeKey(t *testing.T) {
	key, err := RandomKey()
	require.NoError(t, err)
	defer key.Wipe()
	id := Identity{Use: UseFile, BlockLog2: 12}
	s, err := Commit(&id, key)
	require.NoError(t, err)
	defer s.Wipe()
	_, err = NewNames(s)
	require.Error(t, err)
}

func TestNamesOfEveryLengthAndByte(t *testing.T) {
	n := testNames(t, 7)
	dir := DirID{9}
	for size := 1; size <= MaxName; size++ {
		plain := strings.Repeat("x", size)
		stored := n.EncryptName(dir, plain)
		require.Equal(t, size > 175, len(stored) > MaxName, "name of %d bytes", size)
		got, err := n.DecryptName(dir, stored)
		require.NoError(t, err)
		require.Equal(t, plain, got)
	}
	for b := 1; b < 256; b++ {
		plain := "a" + string([]byte{byte(b)})
		got, err := n.DecryptName(dir, n.EncryptName(dir, plain))
		if b == '/' {
			require.ErrorIs(t, err, ErrDamaged)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, plain, got)
	}
}

func TestNamesAreBoundToDirectoryAndKey(t *testing.T) {
	n := testNames(t, 7)
	stored := n.EncryptName(DirID{1}, "name")
	require.Equal(t, stored, n.EncryptName(DirID{1}, "name"))
	require.NotEqual(t, stored, n.EncryptName(DirID{2}, "name"))
	_, err := n.DecryptName(DirID{2}, stored)
	require.ErrorIs(t, err, ErrDamaged)
	_, err = testNames(t, 8).DecryptName(DirID{1}, stored)
	require.ErrorIs(t, err, ErrDamaged)
}

func TestNamesHaveOneStoredForm(t *testing.T) {
	n := testNames(t, 7)
	stored := n.EncryptName(DirID{1}, "name") // 20 bytes: 27 digits, 2 bits unused
	last := stored[len(stored)-1]
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	stray := digits[strings.IndexByte(digits, last)^1]
	for _, bad := range []string{
		"", "A", stored[:10], stored + "A", stored + "=", stored + "\n", stored[:4] + "\r\n" + stored[4:],
		stored[:len(stored)-1] + string(stray), " " + stored, strings.ToLower(stored) + "x",
	} {
		_, err := n.DecryptName(DirID{1}, bad)
		require.ErrorIs(t, err, ErrDamaged, "%q", bad)
	}
}

func TestNamesThatNoEntryCanHaveAreRefused(t *testing.T) {
	n := testNames(t, 7)
	for _, bad := range []string{"", ".", "..", "a/b", "a\x00b", strings.Repeat("x", 256)} {
		_, err := n.DecryptName(DirID{1}, n.EncryptName(DirID{1}, bad))
		require.ErrorIs(t, err, ErrDamaged, "%q", bad)
	}
}

// Every purpose has a key of its own: what is good for one is damage for another.
func TestNameKeysDoNotServeEachOther(t *testing.T) {
	n := testNames(t, 7)
	name := n.EncryptXattrName("x")
	_, err := n.DecryptName(DirID{}, strings.TrimPrefix(name, UserXattrPrefix))
	require.ErrorIs(t, err, ErrDamaged)
	ct := n.EncryptXattrValue("x", []byte("value"))
	_, err = n.DecryptTarget(denseEncode(ct))
	require.ErrorIs(t, err, ErrDamaged)
}

func TestNamesAreSafeForConcurrentUse(t *testing.T) {
	n := testNames(t, 7)
	want := n.EncryptName(DirID{1}, "name")
	var wg sync.WaitGroup
	bad := make(chan string, 8)
	for range 8 {
		wg.Go(func() {
			for range 500 {
				got := n.EncryptName(DirID{1}, "name")
				if plain, err := n.DecryptName(DirID{1}, got); got != want || err != nil || plain != "name" {
					bad <- got
					return
				}
			}
		})
	}
	wg.Wait()
	require.Empty(t, bad)
}

func FuzzDecryptName(f *testing.F) {
	n := testNames(f, 7)
	dir := DirID{1}
	f.Add(n.EncryptName(dir, "name"))
	f.Add(n.EncryptName(dir, strings.Repeat("y", 255)))
	f.Add(n.EncryptName(dir, ".."))
	f.Add("kmsfs.long.")
	f.Add(base64.RawURLEncoding.EncodeToString(make([]byte, 40)))
	f.Fuzz(func(t *testing.T, stored string) {
		plain, err := n.DecryptName(dir, stored)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			require.Empty(t, plain)
			return
		}
		require.True(t, CheckName(plain))
		require.Equal(t, stored, n.EncryptName(dir, plain))
	})
}

func BenchmarkEncryptName(b *testing.B) {
	n := testNames(b, 7)
	b.ReportAllocs()
	for b.Loop() {
		n.EncryptName(DirID{1}, "an_ordinary_name.txt")
	}
}

func BenchmarkDecryptName(b *testing.B) {
	n := testNames(b, 7)
	stored := n.EncryptName(DirID{1}, "an_ordinary_name.txt")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := n.DecryptName(DirID{1}, stored); err != nil {
			b.Fatal(err)
		}
	}
}
