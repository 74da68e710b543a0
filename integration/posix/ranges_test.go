package posix

import (
	"errors"
	"fmt"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// copyRange copies inside the file: also from beyond its end, over it, and onto a
// range that meets the first, which is refused (copy_file_range(2), EINVAL).
func (x *exercise) copyRange(at string, off int64, n int) {
	from := x.r.Int64N(x.size + 5000)
	if x.r.IntN(8) == 0 {
		from = max(0, off+int64(x.r.IntN(2*n))-int64(n))
	}
	x.both(fmt.Sprintf("copy from %d, %s", from, at), func(i int) (int, error) {
		in, out := from, off
		return unix.CopyFileRange(x.fds[i], &in, x.fds[i], &out, n, 0)
	})
}

// refused asks for what blocks that are sealed with their index can't give: to take
// a range out, to put one in, and to share ranges. The file must be as before. Only
// the mount is asked: the plain file would do it. Today the kernel's FUSE says no by
// itself; a later one may send some of this to us.
func (x *exercise) refused(off int64, n int) {
	x.t.Helper()
	off, n = off&^65535, (n+65535)&^65535
	fd := x.fds[0]
	calls := map[string]func() error{
		"collapse": func() error { return unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, off, int64(n)) },
		"insert":   func() error { return unix.Fallocate(fd, unix.FALLOC_FL_INSERT_RANGE, off, int64(n)) },
		"unshare":  func() error { return unix.Fallocate(fd, unix.FALLOC_FL_UNSHARE_RANGE, off, int64(n)) },
		"clone": func() error {
			return unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{Src_fd: int64(fd), Src_offset: 0, Src_length: 65536, Dest_offset: 1 << 20})
		},
		"dedupe": func() error {
			r := unix.FileDedupeRange{Src_offset: 0, Src_length: 4096, Info: []unix.FileDedupeRangeInfo{{Dest_fd: int64(fd), Dest_offset: 1 << 20}}}
			if err := unix.IoctlFileDedupeRange(fd, &r); err != nil {
				return err
			}
			if status := r.Info[0].Status; status < 0 {
				return unix.Errno(-status)
			}
			return nil
		},
	}
	for name, call := range sorted(calls) {
		x.log = append(x.log, fmt.Sprintf("%s %d at %d of %d", name, n, off, x.size))
		require.ErrorIs(x.t, call(), unix.EOPNOTSUPP, "%s\n%s", name, x)
	}
	var st unix.Stat_t
	require.NoError(x.t, unix.Fstat(fd, &st))
	require.Equal(x.t, x.size, st.Size, "%s", x)
	x.read("what was not changed", off, n)
}

// direct reads or writes past the kernel's cache, which other descriptors and
// mappings use at the same time.
func (x *exercise) direct(off int64, data []byte) {
	x.t.Helper()
	off = off &^ 4095
	pages := (len(data) + 4095) / 4096
	if x.r.IntN(2) == 0 {
		x.both(fmt.Sprintf("direct write of %d pages at %d of %d", pages, off, x.size), func(i int) (int, error) {
			buf := alignedPages(pages)
			copy(buf, data)
			n, err := unix.Pwrite(x.raw[i], buf, off)
			return n, errors.Join(err, unix.Munmap(buf))
		})
		return
	}
	var got [2][]byte
	x.both(fmt.Sprintf("direct read of %d pages at %d of %d", pages, off, x.size), func(i int) (int, error) {
		buf := alignedPages(pages)
		n, err := unix.Pread(x.raw[i], buf, off)
		got[i] = append(got[i], buf...)
		return n, errors.Join(err, unix.Munmap(buf))
	})
	x.same(got[0], got[1], off)
}
