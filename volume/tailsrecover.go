package volume

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A KeyOpener opens the data key of a header; the caller owns the result. It is called by
// recoverJobs goroutines at once, and says ErrLater when it is to be asked no more.
type KeyOpener func(context.Context, *crypt.Header) (*crypt.Secrets, error)

// ErrLater is what a KeyOpener says that has no time left. The files it is asked for are
// left to the next mount, and counted instead of told one by one.
var ErrLater = errors.New("this one waits for the next mount")

// recoverJobs is how many keys are asked for at once when a mount recovers.
const recoverJobs = 32

// jobs runs what is given to it in recoverJobs goroutines. Who has something to do waits
// for one.
type jobs struct {
	running sync.WaitGroup
	slots   chan struct{}
}

func newJobs() *jobs { return &jobs{slots: make(chan struct{}, recoverJobs)} }

// on has do called with the item, which is held meanwhile.
func (j *jobs) on(it *Item, do func()) {
	it.Hold()
	j.slots <- struct{}{}
	j.running.Go(func() {
		defer func() { it.Release(); <-j.slots }()
		do()
	})
}

// TailRecovery says what became of the ends that a mount which ended uncleanly kept.
type TailRecovery struct {
	Found int      // ends that were kept
	Put   []uint64 // inodes whose old end was put back
	Gone  int      // ends whose file is no longer there, or is another
	Held  int      // ends whose file's key can't be had now; they are kept
	Errs  []error
}

// heldTail is an end that is kept in a slot.
type heldTail struct {
	slot  int
	seq   uint64
	inode Inode
	tail  crypt.Tail
}

// RecoverTails puts back the ends of files that a power cut tore. The volume must be
// locked, and nothing served yet: the kernel must not learn sizes before. It opens the
// data keys of files whose end is kept, of no others. Nothing that is found there keeps
// a volume from being mounted.
func (v *Volume) RecoverTails(ctx context.Context, open KeyOpener) (r TailRecovery) {
	f, err := v.openTails()
	if err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("opening %s: %w", TailsFile, err))
	}
	if f == nil {
		return r
	}
	defer f.Close()
	byIno, err := v.keptTails(f, &r)
	if err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("reading %s: %w", TailsFile, err))
		return r
	}
	if len(byIno) == 0 {
		return r
	}
	v.heldTails = nil
	if err := v.recoverTails(ctx, f, byIno, open, &r); err != nil {
		r.Errs = append(r.Errs, err)
	}
	if err := f.Sync(); err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("syncing %s: %w", TailsFile, err))
	}
	return r
}

func (v *Volume) recoverTails(ctx context.Context, f *os.File, byIno map[uint64][]heldTail, open KeyOpener, r *TailRecovery) error {
	left := map[uint64]bool{}
	for ino := range byIno {
		left[ino] = true
	}
	var mu sync.Mutex // guards r and heldTails until the jobs are done
	jobs := newJobs()
	whole, err := v.visitInodes(ctx, left, func(it *Item) {
		jobs.on(it, func() {
			list := byIno[it.Ino]
			slices.SortFunc(list, func(a, b heldTail) int { return cmp.Compare(b.seq, a.seq) })
			put, err := v.recoverFile(ctx, it, list, open)
			mu.Lock()
			defer mu.Unlock()
			v.judged(f, it.Ino, list, put, err, r)
		})
	})
	jobs.running.Wait()
	for ino := range left {
		if whole {
			r.Gone += len(byIno[ino])
			for _, h := range byIno[ino] {
				freeTail(f, v.BlockSize(), h.slot, r)
			}
			continue
		}
		r.Held += len(byIno[ino])
		v.heldTails = append(v.heldTails, byIno[ino]...)
	}
	return err
}

