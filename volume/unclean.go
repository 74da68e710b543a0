package volume

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
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

// Behind the two places are two more, used by turns too, for lists of inode numbers: of
// the files that a mount could not look at after an unclean end. A marker names its list
// by place, length and digest. Most lists are empty.
const (
	leftPlace = 2 * markerPlace
	leftMost  = 1 << 20 // inode numbers in a list
	leftSize  = 8 * leftMost
)

// ErrTooManyLeft says that a list of files to be looked at is longer than can be kept.
var ErrTooManyLeft = errors.New("too many files are left to be looked at")

// A Marker is what MarkerFile says.
type Marker struct {
	BootID string    `json:"boot_id"` // of the machine
	Since  time.Time `json:"since"`   // all that was written before was made durable
	// Left are files that an earlier mount was to look at and could not.
	Left []uint64 `json:"-"`
	// Ended: the last mount ended well, there is only what is Left.
	Ended bool `json:"-"`
}

// ErrOldMarker: the marker is from before one that this client knows of.
var ErrOldMarker = errors.New("it is older than one that this client has seen: somebody put it back, or the directory comes from a snapshot")

type markerText struct {
	Seq   uint64 `json:"seq"`
	Clean bool   `json:"clean"`
	Marker
	LeftAt  int64  `json:"left_at,omitempty"` // offset of the list; 0: there is none
	LeftLen int    `json:"left,omitempty"`    // inode numbers in it
	LeftSum []byte `json:"left_sum,omitempty"`
	MAC     []byte `json:"mac,omitempty"` // of the JSON without it, under the volume key
}

// SameBoot reports whether the machine has gone on since: then the mount was killed,
// and what it wrote is there.
func (m *Marker) SameBoot() bool { return m.BootID == bootID() }

// MarkAfter has no marker count whose number is less than first, and writes none: whoever
// writes the backing directory could put one back that stood there while the volume was
// mounted, and have the ends cut off of files that he damaged since.
func (v *Volume) MarkAfter(first uint64) { v.markFirst = first }

// Marked is the number of the marker that was written last, 0 if none was. Each has a
// greater one than those before it.
func (v *Volume) Marked() uint64 { return v.marked }

// MarkMounted sets the marker, or moves it on, durably. since is when all that was
// written before had been made durable: files that were not changed since need no look
// after a power cut.
func (v *Volume) MarkMounted(since time.Time) error {
	return v.mark(markerText{Marker: Marker{BootID: bootID(), Since: since.UTC()}}, nil)
}

// MarkLeft is MarkMounted at the begin of a mount that has looked at what the last one
// left: what is yet to be looked at are these files. That stays so when the mount ends.
func (v *Volume) MarkLeft(since time.Time, left []uint64) error {
	if len(left) > leftMost {
		return ErrTooManyLeft
	}
	return v.mark(markerText{Marker: Marker{BootID: bootID(), Since: since.UTC()}}, &left)
}

// Unmark says, durably, that the mount ended well.
func (v *Volume) Unmark() error {
	return v.mark(markerText{Clean: true, Marker: Marker{BootID: bootID()}}, nil)
}

// mark writes a marker; without a list of files that are left, with that of the last one.
func (v *Volume) mark(m markerText, left *[]uint64) error {
	fd, err := unix.Openat(v.root, MarkerFile, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err == nil {
		defer unix.Close(fd)
		err = v.writeMarker(fd, &m, left)
	}
	if err != nil {
		return fmt.Errorf("writing %s in %s: %w", MarkerFile, v.path, err)
	}
	return nil
}

func (v *Volume) writeMarker(fd int, m *markerText, left *[]uint64) error {
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
		m.Seq = max(last.Seq+1, v.markFirst)
		if m.Seq%2 == last.Seq%2 { // its place is not that of the last
			m.Seq++
		}
		m.LeftAt, m.LeftLen, m.LeftSum = last.LeftAt, last.LeftLen, last.LeftSum
	}
	if last == nil {
		m.Seq = v.markFirst
	}
	if left != nil {
		if err := m.writeLeft(fd, *left); err != nil {
			return err
		}
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
	if err := retry(func() error { return unix.Fdatasync(fd) }); err != nil {
		return err
	}
	v.marked = m.Seq
	return nil
}

// writeLeft writes a list, not over the one of the last marker, which counts until the
// new marker is durable.
func (m *markerText) writeLeft(fd int, left []uint64) error {
	at := int64(leftPlace)
	if m.LeftAt == at {
		at += leftSize
	}
	m.LeftAt, m.LeftLen, m.LeftSum = 0, 0, nil
	if len(left) == 0 {
		return nil
	}
	list := make([]byte, 0, 8*len(left))
	for _, ino := range left {
		list = binary.LittleEndian.AppendUint64(list, ino)
	}
	if _, err := NewBacking(fd).WriteAt(list, at); err != nil {
		return err
	}
	sum := sha256.Sum256(list)
	m.LeftAt, m.LeftLen, m.LeftSum = at, len(left), sum[:]
	return retry(func() error { return unix.Fdatasync(fd) })
}

// readLeft reads the list that an authentic marker names.
func (m *markerText) readLeft(fd int) error {
	if m.LeftAt == 0 {
		return nil
	}
	if m.LeftLen < 0 || m.LeftLen > leftMost {
		return crypt.ErrDamaged
	}
	list := make([]byte, 8*m.LeftLen)
	if n, err := NewBacking(fd).ReadAt(list, m.LeftAt); n < len(list) {
		if err == io.EOF {
			err = crypt.ErrDamaged
		}
		return err
	}
	if sum := sha256.Sum256(list); !bytes.Equal(sum[:], m.LeftSum) {
		return crypt.ErrDamaged
	}
	for ; len(list) > 0; list = list[8:] {
		m.Left = append(m.Left, binary.LittleEndian.Uint64(list))
	}
	return nil
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

// Unclean reads the marker that a mount left; nil if the last one ended well and nothing
// is left to be looked at. If nothing that stands there was made with the volume key, that
// is damage.
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
	case m == nil || m.Clean && m.LeftAt == 0:
		return nil, nil
	case m.Seq < v.markFirst:
		return nil, fmt.Errorf("%s in %s does not count: %w", MarkerFile, v.path, ErrOldMarker)
	}
	if err := m.readLeft(fd); err != nil {
		return nil, fmt.Errorf("reading the list of files in %s in %s: %w", MarkerFile, v.path, err)
	}
	m.Ended = m.Clean
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
	Looked int      // files that were changed since the marker's time, or left
	Cut    []EndCut // those whose bad end was cut off
	Left   int      // those whose end is bad still, or could not be looked at
	Later  []uint64 // of them, those that the next mount is to look at
	Errs   []error
}

