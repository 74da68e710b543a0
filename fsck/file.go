package fsck

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

// file checks a regular file.
func (j *job) file(ctx context.Context, it *volume.Item) error {
	w, err := j.confirmed(ctx, it, func() (view, error) { return j.lookFile(ctx, it) })
	if err != nil {
		return err
	}
	if w.gone {
		j.count(func(r *Report) { r.Vanished++ })
		return nil
	}
	if !w.again {
		j.progress(1, 0)
		j.count(func(r *Report) {
			if w.st.Size == 0 {
				r.Empty++
			} else {
				r.Files++
			}
		})
	}
	if w.hasID {
		j.ids.add(kindFile, w.id, it.Ino)
	}
	if j.o.CutEnds {
		j.cutEnd(ctx, it, &w)
	}
	j.condemn(it, &w)
	for _, f := range w.found {
		j.tell(f)
	}
	return nil
}

// lookFile looks at one file. An error ends the whole check.
func (j *job) lookFile(ctx context.Context, it *volume.Item) (w view, err error) {
	fd, st, err := it.OpenPath()
	if err != nil {
		w.unseen(j.finding(it, Access, Unread, err))
		return w, nil
	}
	defer unix.Close(fd)
	w.st = st
	j.lookName(it, &w)
	w.raw, err = volume.ReadHeader(fd)
	if err == nil {
		var h *crypt.Header
		if h, err = j.v.ParseHeader(w.raw); err == nil {
			w.id, w.hasID = h.File, st.Size > 0
			if w.again = j.links.again(it, &st, h.File); !w.again {
				return w, j.lookContents(ctx, it, fd, h, &w)
			}
			return w, nil
		}
	}
	if w.again = j.links.again(it, &st, crypt.FileID{}); w.again {
		return w, nil
	}
	j.lookXattrs(it, fd, &w)
	if st.Size > 0 { // else it needs none
		w.add(j.judge(it, Header, err))
		j.lookSize(it, &w)
	}
	return w, nil
}

// lookSize judges by arithmetic.
func (j *job) lookSize(it *volume.Item, w *view) {
	if err := crypt.CheckSize(w.st.Size, j.v.BlockSize()); err != nil {
		w.add(j.badEnd(it, w.st.Size, err))
	}
}

func (j *job) badEnd(it *volume.Item, stored int64, err error) Finding {
	f := j.judge(it, End, err)
	if f.Level == Damage {
		from, to := crypt.EndRange(stored, j.v.BlockSize())
		f.Range = &Span{from, to}
	}
	return f
}

// lookContents checks what stands under a header that is well-formed.
func (j *job) lookContents(ctx context.Context, it *volume.Item, fd int, h *crypt.Header, w *view) error {
	j.lookXattrs(it, fd, w)
	if w.st.Size == 0 {
		return nil
	}
	if j.o.Keys == nil {
		j.lookSize(it, w)
		return nil
	}
	s, err := j.open(ctx, h)
	if ctx.Err() != nil {
		s.Wipe()
		return ctx.Err()
	}
	if err != nil {
		j.unopened(it, w, err)
		j.lookSize(it, w)
		return nil
	}
	j.count(func(r *Report) { r.Opened++ })
	contents, err := openContents(it, unix.O_RDONLY)
	if err != nil {
		s.Wipe()
		w.unseen(j.finding(it, Access, Unread, err))
		return nil
	}
	defer unix.Close(contents)
	return j.lookBlocks(ctx, it, volume.NewBacking(contents), s, w)
}

// openContents opens a file so that reading leaves no trace, where that is allowed.
func openContents(it *volume.Item, flags int) (int, error) {
	fd, err := it.Open(flags | unix.O_NOATIME)
	if err == unix.EPERM {
		fd, err = it.Open(flags)
	}
	if err != nil {
		return -1, fmt.Errorf("opening it: %w", err)
	}
	return fd, nil
}

// unopened judges why a data key was not opened.
func (j *job) unopened(it *volume.Item, w *view, err error) {
	level, is := unreachable(err)
	switch {
	case is:
		w.add(j.finding(it, Key, level, err))
	case errors.Is(err, crypt.ErrKeyRejected) && j.keysChanged():
		w.add(j.finding(it, Key, Refused, fmt.Errorf("the keys of the volume were changed during the check, which goes by those before: %w", err)))
	case errors.Is(err, crypt.ErrDamaged), errors.Is(err, crypt.ErrForeign), errors.Is(err, crypt.ErrKeyRejected):
		w.add(j.finding(it, Key, Damage, err))
	default:
		w.add(j.finding(it, Access, Unread, err))
	}
}

