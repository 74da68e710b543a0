package keys

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	"kmsfs/crypt"
)

// A blob wrapped by a local key:
//
//	version (1) = 1 | key id (16) | salt (16) | nonce (12) | ciphertext (32) | tag (16)
//
// AES-256-GCM under HKDF-SHA-256(secret, salt, "kmsfs local wrap 1"): a key per
// blob, so no number of blobs wears the nonces out. The associated data are the
// version, the key id, the salt and the encryption context.
const (
	blobVersion  = 1
	keyIDSize    = 16
	saltSize     = 16
	blobPrefix   = 1 + keyIDSize + saltSize
	blobOverhead = blobPrefix + 12 + 16
	wrapLabel    = "kmsfs local wrap 1"
)

// Local wraps data keys with key files in a directory, its keyring. A key that is
// disabled, or whose file is gone, is so at the next call. Its errors are those that KMS
// gives.
type Local struct {
	dir    string
	recent recentKeys
}

// NewLocal makes a provider over a keyring directory, which Create makes.
func NewLocal(dir string) *Local { return &Local{dir: dir} }

// Forget wipes the keys that were used within the last second.
func (l *Local) Forget() { l.recent.forget() }

// GenerateDataKey implements Provider.
func (l *Local) GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (*crypt.Key, []byte, error) {
	k, err := crypt.RandomKey()
	if err != nil {
		return nil, nil, newError(KindUnavailable, opGenerate, key, err)
	}
	blob, err := l.wrap(ctx, opGenerate, key, ec, k)
	if err != nil {
		k.Wipe()
		return nil, nil, err
	}
	return k, blob, nil
}

// Encrypt implements Provider.
func (l *Local) Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) ([]byte, error) {
	return l.wrap(ctx, opEncrypt, key, ec, k)
}

// Decrypt implements Provider.
func (l *Local) Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error) {
	return l.unwrap(ctx, opDecrypt, key, ec, blob)
}

// ReEncrypt implements Provider. The data key passes through this process: for
// local keys there is no other place.
func (l *Local) ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) ([]byte, error) {
	k, err := l.unwrap(ctx, opReEncrypt, from, ec, blob)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	return l.wrap(ctx, opReEncrypt, to, ec, k)
}

// Describe implements Provider.
func (l *Local) Describe(ctx context.Context, key string) (Description, error) {
	f, err := l.load(ctx, opDescribe, key)
	if err != nil {
		return Description{}, err
	}
	defer f.wipe()
	return Description{Key: key, State: f.State}, nil
}

func (l *Local) wrap(ctx context.Context, op, key string, ec EncryptionContext, k *crypt.Key) ([]byte, error) {
	f, err := l.loadEnabled(ctx, op, key)
	if err != nil {
		return nil, err
	}
	defer f.wipe()
	blob := make([]byte, blobPrefix, blobOverhead+crypt.KeySize)
	blob[0] = blobVersion
	copy(blob[1:], f.id[:])
	if _, err := rand.Read(blob[1+keyIDSize:]); err != nil {
		return nil, newError(KindUnavailable, op, key, fmt.Errorf("drawing a salt: %w", err))
	}
	aead, err := f.cipher(blob[1+keyIDSize : blobPrefix])
	if err != nil {
		return nil, newError(KindRejected, op, key, err)
	}
	err = k.Use(func(raw []byte) error {
		blob = aead.Seal(blob, nil, raw, wrapAAD(blob[:blobPrefix], ec))
		return nil
	})
	if err != nil {
		return nil, newError(KindRejected, op, key, err)
	}
	return blob, nil
}

var errBadBlob = errors.New("the wrapped key is damaged or belongs to another encryption context")

func (l *Local) unwrap(ctx context.Context, op, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error) {
	f, err := l.loadEnabled(ctx, op, key)
	if err != nil {
		return nil, err
	}
	defer f.wipe()
	if len(blob) != blobOverhead+crypt.KeySize || blob[0] != blobVersion {
		return nil, withCode(newError(KindBadBlob, op, key, errBadBlob), "InvalidCiphertextException")
	}
	if id := [keyIDSize]byte(blob[1:]); id != f.id {
		return nil, withCode(newError(KindIncorrectKey, op, key, fmt.Errorf("the wrapped key was made by the local key with id %x", id)), "IncorrectKeyException")
	}
	aead, err := f.cipher(blob[1+keyIDSize : blobPrefix])
	if err != nil {
		return nil, newError(KindRejected, op, key, err)
	}
	raw, err := aead.Open(make([]byte, 0, crypt.KeySize), nil, blob[blobPrefix:], wrapAAD(blob[:blobPrefix], ec))
	if err != nil {
		return nil, withCode(newError(KindBadBlob, op, key, errBadBlob), "InvalidCiphertextException")
	}
	k, err := crypt.NewKey(raw)
	if err != nil {
		return nil, newError(KindUnavailable, op, key, err)
	}
	return k, nil
}

func withCode(e *Error, code string) *Error { e.Code = code; return e }

// loadEnabled reads a key file for use.
func (l *Local) loadEnabled(ctx context.Context, op, key string) (*keyFile, error) {
	f, err := l.load(ctx, op, key)
	if err != nil {
		return nil, err
	}
	if f.State != stateEnabled {
		f.wipe()
		e := withCode(newError(KindDisabled, op, key, fmt.Errorf("%s is disabled", key)), "DisabledException")
		e.State = stateDisabled
		return nil, e
	}
	return f, nil
}

// wrapAAD is what a blob is bound to besides its key: its own prefix and the
// encryption context, sorted, each string after its length.
func wrapAAD(prefix []byte, ec EncryptionContext) []byte {
	names := make([]string, 0, len(ec))
	for n := range ec {
		names = append(names, n)
	}
	sort.Strings(names)
	aad := append(make([]byte, 0, 256), prefix...)
	aad = binary.LittleEndian.AppendUint32(aad, uint32(len(names)))
	for _, n := range names {
		for _, s := range []string{n, ec[n]} {
			aad = append(binary.LittleEndian.AppendUint32(aad, uint32(len(s))), s...)
		}
	}
	return aad
}

// cipher derives the cipher of one blob.
func (f *keyFile) cipher(salt []byte) (aead cipher.AEAD, err error) {
	err = f.secret.Use(func(secret []byte) error {
		prk := crypt.Extract(secret, salt) // not hkdf.Key, which leaves the secret in memory
		defer clear(prk)
		k, err := hkdf.Expand(sha256.New, prk, wrapLabel, crypt.KeySize)
		if err != nil {
			return fmt.Errorf("deriving a wrapping key: %w", err)
		}
		defer clear(k)
		b, err := aes.NewCipher(k)
		if err != nil {
			return fmt.Errorf("making a wrapping cipher: %w", err)
		}
		aead, err = cipher.NewGCMWithRandomNonce(b)
		return err
	})
	return aead, err
}
