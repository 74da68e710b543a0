package crypt

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
)

// HeaderXattr is the extended attribute that holds a file's header.
const HeaderXattr = "user.kmsfs"

// SparseXattr is the extended attribute whose MAC permits holes in a file.
const SparseXattr = "user.kmsfs.sparse"

// Bounds of the header format; docs/FORMAT.md has the table.
const (
	FormatVersion = 1
	SuiteAES256   = 1 // AES-256-GCM records, HKDF-SHA-256

	MaxCopies    = 8
	MaxBlob      = 512                    // bytes of one wrapped key
	MaxHeader    = 8192                   // bytes a parser will look at
	identitySize = 76                     // bytes of the immutable part
	boundSize    = identitySize - KeySize // of those, all but the commitment
	trailerSize  = 6                      // total length and CRC32C
	generation   = 1                      // reserved
)

// Block sizes a volume may have, in bytes.
const (
	MinBlockSize     = 4 << 10
	MaxBlockSize     = 64 << 10
	DefaultBlockSize = MinBlockSize
)

// A VolumeID names a volume: 16 random bytes.
type VolumeID [16]byte

// A FileID names one generation of a file's contents: 16 random bytes.
type FileID [16]byte

func (v VolumeID) String() string { return hex.EncodeToString(v[:]) }
func (f FileID) String() string   { return hex.EncodeToString(f[:]) }

// ParseVolumeID reads the 32 hexadecimal digits that String writes.
func ParseVolumeID(s string) (v VolumeID, err error) {
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != len(v) || hex.EncodeToString(raw) != s {
		return v, fmt.Errorf("a volume id has 32 lower-case hexadecimal digits, got %q", s)
	}
	return VolumeID(raw), nil
}

// Use says what a data key is for, so that a file's key can't serve as a volume's.
type Use uint8

// The uses of a key.
const (
	UseFile   Use = 1
	UseVolume Use = 2
	// UseIntermediate is a key that data keys are derived from (intermediate.go). It
	// stands in encryption contexts only: no header is of this use.
	UseIntermediate Use = 3
)

// flagShared in a header says that its copies hold an intermediate key.
const flagShared = 1

func (u Use) String() string {
	switch u {
	case UseFile:
		return "file"
	case UseVolume:
		return "volume"
	case UseIntermediate:
		return "intermediate"
	}
	return fmt.Sprintf("use-%d", uint8(u))
}

// An Identity is the immutable part of a header: it names the data key, and its
// Commitment proves "this data key and no other".
type Identity struct {
	Use        Use
	Shared     bool  // the copies hold an intermediate key, which other files share (intermediate.go)
	BlockLog2  uint8 // block size = 1 << BlockLog2 bytes
	Volume     VolumeID
	File       FileID
	Commitment [KeySize]byte
}

// BlockSize is the size of a full plaintext block in bytes.
func (id *Identity) BlockSize() int { return 1 << id.BlockLog2 }

// EncryptionContext is what KMS binds to the wrapped key (DESIGN 3.2). It names
// the volume the caller works on, never the one the header claims, and no path:
// CloudTrail logs it in clear.
func (id *Identity) EncryptionContext(volume VolumeID) map[string]string {
	w := id.Wrapped()
	return map[string]string{
		"kmsfs:vol":  volume.String(),
		"kmsfs:file": w.File.String(),
		"kmsfs:use":  w.Use.String(),
		"kmsfs:fmt":  fmt.Sprintf("%d.%d", FormatVersion, SuiteAES256),
	}
}

// appendBound writes the immutable bytes that key derivation binds: all of the
// identity but the commitment, which is derived from them.
func (id *Identity) appendBound(dst []byte) []byte {
	dst = append(dst, "KMSF"...)
	dst = append(dst, FormatVersion, SuiteAES256)
	dst = binary.LittleEndian.AppendUint16(dst, id.flags())
	dst = append(dst, id.BlockLog2, byte(id.Use))
	dst = binary.LittleEndian.AppendUint16(dst, generation)
	dst = append(dst, id.Volume[:]...)
	return append(dst, id.File[:]...)
}

func (id *Identity) flags() uint16 {
	if id.Shared {
		return flagShared
	}
	return 0
}

// Bytes is the identity as it is stored: 76 bytes. It is a fit cache key: who
// knows a data key for these bytes has checked it against the commitment.
func (id *Identity) Bytes() []byte {
	return append(id.appendBound(make([]byte, 0, identitySize)), id.Commitment[:]...)
}

// A Copy is the data key encrypted by one KMS key; in a shared header, the
// intermediate key.
type Copy struct {
	Key  string // "arn:..." of a KMS key or "local:NAME"; a label, trusted by nobody
	Blob []byte // opaque; its length and inner form are the provider's
}

// A Header is the parsed value of HeaderXattr.
type Header struct {
	Identity
	Copies  []Copy
	Padding int // zero bytes after the copies; readers ignore them
}

// Find returns the copy under key, or nil.
func (h *Header) Find(key string) *Copy {
	for i := range h.Copies {
		if SameKey(h.Copies[i].Key, key) {
			return &h.Copies[i]
		}
	}
	return nil
}

