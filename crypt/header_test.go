package crypt

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	arnUUID = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	arnMRK  = "arn:aws:kms:ap-southeast-1:012345678901:key/mrk-1234abcd12ab34cd56ef1234567890ab"
	arnOdd  = "arn:aws:kms:us-east-1:111122223333:key/0123456789abcdef0123456789abcdef01234567" // 40 characters
)

func sampleHeader(keys ...string) *Header {
	h := &Header{Identity: Identity{Use: UseFile, BlockLog2: 12, Volume: testVolume, File: FileID{9}}}
	h.Commitment[0] = 7
	for i, k := range keys {
		h.Copies = append(h.Copies, Copy{Key: k, Blob: bytes.Repeat([]byte{byte(i + 1)}, 184)})
	}
	return h
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, keys := range [][]string{{arnUUID}, {arnMRK}, {arnOdd}, {"local:default"}, {arnUUID, arnMRK, "local:a-b_c.d"},
		{"arn:aws:kms:us-east-1:000000000001:key/12345678-1234-1234-1234-123456789012"},
		{"arn:aws-new:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"},
		{"arn:aws:kms:us-east-1:111122223333:key/1234ABCD-12ab-34cd-56ef-1234567890ab"},
		{"arn:aws:kms:us-east-1:111122223333:key/1234abc-d12ab-34cd-56ef-1234567890ab"}} {
		h := sampleHeader(keys...)
		h.Padding = len(keys) - 1
		raw, err := h.Marshal()
		require.NoError(t, err)
		got, err := ParseHeader(raw)
		require.NoError(t, err)
		require.Equal(t, h, got)
	}
}

// One packed copy must fit into what ext4 keeps inside a 512-byte inode.
func TestOneCopyFitsInTheInode(t *testing.T) {
	for _, arn := range []string{arnUUID, arnMRK} {
		raw, err := sampleHeader(arn).Marshal()
		require.NoError(t, err)
		require.LessOrEqual(t, len(raw), 320)
		_, name, err := packKeyName(arn)
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(name), 33)
		require.LessOrEqual(t, len(name), 38)
	}
}

func reseal(raw []byte) []byte {
	raw = append([]byte(nil), raw...)
	binary.LittleEndian.PutUint16(raw[len(raw)-6:], uint16(len(raw)))
	binary.LittleEndian.PutUint32(raw[len(raw)-4:], crc32.Checksum(raw[:len(raw)-4], castagnoli))
	return raw
}

// What Marshal would not write is refused, also under a right checksum.
func TestMalformedHeaders(t *testing.T) {
	good, err := sampleHeader(arnUUID, arnOdd).Marshal()
	require.NoError(t, err)
	edit := func(f func(b []byte) []byte) []byte { return reseal(f(append([]byte(nil), good...))) }
	set := func(at int, v byte) []byte { return edit(func(b []byte) []byte { b[at] = v; return b }) }
	cases := map[string]struct {
		raw  []byte
		says string
	}{
		"empty":             {nil, "too few"},
		"magic":             {set(0, 'X'), "magic"},
		"version 2":         {set(4, 2), "version 2"},
		"version 0":         {set(4, 0), "version 0"},
		"suite":             {set(5, 2), "suite"},
		"flags":             {set(7, 0x80), "flags"},
		"the next flag":     {set(6, 2), "flags"},
		"shared, and more":  {set(6, 3), "flags"},
		"shared volume":     {edit(func(b []byte) []byte { b[6], b[9] = 1, 2; return b }), "something else than a file"},
		"shared, no number": {edit(func(b []byte) []byte { b[6], b[42], b[43] = 1, 0, 0; return b }), "in place of a file's"},
		"small block":       {set(8, 11), "block size"},
		"large block":       {set(8, 17), "block size"},
		"use":               {set(9, 3), "use"},
		"generation":        {set(10, 2), "generation"},
		"no copies":         {set(76, 0), "copies"},
		"nine copies":       {set(76, 9), "copies"},
		"missing copy":      {set(76, 3), "copy 2"},
		"extra copy":        {set(76, 1), "after the last copy"},
		"provider":          {set(77, 9), "provider"},
		"name form":         {set(79, 7), "form"},
		"partition":         {set(80, 200), "packed"},
		"region length":     {set(81, 200), "packed"},
		"name length":       {set(78, 255), "key name of 255"},
		"long blob":         {edit(func(b []byte) []byte { b[113] = 0xff; return b }), "wrapped key"},
		"empty blob":        {edit(func(b []byte) []byte { b[112] = 0; return b }), "wrapped key"},
		"checksum":          {func() []byte { b := append([]byte(nil), good...); b[50] ^= 1; return b }(), "checksum"},
		"length":            {append(append([]byte(nil), good...), 0), "it says"},
		"truncated":         {good[:len(good)-1], "it says"},
		"oversized":         {make([]byte, MaxHeader+1), "limit"},
		"padding not 0":     {edit(func(b []byte) []byte { return append(b[:len(b)-6], 0, 1, 0, 0, 0, 0, 0, 0) }), "after the last copy"},
		"text would pack":   {textForm(t), "never written"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := ParseHeader(c.raw)
			require.ErrorIs(t, err, ErrDamaged)
			require.ErrorContains(t, err, c.says)
		})
	}
}

