package fsck

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// item checks one entry, whatever it is.
func (j *job) item(ctx context.Context, it *volume.Item) error {
	switch {
	case it.Err != nil:
		j.lost(it)
		return nil
	case it.Type == unix.DT_REG:
		return j.file(ctx, it)
	case it.IsSidecar():
		j.sidecar(it)
		return nil
	}
	return j.node(ctx, it)
}

// lost is a place that the walk could not go to.
func (j *job) lost(it *volume.Item) {
	if errors.Is(it.Err, volume.ErrGone) {
		j.count(func(r *Report) { r.Vanished++ })
		return
	}
	j.tell(Finding{Kind: Access, Level: Unread, Path: it.Path(), Err: it.Err})
}

// sidecar checks that a long name still has its entry. That it holds the right name
// is checked there.
func (j *job) sidecar(it *volume.Item) {
	if !it.IsOrphan() {
		return
	}
	if j.o.Live() { // a mount makes it before the entry
		if time.Sleep(settleTime); !it.IsOrphan() {
			return
		}
	}
	f := j.finding(it, Sidecar, Untidy, errors.New("it holds the long name of an entry that is not there"))
	if j.o.Repair {
		f.act("removed", it.RemoveOrphan())
	}
	j.tell(f)
}

// act notes what became of a repair.
func (f *Finding) act(did string, err error) {
	if err != nil {
		f.Err = fmt.Errorf("%w; the repair failed: %w", f.Err, err)
		return
	}
	f.Did = did
}

func (j *job) finding(it *volume.Item, kind Kind, level Level, err error) Finding {
	return Finding{Kind: kind, Level: level, Path: it.Path(), Stored: it.StoredPath(), Err: err}
}

// settleTime is waited before something is looked at again that a live mount may be
// in the middle of.
const settleTime = 100 * time.Millisecond

// busyTime is how long after a write findings in a file on a live mount are marked:
// gaps that writes left stay open for 30 seconds.
const busyTime = time.Minute

// A view is what one look at an entry showed.
type view struct {
	gone  bool // it is not there any more
	st    unix.Stat_t
	raw   []byte // header
	id    crypt.FileID
	hasID bool
	again bool // one more link of a file that was looked at
	found []Finding
}

func (w *view) add(f Finding) { w.found = append(w.found, f) }

