package volume

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"kmsfs/crypt"
)

// Names of our own files at the root of the backing directory. Everything there
// that starts with "kmsfs." is ours: hidden from users and refused to them.
const (
	SettingsFile = "kmsfs.toml"
	BackupFile   = "kmsfs.toml.bak"
	LockFile     = "kmsfs.lock"
	ownPrefix    = "kmsfs."
)

// Format is the version of the layout that this program writes.
const Format = 1

const maxSettings = 64 << 10 // bytes of kmsfs.toml

// A NamesMode says how entries are named on disk.
type NamesMode string

// The names modes.
const (
	NamesEncrypted NamesMode = "encrypted"
	NamesPlain     NamesMode = "plain"
)

// An Envelope says what the copies in a file's header hold.
type Envelope string

// The envelopes.
const (
	EnvelopePerFile Envelope = "per-file" // the file's own data key
	EnvelopeShared  Envelope = "shared"   // an intermediate key, which the data keys of many files are derived from
)

// Settings are what kmsfs.toml says. Format, ID, BlockSize, Names and Shared never
// change and are covered by MAC. Keys and Header may be changed by somebody who
// holds no key (a rekey by ReEncrypt alone); what authenticates them is the
// client's trusted list, the pin and the header's commitment.
type Settings struct {
	Format    int
	ID        crypt.VolumeID
	BlockSize int
	Names     NamesMode
	Shared    bool     // the envelope is shared
	Keys      []string // KMS keys and local keys; the first is for new files
	Header    []byte   // the volume key's header
	MAC       []byte   // HMAC of what never changes, under the volume key
}

// settingsTOML is the file's form.
type settingsTOML struct {
	Format    int      `toml:"format"`
	Volume    string   `toml:"volume"`
	BlockSize int      `toml:"block_size"`
	Names     string   `toml:"names"`
	Envelope  Envelope `toml:"envelope,omitempty"` // "" = per file, which has no other form
	Keys      []string `toml:"keys"`
	Header    string   `toml:"header"`
	MAC       string   `toml:"mac"`
}

const settingsComment = `# A kmsfs volume. "kmsfs rekey" changes this file; don't edit it by hand:
# what it says is authenticated. Keep a copy, and never lose the keys it names.
`

// BlockLog2 is the block size as headers state it.
func (s *Settings) BlockLog2() uint8 { return uint8(bits.TrailingZeros(uint(s.BlockSize))) }

// Envelope is what the copies in headers hold.
func (s *Settings) Envelope() Envelope {
	if s.Shared {
		return EnvelopeShared
	}
	return EnvelopePerFile
}

// unchanging are the bytes that the MAC and the digest cover. The envelope is named
// only where it is shared: volumes from before there was a choice have it per file.
func (s *Settings) unchanging() []byte {
	b := fmt.Appendf(nil, "kmsfs settings\nformat %d\nvolume %s\nblock_size %d\nnames %s\n", s.Format, s.ID, s.BlockSize, s.Names)
	if s.Shared {
		b = fmt.Appendf(b, "envelope %s\n", EnvelopeShared)
	}
	return b
}

// Digest names the settings that never change, for a client's pin: the SHA-256
// in hexadecimal.
func (s *Settings) Digest() string {
	sum := sha256.Sum256(s.unchanging())
	return hex.EncodeToString(sum[:])
}

func (s *Settings) clone() Settings {
	c := *s
	c.Keys, c.Header, c.MAC = slices.Clone(s.Keys), slices.Clone(s.Header), slices.Clone(s.MAC)
	return c
}

// encode writes the file.
func (s *Settings) encode() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(settingsComment)
	envelope := EnvelopeShared
	if !s.Shared {
		envelope = ""
	}
	err := toml.NewEncoder(&b).SetArraysMultiline(true).Encode(settingsTOML{
		Format: s.Format, Volume: s.ID.String(), BlockSize: s.BlockSize, Names: string(s.Names), Envelope: envelope, Keys: s.Keys,
		Header: base64.StdEncoding.EncodeToString(s.Header), MAC: hex.EncodeToString(s.MAC),
	})
	if err == nil && b.Len() > maxSettings {
		err = fmt.Errorf("%d bytes, more than the limit of %d", b.Len(), maxSettings)
	}
	return b.Bytes(), err
}

