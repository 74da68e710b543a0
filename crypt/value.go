package crypt

import "strings"

// adTarget is the associated data of symlink targets. They are bound to
// nothing else, so that a rename or a hard link need not touch them.
const adTarget = "symlink"

// EncryptTarget is the stored form of a symlink's target: AES-SIV, densely
// encoded without NUL, because the backing file system holds a C string.
func (n *Names) EncryptTarget(plain string) []byte {
	return denseEncode(seal(n.target, []byte(plain), []byte(adTarget)))
}

// DecryptTarget reverses EncryptTarget; anything else is ErrDamaged.
func (n *Names) DecryptTarget(stored []byte) (string, error) {
	raw, err := denseDecode(stored)
	if err != nil {
		return "", err
	}
	plain, err := n.target.DecryptDeterministically(raw, []byte(adTarget))
	if err != nil || len(plain) == 0 || strings.IndexByte(string(plain), 0) >= 0 {
		return "", ErrDamaged
	}
	return string(plain), nil
}

// PlainTargetLen is the length of a symlink's target, from the length of its
// stored form: lstat needs no key. A length that EncryptTarget never makes is 0.
func PlainTargetLen(stored int64) int64 {
	n := stored - (stored+denseChunk)/(denseChunk+1) - sivSize
	return max(n, 0)
}

// XattrPrefix starts every extended attribute of ours on a backing file.
const XattrPrefix = "user.kmsfs"

// UserXattrPrefix starts the stored names of the user's own attributes.
const UserXattrPrefix = "user.kmsfs.u."

// MaxUserXattrName is how long the part after "user." of a user's attribute
// name may be: its stored name must fit the kernel's 255 bytes.
const MaxUserXattrName = (255-len(UserXattrPrefix))*3/4 - sivSize

// EncryptXattrName is the stored name of the user's attribute "user." + name.
// It is base64url and not the dense encoding, because archivers choke on
// attribute names that hold '=' or are not text.
func (n *Names) EncryptXattrName(name string) string {
	return UserXattrPrefix + nameEncoding.EncodeToString(seal(n.xattrName, []byte(name), []byte("xattr-name")))
}

// DecryptXattrName reverses EncryptXattrName; anything else is ErrDamaged.
func (n *Names) DecryptXattrName(stored string) (string, error) {
	text, ok := strings.CutPrefix(stored, UserXattrPrefix)
	if !ok {
		return "", ErrDamaged
	}
	raw, err := decodeName(text)
	if err != nil {
		return "", err
	}
	plain, err := n.xattrName.DecryptDeterministically(raw, []byte("xattr-name"))
	if err != nil || len(plain) == 0 || strings.IndexByte(string(plain), 0) >= 0 {
		return "", ErrDamaged
	}
	return string(plain), nil
}

// XattrOverhead is how much longer a stored attribute value is, in bytes.
const XattrOverhead = sivSize

// EncryptXattrValue is the stored value of the user's attribute "user." + name.
// It is bound to the name, not to the file.
func (n *Names) EncryptXattrValue(name string, value []byte) []byte {
	return seal(n.xattrValue, value, []byte("xattr-value:"+name))
}

// DecryptXattrValue reverses EncryptXattrValue; anything else is ErrDamaged.
func (n *Names) DecryptXattrValue(name string, stored []byte) ([]byte, error) {
	plain, err := n.xattrValue.DecryptDeterministically(stored, []byte("xattr-value:"+name))
	if err != nil {
		return nil, ErrDamaged
	}
	return plain, nil
}

// denseChunk is how many bytes share one substitute for NUL: among 254 bytes at
// least one of the values 1..255 is missing.
const denseChunk = 254

// denseEncode writes b without NUL: each chunk of at most 254 bytes is preceded
// by the smallest value in 1..255 that it does not hold, which stands for 0.
// n bytes become n + ceil(n/254).
func denseEncode(b []byte) []byte {
	out := make([]byte, 0, len(b)+(len(b)+denseChunk-1)/denseChunk)
	for len(b) > 0 {
		chunk := b[:min(len(b), denseChunk)]
		b = b[len(chunk):]
		v := missing(chunk)
		out = append(out, v)
		for _, c := range chunk {
			if c == 0 {
				c = v
			}
			out = append(out, c)
		}
	}
	return out
}

// denseDecode reverses denseEncode and takes nothing that it would have written
// differently.
func denseDecode(b []byte) ([]byte, error) {
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		n := min(len(b), denseChunk+1)
		v, start := b[0], len(out)
		for _, c := range b[1:n] {
			switch c {
			case 0:
				return nil, ErrDamaged
			case v:
				c = 0
			}
			out = append(out, c)
		}
		if n == 1 || missing(out[start:]) != v {
			return nil, ErrDamaged
		}
		b = b[n:]
	}
	return out, nil
}

// missing is the smallest value in 1..255 that is not in chunk.
func missing(chunk []byte) byte {
	var seen [256]bool
	for _, c := range chunk {
		seen[c] = true
	}
	for v := 1; ; v++ {
		if !seen[v] {
			return byte(v)
		}
	}
}
