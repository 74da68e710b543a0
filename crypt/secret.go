package crypt

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"syscall"
)

// KeySize is the size of a data key and of every derived 256-bit key, in bytes.
const KeySize = 32

const redacted = "crypt.Key(redacted)"

// A Key is 32 secret bytes kept outside the Go heap: in memory that is locked
// (as far as RLIMIT_MEMLOCK allows), left out of core dumps, and wiped when the
// key is. Every way of printing it yields a fixed word.
//
// A Key has one owner, who wipes it; anyone who wants to keep it takes a Clone.
type Key struct {
	mu   sync.RWMutex
	slot *[KeySize]byte // guarded by mu; nil once wiped
}

// ErrWiped is what using a key after Wipe yields.
var ErrWiped = errors.New("the key was wiped")

// NewKey takes over raw, which must be 32 bytes long: it copies them into
// locked memory and overwrites raw, also on error.
func NewKey(raw []byte) (*Key, error) {
	defer clear(raw)
	if len(raw) != KeySize {
		return nil, fmt.Errorf("a data key has %d bytes, got %d", KeySize, len(raw))
	}
	slot, err := secrets.take()
	if err != nil {
		return nil, err
	}
	copy(slot[:], raw)
	k := &Key{slot: slot}
	runtime.SetFinalizer(k, (*Key).Wipe) // a lost key is still wiped
	return k, nil
}

// RandomKey makes a fresh random key.
func RandomKey() (*Key, error) {
	raw := make([]byte, KeySize)
	if _, err := rand.Read(raw); err != nil {
		return nil, fmt.Errorf("drawing a random key: %w", err)
	}
	return NewKey(raw)
}

// Use calls f with the key's bytes. f must neither keep nor change them.
func (k *Key) Use(f func(raw []byte) error) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.slot == nil {
		return ErrWiped
	}
	return f(k.slot[:])
}

// Clone copies the key into a slot of its own.
func (k *Key) Clone() (*Key, error) {
	var c *Key
	err := k.Use(func(raw []byte) error {
		slot, err := secrets.take()
		if err != nil {
			return err
		}
		copy(slot[:], raw)
		c = &Key{slot: slot}
		runtime.SetFinalizer(c, (*Key).Wipe)
		return nil
	})
	return c, err
}

// Equal compares two keys in constant time. A wiped key equals nothing.
func (k *Key) Equal(o *Key) bool {
	same := false
	_ = k.Use(func(a []byte) error {
		if k == o {
			same = true
			return nil
		}
		return o.Use(func(b []byte) error {
			same = subtle.ConstantTimeCompare(a, b) == 1
			return nil
		})
	})
	return same
}

// Wipe overwrites the key and gives its memory back. It may be called twice.
func (k *Key) Wipe() {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.slot == nil {
		return
	}
	secrets.put(k.slot)
	k.slot = nil
	runtime.SetFinalizer(k, nil)
}

// Format implements fmt.Formatter: no verb prints the key.
func (*Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements fmt.Stringer with a fixed word.
func (*Key) String() string { return redacted }

// GoString implements fmt.GoStringer with a fixed word.
func (*Key) GoString() string { return redacted }

// MarshalText implements encoding.TextMarshaler with a fixed word; encoding/json
// and log/slog use it too.
func (*Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// secrets is the process's store of key slots.
var secrets arena

// An arena hands out 32-byte slots from anonymous mappings.
type arena struct {
	mu   sync.Mutex
	free []*[KeySize]byte // guarded by mu
	used int              // guarded by mu
	lost error            // guarded by mu; the first refusal to lock memory
}

const arenaChunk = 64 << 10 // bytes mapped at a time: 2,048 keys

func (a *arena) take() (*[KeySize]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 {
		if err := a.growLocked(); err != nil {
			return nil, err
		}
	}
	slot := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.used++
	return slot, nil
}

func (a *arena) put(slot *[KeySize]byte) {
	clear(slot[:])
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free = append(a.free, slot)
	a.used--
}

func (a *arena) growLocked() error {
	mem, err := syscall.Mmap(-1, 0, arenaChunk, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return fmt.Errorf("mapping memory for keys: %w", err)
	}
	// Locking can fail under a small RLIMIT_MEMLOCK: the keys still work, but
	// may reach swap. The program warns about it (MemoryLocked).
	if err := syscall.Mlock(mem); err != nil && a.lost == nil {
		a.lost = err
	}
	if err := syscall.Madvise(mem, madvDontDump); err != nil && a.lost == nil {
		a.lost = err
	}
	_ = syscall.Madvise(mem, madvWipeOnFork)
	for off := 0; off < len(mem); off += KeySize {
		a.free = append(a.free, (*[KeySize]byte)(mem[off:off+KeySize]))
	}
	return nil
}

// From madvise(2); package syscall does not name them.
const (
	madvDontDump   = 16
	madvWipeOnFork = 18
)

// MemoryLocked reports whether every key so far lies in memory that can neither
// be swapped out nor dumped; if not, with the first refusal.
func MemoryLocked() error {
	secrets.mu.Lock()
	defer secrets.mu.Unlock()
	return secrets.lost
}

// LiveKeys says how many keys exist that have not been wiped.
func LiveKeys() int {
	secrets.mu.Lock()
	defer secrets.mu.Unlock()
	return secrets.used
}
