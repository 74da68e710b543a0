package headers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// The outcomes of an import. Empty and Failed are those of an export too.
const (
	Restored Outcome = "restored" // had none, or a malformed one
	Added    Outcome = "added"    // the same header stood with fewer copies
	Marked   Outcome = "marked"   // only the sparse mark was missing
	Present  Outcome = "present"  // nothing to do
	Replaced Outcome = "replaced" // by force; the old one was saved
	Conflict Outcome = "conflict" // another valid one stands, and was left
	Mismatch Outcome = "mismatch" // does not belong to what lies there
	Foreign  Outcome = "foreign"  // the record is not of this volume
	Missing  Outcome = "missing"  // no such file or directory
)

// changes reports whether an outcome means that something is written.
func (o Outcome) changes() bool {
	return o == Restored || o == Added || o == Marked || o == Replaced
}

// problem reports whether a record was not put where it belongs.
func (o Outcome) problem() bool {
	return o == Conflict || o == Mismatch || o == Foreign || o == Missing || o == Failed
}

var (
	errConflict = errors.New("another one stands there, so it was replaced after the export")
	errKind     = errors.New("something of another kind stands there now")
	errMissing  = errors.New("it is not there; it was deleted or renamed after the export, or not copied")
)

// A task is a record, and what was saved of what it is to replace.
type task struct {
	rec   *Record
	saved *Record
}

// one does what is to be done for one record. Only writing is left out while
// planning.
func (j *job) one(ctx context.Context, t task) (Outcome, error) {
	fd, st, err := j.v.OpenStored(t.rec.Path)
	switch {
	case err == unix.ENOENT:
		return Missing, errMissing
	case err != nil:
		return Failed, fmt.Errorf("opening it: %w", err)
	}
	defer unix.Close(fd)
	want := uint32(unix.S_IFREG)
	if t.rec.Kind == KindDir {
		want = unix.S_IFDIR
	}
	if st.Mode&unix.S_IFMT != want {
		return Failed, errKind
	}
	return j.again(func() (Outcome, error) {
		if t.rec.Kind == KindDir {
			return j.dir(fd, t)
		}
		return j.file(ctx, fd, t)
	})
}

// again begins anew when somebody else wrote meanwhile.
func (j *job) again(f func() (Outcome, error)) (out Outcome, err error) {
	for range restarts {
		out, err = f()
		if !errors.Is(err, volume.ErrHeaderChanged) || errors.Is(err, errNotSaved) {
			break
		}
	}
	return out, err
}

// file puts a header back.
func (j *job) file(ctx context.Context, fd int, t task) (Outcome, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Failed, err
	}
	if st.Size == 0 { // a header over no bytes is never used
		return Empty, nil
	}
	raw, err := volume.OwnHeader(fd)
	if err != nil {
		return Failed, err
	}
	h, err := j.v.ParseHeader(t.rec.Value)
	if err != nil {
		return Foreign, err
	}
	next, out, err := j.judge(t.rec, h, raw)
	if err != nil {
		return out, err
	}
	if out == Restored || out == Replaced {
		if err := j.prepare(ctx, fd, &st, h, t, out, raw); err != nil {
			return outcomeOf(err), err
		}
	}
	return j.write(fd, t.rec, raw, next, out)
}

// judge decides what becomes of a file whose standing header is raw, and what
// header it gets.
func (j *job) judge(rec *Record, h *crypt.Header, raw []byte) (next []byte, out Outcome, err error) {
	standing, err := j.v.ParseHeader(raw)
	switch {
	case errors.Is(err, crypt.ErrDamaged), errors.Is(err, crypt.ErrNoHeader):
		return rec.Value, Restored, nil
	case err == nil && standing.Identity == h.Identity:
		return j.union(standing, h)
	case j.o.Force:
		return rec.Value, Replaced, nil
	}
	return nil, Conflict, errConflict
}

// union adds to a standing header those copies that it lacks and whose key the
// volume lists: an old export must not bring a retired key's copies back.
func (j *job) union(standing, h *crypt.Header) (next []byte, out Outcome, err error) {
	u := standing.Clone()
	for _, c := range h.Copies {
		if slices.Contains(j.listed, c.Key) && u.Find(c.Key) == nil {
			u.Copies = append(u.Copies, c)
		}
	}
	if len(u.Copies) == len(standing.Copies) {
		return nil, Present, nil
	}
	if next, err = u.Marshal(); err != nil {
		return nil, Failed, fmt.Errorf("adding copies to its header: %w", err)
	}
	return next, Added, nil
}