// parseSettings reads the file strictly: what it does not know is an error with
// its line. Nothing in it is trusted yet.
func parseSettings(data []byte) (*Settings, error) {
	if len(data) > maxSettings {
		return nil, badSettings(fmt.Errorf("%d bytes, more than the limit of %d", len(data), maxSettings))
	}
	var t settingsTOML
	if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&t); err != nil {
		return nil, badSettings(withLine(err))
	}
	s := &Settings{Format: t.Format, BlockSize: t.BlockSize, Names: NamesMode(t.Names), Shared: t.Envelope == EnvelopeShared, Keys: t.Keys}
	if s.Format != Format {
		return nil, badSettings(fmt.Errorf("format %d, this program knows %d", s.Format, Format))
	}
	if t.Envelope != "" && !s.Shared {
		return nil, badSettings(fmt.Errorf("envelope is %q or not there, not %q", EnvelopeShared, t.Envelope))
	}
	var errID, errHeader, errMAC error
	s.ID, errID = crypt.ParseVolumeID(t.Volume)
	s.Header, errHeader = base64.StdEncoding.Strict().DecodeString(t.Header)
	s.MAC, errMAC = hex.DecodeString(t.MAC)
	if err := errors.Join(errID, errHeader, errMAC); err != nil {
		return nil, badSettings(err)
	}
	if _, err := s.check(); err != nil {
		return nil, badSettings(err)
	}
	return s, nil
}

func badSettings(err error) error { return fmt.Errorf("%w: %w", err, crypt.ErrDamaged) }

// withLine says where in the file go-toml found fault.
func withLine(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		e := strict.Errors[0]
		row, _ := e.Position()
		return fmt.Errorf("line %d: unknown key %q", row, strings.Join(e.Key(), "."))
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, _ := decode.Position()
		return fmt.Errorf("line %d: %w", row, err)
	}
	return err
}

// check says whether the settings make sense in themselves, and returns the
// volume key's header.
func (s *Settings) check() (*crypt.Header, error) {
	if s.BlockSize < crypt.MinBlockSize || s.BlockSize > crypt.MaxBlockSize || bits.OnesCount(uint(s.BlockSize)) != 1 {
		return nil, fmt.Errorf("block_size is a power of two from %d to %d, not %d", crypt.MinBlockSize, crypt.MaxBlockSize, s.BlockSize)
	}
	if s.Names != NamesEncrypted && s.Names != NamesPlain {
		return nil, fmt.Errorf("names is %q or %q, not %q", NamesEncrypted, NamesPlain, s.Names)
	}
	if len(s.MAC) != sha256.Size {
		return nil, fmt.Errorf("mac has %d bytes, not %d", len(s.MAC), sha256.Size)
	}
	if err := s.checkKeys(); err != nil {
		return nil, err
	}
	h, err := crypt.ParseHeader(s.Header)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the volume key's header: %w", err)
	case h.Use != crypt.UseVolume || h.Volume != s.ID || h.BlockLog2 != s.BlockLog2():
		return nil, errors.New("the volume key's header is not this volume's")
	}
	return h, nil
}

func (s *Settings) checkKeys() error {
	if len(s.Keys) < 1 || len(s.Keys) > crypt.MaxCopies {
		return fmt.Errorf("a volume has 1 to %d keys, not %d", crypt.MaxCopies, len(s.Keys))
	}
	for i, k := range s.Keys {
		if err := crypt.CheckKeyName(k); err != nil {
			return err
		}
		if slices.Contains(s.Keys[:i], k) {
			return fmt.Errorf("key %q is listed twice", k)
		}
	}
	return nil
}

// checkCopies says whether every listed key can open the volume key: a key list
// that runs ahead of the header would lock its users out.
func (s *Settings) checkCopies(h *crypt.Header) error {
	for _, k := range s.Keys {
		if h.Find(k) == nil {
			return fmt.Errorf("the volume key has no copy under %s", k)
		}
	}
	return nil
}
