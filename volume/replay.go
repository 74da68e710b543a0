package volume

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A Replay says what became of the writes that a daemon had under way when it was
// killed.
type Replay struct {
	Found    int     // writes that were under way
	Finished int     // of them, those that are finished now
	Gone     int     // of them, those whose file is no longer there, or is empty now
	Errs     []error // what went wrong with the others, and with the file of slots
}

// errAllFound ends a walk.
var errAllFound = errors.New("every file was found")

// ReplaySlots finishes the writes that a daemon of this boot was killed in, and
// removes its slots in the directory dir. The volume must be locked, and nothing
// served yet. Only regular files below the root are written to, those that the slots
// were made for: the same inode, born at the same time, under the same data key.
// Nothing that is found there keeps a volume from being mounted.
func (v *Volume) ReplaySlots(ctx context.Context, dir string) (r Replay) {
	path := v.slotPath(dir)
	f, p, err := v.openLeft(path)
	if err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("the slots of the last mount, %s, are passed over: %w", path, err))
	}
	if f == nil {
		return r
	}
	defer f.Close()
	// They are this session's now: should it be killed meanwhile, the next goes on.
	if _, err := f.WriteAt([]byte(v.lock.session), slotSession); err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("taking over %s: %w", path, err))
	}
	byIno := v.flights(f, &p, &r)
	if err := v.replay(ctx, f, &p, byIno, &r); err != nil {
		r.Errs = append(r.Errs, err)
	}
	if err := unix.Unlink(path); err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("removing %s: %w", path, err))
	}
	return r
}

// slotFlight is a flight and the slot that it is in.
type slotFlight struct {
	flight
	slot int
}

// flights reads the table.
func (v *Volume) flights(f *os.File, p *slotPlan, r *Replay) map[uint64][]slotFlight {
	byIno := make(map[uint64][]slotFlight)
	table := make([]byte, p.count()*slotEntry)
	if _, err := f.ReadAt(table, slotHead); err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("reading the table of slots: %w", err))
		return nil
	}
	for i := range p.count() {
		fl, ok, err := parseFlight(table[i*slotEntry:][:slotEntry])
		if err != nil {
			r.Errs = append(r.Errs, fmt.Errorf("slot %d: %w", i, err))
		}
		if ok {
			r.Found++
			byIno[fl.inode.Ino] = append(byIno[fl.inode.Ino], slotFlight{fl, i})
		}
	}
	return byIno
}

func (v *Volume) replay(ctx context.Context, f *os.File, p *slotPlan, byIno map[uint64][]slotFlight, r *Replay) error {
	if len(byIno) == 0 {
		return nil
	}
	left := map[uint64]bool{}
	for ino := range byIno {
		left[ino] = true
	}
	_, err := v.visitInodes(ctx, left, func(it *Item) {
		if err := v.replayFile(it, f, p, byIno[it.Ino], r); err != nil {
			r.Errs = append(r.Errs, fmt.Errorf("finishing a write to inode %d: %w", it.Ino, err))
		}
	})
	for ino := range left {
		r.Gone += len(byIno[ino])
	}
	return err
}

func (v *Volume) replayFile(it *Item, f *os.File, p *slotPlan, list []slotFlight, r *Replay) error {
	fd, err := it.openToMend()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	slices.SortFunc(list, func(a, b slotFlight) int { return cmp.Compare(a.seq, b.seq) })
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	var errs []error
	timed := true // the file has the times of all these writes
	for _, fl := range list {
		ours, err := v.isFor(fd, &fl.flight)
		if err == nil && !ours {
			r.Gone++
			continue
		}
		var begun bool
		if err == nil {
			begun, err = v.replayFlight(fd, f, p, fl)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		timed = timed && begun
		r.Finished++
	}
	if timed { // it was written then, not now
		errs = append(errs, Utimens(fd, &[2]unix.Timespec{st.Atim, st.Mtim}))
	}
	return errors.Join(errs...)
}

// openToMend opens the file for writing. It may forbid that by now: it was open.
func (it *Item) openToMend() (fd int, err error) {
	if fd, err = it.Open(unix.O_RDWR); !errors.Is(err, unix.EACCES) {
		return fd, err
	}
	at, err := it.Open(unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer unix.Close(at)
	return OpenAnyway(at)
}

// isFor reports whether the file is still the one that the flight was meant for.
func (v *Volume) isFor(fd int, fl *flight) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_SYNC_AS_STAT, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	if err != nil {
		return false, err
	}
	if InodeOf(&st) != fl.inode {
		return false, nil
	}
	raw, err := ReadHeader(fd)
	if err != nil || raw == nil {
		return false, err
	}
	h, err := v.ParseHeader(raw)
	if err != nil {
		return false, err
	}
	return h.File == fl.File, nil
}

// InodeOf is the identity in attributes that were asked for with the birth time.
func InodeOf(st *unix.Statx_t) Inode {
	id := Inode{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.Born = st.Btime.Sec*int64(time.Second) + int64(st.Btime.Nsec)
	}
	return id
}

// replayFlight finishes a write. begun says that it had begun before: the file has its time.
func (v *Volume) replayFlight(fd int, f *os.File, p *slotPlan, fl slotFlight) (begun bool, err error) {
	off, size := p.data(fl.slot)
	if fl.Len < 0 || fl.Len > size {
		return false, fmt.Errorf("the write makes no sense: %w", crypt.ErrDamaged)
	}
	records := make([]byte, fl.Len)
	if _, err := f.ReadAt(records, off); err != nil {
		return false, err
	}
	// A write begins with its first page, after it has set the times; no two records have
	// the same nonce.
	first := make([]byte, min(crypt.RecordOverhead, fl.Len))
	if n, err := NewBacking(fd).ReadAt(first, fl.Off); n == len(first) || err == io.EOF {
		begun = bytes.Equal(first[:n], records[:len(first)])
	}
	return begun, fl.Replay(NewBacking(fd), v.BlockSize(), records)
}
