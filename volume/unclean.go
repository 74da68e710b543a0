package volume

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/internal/durable"
)

// MarkerFile says whether the volume is mounted for writing. Who finds that it is, and
// has the lock, knows that a mount ended uncleanly. It is written in place, since to
// make and remove it would change the time of the users' root directory: by turns in
// two places, so that a power cut leaves one of them whole.
const MarkerFile = "kmsfs.unclean"

// markerPlace is how far the two places are apart, in bytes; a marker fits into a sector.
const markerPlace = 4096

// A Marker is what MarkerFile says.
type Marker struct {
	BootID string    `json:"boot_id"` // of the machine
	Since  time.Time `json:"since"`   // all that was written before was made durable
}

type markerText struct {
	Seq   uint64 `json:"seq"`
	Clean bool   `json:"clean"`
	Marker
	MAC []byte `json:"mac,omitempty"` // of the JSON without it, under the volume key
}

// SameBoot reports whether the machine has gone on since: then the mount was killed,
// and what it wrote is there.
func (m *Marker) SameBoot() bool { return m.BootID == bootID() }

// MarkMounted sets the marker, or moves it on, durably. since is when all that was
// written before had been made durable: files that were not changed since need no look
// after a power cut.
func (v *Volume) MarkMounted(since time.Time) error {
	return v.mark(markerText{Marker: Marker{bootID(), since.UTC()}})
}

// Unmark says, durably, that the mount ended well.
func (v *Volume) Unmark() error {
	return v.mark(markerText{Clean: true, Marker: Marker{BootID: bootID()}})
}

func (v *Volume) mark(m markerText) error {
	fd, err := unix.Openat(v.root, MarkerFile, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err == nil {
		defer unix.Close(fd)
		err = v.writeMarker(fd, &m)
	}
	if err != nil {
		return fmt.Errorf("writing %s in %s: %w", MarkerFile, v.path, err)
	}
	return nil
}

func (v *Volume) writeMarker(fd int, m *markerText) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return errors.New("it is not ours: remove it and try again")
	}
	last, _, err := v.readMarker(fd)
	if err != nil {
		return err
	}
	if last != nil {
		m.Seq = last.Seq + 1
	}
	if m.MAC, err = v.markerMAC(m); err != nil {
		return err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	line := make([]byte, 512)
	copy(line, append(text, '\n'))
	if _, err := NewBacking(fd).WriteAt(line, int64(m.Seq%2)*markerPlace); err != nil {
		return err
	}
	if st.Size == 0 { // its name, too
		if err := durable.SyncDir(v.root); err != nil {
			return err
		}
	}
	return retry(func() error { return unix.Fdatasync(fd) })
}

func (v *Volume) markerMAC(m *markerText) ([]byte, error) {
	bare := *m
	bare.MAC = nil
	text, err := json.Marshal(bare)
	if err != nil {
		return nil, err
	}
	return v.secrets.MarkerMAC(text)
}

// readMarker finds the newer of two markers that were made with the volume key; nil if
// there is none. forged says that there is something else.
func (v *Volume) readMarker(fd int) (newest *markerText, forged bool, err error) {
	for place := range int64(2) {
		line := make([]byte, 512)
		n, err := NewBacking(fd).ReadAt(line, place*markerPlace)
		if err != nil && err != io.EOF {
			return nil, false, err
		}
		line = bytes.TrimRight(line[:n], "\x00\n")
		var m markerText
		if json.Unmarshal(line, &m) != nil {
			forged = forged || len(line) > 0
			continue
		}
		mac, err := v.markerMAC(&m)
		if err != nil {
			return nil, false, err
		}
		if !hmac.Equal(mac, m.MAC) {
			forged = true
		} else if newest == nil || m.Seq > newest.Seq {
			newest = &m
		}
	}
	return newest, forged, nil
}

// Unclean reads the marker that a mount left; nil if the last one ended well. If nothing
// that stands there was made with the volume key, that is damage.
func (v *Volume) Unclean() (*Marker, error) {
	fd, err := unix.Openat(v.root, MarkerFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("opening %s in %s: %w", MarkerFile, v.path, err)
	}
	defer unix.Close(fd)
	m, forged, err := v.readMarker(fd)
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading %s in %s: %w", MarkerFile, v.path, err)
	case m == nil && forged:
		return nil, fmt.Errorf("%s in %s was not made with the volume key: %w", MarkerFile, v.path, crypt.ErrDamaged)
	case m == nil || m.Clean:
		return nil, nil
	}
	return &m.Marker, nil
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
// must be locked, and nothing served yet. What was cut is durable when it returns. Files
// whose synced end is to be put back yet (TailRecovery.Held) are left alone: after a cut
// it would have no place.
func (v *Volume) RecoverEnds(ctx context.Context, since time.Time, open KeyOpener) (r EndRecovery) {
	var mu sync.Mutex
	var jobs sync.WaitGroup
	slots := make(chan struct{}, endJobs)
	after := since.Add(-markerSlack)
	kept := map[uint64]bool{}
	for _, h := range v.heldTails {
		kept[h.inode.Ino] = true
	}
	err := v.Walk(ctx, func(it *Item) error {
		if it.Err != nil || kept[it.Ino] {
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
