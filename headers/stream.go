package headers

import (
	"bufio"
	"compress/flate"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// ErrStream says that a file is not a whole, unaltered export.
var ErrStream = errors.New("the file is not a whole and unaltered export of headers")

const (
	magic         = "KMSFHEAD"
	formatVersion = 1
	markSize      = sha256.Size // bytes of a sparse mark
)

// A Kind says what a record is about.
type Kind byte

// The kinds of records.
const (
	KindVolume Kind = 'V' // kmsfs.toml
	KindDir    Kind = 'D' // a directory's id
	KindFile   Kind = 'F' // a file's header
	kindEnd    Kind = 'E'
)

// A Record is one thing that the stream keeps.
type Record struct {
	Kind  Kind
	Path  string       // stored path below the root; of directories and files
	File  crypt.FileID // of files: what the header says
	Size  int64        // of files: stored bytes when it was exported
	Value []byte       // kmsfs.toml, the attribute with a directory's id, or the header
	Mark  []byte       // of files: the sparse mark, if there is one
}

// check says whether the record may stand in a stream.
func (r *Record) check() error {
	if r.Kind == KindVolume {
		if len(r.Value) > volume.MaxSettings {
			return fmt.Errorf("a kmsfs.toml of %d bytes: %w", len(r.Value), ErrStream)
		}
		return nil
	}
	if err := volume.CheckStoredPath(r.Path); err != nil {
		return fmt.Errorf("a path of %d bytes, %.80q: %w: %w", len(r.Path), r.Path, err, ErrStream)
	}
	if r.Kind == KindDir {
		if len(r.Value) != volume.DirXattrSize {
			return fmt.Errorf("a directory's id of %d bytes: %w", len(r.Value), ErrStream)
		}
		return nil
	}
	return r.checkFile()
}

func (r *Record) checkFile() error {
	h, err := crypt.ParseHeader(r.Value)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", err, ErrStream)
	case h.File != r.File:
		return fmt.Errorf("a header of another file id than its record's: %w", ErrStream)
	case r.Size <= 0:
		return fmt.Errorf("a file of %d bytes: %w", r.Size, ErrStream)
	case len(r.Mark) != 0 && len(r.Mark) != markSize:
		return fmt.Errorf("a sparse mark of %d bytes: %w", len(r.Mark), ErrStream)
	}
	return nil
}

// appendTo encodes the record.
func (r *Record) appendTo(dst []byte) []byte {
	dst = append(dst, byte(r.Kind))
	if r.Kind != KindVolume {
		dst = appendField(dst, []byte(r.Path))
	}
	if r.Kind == KindFile {
		dst = append(dst, r.File[:]...)
		dst = binary.LittleEndian.AppendUint64(dst, uint64(r.Size))
	}
	dst = appendField(dst, r.Value)
	if r.Kind == KindFile {
		dst = appendField(dst, r.Mark)
	}
	return dst
}

func appendField(dst, field []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(field)))
	return append(dst, field...)
}

// appendPreamble encodes what the stream begins with.
func appendPreamble(dst []byte, id crypt.VolumeID) []byte {
	dst = append(dst, magic...)
	dst = append(dst, formatVersion)
	return append(dst, id[:]...)
}

// appendEnd encodes the end but for the checksum.
func appendEnd(dst []byte, dirs, files uint64) []byte {
	dst = append(dst, byte(kindEnd))
	dst = binary.LittleEndian.AppendUint64(dst, dirs)
	return binary.LittleEndian.AppendUint64(dst, files)
}

// A Writer writes a stream. Without Close it is not whole, and Import refuses it.
type Writer struct {
	zip         *gzip.Writer
	sum         hash.Hash
	buf         []byte
	dirs, files uint64
}

// NewWriter starts a stream of the volume id, whose kmsfs.toml has the bytes
// settings.
func NewWriter(w io.Writer, id crypt.VolumeID, settings []byte) (*Writer, error) {
	out := &Writer{zip: gzip.NewWriter(w), sum: sha256.New()}
	if err := out.put(appendPreamble(nil, id)); err != nil {
		return nil, err
	}
	return out, out.Write(&Record{Kind: KindVolume, Value: settings})
}

// Write adds a record. One that Import would refuse is an error.
func (w *Writer) Write(r *Record) error {
	if err := r.check(); err != nil {
		return err
	}
	switch r.Kind {
	case KindDir:
		w.dirs++
	case KindFile:
		w.files++
	}
	w.buf = r.appendTo(w.buf[:0])
	return w.put(w.buf)
}

// Close ends the stream; what it was written to stays open.
func (w *Writer) Close() error {
	if err := w.put(appendEnd(nil, w.dirs, w.files)); err != nil {
		return err
	}
	if _, err := w.zip.Write(w.sum.Sum(nil)); err != nil {
		return err
	}
	return w.zip.Close()
}

func (w *Writer) put(p []byte) error {
	w.sum.Write(p)
	_, err := w.zip.Write(p)
	return err
}

// A Reader reads a stream. It allocates no more than the longest record.
type Reader struct {
	src  io.Reader     // the stream itself
	zipd *bufio.Reader // the compressed one; nil in a reader of the stream itself
	sum  hash.Hash

	Volume      crypt.VolumeID
	Settings    []byte // of the volume record
	Dirs, Files uint64 // records read so far
	Sum         [sha256.Size]byte
}

// NewReader starts to read a stream, up to the end of its volume record.
func NewReader(compressed io.Reader) (*Reader, error) {
	in := bufio.NewReader(compressed)
	zip, err := gzip.NewReader(in)
	if err != nil {
		return nil, judgeRead(err)
	}
	zip.Multistream(false)
	return newReader(bufio.NewReader(zip), in)
}

