package keys

import (
	"fmt"

	"kmsfs/crypt"
)

// Check says whether a header is under the key that new files get now. What has
// no name is not met by a rekey's sweep: before such a file gets a name its header
// is checked, or it would stay under a key that nobody keeps.
func (r *Ring) Check(h *crypt.Header) error {
	if h.Volume != r.core.volume {
		return crypt.ErrForeign
	}
	if first := r.first(); h.Find(first) == nil {
		return fmt.Errorf("the file's data key is not under %s, to which the volume was rekeyed while the file had no name: %w", first, crypt.ErrKeyRejected)
	}
	return nil
}
