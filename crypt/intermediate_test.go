package crypt

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// newShared is an intermediate key with its id.
func newShared(t *testing.T) (Identity, *Key) {
	t.Helper()
	id, err := NewIntermediate(testVolume, 12)
	require.NoError(t, err)
	k, err := RandomKey()
	require.NoError(t, err)
	t.Cleanup(k.Wipe)
	return id, k
}

// One intermediate key, a data key of its own for each file, and neither tells of
// another.
func TestSharedDataKeysDiffer(t *testing.T) {
	inter, k := newShared(t)
	var all []*Secrets
	for n := uint16(1); n <= 50; n++ {
		id := inter.Numbered(n)
		s, err := Commit(&id, k)
		require.NoError(t, err)
		defer s.Wipe()
		require.False(t, s.DataKey().Equal(k), "the intermediate key itself serves no file")
		for _, o := range all {
			require.False(t, s.DataKey().Equal(o.DataKey()))
			require.NotEqual(t, o.Identity().File, s.Identity().File)
			require.NotEqual(t, o.Identity().Commitment, s.Identity().Commitment)
		}
		all = append(all, s)
		again, err := Unlock(id, k)
		require.NoError(t, err)
		require.True(t, again.DataKey().Equal(s.DataKey()))
		again.Wipe()
	}
	alone := all[0].Identity()
	alone.Shared = false
	_, err := Unlock(alone, all[0].DataKey())
	require.ErrorIs(t, err, ErrDamaged, "nor does a data key open its file without the flag")
}

// Whatever is changed in a shared header, or taken for it, opens nothing: the flag
// stripped or added, the id of the intermediate key or the number edited, another key.
func TestSharedCommitment(t *testing.T) {
	inter, k := newShared(t)
	id := inter.Numbered(7)
	s, err := Commit(&id, k)
	require.NoError(t, err)
	defer s.Wipe()
	other, err := Commit(&Identity{Use: UseFile, BlockLog2: 12, Volume: testVolume, File: id.File}, k)
	require.NoError(t, err)
	defer other.Wipe()
	require.False(t, other.DataKey().Equal(s.DataKey()))
	for name, edit := range map[string]func(*Identity){
		"flag stripped":   func(id *Identity) { id.Shared = false },
		"intermediate id": func(id *Identity) { id.File[3] ^= 1 },
		"number":          func(id *Identity) { id.File = id.File.numbered(8) },
		"number 0":        func(id *Identity) { id.File = id.File.numbered(0) },
		"volume":          func(id *Identity) { id.Volume[0] ^= 1 },
		"block size":      func(id *Identity) { id.BlockLog2 = 13 },
		"commitment":      func(id *Identity) { id.Commitment[0] ^= 1 },
		"flag added":      func(id *Identity) { *id = other.Identity(); id.Shared = true },
	} {
		x := id
		edit(&x)
		_, err := Unlock(x, k)
		require.ErrorIs(t, err, ErrDamaged, name)
	}
	_, wrong := newShared(t)
	_, err = Unlock(id, wrong)
	require.ErrorIs(t, err, ErrDamaged, "another intermediate key")
	_, err = Unlock(id, s.DataKey())
	require.ErrorIs(t, err, ErrDamaged, "the data key in place of the intermediate key")
}

// What KMS is told: the same of all files under one intermediate key, and nothing that
// any file or volume could be taken for.
func TestSharedEncryptionContext(t *testing.T) {
	inter, _ := newShared(t)
	one, two := inter.Numbered(1), inter.Numbered(2)
	want := inter.EncryptionContext(testVolume)
	require.Equal(t, want, one.EncryptionContext(testVolume))
	require.Equal(t, want, two.EncryptionContext(testVolume))
	require.Equal(t, "intermediate", want["kmsfs:use"])
	require.Equal(t, inter.File.String(), want["kmsfs:file"])
	require.Equal(t, "0000", want["kmsfs:file"][28:])
	require.Equal(t, inter, one.Wrapped())
	plain := Identity{Use: UseFile, Volume: testVolume, File: one.File}
	require.Equal(t, plain, plain.Wrapped())
	require.Equal(t, "file", plain.EncryptionContext(testVolume)["kmsfs:use"])
}

// A shared header is as long as any other, and is stored and read like one.
func TestSharedHeader(t *testing.T) {
	h := sampleHeader(arnMRK)
	h.Shared, h.File = true, h.File.numbered(513)
	raw, err := h.Marshal()
	require.NoError(t, err)
	require.LessOrEqual(t, len(raw), 320, "what ext4 keeps inside a 512-byte inode")
	got, err := ParseHeader(raw)
	require.NoError(t, err)
	require.Equal(t, h, got)
	old, err := sampleHeader(arnMRK).Marshal()
	require.NoError(t, err)
	require.Len(t, raw, len(old))
}
