package crypt

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
)

// In a volume whose envelope is shared, the copies of a header hold not the file's data
// key but an intermediate key, which up to MaxSharing files have in common, so that one
// call to KMS opens them all. A file's data key is derived from it:
//
//	data key = HKDF-Expand(HKDF-Extract(intermediate key, salt = its id), "file-key", immutable bytes)
//
// (key derivation from a key-derivation key, NIST SP 800-56C and 800-108). A wrapped data
// key beside the wrapped intermediate key would cost 60 bytes more, and a header with one
// copy would leave the 512-byte inode. For the same reason the intermediate key's id has
// no place of its own: it is the file id with its last two bytes, the file's number under
// that key, set to zero. So a file's id, which is under the commitment, says which
// intermediate key its data key came from, and no other will open it.

// MaxSharing is how many files an intermediate key can serve, by the form of their ids.
const MaxSharing = 1<<16 - 1

const idNumber = 14 // offset of the number in a file id

// number is the file's under its intermediate key; 0 is that key's own.
func (f FileID) number() uint16 { return binary.LittleEndian.Uint16(f[idNumber:]) }

func (f FileID) numbered(n uint16) FileID {
	binary.LittleEndian.PutUint16(f[idNumber:], n)
	return f
}

// NewIntermediate draws the id of an intermediate key: 14 random bytes.
func NewIntermediate(volume VolumeID, blockLog2 uint8) (Identity, error) {
	id := Identity{Use: UseIntermediate, BlockLog2: blockLog2, Volume: volume}
	if _, err := rand.Read(id.File[:idNumber]); err != nil {
		return id, fmt.Errorf("drawing the id of an intermediate key: %w", err)
	}
	return id, nil
}

// Numbered is the identity of file number n (from 1) under the intermediate key that
// id names. Each number is used once: it makes the data key another one.
func (id Identity) Numbered(n uint16) Identity {
	return Identity{Use: UseFile, Shared: true, BlockLog2: id.BlockLog2, Volume: id.Volume, File: id.File.numbered(n)}
}

// Wrapped is the identity of what the copies hold: the intermediate key's of a shared
// header, else its own. It has no commitment: what a copy opens to is proved by the
// file's.
func (id *Identity) Wrapped() Identity {
	w := Identity{Use: id.Use, BlockLog2: id.BlockLog2, Volume: id.Volume, File: id.File}
	if id.Shared {
		w.Use, w.File = UseIntermediate, id.File.numbered(0)
	}
	return w
}

// dataKey is the file's own key, from what a copy holds. The caller wipes it.
func (id *Identity) dataKey(held *Key) (*Key, error) {
	if !id.Shared {
		return held.Clone()
	}
	prk, err := held.extract(id.File.numbered(0))
	if err != nil {
		return nil, err
	}
	defer prk.Wipe()
	raw := make([]byte, KeySize)
	if err := expand(prk, labelFile, id, nil, raw); err != nil {
		return nil, err
	}
	return NewKey(raw)
}
