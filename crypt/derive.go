package crypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
)

// One key, one purpose: the labels of HKDF-Expand (RFC 5869). A label names the
// purpose; the immutable bytes of the header bind the key to this file, this
// volume, this use and this format.
const (
	labelCommit = "commit"
	labelBlock  = "block"
	labelSparse = "sparse"
	labelFile   = "file-key"

	labelSettings   = "settings-mac"
	labelDirID      = "dir-id"
	labelName       = "name"
	labelSymlink    = "symlink"
	labelXattrName  = "xattr-name"
	labelXattrValue = "xattr-value"
	labelMarker     = "unclean"
)

// Secrets are what a data key opens: the keys derived from it for one identity.
// They hold a copy of the data key of their own, in locked memory.
type Secrets struct {
	id  Identity
	key *Key
	prk *Key // HKDF-Extract(SHA-256, data key, salt = file id)

	under atomic.Pointer[[]string] // see Under
}

// A Fresh is a data key that no file uses yet, with the header it goes under.
type Fresh struct {
	Header  *Header
	Secrets *Secrets
	// Batch is for whoever hands out fresh keys, to tell those from before a change.
	Batch uint64
}

// NewIdentity draws a random file id.
func NewIdentity(volume VolumeID, use Use, blockLog2 uint8) (Identity, error) {
	id := Identity{Use: use, BlockLog2: blockLog2, Volume: volume}
	if _, err := rand.Read(id.File[:]); err != nil {
		return id, fmt.Errorf("drawing a file id: %w", err)
	}
	return id, nil
}

// Commit derives the keys of a new identity from a fresh key, which is what its
// copies shall hold: a data key, or of a shared identity the intermediate key. It
// fills in id.Commitment. The caller still owns the key.
func Commit(id *Identity, key *Key) (*Secrets, error) {
	s, err := derive(*id, key)
	if err != nil {
		return nil, err
	}
	if err := s.expand(labelCommit, nil, id.Commitment[:]); err != nil {
		s.Wipe()
		return nil, err
	}
	s.id = *id
	return s, nil
}

// Unlock derives the keys of a stored identity, after it has proved in constant
// time that key, which is what one of its copies holds, is or leads to the data key
// that the identity commits to; if not, ErrDamaged. GCM alone would not commit to a
// key (the class of CVE-2025-14763). The caller still owns the key.
func Unlock(id Identity, key *Key) (*Secrets, error) {
	s, err := derive(id, key)
	if err != nil {
		return nil, err
	}
	var want [KeySize]byte
	if err := s.expand(labelCommit, nil, want[:]); err != nil {
		s.Wipe()
		return nil, err
	}
	if subtle.ConstantTimeCompare(want[:], id.Commitment[:]) != 1 {
		s.Wipe()
		return nil, fmt.Errorf("the data key is not the one the header commits to: %w", ErrDamaged)
	}
	return s, nil
}

func derive(id Identity, key *Key) (*Secrets, error) {
	own, err := id.dataKey(key)
	if err != nil {
		return nil, err
	}
	prk, err := own.extract(id.File)
	if err != nil {
		own.Wipe()
		return nil, err
	}
	return &Secrets{id: id, key: own, prk: prk}, nil
}

// extract is the key that others are expanded from, in locked memory.
func (k *Key) extract(salt FileID) (prk *Key, err error) {
	err = k.Use(func(raw []byte) error {
		prk, err = NewKey(Extract(raw, salt[:]))
		return err
	})
	return prk, err
}

// Extract is HKDF-Extract (RFC 5869), which is an HMAC, with SHA-256. The library's own
// leaves the secret in the buffer of a hash that nobody can reach any more; here what
// follows it takes its place. The caller clears the result, 32 bytes.
func Extract(secret, salt []byte) []byte {
	h := hmac.New(sha256.New, salt)
	h.Write(secret)
	prk := h.Sum(nil)
	h.Reset()
	h.Write(make([]byte, sha256.BlockSize-1))
	h.Sum(nil)
	return prk
}

// Identity is what the secrets belong to.
func (s *Secrets) Identity() Identity { return s.id }

// Clone copies the secrets; each copy is wiped by its own owner.
func (s *Secrets) Clone() (*Secrets, error) {
	key, err := s.key.Clone()
	if err != nil {
		return nil, err
	}
	prk, err := s.prk.Clone()
	if err != nil {
		key.Wipe()
		return nil, err
	}
	c := &Secrets{id: s.id, key: key, prk: prk}
	c.under.Store(s.under.Load())
	return c, nil
}

