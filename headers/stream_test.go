package headers

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/volume"
)

const (
	oldKey   = "arn:aws:kms:us-east-1:111122223333:key/11111111-1111-4111-8111-111111111111"
	newKey   = "arn:aws:kms:us-east-1:444455556666:key/22222222-2222-4222-8222-222222222222"
	otherKey = "local:other"
)

// sampleHeader is a header that parses; nothing opens it.
func sampleHeader(t testing.TB, id crypt.VolumeID, file byte, keys ...string) *Record {
	t.Helper()
	h := &crypt.Header{Identity: crypt.Identity{Use: crypt.UseFile, BlockLog2: 12, Volume: id, File: crypt.FileID{file}, Commitment: [32]byte{file, 1}}}
	for _, k := range keys {
		h.Copies = append(h.Copies, crypt.Copy{Key: k, Blob: bytes.Repeat([]byte{file}, 20)})
	}
	raw, err := h.Marshal()
	require.NoError(t, err)
	return &Record{Kind: KindFile, Path: "dir/f" + strconv.Itoa(int(file)), File: h.File, Size: 4000 + int64(file), Value: raw}
}

// sample is a small stream of each kind of record.
func sample(t testing.TB) (id crypt.VolumeID, settings []byte, recs []*Record) {
	id = crypt.VolumeID{7, 7}
	marked := sampleHeader(t, id, 2, newKey, otherKey)
	marked.Mark = bytes.Repeat([]byte{9}, markSize)
	return id, []byte("settings"), []*Record{
		{Kind: KindDir, Path: "dir", Value: bytes.Repeat([]byte{3}, volume.DirXattrSize)},
		sampleHeader(t, id, 1, oldKey), marked,
	}
}

func write(t testing.TB, id crypt.VolumeID, settings []byte, recs ...*Record) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, id, settings)
	require.NoError(t, err)
	for _, r := range recs {
		require.NoError(t, w.Write(r))
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func readAll(r *Reader, err error) ([]*Record, error) {
	if err != nil {
		return nil, err
	}
	var recs []*Record
	for {
		rec, err := r.Next()
		if err == io.EOF {
			return recs, nil
		}
		if err != nil {
			return nil, err
		}
		recs = append(recs, rec)
	}
}

func inflate(t testing.TB, raw []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(raw))
	require.NoError(t, err)
	plain, err := io.ReadAll(z)
	require.NoError(t, err)
	return plain
}

func deflate(t testing.TB, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(plain)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.Bytes()
}

// craft is the stream of whoever computes its checksum himself: body is what
// stands between the preamble and the end.
func craft(t testing.TB, id crypt.VolumeID, body []byte, dirs, files uint64) []byte {
	t.Helper()
	plain := appendEnd(append(appendPreamble(nil, id), body...), dirs, files)
	sum := sha256.Sum256(plain)
	return deflate(t, append(plain, sum[:]...))
}

func TestRoundTrip(t *testing.T) {
	id, settings, want := sample(t)
	r, err := NewReader(bytes.NewReader(write(t, id, settings, want...)))
	require.NoError(t, err)
	require.Equal(t, id, r.Volume)
	require.Equal(t, settings, r.Settings)
	got, err := readAll(r, nil)
	require.NoError(t, err)
	require.Len(t, got, len(want))
	for i := range want {
		require.Equal(t, want[i].appendTo(nil), got[i].appendTo(nil))
		require.Equal(t, want[i].Path, got[i].Path)
	}
	require.EqualValues(t, 1, r.Dirs)
	require.EqualValues(t, 2, r.Files)
}

// A stream that gzip(1) packed again is as good.
func TestAnyGzipWillDo(t *testing.T) {
	id, settings, want := sample(t)
	recs, err := readAll(NewReader(bytes.NewReader(deflate(t, inflate(t, write(t, id, settings, want...))))))
	require.NoError(t, err)
	require.Len(t, recs, len(want))
}

func TestCutAnywhereIsRefused(t *testing.T) {
	id, settings, recs := sample(t)
	raw := write(t, id, settings, recs...)
	for n := range raw {
		_, err := readAll(NewReader(bytes.NewReader(raw[:n])))
		require.ErrorIs(t, err, ErrStream, "cut to %d of %d bytes", n, len(raw))
	}
	plain := inflate(t, raw)
	for n := range plain {
		_, err := readAll(NewReader(bytes.NewReader(deflate(t, plain[:n]))))
		require.ErrorIs(t, err, ErrStream, "cut to %d of %d bytes before it was packed", n, len(plain))
	}
}