// lookBlocks checks mark, end and, if that was asked for, every block. It owns s.
func (j *job) lookBlocks(ctx context.Context, it *volume.Item, b *volume.Stored, s *crypt.Secrets, w *view) error {
	mark, err := b.SparseMark()
	marked := false
	if err == nil {
		marked, err = s.IsSparseMark(mark)
	}
	switch {
	case err != nil:
		w.add(j.judge(it, SparseMark, err))
	case mark != nil && !marked:
		w.add(j.finding(it, SparseMark, Damage, errors.New("the mark that permits holes is not this file's and counts for nothing")))
	}
	f, err := crypt.NewFile(b, j.v.BlockSize(), w.st.Size, s)
	if err != nil {
		w.add(j.judge(it, Header, err))
		return nil
	}
	defer f.Close()
	end := f.Size()
	if bad := f.EndErr(); bad != nil {
		finding := j.badEnd(it, w.st.Size, bad)
		w.add(finding)
		end, _ = crypt.EndRange(w.st.Size, j.v.BlockSize())
	}
	if !j.o.Data {
		return nil
	}
	r := reader{ctx: ctx, f: f, b: b, block: int64(j.v.BlockSize()), end: end, marked: marked, progress: func(n int64) { j.progress(0, n) }}
	err = r.run()
	j.count(func(rep *Report) { rep.Bytes += r.good })
	for _, bad := range r.spans.list {
		finding := j.finding(it, Data, Damage, errBlocks)
		finding.Range = &Span{bad.From, bad.To}
		w.add(finding)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		w.add(j.finding(it, Access, Unread, fmt.Errorf("reading its contents: %w", err)))
	}
	return nil
}

var errBlocks = fmt.Errorf("blocks do not authenticate: %w", crypt.ErrDamaged)

// A reader authenticates the blocks of one file up to end.
type reader struct {
	ctx        context.Context
	f          *crypt.File
	b          *volume.Stored
	block, end int64
	marked     bool
	progress   func(int64)

	buf   []byte
	spans spans
	good  int64
}

// readChunk is how much is read at a time, in bytes; a multiple of every block size.
const readChunk = 1 << 20

func (r *reader) run() error {
	r.buf = make([]byte, min(readChunk, r.end+1))
	for off := int64(0); off < r.end; {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n := r.hole(off)
		if n == 0 {
			n = min(readChunk, r.end-off)
			if err := r.chunk(off, n); err != nil {
				return err
			}
		}
		off += n
		r.progress(n)
	}
	return nil
}

// hole says how many bytes from off on are holes of the backing file in whole
// records, and judges them: an attacker, or a program, can make more than anybody
// could read.
func (r *reader) hole(off int64) int64 {
	record := r.block + crypt.RecordOverhead
	first, whole := off/r.block, r.end/r.block
	data, err := r.b.SeekData(first * record)
	next := whole
	switch {
	case err == nil:
		next = min(whole, data/record)
	case err != unix.ENXIO: // ENXIO: nothing but a hole up to the end
		return 0
	}
	n := (next - first) * r.block
	if n <= 0 {
		return 0
	}
	if !r.marked {
		r.spans.add(off, off+n)
	} else {
		r.good += n
	}
	return n
}

// chunk reads n bytes at once, and block by block if some are damaged.
func (r *reader) chunk(off, n int64) error {
	err := r.read(off, n)
	if err == nil || !errors.Is(err, crypt.ErrDamaged) {
		return err
	}
	for end := off + n; off < end; off += r.block {
		m := min(r.block, end-off)
		err := r.read(off, m)
		if errors.Is(err, crypt.ErrDamaged) {
			r.spans.add(off, off+m)
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) read(off, n int64) error {
	m, err := r.f.ReadAt(r.buf[:n], off)
	if int64(m) == n {
		r.good += n
		return nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// cutEnd cuts a bad end off and notes what went with it.
func (j *job) cutEnd(ctx context.Context, it *volume.Item, w *view) {
	for i := range w.found {
		if w.found[i].Kind != End || w.found[i].Level != Damage || !w.hasID {
			continue
		}
		size, err := j.cut(ctx, it, w)
		if w.found[i].act(fmt.Sprintf("cut back to %d bytes", size), err); err != nil {
			return
		}
		for k := range w.found {
			if f := &w.found[k]; f.Kind == Data && f.Range.From >= size {
				f.Did = "cut off"
			}
		}
		return
	}
}

func (j *job) cut(ctx context.Context, it *volume.Item, w *view) (size int64, err error) {
	fd, err := openContents(it, unix.O_RDWR)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	raw, err := volume.ReadHeader(fd)
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	if !bytes.Equal(raw, w.raw) || st.Size != w.st.Size {
		return 0, volume.ErrHeaderChanged
	}
	h, err := j.v.ParseHeader(raw)
	if err != nil {
		return 0, err
	}
	s, err := j.open(ctx, h)
	if err != nil {
		return 0, err
	}
	f, err := crypt.NewFile(volume.NewBacking(fd), j.v.BlockSize(), st.Size, s)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.CutEnd()
}