// textForm is a header whose ARN stands as text although it packs.
func textForm(t *testing.T) []byte {
	raw, err := sampleHeader(arnUUID).Marshal()
	require.NoError(t, err)
	_, packed, err := packKeyName(arnUUID)
	require.NoError(t, err)
	out := append([]byte(nil), raw[:78]...)
	out = append(out, byte(len(arnUUID)+1), formText)
	out = append(out, arnUUID...)
	return reseal(append(out, raw[79+len(packed):]...))
}

func TestMarshalRefuses(t *testing.T) {
	for name, h := range map[string]*Header{
		"no copy":     sampleHeader(),
		"nine copies": sampleHeader(strings.Split(strings.Repeat("local:a ", 9), " ")[:9]...),
		"alias":       sampleHeader("arn:aws:kms:us-east-1:111122223333:alias/x"),
		"no ARN":      sampleHeader("key"),
		"local path":  sampleHeader("local:../x"),
		"empty local": sampleHeader("local:"),
		"long blob":   {Copies: []Copy{{Key: arnUUID, Blob: make([]byte, MaxBlob+1)}}},
		"no blob":     {Copies: []Copy{{Key: arnUUID}}},
		"padding":     {Copies: sampleHeader(arnUUID).Copies, Padding: MaxHeader},
	} {
		_, err := h.Marshal()
		require.Error(t, err, name)
	}
}

func TestSameKey(t *testing.T) {
	replica := strings.Replace(arnMRK, "ap-southeast-1", "eu-west-1", 1)
	require.True(t, SameKey(arnMRK, replica))
	require.True(t, SameKey(arnUUID, arnUUID))
	require.False(t, SameKey(arnUUID, strings.Replace(arnUUID, "us-east-1", "eu-west-1", 1)), "single-region keys match exactly")
	require.False(t, SameKey(arnMRK, strings.Replace(replica, "012345678901", "999999999999", 1)))
	require.False(t, SameKey(arnMRK, strings.Replace(replica, "arn:aws:", "arn:aws-cn:", 1)))
	h := sampleHeader(arnUUID, arnMRK)
	require.Equal(t, arnMRK, h.Find(replica).Key)
	require.Nil(t, h.Find("local:x"))
}

func TestEncryptionContextNamesTheVolumeWeWorkOn(t *testing.T) {
	h := sampleHeader(arnUUID)
	ec := h.EncryptionContext(VolumeID{0xaa})
	require.Equal(t, map[string]string{
		"kmsfs:vol": "aa" + strings.Repeat("0", 30), "kmsfs:file": "09" + strings.Repeat("0", 30),
		"kmsfs:use": "file", "kmsfs:fmt": "1.1"}, ec)
}