// prepare is what must have happened before a header is put on a file that had
// none or another one: that is saved, and the new one is known to belong there.
func (j *job) prepare(ctx context.Context, fd int, st *unix.Stat_t, h *crypt.Header, t task, out Outcome, raw []byte) error {
	if out == Replaced {
		if err := j.saveHeader(fd, st, t, raw); err != nil {
			return err
		}
	}
	if !j.act && !j.o.DryRun { // the plan of an import that will verify when it writes
		return nil
	}
	verified, err := j.verify(ctx, fd, st.Size, h)
	switch {
	case errors.Is(err, ErrMismatch):
		return fmt.Errorf("%w (it had %d stored bytes when exported, and has %d)", err, t.rec.Size, st.Size)
	case err != nil:
		return fmt.Errorf("verifying that the header belongs to the contents: %w", err)
	case !verified:
		j.unverified.Add(1)
	}
	return nil
}

// saveHeader saves what stands, when planning; when writing it checks that this
// was done.
func (j *job) saveHeader(fd int, st *unix.Stat_t, t task, raw []byte) error {
	switch {
	case j.o.DryRun:
		return nil
	case j.act && !savedSame(t.saved, raw):
		return errNotSaved
	case j.act:
		return nil
	}
	standing, err := crypt.ParseHeader(raw)
	if err != nil {
		return err
	}
	mark, err := readMark(fd)
	if err != nil {
		return err
	}
	return j.save(&Record{Kind: KindFile, Path: t.rec.Path, File: standing.File, Size: st.Size, Value: raw, Mark: mark})
}

func outcomeOf(err error) Outcome {
	if errors.Is(err, ErrMismatch) {
		return Mismatch
	}
	return Failed
}

// write installs header and mark. The mark comes last: if it is missing, another
// run sees that.
func (j *job) write(fd int, rec *Record, old, next []byte, out Outcome) (Outcome, error) {
	if next != nil && j.act {
		if err := volume.ReplaceHeader(fd, old, next); err != nil {
			return Failed, err
		}
	}
	needed, err := needsMark(fd, rec, out)
	if err != nil {
		return Failed, err
	}
	if !needed {
		return out, nil
	}
	if j.act {
		if err := volume.NewBacking(fd).SetSparseMark(rec.Mark); err != nil {
			return Failed, fmt.Errorf("setting its sparse mark: %w", err)
		}
	}
	if out == Present {
		out = Marked
	}
	return out, nil
}

// needsMark reports whether the record's mark is to be set. Under the same header
// one that stands is left; under a new one it is another file's.
func needsMark(fd int, rec *Record, out Outcome) (bool, error) {
	if len(rec.Mark) == 0 {
		return false, nil
	}
	standing, err := readMark(fd)
	if err != nil {
		return false, err
	}
	if out == Restored || out == Replaced {
		return !bytes.Equal(standing, rec.Mark), nil
	}
	return standing == nil, nil
}

// dir puts a directory's id back.
func (j *job) dir(fd int, t task) (Outcome, error) {
	if j.v.Names() == volume.NamesPlain {
		return Present, nil
	}
	if j.v.Unlocked() {
		if err := j.v.CheckDirID(t.rec.Value); err != nil {
			return Mismatch, err
		}
	}
	standing, err := volume.StoredDirID(fd)
	if err != nil {
		return Failed, err
	}
	out := Restored
	switch {
	case bytes.Equal(standing, t.rec.Value):
		return Present, nil
	case len(standing) != volume.DirXattrSize: // none, or malformed
	case !j.o.Force:
		return Conflict, errConflict
	default:
		out = Replaced
		if err := j.saveDir(t, standing); err != nil {
			return Failed, err
		}
	}
	if j.act {
		if err := volume.ReplaceDirID(fd, standing, t.rec.Value); err != nil {
			return Failed, err
		}
	}
	return out, nil
}

func (j *job) saveDir(t task, standing []byte) error {
	switch {
	case j.o.DryRun, j.act && savedSame(t.saved, standing):
		return nil
	case j.act:
		return errNotSaved
	}
	return j.save(&Record{Kind: KindDir, Path: t.rec.Path, Value: standing})
}