// Under names the keys of key services on whose leases the use of these secrets
// depends, the governing one first. Whoever opened them says so with SetUnder; it goes
// along when they are cloned.
func (s *Secrets) Under() []string {
	if s == nil {
		return nil
	}
	if p := s.under.Load(); p != nil {
		return *p
	}
	return nil
}

// SetUnder changes what Under says. The list must not be changed any more.
func (s *Secrets) SetUnder(keys []string) { s.under.Store(&keys) }

// DataKey is the data key itself, for wrapping it again. The Secrets own it. It is not
// what the copies of a shared header hold.
func (s *Secrets) DataKey() *Key { return s.key }

// Wipe overwrites the secrets. It may be called twice, and on nil.
func (s *Secrets) Wipe() {
	if s != nil {
		s.key.Wipe()
		s.prk.Wipe()
	}
}

func (s *Secrets) expand(label string, extra, out []byte) error {
	return expand(s.prk, label, &s.id, extra, out)
}

// expand fills out with HKDF-Expand(prk, label, immutable bytes, extra): label
// and bytes are preceded by their lengths, so that no two uses collide.
func expand(prk *Key, label string, id *Identity, extra, out []byte) error {
	var room [128]byte
	info := append(append(room[:0], byte(len(label))), label...)
	info = append(info, boundSize)
	info = id.appendBound(info)
	info = append(info, extra...)
	return prk.Use(func(prk []byte) error {
		k, err := hkdf.Expand(sha256.New, prk, string(info), len(out))
		if err != nil {
			return fmt.Errorf("deriving the %s key: %w", label, err)
		}
		copy(out, k)
		clear(k)
		return nil
	})
}

// blockAEAD is the cipher of one key epoch. Its expanded key lives on the Go
// heap and can't be wiped; whoever holds it drops it with the file.
func (s *Secrets) blockAEAD(epoch uint32) (cipher.AEAD, error) {
	var k [KeySize]byte
	defer clear(k[:])
	if err := s.expand(labelBlock, binary.LittleEndian.AppendUint32(nil, epoch), k[:]); err != nil {
		return nil, err
	}
	b, err := aes.NewCipher(k[:])
	if err != nil {
		return nil, fmt.Errorf("making a block cipher: %w", err)
	}
	return cipher.NewGCMWithRandomNonce(b)
}

// SparseMark is the value of SparseXattr for this file: HMAC-SHA-256 of its
// immutable bytes, commitment included.
func (s *Secrets) SparseMark() ([]byte, error) {
	return s.mac(labelSparse, s.id.Bytes())
}

// IsSparseMark compares a stored mark in constant time. ErrWiped says nothing about
// the mark.
func (s *Secrets) IsSparseMark(stored []byte) (bool, error) {
	want, err := s.SparseMark()
	return err == nil && hmac.Equal(want, stored), err
}

// SettingsMAC authenticates the settings of the volume these secrets belong to.
func (s *Secrets) SettingsMAC(settings []byte) ([]byte, error) {
	return s.mac(labelSettings, settings)
}

// MarkerMAC authenticates what says that the volume is mounted.
func (s *Secrets) MarkerMAC(marker []byte) ([]byte, error) {
	return s.mac(labelMarker, marker)
}

// DirMAC authenticates a directory id.
func (s *Secrets) DirMAC(id DirID) ([]byte, error) {
	return s.mac(labelDirID, append([]byte("dir"), id[:]...))
}

// RootDirID is the root directory's id: it is derived, so that the root needs
// no attribute.
func (s *Secrets) RootDirID() (id DirID, err error) {
	m, err := s.mac(labelDirID, []byte("root"))
	copy(id[:], m)
	return id, err
}

func (s *Secrets) mac(label string, msg []byte) ([]byte, error) {
	if s.id.Use != UseVolume && label != labelSparse {
		return nil, errors.New("a file's data key can't serve a volume")
	}
	var k [KeySize]byte
	defer clear(k[:])
	if err := s.expand(label, nil, k[:]); err != nil {
		return nil, err
	}
	h := hmac.New(sha256.New, k[:])
	h.Write(msg)
	return h.Sum(nil), nil
}
