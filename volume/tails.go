package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// TailsFile is where the ends of files are kept while they are written over.
const TailsFile = "kmsfs.tails"

// The file: its head on a page of its own, then slots of whole pages, each an entry and
// the records of one end. See docs/FORMAT.md.
const (
	tailMagic   = "KMSFTAIL"
	tailVersion = 1
	tailHead    = 36
	tailEntry   = 64
	tailPage    = 4096
	tailSlots   = 256
)

const (
	tailFree = 0
	tailKept = 1
)

// Tails keep the durable ends of a mounted volume's files while these are written over
// (crypt.TailKeeper). An end is durable in a slot before the write, and let go after
// the file's next sync. To let go is a store that is not synced: it becomes durable
// with the next end that is kept, or when it has to (Disturb). They are safe for
// concurrent use; nil keeps nothing.
type Tails struct {
	f    tailStore
	size int64 // of a slot, bytes
	off  bool  // nothing new is kept: there is only what could not be judged
	full chan struct{}

	syncMu sync.Mutex // one sync of the file at a time; taken before mu

	mu      sync.Mutex
	some    sync.Cond // signalled when slots are freed, and when making all durable failed
	free    []int     // guarded by mu; the last one freed is the next one taken
	byInode map[Inode][]*keptTail
	// held are of an earlier mount and not judged yet, by inode number; guarded by mu.
	// No sync lets them go: what it makes durable may be the torn end.
	held   map[uint64][]*keptTail
	gone   []*keptTail // guarded by mu; freed, not durably
	next   *tailRound  // guarded by mu; the sync that gathers who waits for it
	seq    uint64      // guarded by mu
	failed error       // guarded by mu; why making all durable failed the last time
	fails  int         // guarded by mu; how often it did
	stats  TailStats   // guarded by mu
}

// TailStats count what was kept.
type TailStats struct {
	Kept  int64 // ends that were written over
	Syncs int64 // of the file that keeps them
}

// tailStore is the file that keeps them.
type tailStore interface {
	WriteAt(p []byte, off int64) (int, error)
	Sync() error
	Close() error
}

type tailsOnDisk struct{ *os.File }

// Sync is fdatasync(2): of the file nothing but contents changes.
func (d tailsOnDisk) Sync() error {
	return retry(func() error { return unix.Fdatasync(int(d.Fd())) })
}

// A keptTail is one slot in use, or that was until the next sync of the file. Its
// fields but ready and err are guarded by Tails.mu.
type keptTail struct {
	slot  int
	inode Inode
	tail  crypt.Tail // without records
	syncs int        // of its file that have begun since, and go on; a write then needs more
	lost  bool       // one failed: what was written there since may be gone, whatever later ones say
	past  bool       // one ended well: it goes when those end that were under way then
	freed bool

	ready chan struct{} // closed when it is durable, or err is set
	err   error
}

// A tailRound is a sync of the file that others wait for.
type tailRound struct {
	done chan struct{}
	err  error
}

// OpenTails makes or takes over the file that keeps ends. The volume must be locked,
// and RecoverTails done. With off set nothing is kept; the answer is nil then, unless
// an end of an earlier mount could not be judged.
func (v *Volume) OpenTails(off bool) (*Tails, error) {
	if off && len(v.heldTails) == 0 {
		if err := unix.Unlinkat(v.root, TailsFile, 0); err != nil && err != unix.ENOENT {
			return nil, fmt.Errorf("removing %s: %w", TailsFile, err)
		}
		return nil, nil
	}
	f, err := v.tailsFile()
	if err != nil {
		return nil, fmt.Errorf("making %s: %w", TailsFile, err)
	}
	t := newTails(tailsOnDisk{f}, tailSlotSize(v.BlockSize()))
	t.off = off
	t.hold(v.heldTails)
	return t, nil
}

func newTails(f tailStore, size int64) *Tails {
	t := &Tails{f: f, size: size, full: make(chan struct{}, 1), byInode: map[Inode][]*keptTail{}, held: map[uint64][]*keptTail{}}
	t.some.L = &t.mu
	for i := range tailSlots {
		t.free = append(t.free, tailSlots-1-i)
	}
	return t
}

// mostHeld leaves room for the ends of files that are written now.
const mostHeld = tailSlots - 32

