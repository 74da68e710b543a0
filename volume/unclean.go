package volume

import (
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// MarkerFile stands while the volume is mounted for writing. Who finds it knows that a
// mount ended uncleanly.
const MarkerFile = "kmsfs.unclean"

const maxMarker = 4096

// A Marker is what MarkerFile says.
type Marker struct {
	BootID string    `json:"boot_id"` // of the machine
	Since  time.Time `json:"since"`   // all that was written before was made durable
}

type markerText struct {
	Marker
	MAC []byte `json:"mac"` // of the Marker as JSON, under the volume key
}

// SameBoot reports whether the machine has gone on since: then the mount was killed,
// and what it wrote is there.
func (m *Marker) SameBoot() bool { return m.BootID == bootID() }

// MarkMounted makes the marker, or replaces it, durably. since is when all that was
// written before had been made durable: files that were not changed since need no look
// after a power cut.
func (v *Volume) MarkMounted(since time.Time) error {
	m := markerText{Marker: Marker{bootID(), since.UTC()}}
	var err error
	if m.MAC, err = v.markerMAC(&m.Marker); err != nil {
		return err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := durable.ReplaceAt(v.root, MarkerFile, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing %s in %s: %w", MarkerFile, v.path, err)
	}
	return nil
}

func (v *Volume) markerMAC(m *Marker) ([]byte, error) {
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	return v.secrets.MarkerMAC(text)
}

// Unclean reads the marker that a mount left; nil if the last one ended well. One that
// nobody with the volume key made is damage.
func (v *Volume) Unclean() (*Marker, error) {
	text, err := durable.ReadAt(v.root, MarkerFile, maxMarker)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s in %s: %w", MarkerFile, v.path, err)
	}
	var m markerText
	if json.Unmarshal(text, &m) != nil {
		return nil, fmt.Errorf("%s in %s can't be read: %w", MarkerFile, v.path, crypt.ErrDamaged)
	}
	mac, err := v.markerMAC(&m.Marker)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(mac, m.MAC) {
		return nil, fmt.Errorf("%s in %s was not made with the volume key: %w", MarkerFile, v.path, crypt.ErrDamaged)
	}
	return &m.Marker, nil
}

// Unmark removes the marker durably.
func (v *Volume) Unmark() error {
	err := unix.Unlinkat(v.root, MarkerFile, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err == nil {
		err = durable.SyncDir(v.root)
	}
	if err != nil {
		return fmt.Errorf("removing %s in %s: %w", MarkerFile, v.path, err)
	}
	return nil
}

// An EndCut is a bad end that was cut off.
type EndCut struct {
	Ino  uint64 `json:"inode"`
	From int64  `json:"from"` // plaintext bytes before
	To   int64  `json:"to"`   // and after
}

// EndRecovery says what became of files that were changed before a mount ended
// uncleanly.
type EndRecovery struct {
	Looked int      // files that were changed since the marker's time
	Cut    []EndCut // those whose bad end was cut off
	Left   int      // those whose end is bad still, or could not be looked at
	Errs   []error
}

const (
	// markerSlack is how far the clock that stamps files may be behind ours.
	markerSlack = 5 * time.Second
	endJobs     = 8
)

// RecoverEnds cuts bad ends of files that were changed since a time back to the last
// good record: a power cut leaves them where a file grew and was not synced. The volume
// must be locked, and nothing served yet. What was cut is durable when it returns.
func (v *Volume) RecoverEnds(ctx context.Context, since time.Time, open KeyOpener) (r EndRecovery) {
	var mu sync.Mutex
	var jobs sync.WaitGroup
	slots := make(chan struct{}, endJobs)
	after := since.Add(-markerSlack)
	err := v.Walk(ctx, func(it *Item) error {
		if it.Err != nil {
			return nil
		}
		it.Hold()
		slots <- struct{}{}
		jobs.Go(func() {
			defer func() { it.Release(); <-slots }()
			looked, cut, err := v.recoverEnd(ctx, it, after, open)
			mu.Lock()
			defer mu.Unlock()
			if looked {
				r.Looked++
			}
			if cut != nil {
				r.Cut = append(r.Cut, *cut)
			}
			if err != nil {
				r.Left++
				r.Errs = append(r.Errs, fmt.Errorf("the end of inode %d: %w", it.Ino, err))
			}
		})
		return nil
	})
	jobs.Wait()
	if err != nil {
		r.Errs = append(r.Errs, err)
	}
	slices.SortFunc(r.Cut, func(a, b EndCut) int { return int(int64(a.Ino) - int64(b.Ino)) })
	return r
}

// recoverEnd looks at one file. Links are met several times: what is good needs nothing.
func (v *Volume) recoverEnd(ctx context.Context, it *Item, after time.Time, open KeyOpener) (looked bool, cut *EndCut, err error) {
	raw, st, err := it.Peek()
	if errors.Is(err, unix.EACCES) {
		raw, st, err = it.PeekOwn()
	}
	if err != nil || st.Size == 0 || time.Unix(st.Ctim.Unix()).Before(after) {
		return false, nil, nil // what can't be looked at is told when it is opened
	}
	h, err := v.ParseHeader(raw)
	if err != nil {
		return false, nil, nil
	}
	s, err := open(ctx, h)
	if err != nil {
		return true, nil, err
	}
	fd, err := it.openToMend()
	if err != nil {
		s.Wipe()
		return true, nil, err
	}
	defer unix.Close(fd)
	f, err := crypt.NewFile(NewBacking(fd), v.BlockSize(), st.Size, s)
	if err != nil {
		return true, nil, err
	}
	defer f.Close()
	if f.EndErr() == nil {
		return true, nil, nil
	}
	from := f.Size()
	to, err := f.CutEnd()
	if err != nil {
		return true, nil, err
	}
	return true, &EndCut{Ino: it.Ino, From: from, To: to}, NewBacking(fd).Sync()
}
