package rekey

import (
	"crypto/sha256"
	"sync"

	"kmsfs/crypt"
)

// maxDistinct bounds what a plan remembers, at about 40 bytes each.
const maxDistinct = 1 << 18

// distinct counts what the key service will be asked for: once for each file, or, where
// files share what their copies hold, once for each of those. Beyond maxDistinct the
// count may be too high: it is never too low.
type distinct struct {
	mu   sync.Mutex
	seen map[[16]byte]struct{} // guarded by mu; hashes of a key's name and a blob
	n    map[string]int        // guarded by mu; by key
}

func newDistinct() *distinct {
	return &distinct{seen: map[[16]byte]struct{}{}, n: map[string]int{}}
}

// add counts the copy labelled label of a header, whose key is asked by the name key.
func (d *distinct) add(key string, h *crypt.Header, label string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h.Shared {
		sum := sha256.Sum256(append([]byte(key+"\x00"), exact(h, label).Blob...))
		id := [16]byte(sum[:])
		if _, again := d.seen[id]; again {
			return
		}
		if len(d.seen) < maxDistinct {
			d.seen[id] = struct{}{}
		}
	}
	d.n[key]++
}
