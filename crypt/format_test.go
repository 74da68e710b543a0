package crypt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// docTable returns the rows of the document's table under a header line.
func docTable(t *testing.T, header string) (rows [][]string) {
	t.Helper()
	raw, err := os.ReadFile("../docs/FORMAT.md")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(raw), "\n"+header+"\n")
	require.True(t, ok, "docs/FORMAT.md has no table %q", header)
	for _, line := range strings.Split(rest, "\n")[1:] {
		if !strings.HasPrefix(line, "|") {
			break
		}
		var cells []string
		for _, c := range strings.Split(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(c))
		}
		rows = append(rows, cells)
	}
	require.NotEmpty(t, rows)
	return rows
}

func number(t *testing.T, s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	require.NoError(t, err)
	return n
}

func TestDocumentedStoredSizes(t *testing.T) {
	for _, r := range docTable(t, "| plaintext | stored |") {
		plain, stored := number(t, r[0]), number(t, r[1])
		require.Equal(t, stored, StoredSize(plain, 4096), "%d", plain)
		require.Equal(t, plain, PlainSize(stored, 4096))
	}
}

func TestDocumentedHeaderSizes(t *testing.T) {
	region := func(r string) string { return strings.Replace(arnUUID, "us-east-1", r, 1) }
	keys := map[string][]string{
		"one copy, us-east-1":                          {arnUUID},
		"one copy, ap-southeast-1":                     {region("ap-southeast-1")},
		"two copies, us-east-1 and eu-west-1":          {arnUUID, region("eu-west-1")},
		"one copy under a 40-character id (text form)": {arnOdd},
	}
	rows := docTable(t, "| header | bytes |")
	require.Len(t, rows, len(keys))
	for _, r := range rows {
		require.Contains(t, keys, r[0])
		raw, err := sampleHeader(keys[r[0]]...).Marshal()
		require.NoError(t, err)
		require.EqualValues(t, number(t, r[1]), len(raw), r[0])
	}
}

func TestDocumentedTargetSizes(t *testing.T) {
	for _, r := range docTable(t, "| target | stored |") {
		require.Equal(t, number(t, r[0]), PlainTargetLen(number(t, r[1])))
	}
}

// The offsets of the header table add up, and hold what they say.
func TestDocumentedHeaderOffsets(t *testing.T) {
	h := sampleHeader(arnUUID)
	raw, err := h.Marshal()
	require.NoError(t, err)
	at := int64(0)
	for _, r := range docTable(t, "| offset | bytes | field | value |") {
		if !regexp.MustCompile(`^\d+$`).MatchString(r[0]) {
			continue
		}
		require.Equal(t, at, number(t, r[0]), r[2])
		if r[1] != "" {
			at += number(t, r[1])
		}
	}
	require.EqualValues(t, 77, at)
	at = 0
	for _, r := range docTable(t, "| offset | bytes | of a shared header's file id |") {
		require.Equal(t, at, number(t, r[0]))
		at += number(t, r[1])
	}
	require.EqualValues(t, len(h.File), at)
	id := Identity{}.Numbered(0x0102)
	require.Equal(t, []byte{0x02, 0x01}, id.File[idNumber:], "little-endian")
	require.Equal(t, h.File[:], raw[28:44])
	require.Equal(t, h.Commitment[:], raw[44:76])
	require.EqualValues(t, len(raw), binary.LittleEndian.Uint16(raw[len(raw)-6:]))
}

func TestDocumentedPartitions(t *testing.T) {
	raw, err := os.ReadFile("../docs/FORMAT.md")
	require.NoError(t, err)
	for i, p := range partitions {
		require.Regexp(t, regexp.MustCompile(`\b`+strconv.Itoa(i)+" "+p+`[ ,|]`), string(raw))
	}
}

// A fixed data key and file id, and what they stored once: format 1 opens for
// ever. make.py beside the vector wrote it from docs/FORMAT.md alone, with
// another implementation of HKDF and AES-GCM.
func TestVector(t *testing.T) {
	for _, name := range []string{"format1.txt", "format1-shared.txt"} {
		t.Run(name, func(t *testing.T) { checkVector(t, readVector(t, "testdata/vectors/"+name)) })
	}
}

func checkVector(t *testing.T, v map[string][]byte) {
	h, err := ParseHeader(v["header"])
	require.NoError(t, err)
	key, err := NewKey(append([]byte(nil), v["data-key"]...))
	require.NoError(t, err)
	s, err := Unlock(h.Identity, key)
	require.NoError(t, err)
	mark, err := s.SparseMark()
	require.NoError(t, err)
	require.Equal(t, v["sparse"], mark)
	m := newMem()
	_, err = m.WriteAt(v["stored"], 0)
	require.NoError(t, err)
	f, err := NewFile(m, h.BlockSize(), int64(len(m.data)), s)
	require.NoError(t, err)
	require.NoError(t, f.EndErr())
	require.True(t, bytes.Equal(v["plain"], readAll(t, f)))
}

func readVector(t *testing.T, path string) map[string][]byte {
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	out := map[string][]byte{}
	for _, line := range strings.Split(string(raw), "\n") {
		if k, v, ok := strings.Cut(line, ": "); ok && !strings.HasPrefix(line, "#") {
			b, err := hex.DecodeString(v)
			require.NoError(t, err)
			out[k] = b
		}
	}
	require.Len(t, out, 5)
	return out
}