// hold takes over what an earlier mount kept and RecoverTails could not judge. If that
// leaves no room, nothing new is kept.
func (t *Tails) hold(list []heldTail) {
	t.off = t.off || len(list) > mostHeld
	for _, h := range list {
		e := &keptTail{slot: h.slot, inode: h.inode, tail: crypt.Tail{File: h.tail.File, Off: h.tail.Off}}
		t.seq = max(t.seq, h.seq)
		t.free = slices.DeleteFunc(t.free, func(slot int) bool { return slot == h.slot })
		t.held[h.inode.Ino] = append(t.held[h.inode.Ino], e)
	}
}

func tailSlotSize(blockSize int) int64 {
	return (tailEntry + crypt.TailSize(blockSize) + tailPage - 1) / tailPage * tailPage
}

func tailsSize(blockSize int) int64 { return tailPage + tailSlots*tailSlotSize(blockSize) }

func (v *Volume) tailsHead() []byte {
	b := append(make([]byte, 0, tailHead), tailMagic...)
	b = binary.LittleEndian.AppendUint32(b, tailVersion)
	b = binary.LittleEndian.AppendUint32(b, tailSlots)
	b = binary.LittleEndian.AppendUint32(b, uint32(tailSlotSize(v.BlockSize())))
	id := v.ID()
	return append(b, id[:]...)
}

// tailsFile opens the file if it is one that we made, and else makes it: all of it
// written, so that a later sync has no metadata to write.
func (v *Volume) tailsFile() (*os.File, error) {
	f, err := v.openTails()
	if err != nil {
		return nil, err
	}
	if f != nil {
		return f, nil
	}
	if err := unix.Unlinkat(v.root, TailsFile, 0); err != nil && err != unix.ENOENT {
		return nil, err
	}
	fd, err := unix.Openat(v.root, TailsFile, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	f = os.NewFile(uintptr(fd), TailsFile)
	if err := v.fillTails(f); err != nil {
		f.Close()
		_ = unix.Unlinkat(v.root, TailsFile, 0)
		return nil, err
	}
	return f, nil
}

func (v *Volume) fillTails(f *os.File) error {
	zeros := make([]byte, tailsSize(v.BlockSize()))
	copy(zeros, v.tailsHead())
	if _, err := f.Write(zeros); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	dir, err := v.OpenSync()
	if err != nil {
		return err
	}
	defer dir.Close()
	return retry(func() error { return unix.Fsync(dir.fd) })
}

// openTails opens the file that is there; nil if there is none, or it is not as we
// would make it.
func (v *Volume) openTails() (*os.File, error) {
	fd, err := unix.Openat(v.root, TailsFile, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) || err == unix.ELOOP || err == unix.ENXIO || err == unix.EISDIR {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), TailsFile)
	var st unix.Stat_t
	head := make([]byte, tailHead)
	err = unix.Fstat(fd, &st)
	// A hard link planted under the name would have us write into somebody's file.
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1 && st.Size == tailsSize(v.BlockSize()) {
		if _, err = f.ReadAt(head, 0); err == nil && string(head) == string(v.tailsHead()) {
			return f, nil
		}
	}
	f.Close()
	return nil, err
}

// Keep is crypt.TailKeeper's KeepTail for one file.
func (t *Tails) Keep(inode Inode, tail crypt.Tail) error {
	if t == nil {
		return nil
	}
	if t.off { // what is held there goes by a good end that is written over now
		return t.Disturb(inode, tail.Off, tail.Off+1)
	}
	e, isNew, err := t.take(inode, &tail)
	if err != nil {
		return err
	}
	if !isNew {
		<-e.ready
		return e.err
	}
	defer close(e.ready)
	if _, e.err = t.f.WriteAt(e.encode(&tail, t.nextSeq()), t.at(e.slot)); e.err == nil {
		e.err = t.commit()
	}
	if e.err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.freeLocked(e)
	}
	return e.err
}