func newReader(src io.Reader, zipd *bufio.Reader) (*Reader, error) {
	r := &Reader{src: src, zipd: zipd, sum: sha256.New()}
	want := appendPreamble(nil, crypt.VolumeID{})
	got := make([]byte, len(want))
	if err := r.full(got); err != nil {
		return nil, err
	}
	head := len(got) - len(r.Volume)
	if string(got[:len(magic)]) != magic {
		return nil, fmt.Errorf("it does not begin as one: %w", ErrStream)
	}
	if string(got[:head]) != string(want[:head]) {
		return nil, fmt.Errorf("it has format version %d, this program knows %d: %w", got[len(magic)], formatVersion, ErrStream)
	}
	copy(r.Volume[:], got[head:])
	v, err := r.read()
	if err != nil {
		return nil, err
	}
	if v == nil || v.Kind != KindVolume {
		return nil, fmt.Errorf("the volume record is not the first: %w", ErrStream)
	}
	r.Settings = v.Value
	return r, nil
}

// Next reads the next record; io.EOF after a good end. What it read before it
// returned io.EOF is not proven to be unaltered.
func (r *Reader) Next() (*Record, error) {
	rec, err := r.read()
	switch {
	case err != nil:
		return nil, err
	case rec == nil:
		return nil, io.EOF
	case rec.Kind == KindVolume:
		return nil, fmt.Errorf("a second volume record: %w", ErrStream)
	case rec.Kind == KindDir:
		r.Dirs++
	default:
		r.Files++
	}
	return rec, nil
}

// read reads a record of any kind; nil for the end.
func (r *Reader) read() (*Record, error) {
	var kind [1]byte
	if err := r.full(kind[:]); err != nil {
		return nil, err
	}
	rec := &Record{Kind: Kind(kind[0])}
	var err error
	switch rec.Kind {
	case KindVolume:
		rec.Value, err = r.field(volume.MaxSettings)
	case KindDir:
		err = r.dir(rec)
	case KindFile:
		err = r.file(rec)
	case kindEnd:
		return nil, r.end()
	default:
		return nil, fmt.Errorf("a record of unknown type %#x: %w", kind[0], ErrStream)
	}
	if err == nil {
		err = rec.check()
	}
	if err != nil {
		return nil, err
	}
	return rec, nil
}

func (r *Reader) dir(rec *Record) (err error) {
	if err = r.path(rec); err == nil {
		rec.Value, err = r.field(volume.DirXattrSize)
	}
	return err
}

func (r *Reader) file(rec *Record) (err error) {
	if err = r.path(rec); err != nil {
		return err
	}
	if err = r.full(rec.File[:]); err != nil {
		return err
	}
	size, err := r.uint64()
	if err != nil {
		return err
	}
	rec.Size = int64(size)
	if rec.Value, err = r.field(crypt.MaxHeader); err == nil {
		rec.Mark, err = r.field(markSize)
	}
	return err
}

func (r *Reader) path(rec *Record) error {
	raw, err := r.field(volume.MaxStoredPath)
	rec.Path = string(raw)
	return err
}

// field reads a length and so many bytes, at most limit.
func (r *Reader) field(limit int) ([]byte, error) {
	var n [4]byte
	if err := r.full(n[:]); err != nil {
		return nil, err
	}
	size := binary.LittleEndian.Uint32(n[:])
	if int64(size) > int64(limit) {
		return nil, fmt.Errorf("a field of %d bytes, more than the limit of %d: %w", size, limit, ErrStream)
	}
	b := make([]byte, size)
	return b, r.full(b)
}

func (r *Reader) uint64() (uint64, error) {
	var n [8]byte
	err := r.full(n[:])
	return binary.LittleEndian.Uint64(n[:]), err
}

// end checks counts and checksum, and that nothing follows.
func (r *Reader) end() error {
	dirs, err := r.uint64()
	if err != nil {
		return err
	}
	files, err := r.uint64()
	if err != nil {
		return err
	}
	r.sum.Sum(r.Sum[:0])
	var got [sha256.Size]byte
	if err := r.full(got[:]); err != nil {
		return err
	}
	switch {
	case got != r.Sum:
		return fmt.Errorf("wrong checksum: %w", ErrStream)
	case dirs != r.Dirs || files != r.Files:
		return fmt.Errorf("it says %d directories and %d files, and has %d and %d: %w", dirs, files, r.Dirs, r.Files, ErrStream)
	}
	return r.nothingMore()
}

// nothingMore also makes gzip look at its own checksum.
func (r *Reader) nothingMore() error {
	var b [1]byte
	if n, err := io.ReadFull(r.src, b[:]); n > 0 {
		return fmt.Errorf("bytes after the end: %w", ErrStream)
	} else if err != io.EOF {
		return judgeRead(err)
	}
	if r.zipd == nil {
		return nil
	}
	switch _, err := r.zipd.ReadByte(); err {
	case io.EOF:
		return nil
	case nil:
		return fmt.Errorf("bytes after the end: %w", ErrStream)
	default:
		return judgeRead(err)
	}
}

func (r *Reader) full(p []byte) error {
	if _, err := io.ReadFull(r.src, p); err != nil {
		return judgeRead(err)
	}
	r.sum.Write(p)
	return nil
}

// judgeRead tells a stream that is cut or altered from a disk that fails.
func judgeRead(err error) error {
	var corrupt flate.CorruptInputError
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("it is cut short: %w", ErrStream)
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.As(err, &corrupt):
		return fmt.Errorf("%w: %w", err, ErrStream)
	}
	return err
}
