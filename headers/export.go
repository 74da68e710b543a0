package headers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// Outcome is what became of one file or directory.
type Outcome string

// The outcomes of an export.
const (
	Exported Outcome = "exported"
	Empty    Outcome = "empty"    // holds no bytes: it has no header that counts, or needs none
	Bad      Outcome = "bad"      // has no valid header of this volume, or no id for its entries
	Failed   Outcome = "failed"   // could not be read or written
	Vanished Outcome = "vanished" // deleted or renamed after it was listed
)

// Counts are numbers of files, or of directories, by outcome.
type Counts map[Outcome]int

// An Event is one file or directory and what became of it.
type Event struct {
	Kind    Kind
	Path    string // stored
	Outcome Outcome
	Err     error
}

// An ExportReport is what an export did.
type ExportReport struct {
	Files, Dirs Counts
	// Changed: the volume's keys changed meanwhile, so kmsfs.toml in the stream and
	// the headers may not go together.
	Changed bool
}

// Export writes a stream of the volume, which must be locked: with its key, a
// walk tells plain paths. It changes nothing and asks for no key. What can't be
// exported is an event, and the rest goes on. What is renamed on a live mount
// meanwhile may be missed.
func Export(ctx context.Context, v *volume.Volume, to io.Writer, event func(Event)) (ExportReport, error) {
	e := &export{v: v, event: event, report: ExportReport{Files: Counts{}, Dirs: Counts{}}}
	if v.Unlocked() {
		return e.report, errors.New("an export wants a locked volume")
	}
	settings, err := v.EncodeSettings()
	if err != nil {
		return e.report, err
	}
	if e.w, err = NewWriter(to, v.ID(), settings); err != nil {
		return e.report, err
	}
	if err := v.WalkAll(ctx, e.file, e.dir); err != nil {
		return e.report, err
	}
	if err := e.w.Close(); err != nil {
		return e.report, err
	}
	e.report.Changed, err = v.Reload()
	return e.report, err
}

type export struct {
	v      *volume.Volume
	w      *Writer
	event  func(Event)
	report ExportReport
}

func (e *export) count(c Counts, ev Event) {
	c[ev.Outcome]++
	if e.event != nil {
		e.event(ev)
	}
}

// errTooDeep is what a Writer has against a record that was just read from disk.
var errTooDeep = fmt.Errorf("its path is longer than the %d bytes that an export can hold", volume.MaxStoredPath)

// file exports one file. Only a failure to write ends the walk.
func (e *export) file(it *volume.Item) error {
	out, rec, err := e.read(it)
	if rec != nil {
		werr := e.w.Write(rec)
		if werr != nil && !errors.Is(werr, ErrStream) {
			return werr
		}
		if werr != nil {
			out, err = Failed, errTooDeep
		}
	}
	e.count(e.report.Files, Event{Kind: KindFile, Path: it.Path(), Outcome: out, Err: err})
	return nil
}

func (e *export) read(it *volume.Item) (Outcome, *Record, error) {
	fd, err := it.Open(unix.O_PATH)
	switch {
	case errors.Is(err, volume.ErrGone):
		return Vanished, nil, nil
	case it.Err != nil: // below a directory that moved, any number of files is missed
		return Failed, nil, it.Err
	case err != nil:
		return Failed, nil, fmt.Errorf("opening it: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Failed, nil, err
	}
	if st.Size == 0 {
		return Empty, nil, nil
	}
	return e.record(fd, it.Path(), st.Size)
}

// record reads header and mark, again if the file got new contents in between: the
// two belong together.
func (e *export) record(fd int, path string, size int64) (Outcome, *Record, error) {
	for range restarts {
		raw, err := volume.ReadHeader(fd)
		if err != nil && !errors.Is(err, crypt.ErrDamaged) {
			return Failed, nil, fmt.Errorf("reading its header: %w", err)
		}
		var h *crypt.Header
		if err == nil {
			h, err = e.v.ParseHeader(raw)
		}
		if err != nil {
			return Bad, nil, err
		}
		mark, err := readMark(fd)
		if err != nil {
			return Failed, nil, err
		}
		if again, err := volume.ReadHeader(fd); mark != nil && (err != nil || !bytes.Equal(again, raw)) {
			continue
		}
		return Exported, &Record{Kind: KindFile, Path: path, File: h.File, Size: size, Value: raw, Mark: mark}, nil
	}
	return Failed, nil, volume.ErrHeaderChanged
}

// restarts bounds how often one file is begun again because its header changed.
const restarts = 10

// readMark reads a sparse mark. What does not look like one permits nothing, and
// is not kept.
func readMark(fd int) ([]byte, error) {
	mark, err := volume.NewBacking(fd).SparseMark()
	if errors.Is(err, crypt.ErrDamaged) || err == nil && len(mark) != markSize {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading its sparse mark: %w", err)
	}
	return mark, nil
}

// dir exports one directory's id. With plain names directories have none.
func (e *export) dir(path string, fd int) error {
	if e.v.Names() == volume.NamesPlain {
		return nil
	}
	out, err := Exported, error(nil)
	raw, rerr := volume.StoredDirID(fd)
	switch {
	case rerr != nil:
		out, err = Failed, rerr
	case len(raw) == volume.DirXattrSize:
		werr := e.w.Write(&Record{Kind: KindDir, Path: path, Value: raw})
		if werr != nil && !errors.Is(werr, ErrStream) {
			return werr
		}
		if werr != nil {
			out, err = Failed, errTooDeep
		}
	default:
		out, err = e.noID(fd, raw)
	}
	e.count(e.report.Dirs, Event{Kind: KindDir, Path: path, Outcome: out, Err: err})
	return nil
}

// noID judges a directory without an id that is one: nothing is lost if nothing is
// in it.
func (e *export) noID(fd int, raw []byte) (Outcome, error) {
	needs, err := e.v.NeedsDirID(fd)
	switch {
	case err != nil:
		return Failed, err
	case !needs:
		return Empty, nil
	case raw == nil:
		return Bad, fmt.Errorf("the directory has entries but no id: %w", crypt.ErrDamaged)
	}
	return Bad, fmt.Errorf("the directory's id has %d bytes: %w", len(raw), crypt.ErrDamaged)
}