// take finds what was kept of the file that covers tail, or takes a slot for it. If
// none is free it waits until everything was made durable.
func (t *Tails) take(inode Inode, tail *crypt.Tail) (e *keptTail, isNew bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fails := t.fails
	for {
		for _, e := range t.byInode[inode] {
			if e.syncs == 0 && !e.freed && e.tail.Covers(tail) {
				return e, false, nil
			}
		}
		if len(t.free) > 0 {
			break
		}
		select {
		case t.full <- struct{}{}:
		default:
		}
		t.some.Wait()
		if t.fails != fails {
			return nil, false, t.failed
		}
	}
	n := len(t.free) - 1
	e = &keptTail{slot: t.free[n], inode: inode, tail: crypt.Tail{File: tail.File, Off: tail.Off, Cut: tail.Cut}, ready: make(chan struct{})}
	t.free = t.free[:n]
	t.byInode[inode] = append(t.byInode[inode], e)
	t.stats.Kept++
	return e, true, nil
}

func (t *Tails) nextSeq() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seq++
	return t.seq
}

func (t *Tails) at(slot int) int64 { return tailPage + int64(slot)*t.size }

func (e *keptTail) encode(tail *crypt.Tail, seq uint64) []byte {
	b := make([]byte, tailEntry, tailEntry+len(tail.Records))
	le := binary.LittleEndian
	le.PutUint32(b, tailKept)
	le.PutUint64(b[8:], seq)
	le.PutUint64(b[16:], e.inode.Ino)
	le.PutUint64(b[24:], uint64(tail.Off))
	le.PutUint32(b[32:], uint32(len(tail.Records)))
	copy(b[40:], tail.File[:])
	b = append(b, tail.Records...)
	le.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	return b
}

// freeLocked lets an entry go; until commit that is not durable. mu is held.
func (t *Tails) freeLocked(e *keptTail) {
	if e.freed {
		return
	}
	e.freed = true
	t.writeFree(e.slot)
	t.free = append(t.free, e.slot)
	t.gone = append(t.gone, e)
	t.some.Broadcast()
}

func (t *Tails) writeFree(slot int) {
	var state [4]byte
	binary.LittleEndian.PutUint32(state[:], tailFree)
	_, _ = t.f.WriteAt(state[:], t.at(slot)) // what stays is put back only where an end is bad
}

// commit makes what was written to the file so far durable. One sync serves all who
// wait when it begins.
func (t *Tails) commit() error {
	t.mu.Lock()
	r := t.next
	if r != nil {
		t.mu.Unlock()
		<-r.done
		return r.err
	}
	r = &tailRound{done: make(chan struct{})}
	t.next = r
	t.mu.Unlock()

	t.syncMu.Lock()
	defer t.syncMu.Unlock()
	defer close(r.done)
	t.mu.Lock()
	t.next = nil
	gone := t.gone
	t.gone = nil
	t.stats.Syncs++
	t.mu.Unlock()
	r.err = t.f.Sync()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.durable(gone, r.err)
	return r.err
}

// durable forgets entries that are freed for good. mu is held.
func (t *Tails) durable(gone []*keptTail, err error) {
	if err != nil {
		for _, e := range gone { // fsync(2): the next one need not write again what this one lost
			if slices.Contains(t.free, e.slot) {
				t.writeFree(e.slot)
			}
		}
		t.gone = append(gone, t.gone...)
		return
	}
	for _, e := range gone {
		list := t.byInode[e.inode]
		for i := range list {
			if list[i] == e {
				list = append(list[:i:i], list[i+1:]...)
				break
			}
		}
		if t.byInode[e.inode] = list; len(list) == 0 {
			delete(t.byInode, e.inode)
		}
	}
}

// Disturb is crypt.TailKeeper's for one file.
func (t *Tails) Disturb(inode Inode, from, to int64) error {
	if t == nil || !t.disturbs(inode, from, to) {
		return nil
	}
	return t.commit()
}

// disturbs reports whether something that was let go there may come back. What an
// earlier mount kept, and nobody could judge, is let go now.
func (t *Tails) disturbs(inode Inode, from, to int64) (found bool) {
	there := func(e *keptTail) bool { return from <= e.tail.Off && e.tail.Off < to }
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.byInode[inode] {
		found = found || e.freed && there(e)
	}
	t.held[inode.Ino] = slices.DeleteFunc(t.held[inode.Ino], func(e *keptTail) bool {
		if !there(e) {
			return false
		}
		e.inode = inode
		t.byInode[inode] = append(t.byInode[inode], e)
		t.freeLocked(e)
		found = true
		return true
	})
	if len(t.held[inode.Ino]) == 0 {
		delete(t.held, inode.Ino)
	}
	return found
}