// A flipped bit is refused. A few bits of gzip mean nothing (its time stamp, the
// padding of its last byte): then what is read is what was written.
func TestFlippedBitsAreRefused(t *testing.T) {
	id, settings, recs := sample(t)
	raw := write(t, id, settings, recs...)
	idle := 0
	for i := range raw {
		for bit := range 8 {
			bad := bytes.Clone(raw)
			bad[i] ^= 1 << bit
			got, err := readAll(NewReader(bytes.NewReader(bad)))
			if err != nil {
				require.ErrorIs(t, err, ErrStream, "bit %d of byte %d", bit, i)
				continue
			}
			idle++
			require.Equal(t, inflate(t, raw), inflate(t, bad))
			require.Len(t, got, len(recs))
		}
	}
	require.Less(t, idle, 8*10, "only gzip's own header and padding may be idle")
	plain := inflate(t, raw)
	for i := range plain {
		bad := bytes.Clone(plain)
		bad[i] ^= 1
		_, err := readAll(NewReader(bytes.NewReader(deflate(t, bad))))
		require.ErrorIs(t, err, ErrStream, "byte %d before it was packed", i)
	}
}

func TestBytesAfterTheEndAreRefused(t *testing.T) {
	id, settings, recs := sample(t)
	raw := write(t, id, settings, recs...)
	for name, bad := range map[string][]byte{
		"after gzip":       append(bytes.Clone(raw), 0),
		"a second stream":  append(bytes.Clone(raw), raw...),
		"before it packed": deflate(t, append(inflate(t, raw), 0)),
	} {
		_, err := readAll(NewReader(bytes.NewReader(bad)))
		require.ErrorIs(t, err, ErrStream, name)
	}
}

// badPaths lead out of a volume, to its own files, or nowhere.
var badPaths = []string{
	"", "/", "/etc/passwd", "../x", "..", ".", "./x", "a/../../x", "a/..", "a/.", "a//b", "a/", "//", "a\x00b",
	"kmsfs.toml", "kmsfs.toml.bak", "kmsfs.lock", "kmsfs.new/x", strings.Repeat("n", 256), "a/" + strings.Repeat("n", 256),
	strings.Repeat("n/", volume.MaxStoredPath/2) + "n",
}

func TestPathsThatLeadAwayAreRefused(t *testing.T) {
	id, settings, _ := sample(t)
	for _, p := range badPaths {
		f := sampleHeader(t, id, 1, oldKey)
		f.Path = p
		d := &Record{Kind: KindDir, Path: p, Value: make([]byte, volume.DirXattrSize)}
		for _, rec := range []*Record{f, d} {
			w, err := NewWriter(io.Discard, id, settings)
			require.NoError(t, err)
			require.ErrorIs(t, w.Write(rec), ErrStream)
			body := rec.appendTo((&Record{Kind: KindVolume, Value: settings}).appendTo(nil))
			_, err = readAll(NewReader(bytes.NewReader(craft(t, id, body, 0, 1))))
			require.ErrorIs(t, err, ErrStream, "%.80q", p)
		}
	}
}

func TestMalformedRecordsAreRefused(t *testing.T) {
	id, settings, _ := sample(t)
	v := (&Record{Kind: KindVolume, Value: settings}).appendTo(nil)
	file := func(change func(r *Record)) []byte {
		r := sampleHeader(t, id, 1, oldKey)
		change(r)
		return r.appendTo(bytes.Clone(v))
	}
	_, err := readAll(NewReader(bytes.NewReader(craft(t, id, file(func(*Record) {}), 0, 1))))
	require.NoError(t, err)
	for name, body := range map[string][]byte{
		"no volume record":     sampleHeader(t, id, 1, oldKey).appendTo(nil),
		"two volume records":   append(bytes.Clone(v), v...),
		"unknown type":         append(bytes.Clone(v), 'X'),
		"header that is none":  file(func(r *Record) { r.Value = []byte("KMSF") }),
		"no header":            file(func(r *Record) { r.Value = nil }),
		"another file id":      file(func(r *Record) { r.File[3]++ }),
		"an empty file":        file(func(r *Record) { r.Size = 0 }),
		"a negative size":      file(func(r *Record) { r.Size = -1 }),
		"a short mark":         file(func(r *Record) { r.Mark = make([]byte, 31) }),
		"a short directory id": (&Record{Kind: KindDir, Path: "d", Value: make([]byte, 47)}).appendTo(bytes.Clone(v)),
		"settings too long":    (&Record{Kind: KindVolume, Value: make([]byte, volume.MaxSettings+1)}).appendTo(nil),
	} {
		_, err := readAll(NewReader(bytes.NewReader(craft(t, id, body, 0, 1))))
		require.ErrorIs(t, err, ErrStream, name)
	}
	_, err = readAll(NewReader(bytes.NewReader(craft(t, id, file(func(*Record) {}), 0, 2))))
	require.ErrorIs(t, err, ErrStream, "the counts")
}