const (
	// markerSlack is how far the clock that stamps files may be behind ours.
	markerSlack = 5 * time.Second
	// endErrs bounds the list of errors: each stands in the log.
	endErrs = 100
)

// RecoverEnds cuts bad ends of files that were changed since the marker's time back to the
// last good record: a power cut leaves them where a file grew and was not synced. The
// volume must be locked, and nothing served yet. What was cut is durable when it returns.
// Files whose synced end is to be put back yet (TailRecovery.Held) are left to the next
// mount: after a cut it would have no place. So are those whose key can't be had.
func (v *Volume) RecoverEnds(ctx context.Context, m *Marker, open KeyOpener) (r EndRecovery) {
	w := endWalk{v: v, open: open, left: map[uint64]bool{}, kept: map[uint64]bool{}, linked: map[uint64]bool{}, after: m.Since.Add(-markerSlack), only: m.Ended}
	for _, ino := range m.Left {
		w.left[ino] = true
	}
	for _, h := range v.heldTails {
		w.kept[h.inode.Ino] = true
	}
	jobs := newJobs()
	err := v.Walk(ctx, func(it *Item) error {
		if it.Err == nil && (!w.only || w.left[it.Ino]) {
			jobs.on(it, func() { w.look(ctx, it, &r) })
		}
		return nil
	})
	jobs.running.Wait()
	if err != nil {
		r.Errs = append(r.Errs, err)
	}
	slices.SortFunc(r.Cut, func(a, b EndCut) int { return cmp.Compare(a.Ino, b.Ino) })
	slices.Sort(r.Later)
	return r
}

// An endWalk looks for files with bad ends.
type endWalk struct {
	v          *Volume
	open       KeyOpener
	after      time.Time
	only       bool // only those that are left
	left, kept map[uint64]bool

	mu     sync.Mutex      // guards the EndRecovery
	linked map[uint64]bool // guarded by mu; files of several links that were met
}

// look looks at one file.
func (w *endWalk) look(ctx context.Context, it *Item, r *EndRecovery) {
	h, stored := w.candidate(it)
	if h == nil {
		return
	}
	var cut *EndCut
	err := ErrLater
	if !w.kept[it.Ino] {
		cut, err = w.v.recoverEnd(ctx, it, h, stored, w.open)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r.Looked++
	if cut != nil {
		r.Cut = append(r.Cut, *cut)
	}
	if err == nil {
		return
	}
	r.Left++
	if !errors.Is(err, crypt.ErrDamaged) {
		r.Later = append(r.Later, it.Ino)
	}
	if !errors.Is(err, ErrLater) && len(r.Errs) < endErrs {
		r.Errs = append(r.Errs, fmt.Errorf("the end of inode %d: %w", it.Ino, err))
	}
}

// candidate reads the header of a file that is to be looked at; nil of any other.
func (w *endWalk) candidate(it *Item) (h *crypt.Header, stored int64) {
	raw, st, err := it.Peek()
	if errors.Is(err, unix.EACCES) {
		raw, st, err = it.PeekOwn()
	}
	if err != nil || st.Size == 0 || !w.left[it.Ino] && time.Unix(st.Ctim.Unix()).Before(w.after) {
		return nil, 0 // what can't be looked at is told when it is opened
	}
	if st.Nlink > 1 && w.met(it.Ino) {
		return nil, 0
	}
	if h, err = w.v.ParseHeader(raw); err != nil {
		return nil, 0
	}
	return h, st.Size
}

// met reports whether another link of a file was met.
func (w *endWalk) met(ino uint64) (before bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before = w.linked[ino]
	w.linked[ino] = true
	return before
}

func (v *Volume) recoverEnd(ctx context.Context, it *Item, h *crypt.Header, stored int64, open KeyOpener) (cut *EndCut, err error) {
	s, err := open(ctx, h)
	if err != nil {
		return nil, err
	}
	fd, err := it.openToMend()
	if err != nil {
		s.Wipe()
		return nil, err
	}
	defer unix.Close(fd)
	f, err := crypt.NewFile(NewBacking(fd), v.BlockSize(), stored, s)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.EndErr() == nil {
		return nil, nil
	}
	from := f.Size()
	to, err := f.CutEnd()
	if err != nil {
		return nil, err
	}
	return &EndCut{Ino: it.Ino, From: from, To: to}, NewBacking(fd).Sync()
}