// BeginSync is crypt.TailKeeper's for one file.
func (t *Tails) BeginSync(inode Inode, again func(off int64) bool) (end func(error)) {
	if t == nil {
		return func(error) {}
	}
	t.writeAgain(inode, again)
	t.mu.Lock()
	defer t.mu.Unlock()
	list := t.staleLocked(nil, inode)
	return func(err error) { t.endSync(list, err) }
}

// writeAgain has what stands in the place of lost ends written anew.
func (t *Tails) writeAgain(inode Inode, again func(off int64) bool) {
	for _, e := range t.lostOf(inode) {
		if !again(e.tail.Off) {
			continue
		}
		t.mu.Lock()
		e.lost = false
		t.mu.Unlock()
	}
}

func (t *Tails) lostOf(inode Inode) (list []*keptTail) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.byInode[inode] {
		if e.lost && !e.freed && e.syncs == 0 {
			list = append(list, e)
		}
	}
	return list
}

// BeginRest is BeginSync for all files at once but those that isOpen. No write to one
// of the others may be under way, or begin before it returns.
func (t *Tails) BeginRest(isOpen func(Inode) bool) (end func(error)) {
	if t == nil {
		return func(error) {}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*keptTail
	for inode := range t.byInode {
		if !isOpen(inode) {
			list = t.staleLocked(list, inode)
		}
	}
	return func(err error) {
		t.endSync(list, err)
		t.mu.Lock()
		defer t.mu.Unlock()
		if err == nil && t.allLost() {
			err = errors.New("a sync failed, and since then those files were not written again: unmount and mount again")
		}
		if err != nil {
			t.failed = fmt.Errorf("no room to keep the ends of files, since the backing store can't be synced: %w", err)
			t.fails++
		}
		t.some.Broadcast()
	}
}

// allLost reports whether no slot will get free by any sync. mu is held.
func (t *Tails) allLost() bool {
	if len(t.free) > 0 {
		return false
	}
	for _, list := range t.byInode {
		for _, e := range list {
			if !e.lost && !e.freed {
				return false
			}
		}
	}
	return true
}

// staleLocked marks what is kept of a file and adds it to list. mu is held.
func (t *Tails) staleLocked(list []*keptTail, inode Inode) []*keptTail {
	for _, e := range t.byInode[inode] {
		if !e.past {
			e.syncs++
			list = append(list, e)
		}
	}
	return list
}

// endSync lets go of what was kept before a sync that ended well. After a failed one
// what was synced last is what counts, as before; and it counts for longer, since another
// sync that ends well need not have written what this one lost (fsync(2)).
func (t *Tails) endSync(list []*keptTail, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range list {
		e.syncs--
		e.lost = e.lost || err != nil
		e.past = !e.lost
		if e.syncs > 0 || e.freed {
			continue
		}
		if e.past {
			t.freeLocked(e)
		} else {
			t.needlessLocked(e)
		}
	}
	t.some.Broadcast()
}

// needlessLocked lets go of what was kept after e while e did not count: else each failed
// sync of a file would take a slot for good. mu is held.
func (t *Tails) needlessLocked(e *keptTail) {
	list := t.byInode[e.inode]
	for _, later := range list[slices.Index(list, e)+1:] {
		select {
		case <-later.ready:
			if later.syncs == 0 && e.tail.Covers(&later.tail) {
				t.freeLocked(later)
			}
		default: // it is on its way
		}
	}
}

// Full is signalled when somebody waits for a slot: everything has to be made durable
// (BeginRest).
func (t *Tails) Full() <-chan struct{} {
	if t == nil {
		return nil
	}
	return t.full
}

// Keeping reports whether the ends of files that are written now are kept.
func (t *Tails) Keeping() bool { return t != nil && !t.off }

// Stats reports the counters.
func (t *Tails) Stats() TailStats {
	if t == nil {
		return TailStats{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stats
}

// Close closes the file. What was let go is durably so then.
func (t *Tails) Close() error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	dirty := len(t.gone) > 0
	t.mu.Unlock()
	var err error
	if dirty {
		err = t.commit()
	}
	return errors.Join(err, t.f.Close())
}