// allocated is how much f allocates, in bytes.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A length is believed up to its bound only.
func TestLengthsAreBounded(t *testing.T) {
	id, settings, _ := sample(t)
	v := (&Record{Kind: KindVolume, Value: settings}).appendTo(nil)
	for name, body := range map[string][]byte{
		"settings": {'V', 0xff, 0xff, 0xff, 0xff},
		"path":     append(bytes.Clone(v), 'F', 0xff, 0xff, 0xff, 0x7f),
		"id":       binary.LittleEndian.AppendUint32(append(appendField(append(bytes.Clone(v), 'D'), []byte("d")), []byte{}...), 1<<31),
	} {
		raw := craft(t, id, body, 0, 1)
		require.Less(t, allocated(func() {
			_, err := readAll(NewReader(bytes.NewReader(raw)))
			require.ErrorIs(t, err, ErrStream, name)
		}), uint64(1<<20), name)
	}
}

// FuzzReader: what parses encodes to the same bytes, and nothing takes more memory
// than a record may have.
func FuzzReader(f *testing.F) {
	id, settings, recs := sample(f)
	f.Add(inflate(f, write(f, id, settings, recs...)))
	f.Add(inflate(f, write(f, id, settings)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if n := len(raw) - sha256.Size; n > 0 { // get past the checksum
			sum := sha256.Sum256(raw[:n])
			copy(raw[n:], sum[:])
		}
		var r *Reader
		var got []*Record
		var err error
		used := allocated(func() {
			if r, err = newReader(bytes.NewReader(raw), nil); err == nil {
				got, err = readAll(r, nil)
			}
		})
		require.Less(t, used, uint64(4<<20+64*len(raw)))
		if err != nil {
			require.ErrorIs(t, err, ErrStream)
			return
		}
		again := appendPreamble(nil, r.Volume)
		again = (&Record{Kind: KindVolume, Value: r.Settings}).appendTo(again)
		for _, rec := range got {
			again = rec.appendTo(again)
		}
		again = appendEnd(again, r.Dirs, r.Files)
		require.Equal(t, raw[:len(raw)-sha256.Size], again)
	})
}

// docRows are the rows of the table of docs/FORMAT.md under a line.
func docRows(t *testing.T, after string) (rows [][]string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("..", "docs", "FORMAT.md"))
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(raw), "\n"+after+"\n\n")
	require.True(t, ok, "docs/FORMAT.md has no line %q", after)
	for _, line := range strings.Split(rest, "\n")[2:] {
		if !strings.HasPrefix(line, "|") {
			break
		}
		var cells []string
		for _, c := range strings.Split(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.Trim(strings.TrimSpace(c), "`"))
		}
		rows = append(rows, cells)
	}
	require.NotEmpty(t, rows)
	return rows
}

// TestDocumentedStream takes a stream apart by nothing but the tables of
// docs/FORMAT.md.
func TestDocumentedStream(t *testing.T) {
	id, settings, recs := sample(t)
	plain := inflate(t, write(t, id, settings, recs...))
	at := 0
	var sizes map[string]int // of the fields of one table
	take := func(title string) map[string][]byte {
		fields, n := map[string][]byte{}, 0
		sizes = map[string]int{}
		for _, row := range docRows(t, title) {
			size, err := strconv.Atoi(row[0])
			if row[0] == "n" {
				size, err = n, nil
			}
			require.NoError(t, err)
			require.LessOrEqual(t, at+size, len(plain), row[1])
			field := plain[at : at+size]
			if strings.HasPrefix(row[1], "length") {
				n = int(binary.LittleEndian.Uint32(field))
			}
			fields[row[1]], sizes[row[1]] = field, size
			at += size
		}
		return fields
	}
	start := take("The stream begins with")
	require.Equal(t, magic, string(start["magic"]))
	require.Equal(t, []byte{formatVersion}, start["format version"])
	require.Equal(t, id[:], start["volume id"])
	v := take("Volume record, the first and only one")
	require.Equal(t, "V", string(v["type V"]))
	require.Equal(t, settings, v["bytes of kmsfs.toml"])
	d := take("Directory record")
	require.Equal(t, "D", string(d["type D"]))
	require.Equal(t, recs[0].Path, string(d["path"]))
	require.Equal(t, recs[0].Value, d["value of user.kmsfs.dir"])
	for _, rec := range recs[1:] {
		f := take("File record")
		require.Equal(t, "F", string(f["type F"]))
		require.Equal(t, rec.Path, string(f["path"]))
		require.Equal(t, rec.File[:], f["file id"])
		require.EqualValues(t, rec.Size, binary.LittleEndian.Uint64(f["stored size"]))
		require.Equal(t, rec.Value, f["header"])
		require.Equal(t, len(rec.Mark), sizes["value of user.kmsfs.sparse, or nothing"])
	}
	before := at
	e := take("End")
	require.Equal(t, "E", string(e["type E"]))
	require.EqualValues(t, 1, binary.LittleEndian.Uint64(e["directory records"]))
	require.EqualValues(t, 2, binary.LittleEndian.Uint64(e["file records"]))
	sum := sha256.Sum256(plain[:before+17])
	require.Equal(t, sum[:], e["SHA-256 of all bytes before it"])
	require.Len(t, plain, at)
}
