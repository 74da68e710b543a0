package crypt

import "fmt"

// Suspend wipes the keys and keeps all else that the File knows: its size, its end
// (which is ciphertext), its pending gaps. Until Resume, whatever needs a key fails
// with ErrWiped and changes nothing. Who calls it has written or given up what is
// yet to be sealed. It returns the key for growing from nothing, if there was one.
//
// A file with no bytes has no keys to come back to: what is written next goes under
// a fresh one.
func (f *File) Suspend() (unused *Fresh) {
	f.shape.Lock()
	defer f.shape.Unlock()
	unused = f.fresh.Swap(nil)
	c := f.cipher.Load()
	if c == nil {
		return unused
	}
	c.wipe()
	if f.size.Load() == 0 && f.EndErr() == nil {
		f.cipher.Store(nil)
		f.mark.Store(markUnknown)
		return unused
	}
	f.suspended = true
	return unused
}

// Suspended reports whether the File waits for Resume.
func (f *File) Suspended() bool {
	f.shape.RLock()
	defer f.shape.RUnlock()
	return f.suspended
}

// Resume gives a suspended File its keys back; it takes over s. They must be those
// that it had: what is in memory, and what others have sealed meanwhile, is under no
// other.
func (f *File) Resume(s *Secrets) error {
	f.shape.Lock()
	defer f.shape.Unlock()
	if !f.suspended {
		s.Wipe()
		return nil
	}
	if c := f.cipher.Load(); s == nil || c.secrets.Identity() != s.Identity() {
		s.Wipe()
		return fmt.Errorf("the header is no longer that of the open file: %w", ErrDamaged)
	}
	// A new sealer, so that a write which sealed its blocks under the old one starts
	// over.
	f.cipher.Store(newSealer(s))
	f.suspended = false
	return nil
}

// Under is what the secrets of the contents depend on (Secrets.Under); nil while
// nothing is stored. It waits for nothing.
func (f *File) Under() []string { return f.Secrets().Under() }

// FreshUnder is the same of the key for growing from nothing.
func (f *File) FreshUnder() []string {
	if fresh := f.fresh.Load(); fresh != nil {
		return fresh.Secrets.Under()
	}
	return nil
}