func FuzzParseHeader(f *testing.F) {
	for _, keys := range [][]string{{arnUUID}, {arnMRK, "local:a"}, {arnOdd}} {
		raw, err := sampleHeader(keys...).Marshal()
		require.NoError(f, err)
		f.Add(raw)
		raw[6], raw[42] = flagShared, 1
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 6 {
			raw = reseal(raw) // get past the checksum
		}
		h, err := ParseHeader(raw)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			return
		}
		again, err := h.Marshal()
		require.NoError(t, err)
		require.Equal(t, raw, again)
	})
}

func TestKeysArePrintedAsAWord(t *testing.T) {
	raw := bytes.Repeat([]byte{0x5a}, KeySize)
	k, err := NewKey(raw)
	require.NoError(t, err)
	require.Equal(t, make([]byte, KeySize), raw, "the caller's bytes are wiped")
	s := struct{ K *Key }{k}
	out := fmt.Sprintf("%v %+v %#v %s %q %x %d", k, s, s, k, k, k, s)
	js, err := json.Marshal(s)
	require.NoError(t, err)
	out += string(js)
	for _, leak := range []string{"5a", "90", "ZZ", "WlpaWl"} {
		require.NotContains(t, strings.ReplaceAll(out, "0x5a5a", ""), leak+leak)
	}
	require.Contains(t, string(js), "redacted")
}

func TestKeyLife(t *testing.T) {
	before := LiveKeys()
	k, err := RandomKey()
	require.NoError(t, err)
	c, err := k.Clone()
	require.NoError(t, err)
	require.True(t, k.Equal(c))
	require.True(t, k.Equal(k))
	var slot *[KeySize]byte = k.slot
	k.Wipe()
	k.Wipe()
	require.Equal(t, [KeySize]byte{}, *slot)
	require.ErrorIs(t, k.Use(func([]byte) error { return nil }), ErrWiped)
	require.False(t, k.Equal(c))
	_, err = k.Clone()
	require.ErrorIs(t, err, ErrWiped)
	c.Wipe()
	require.Equal(t, before, LiveKeys())
	_, err = NewKey(make([]byte, 31))
	require.Error(t, err)
}

func TestUnlockCommitsToKeyAndIdentity(t *testing.T) {
	key, err := RandomKey()
	require.NoError(t, err)
	other, err := RandomKey()
	require.NoError(t, err)
	id, err := NewIdentity(testVolume, UseFile, 12)
	require.NoError(t, err)
	s, err := Commit(&id, key)
	require.NoError(t, err)
	defer s.Wipe()
	again, err := Unlock(id, key)
	require.NoError(t, err)
	again.Wipe()
	_, err = Unlock(id, other)
	require.ErrorIs(t, err, ErrDamaged)
	for name, edit := range map[string]func(*Identity){
		"use":        func(id *Identity) { id.Use = UseVolume },
		"block size": func(id *Identity) { id.BlockLog2 = 13 },
		"volume":     func(id *Identity) { id.Volume[0] ^= 1 },
		"file":       func(id *Identity) { id.File[0] ^= 1 },
		"commitment": func(id *Identity) { id.Commitment[0] ^= 1 },
	} {
		x := id
		edit(&x)
		_, err := Unlock(x, key)
		require.ErrorIs(t, err, ErrDamaged, name)
	}
	_, err = s.SettingsMAC(nil)
	require.Error(t, err, "a file's key serves no volume")
}

func TestBlockSet(t *testing.T) {
	var s blockSet
	in := map[int64]bool{}
	x := uint32(1)
	next := func(n uint32) int64 { x = x*1664525 + 1013904223; return int64(x >> 16 % n) }
	for range 5000 {
		lo, n := next(64)%64, next(9)%9
		if next(2)%2 == 0 {
			s.add(lo, lo+n)
			for i := lo; i < lo+n; i++ {
				in[i] = true
			}
		} else {
			s.remove(lo, lo+n)
			for i := lo; i < lo+n; i++ {
				delete(in, i)
			}
		}
		for i := range int64(80) {
			require.Equal(t, in[i], s.has(i))
		}
		runs, blocks := s.list()
		require.EqualValues(t, len(in), blocks)
		for i, r := range runs {
			require.Less(t, r[0], r[1])
			if i > 0 {
				require.Less(t, runs[i-1][1], r[0])
			}
		}
	}
}
