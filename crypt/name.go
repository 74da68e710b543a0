package crypt

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

// A DirID names a directory: 16 random bytes that names in it are bound to.
type DirID [16]byte

// MaxName is the longest name a directory entry may have, in bytes.
const MaxName = 255

// sivSize is what AES-SIV adds to what it encrypts: the synthetic IV.
const sivSize = 16

// Names encrypts names, symlink targets and extended attributes of one volume
// with AES-SIV (RFC 5297): deterministic, so that a name is found by encrypting
// it again, and under one key per purpose. It is safe for concurrent use.
//
// Its keys live on the Go heap, where they can't be wiped; they go with the
// volume at unmount. Contents never depend on them.
type Names struct {
	name, target, xattrName, xattrValue *subtle.AESSIV
}

// nameEncoding refuses stray bits at the end: one name, one stored form.
var nameEncoding = base64.RawURLEncoding.Strict()

// NewNames derives the name keys from the volume key. s stays the caller's.
func NewNames(s *Secrets) (*Names, error) {
	if s.id.Use != UseVolume {
		return nil, errors.New("a file's data key can't serve a volume")
	}
	n := new(Names)
	for _, p := range []struct {
		label string
		siv   **subtle.AESSIV
	}{
		{labelName, &n.name}, {labelSymlink, &n.target},
		{labelXattrName, &n.xattrName}, {labelXattrValue, &n.xattrValue},
	} {
		k := make([]byte, subtle.AESSIVKeySize) // the cipher keeps it
		if err := s.expand(p.label, nil, k); err != nil {
			return nil, err
		}
		siv, err := subtle.NewAESSIV(k)
		if err != nil {
			return nil, fmt.Errorf("making the %s cipher: %w", p.label, err)
		}
		*p.siv = siv
	}
	return n, nil
}

// CheckName says whether s can be a directory entry: not empty, not "." or
// "..", at most 255 bytes, neither slash nor NUL.
func CheckName(s string) bool {
	if s == "" || s == "." || s == ".." || len(s) > MaxName {
		return false
	}
	return strings.IndexByte(s, '/') < 0 && strings.IndexByte(s, 0) < 0
}

// EncryptName is the stored form of a name in the directory dir: base64url of
// AES-SIV(name, associated data = dir). The same name has another stored form in
// every directory. It can be longer than 255 bytes.
func (n *Names) EncryptName(dir DirID, plain string) string {
	return nameEncoding.EncodeToString(seal(n.name, []byte(plain), dir[:]))
}

// DecryptName reverses EncryptName. A stored name that was not made by it for
// this directory, or that hides something no entry can be called, is ErrDamaged.
func (n *Names) DecryptName(dir DirID, stored string) (string, error) {
	raw, err := decodeName(stored)
	if err != nil {
		return "", ErrDamaged
	}
	plain, err := n.name.DecryptDeterministically(raw, dir[:])
	if err != nil || !CheckName(string(plain)) {
		return "", ErrDamaged
	}
	return string(plain), nil
}

// decodeName is strict base64url: Go's decoder skips line breaks, which would
// give one name many stored forms.
func decodeName(stored string) ([]byte, error) {
	raw, err := nameEncoding.DecodeString(stored)
	if err != nil || nameEncoding.EncodedLen(len(raw)) != len(stored) {
		return nil, ErrDamaged
	}
	return raw, nil
}

// seal can fail only for messages beyond the address space.
func seal(siv *subtle.AESSIV, plain, ad []byte) []byte {
	ct, err := siv.EncryptDeterministically(plain, ad)
	if err != nil {
		panic("crypt: AES-SIV refused a message: " + err.Error())
	}
	return ct
}
