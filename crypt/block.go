package crypt

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
)

// Limits of one key epoch.
const (
	// epochRecords is how many records are sealed under one epoch's key:
	// far below the 2^32 random nonces that NIST SP 800-38D allows per key,
	// so that other mounts may add theirs.
	epochRecords = 1 << 28
	// epochCache bounds the ciphers kept for reading. Each mount that writes
	// to a file adds an epoch; whoever plants more costs us one HKDF a record.
	epochCache = 64
)

// A sealer seals and opens the records of one generation of a file. Its ciphers
// live on the Go heap and go with it.
type sealer struct {
	secrets *Secrets

	mu     sync.Mutex
	byKey  map[uint32]cipher.AEAD // guarded by mu
	epoch  uint32                 // guarded by mu; what we seal under, if left > 0
	left   int64                  // guarded by mu; records until the next epoch
	sealed cipher.AEAD            // guarded by mu; cipher of epoch
}

func newSealer(s *Secrets) *sealer {
	return &sealer{secrets: s, byKey: make(map[uint32]cipher.AEAD)}
}

func (s *sealer) wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets.Wipe()
	clear(s.byKey)
	s.left, s.sealed = 0, nil
}

// forSealing returns the epoch and cipher for n more records. The epoch is
// random: no counter survives on disk, and several hosts may write.
func (s *sealer) forSealing(n int64) (uint32, cipher.AEAD, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left < n {
		var raw [epochSize]byte
		if _, err := rand.Read(raw[:]); err != nil {
			return 0, nil, fmt.Errorf("drawing a key epoch: %w", err)
		}
		epoch := binary.LittleEndian.Uint32(raw[:])
		aead, err := s.cipherLocked(epoch)
		if err != nil {
			return 0, nil, err
		}
		s.epoch, s.sealed, s.left = epoch, aead, max(n, epochRecords)
	}
	s.left -= n
	return s.epoch, s.sealed, nil
}

func (s *sealer) forOpening(epoch uint32) (cipher.AEAD, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cipherLocked(epoch)
}

func (s *sealer) cipherLocked(epoch uint32) (cipher.AEAD, error) {
	if aead, ok := s.byKey[epoch]; ok {
		return aead, nil
	}
	aead, err := s.secrets.blockAEAD(epoch)
	if err != nil {
		return nil, err
	}
	if len(s.byKey) >= epochCache {
		clear(s.byKey)
	}
	s.byKey[epoch] = aead
	return aead, nil
}

// A run seals consecutive records with one look at the epoch.
type run struct {
	epoch uint32
	aead  cipher.AEAD
	aad   []byte // 8 bytes: the block's index
}

func (s *sealer) start(records int64) (run, error) {
	epoch, aead, err := s.forSealing(records)
	return run{epoch, aead, make([]byte, 8)}, err
}

// seal appends the record of a block to dst.
func (r run) seal(dst []byte, block int64, plain []byte) []byte {
	binary.LittleEndian.PutUint64(r.aad, uint64(block))
	dst = binary.LittleEndian.AppendUint32(dst, r.epoch)
	return r.aead.Seal(dst, nil, plain, r.aad)
}

// An opener opens consecutive records; most share an epoch.
type opener struct {
	s     *sealer
	epoch uint32
	aead  cipher.AEAD
	aad   []byte
}

func (s *sealer) opener() *opener { return &opener{s: s, aad: make([]byte, 8)} }

// open decrypts the record of a block into dst, which has exactly the record's
// plaintext length. dst is unspecified if the record does not authenticate.
func (o *opener) open(dst []byte, block int64, record []byte) error {
	if len(record) != len(dst)+RecordOverhead {
		return ErrDamaged
	}
	epoch := binary.LittleEndian.Uint32(record)
	if o.aead == nil || epoch != o.epoch {
		aead, err := o.s.forOpening(epoch)
		if err != nil {
			return err
		}
		o.epoch, o.aead = epoch, aead
	}
	binary.LittleEndian.PutUint64(o.aad, uint64(block))
	if _, err := o.aead.Open(dst[:0:len(dst)], nil, record[epochSize:], o.aad); err != nil {
		return ErrDamaged
	}
	return nil
}

func isZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}