// confirmed repeats a look that found something, if that may be because somebody was
// writing, and keeps what every look found.
func (j *job) confirmed(ctx context.Context, it *volume.Item, look func() (view, error)) (view, error) {
	w, err := look()
	for range 2 {
		if err != nil || len(w.found) == 0 || w.gone || !j.o.Live() && !changed(it, &w) {
			return w, err
		}
		if err := pause(ctx, settleTime); err != nil {
			return w, err
		}
		next, err := look()
		if err != nil {
			return w, err
		}
		next.found = common(w.found, next.found)
		if w = next; !changed(it, &w) {
			break
		}
	}
	w.markBusy(j.o.Live())
	return w, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (w *view) markBusy(live bool) {
	busy := live && time.Since(time.Unix(w.st.Mtim.Unix())) < busyTime
	for i := range w.found {
		w.found[i].Busy = busy
	}
}

// changed reports whether the entry is no longer what was looked at.
func changed(it *volume.Item, w *view) bool {
	fd, st, err := it.OpenPath()
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	if st.Size != w.st.Size || st.Mtim != w.st.Mtim || st.Ctim != w.st.Ctim {
		return true
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false
	}
	raw, err := volume.ReadHeader(fd)
	return err != nil || string(raw) != string(w.raw)
}

// node checks a directory, a symlink or a special file.
func (j *job) node(ctx context.Context, it *volume.Item) error {
	w, err := j.confirmed(ctx, it, func() (view, error) { return j.lookNode(it), nil })
	if err != nil {
		return err
	}
	if w.gone {
		j.count(func(r *Report) { r.Vanished++ })
		return nil
	}
	switch it.Type {
	case unix.DT_DIR:
		j.count(func(r *Report) { r.Dirs++ })
	case unix.DT_LNK:
		j.count(func(r *Report) { r.Symlinks++ })
	default:
		j.count(func(r *Report) { r.Others++ })
	}
	for _, f := range w.found {
		if f.Kind == DirID && f.Level == Untidy && j.o.Repair && j.v.Unlocked() {
			f.act("given a fresh id", j.giveID(it))
		}
		j.tell(f)
	}
	return nil
}

func (j *job) giveID(it *volume.Item) error {
	fd, _, err := it.OpenPath()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return j.v.GiveDirID(fd)
}

// lookNode looks at what is no regular file.
func (j *job) lookNode(it *volume.Item) (w view) {
	fd, st, err := it.OpenPath()
	if err != nil {
		w.unseen(j.finding(it, Access, Unread, err))
		return w
	}
	defer unix.Close(fd)
	w.st = st
	j.lookName(it, &w)
	switch it.Type {
	case unix.DT_DIR:
		j.lookDir(it, fd, &w)
	case unix.DT_LNK:
		if _, err := j.v.ReadlinkFd(fd); err != nil && !errors.Is(err, volume.ErrLocked) {
			w.add(j.judge(it, Symlink, err))
		}
	}
	return w
}

// unseen is a look that saw nothing.
func (w *view) unseen(f Finding) {
	if errors.Is(f.Err, volume.ErrGone) {
		w.gone = true
		return
	}
	w.add(f)
}

// judge makes a finding of an error: damage, or something that can't be read.
func (j *job) judge(it *volume.Item, kind Kind, err error) Finding {
	if errors.Is(err, crypt.ErrDamaged) || errors.Is(err, crypt.ErrNoHeader) || errors.Is(err, crypt.ErrForeign) {
		return j.finding(it, kind, Damage, err)
	}
	return j.finding(it, Access, Unread, err)
}

func (j *job) lookName(it *volume.Item, w *view) {
	if err := it.NameErr(); err != nil {
		w.add(j.judge(it, Name, err))
	}
}

// lookDir checks a directory's id and attributes.
func (j *job) lookDir(it *volume.Item, fd int, w *view) {
	j.lookXattrs(it, fd, w)
	if j.v.Names() != volume.NamesEncrypted {
		return
	}
	raw, err := volume.PeekDirID(fd)
	if err != nil {
		w.add(j.judge(it, DirID, err))
		return
	}
	if raw == nil {
		needs, err := j.v.NeedsDirID(fd)
		switch {
		case err != nil:
			w.add(j.judge(it, DirID, err))
		case needs:
			w.add(j.finding(it, DirID, Damage, errors.New("the directory has entries but no id, so their names can't be read")))
		default:
			w.add(j.finding(it, DirID, Untidy, errors.New("the empty directory has no id; it gets one when it is used")))
		}
		return
	}
	err = j.v.CheckDirID(raw)
	if errors.Is(err, volume.ErrLocked) && len(raw) == volume.DirXattrSize {
		err = nil
	} else if errors.Is(err, volume.ErrLocked) {
		err = fmt.Errorf("malformed directory id: %w", crypt.ErrDamaged)
	}
	if err != nil {
		w.add(j.judge(it, DirID, err))
		return
	}
	j.ids.add(kindDir, [16]byte(raw), it.Ino)
}

func (j *job) lookXattrs(it *volume.Item, fd int, w *view) {
	if !j.v.Unlocked() {
		return
	}
	err := j.v.CheckXattrs(fd, func(name string, err error) {
		if errors.Is(err, volume.ErrStrayXattr) {
			w.add(j.finding(it, Xattr, Untidy, fmt.Errorf("%s: %w", name, err)))
			return
		}
		w.add(j.judge(it, Xattr, err))
	})
	if err != nil {
		w.add(j.judge(it, Xattr, err))
	}
}
