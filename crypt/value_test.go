package crypt

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTargetsOfEveryLength(t *testing.T) {
	n := testNames(t, 7)
	for _, size := range []int{1, 2, 15, 16, 17, 237, 238, 239, 253, 254, 255, 491, 492, 493, 1000, 4062, 4063, 4095} {
		plain := strings.Repeat("\xff/", size)[:size]
		stored := n.EncryptTarget(plain)
		require.NotContains(t, string(stored), "\x00")
		require.EqualValues(t, size, PlainTargetLen(int64(len(stored))))
		got, err := n.DecryptTarget(stored)
		require.NoError(t, err)
		require.Equal(t, plain, got)
	}
	require.Len(t, n.EncryptTarget(strings.Repeat("x", 4063)), 4096, "the longest target ext4 holds is 4,062 bytes")
	require.Zero(t, PlainTargetLen(0))
	require.Zero(t, PlainTargetLen(5))
}

func TestTargetDamage(t *testing.T) {
	n := testNames(t, 7)
	stored := n.EncryptTarget("target")
	for i := range stored {
		bad := bytes.Clone(stored)
		bad[i] ^= 0x40
		_, err := n.DecryptTarget(bad)
		require.ErrorIs(t, err, ErrDamaged, "byte %d", i)
	}
	for _, bad := range [][]byte{nil, {1}, {1, 2}, stored[:len(stored)-1], n.EncryptTarget(""), n.EncryptTarget("a\x00b")} {
		_, err := n.DecryptTarget(bad)
		require.ErrorIs(t, err, ErrDamaged)
	}
}

func TestXattrNamesAndValues(t *testing.T) {
	n := testNames(t, 7)
	long := strings.Repeat("n", MaxUserXattrName)
	require.LessOrEqual(t, len(n.EncryptXattrName(long)), 255)
	require.Greater(t, len(n.EncryptXattrName(long+"n")), 255)
	for _, name := range []string{"a", "mime_type", "with=sign", "\xff\xfe", long} {
		got, err := n.DecryptXattrName(n.EncryptXattrName(name))
		require.NoError(t, err)
		require.Equal(t, name, got)
		for _, value := range [][]byte{{}, {0}, []byte("text"), make([]byte, 5000)} {
			stored := n.EncryptXattrValue(name, value)
			require.Len(t, stored, len(value)+XattrOverhead)
			got, err := n.DecryptXattrValue(name, stored)
			require.NoError(t, err)
			require.Equal(t, value, got)
			_, err = n.DecryptXattrValue(name+"x", stored)
			require.ErrorIs(t, err, ErrDamaged, "values are bound to their names")
		}
	}
	for _, bad := range []string{"", "user.plain", UserXattrPrefix, UserXattrPrefix + "AAAA", n.EncryptXattrName("")} {
		_, err := n.DecryptXattrName(bad)
		require.ErrorIs(t, err, ErrDamaged, "%q", bad)
	}
	_, err := n.DecryptXattrValue("a", []byte("short"))
	require.ErrorIs(t, err, ErrDamaged)
}

func TestDenseEncodingIsInvertibleByArithmetic(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		b := make([]byte, r.IntN(1200))
		for i := range b {
			b[i] = byte(r.IntN(4)) * byte(r.IntN(256))
		}
		enc := denseEncode(b)
		require.Len(t, enc, len(b)+(len(b)+253)/254)
		require.NotContains(t, enc, byte(0))
		dec, err := denseDecode(enc)
		require.NoError(t, err)
		require.Equal(t, b, dec)
	}
	worst := make([]byte, 254)
	for i := range worst {
		worst[i] = byte(i) // 0..253: only 254 and 255 are missing
	}
	require.EqualValues(t, 254, denseEncode(worst)[0])
}

func FuzzDecryptTarget(f *testing.F) {
	n := testNames(f, 7)
	f.Add(n.EncryptTarget("target"))
	f.Add(n.EncryptTarget(strings.Repeat("z", 4000)))
	f.Add([]byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, stored []byte) {
		if raw, err := denseDecode(stored); err == nil {
			require.True(t, bytes.Equal(stored, denseEncode(raw)))
		}
		plain, err := n.DecryptTarget(stored)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			return
		}
		require.Equal(t, stored, n.EncryptTarget(plain))
	})
}