// Clone copies the header and its list of copies (blobs are shared: nobody
// changes one in place).
func (h *Header) Clone() *Header {
	c := *h
	c.Copies = append([]Copy(nil), h.Copies...)
	return &c
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Marshal encodes the header.
func (h *Header) Marshal() ([]byte, error) {
	if len(h.Copies) < 1 || len(h.Copies) > MaxCopies {
		return nil, fmt.Errorf("a header holds 1 to %d copies, not %d", MaxCopies, len(h.Copies))
	}
	if h.Padding < 0 || h.Padding > MaxHeader {
		return nil, fmt.Errorf("header padding of %d bytes", h.Padding)
	}
	dst := h.Bytes()
	dst = append(dst, byte(len(h.Copies)))
	for i, c := range h.Copies {
		provider, name, err := packKeyName(c.Key)
		if err != nil {
			return nil, err
		}
		if len(c.Blob) == 0 || len(c.Blob) > MaxBlob {
			return nil, fmt.Errorf("copy %d: a wrapped key has 1 to %d bytes, not %d", i, MaxBlob, len(c.Blob))
		}
		dst = append(dst, provider, byte(len(name)))
		dst = append(dst, name...)
		dst = binary.LittleEndian.AppendUint16(dst, uint16(len(c.Blob)))
		dst = append(dst, c.Blob...)
	}
	dst = append(dst, make([]byte, h.Padding)...)
	if len(dst)+trailerSize > MaxHeader {
		return nil, fmt.Errorf("a header of %d bytes is beyond the limit of %d", len(dst)+trailerSize, MaxHeader)
	}
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(dst)+trailerSize))
	return binary.LittleEndian.AppendUint32(dst, crc32.Checksum(dst, castagnoli)), nil
}

// ParseHeader decodes a stored header. Everything that Marshal would not have
// written is refused with ErrDamaged, so a header that parses encodes to the
// same bytes again. It allocates no more than raw is long.
func ParseHeader(raw []byte) (*Header, error) {
	if len(raw) > MaxHeader {
		return nil, malformed("%d bytes, more than the limit of %d", len(raw), MaxHeader)
	}
	if len(raw) < identitySize+1+trailerSize {
		return nil, malformed("%d bytes are too few", len(raw))
	}
	if string(raw[:4]) != "KMSF" {
		return nil, malformed("wrong magic")
	}
	if raw[4] != FormatVersion {
		return nil, malformed("format version %d, this program knows %d", raw[4], FormatVersion)
	}
	end := raw[len(raw)-trailerSize:]
	if n := int(binary.LittleEndian.Uint16(end)); n != len(raw) {
		return nil, malformed("it says %d bytes and has %d", n, len(raw))
	}
	if binary.LittleEndian.Uint32(end[2:]) != crc32.Checksum(raw[:len(raw)-4], castagnoli) {
		return nil, malformed("wrong checksum")
	}
	h := new(Header)
	if err := h.parseIdentity(raw); err != nil {
		return nil, err
	}
	if err := h.parseCopies(raw[identitySize : len(raw)-trailerSize]); err != nil {
		return nil, err
	}
	return h, nil
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("malformed header: "+format+": %w", append(args, ErrDamaged)...)
}

func (h *Header) parseIdentity(raw []byte) error {
	flags, file := binary.LittleEndian.Uint16(raw[6:]), FileID(raw[28:44])
	switch {
	case raw[5] != SuiteAES256:
		return malformed("unknown suite %d", raw[5])
	case flags&^flagShared != 0:
		return malformed("unknown flags %#x", flags)
	case raw[8] < 12 || raw[8] > 16:
		return malformed("block size 2^%d", raw[8])
	case raw[9] != byte(UseFile) && raw[9] != byte(UseVolume):
		return malformed("unknown use %d", raw[9])
	case binary.LittleEndian.Uint16(raw[10:]) != generation:
		return malformed("unknown generation %d", binary.LittleEndian.Uint16(raw[10:]))
	case flags == flagShared && raw[9] != byte(UseFile):
		return malformed("an intermediate key for something else than a file")
	case flags == flagShared && file.number() == 0:
		return malformed("the id of an intermediate key in place of a file's")
	}
	h.BlockLog2, h.Use, h.Shared = raw[8], Use(raw[9]), flags == flagShared
	h.Volume, h.File = VolumeID(raw[12:28]), file
	h.Commitment = [KeySize]byte(raw[44:identitySize])
	return nil
}

func (h *Header) parseCopies(b []byte) error {
	n := int(b[0])
	if n < 1 || n > MaxCopies {
		return malformed("%d copies", n)
	}
	b = b[1:]
	for i := range n {
		c, rest, err := parseCopy(b)
		if err != nil {
			return malformed("copy %d: %v", i, err)
		}
		h.Copies, b = append(h.Copies, c), rest
	}
	for _, v := range b {
		if v != 0 {
			return malformed("bytes after the last copy")
		}
	}
	h.Padding = len(b)
	return nil
}

func parseCopy(b []byte) (c Copy, rest []byte, err error) {
	short := fmt.Errorf("cut short")
	if len(b) < 2 || len(b) < 2+int(b[1])+2 {
		return c, nil, short
	}
	provider, name, b := b[0], b[2:2+int(b[1])], b[2+int(b[1]):]
	if c.Key, err = unpackKeyName(provider, name); err != nil {
		return c, nil, err
	}
	n := int(binary.LittleEndian.Uint16(b))
	if n == 0 || n > MaxBlob {
		return c, nil, fmt.Errorf("a wrapped key of %d bytes", n)
	}
	if b = b[2:]; len(b) < n {
		return c, nil, short
	}
	c.Blob = append([]byte(nil), b[:n]...)
	return c, b[n:], nil
}