// judged lets go of what was kept of one file, unless it could not be compared.
func (v *Volume) judged(f *os.File, ino uint64, list []heldTail, put bool, err error, r *TailRecovery) {
	switch {
	case errors.Is(err, errOtherFile):
		r.Gone += len(list)
	case err != nil:
		r.Held += len(list)
		if !errors.Is(err, ErrLater) {
			r.Errs = append(r.Errs, fmt.Errorf("the end of inode %d, which is kept, can't be compared with the file; that is tried again at the next mount: %w", ino, err))
		}
		v.heldTails = append(v.heldTails, list...)
		return
	case put:
		r.Put = append(r.Put, ino)
	}
	for _, h := range list {
		freeTail(f, v.BlockSize(), h.slot, r)
	}
}

func freeTail(f *os.File, blockSize, slot int, r *TailRecovery) {
	var state [4]byte
	if _, err := f.WriteAt(state[:], tailPage+int64(slot)*tailSlotSize(blockSize)); err != nil {
		r.Errs = append(r.Errs, fmt.Errorf("letting go of a kept end: %w", err))
	}
}

// errOtherFile: the inode is another file than the one whose end was kept.
var errOtherFile = errors.New("it is another file now")

func (v *Volume) recoverFile(ctx context.Context, it *Item, list []heldTail, open KeyOpener) (put bool, err error) {
	fd, err := it.openToMend()
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	raw, err := ReadHeader(fd)
	if err != nil {
		return false, err
	}
	h, err := v.ParseHeader(raw)
	if err != nil {
		return false, errOtherFile
	}
	tails := make([]crypt.Tail, 0, len(list))
	for _, k := range list {
		if k.tail.File == h.File {
			tails = append(tails, k.tail)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if len(tails) == 0 || st.Size == 0 {
		return false, errOtherFile
	}
	s, err := open(ctx, h)
	if err != nil {
		return false, err
	}
	defer s.Wipe()
	put, err = crypt.RecoverTails(NewBacking(fd), v.BlockSize(), st.Size, s, tails)
	if err == nil && !put { // what was only written again is no change
		err = Utimens(fd, &[2]unix.Timespec{st.Atim, st.Mtim})
	}
	return put, err
}

// keptTails reads the file.
func (v *Volume) keptTails(f *os.File, r *TailRecovery) (map[uint64][]heldTail, error) {
	byIno := map[uint64][]heldTail{}
	slot := make([]byte, tailSlotSize(v.BlockSize()))
	for i := range tailSlots {
		if _, err := f.ReadAt(slot, tailPage+int64(i)*int64(len(slot))); err != nil {
			return nil, err
		}
		h, ok := parseTail(slot)
		if !ok {
			continue // free, or torn before anybody relied on it
		}
		h.slot = i
		r.Found++
		byIno[h.inode.Ino] = append(byIno[h.inode.Ino], h)
	}
	return byIno, nil
}

func parseTail(b []byte) (h heldTail, ok bool) {
	le := binary.LittleEndian
	n := int(le.Uint32(b[32:]))
	if le.Uint32(b) != tailKept || n > len(b)-tailEntry || le.Uint32(b[4:]) != crc32.Checksum(b[8:tailEntry+n], castagnoli) {
		return h, false
	}
	h.seq, h.inode.Ino = le.Uint64(b[8:]), le.Uint64(b[16:])
	h.tail.Off = int64(le.Uint64(b[24:]))
	copy(h.tail.File[:], b[40:])
	h.tail.Records = slices.Clone(b[tailEntry : tailEntry+n])
	return h, true
}

// visitInodes looks for files by inode number, which leads to none without a
// capability, and takes each that it found out of want. whole says that what is left
// there is nowhere.
func (v *Volume) visitInodes(ctx context.Context, want map[uint64]bool, visit func(*Item)) (whole bool, err error) {
	whole = true
	err = v.Walk(ctx, func(it *Item) error {
		if it.Err != nil {
			whole = false
		} else if want[it.Ino] {
			delete(want, it.Ino)
			visit(it)
		}
		if len(want) == 0 {
			return errAllFound
		}
		return nil
	})
	if errors.Is(err, errAllFound) {
		return true, nil
	}
	return whole && err == nil, err
}
