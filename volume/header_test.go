package volume

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// fileHeader is a header of the volume for a file, with a blob of n bytes.
func fileHeader(t testing.TB, v *Volume, n int) []byte {
	t.Helper()
	id, err := crypt.NewIdentity(v.ID(), crypt.UseFile, 12)
	require.NoError(t, err)
	raw, err := (&crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: bytes.Repeat([]byte{1}, n)}}}).Marshal()
	require.NoError(t, err)
	return raw
}

func openFile(t testing.TB, d *Dir, name string, flags int) int {
	t.Helper()
	fd, err := d.Open(name, flags)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestHeaderThroughAnyDescriptor(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	path, err := d.OpenPath("f")
	require.NoError(t, err)
	defer unix.Close(path)
	fds := []int{openFile(t, d, "f", unix.O_RDONLY), openFile(t, d, "f", unix.O_RDWR), openFile(t, d, "f", unix.O_WRONLY), path}
	var old []byte
	for _, fd := range fds {
		got, err := ReadHeader(fd)
		require.NoError(t, err)
		require.Equal(t, old, got)
		header := fileHeader(t, v, 184)
		require.ErrorIs(t, ReplaceHeader(fd, []byte("other"), header), ErrHeaderChanged)
		if old != nil {
			require.ErrorIs(t, ReplaceHeader(fd, nil, header), ErrHeaderChanged)
		}
		require.NoError(t, ReplaceHeader(fd, old, header))
		old = fileHeader(t, v, 200)
		require.NoError(t, SetHeader(fd, old))
		require.NoError(t, HeaderFits(fd, 2000))
		got, err = ReadHeader(fd)
		require.NoError(t, err)
		require.Equal(t, old, got, "trying leaves the header")
	}
}

func TestHeadersAreForRegularFiles(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	require.NoError(t, d.Mknod("fifo", unix.S_IFIFO|0o600, 0))
	fd, err := d.OpenPath("fifo")
	require.NoError(t, err)
	defer unix.Close(fd)
	inTime(t, func() { require.ErrorIs(t, SetHeader(fd, []byte("x")), unix.ESTALE) })
	require.ErrorIs(t, SetHeader(d.Fd(), []byte("x")), unix.EISDIR)
}

func TestHeaderOfManyCopies(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "")
	fd := openFile(t, d, "f", unix.O_RDWR)
	h, err := crypt.ParseHeader(fileHeader(t, v, 400))
	require.NoError(t, err)
	for _, key := range []string{"local:a", "local:b", "local:c"} {
		h.Copies = append(h.Copies, crypt.Copy{Key: key, Blob: make([]byte, 400)})
	}
	raw, err := h.Marshal()
	require.NoError(t, err)
	require.Greater(t, len(raw), 1024)
	require.NoError(t, SetHeader(fd, raw))
	got, err := ReadHeader(fd)
	require.NoError(t, err)
	require.Equal(t, raw, got)
}

func TestParseHeaderChecksWhoseItIs(t *testing.T) {
	v, k := newVolume(t, NamesEncrypted)
	good := fileHeader(t, v, 184)
	h, err := v.ParseHeader(good)
	require.NoError(t, err)
	marshal := func(edit func(*crypt.Header)) []byte {
		c := h.Clone()
		edit(c)
		raw, err := c.Marshal()
		require.NoError(t, err)
		return raw
	}
	for name, c := range map[string]struct {
		raw  []byte
		want error
	}{
		"none":          {nil, crypt.ErrNoHeader},
		"empty":         {[]byte{}, crypt.ErrNoHeader},
		"cut":           {good[:len(good)-1], crypt.ErrDamaged},
		"bit":           {append([]byte{good[0] ^ 1}, good[1:]...), crypt.ErrDamaged},
		"foreign":       {marshal(func(h *crypt.Header) { h.Volume[0]++ }), crypt.ErrForeign},
		"block size":    {marshal(func(h *crypt.Header) { h.BlockLog2 = 13 }), crypt.ErrDamaged},
		"volume's":      {k.settings.Header, crypt.ErrDamaged},
		"newer version": {append([]byte("KMSF\x02"), good[5:]...), crypt.ErrDamaged},
	} {
		_, err := v.ParseHeader(c.raw)
		require.ErrorIs(t, err, c.want, name)
	}
}

func TestOversizedAttributesAreDamage(t *testing.T) {
	dir := t.TempDir() // tmpfs or an ext4 with ea_inode would take more; ext4 takes one block
	path := filepath.Join(dir, "f")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, unix.Setxattr(path, crypt.SparseXattr, make([]byte, 600), 0))
	fd, err := unix.Open(path, unix.O_RDWR, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	_, err = NewBacking(fd).SparseMark()
	require.ErrorIs(t, err, crypt.ErrDamaged)
	_, err = readXattr(fd, crypt.SparseXattr, 1000)
	require.NoError(t, err)
}

// The user's attributes and the header share ext4's block: what doesn't fit is
// reported, and the old header stays.
func TestHeaderThatDoesNotFit(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	fd := openFile(t, d, "f", unix.O_RDWR)
	old := fileHeader(t, v, 184)
	require.NoError(t, SetHeader(fd, old))
	n := 0
	for size := 2048; size >= 64; size /= 2 { // fill what room is left
		for v.Setxattr(fd, "user.fill"+string(rune('a'+n)), make([]byte, size), 0) == nil {
			n++
		}
	}
	require.NotZero(t, n)
	full := func(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) }
	require.True(t, full(HeaderFits(fd, 1500)))
	require.True(t, full(HeaderFits(fd, crypt.MaxHeader+1)))
	require.NoError(t, HeaderFits(fd, len(old)))
	require.NoError(t, HeaderFits(fd, 10))
	big := fileHeader(t, v, 512)
	require.True(t, full(ReplaceHeader(fd, old, big)))
	require.True(t, full(SetHeader(fd, big)))
	require.True(t, full(NewBacking(fd).SetHeader(big)))
	got, err := ReadHeader(fd)
	require.NoError(t, err)
	require.Equal(t, old, got)
	require.ErrorIs(t, HeaderFits(openFile(t, d, "f", unix.O_RDONLY), 0), nil)
	touch(t, d, "none", "")
	require.ErrorIs(t, HeaderFits(openFile(t, d, "none", unix.O_RDWR), 500), crypt.ErrNoHeader)
}

func TestHeaderLockIsHeldByOneWriter(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	mine, other := openFile(t, d, "f", unix.O_RDWR), openFile(t, d, "f", unix.O_RDONLY)
	require.NoError(t, lockHeader(mine))
	done := make(chan error, 1)
	go func() { done <- ReplaceHeader(other, nil, []byte("header")) }()
	select {
	case err := <-done:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	unlockHeader(mine)
	require.NoError(t, <-done)
	require.NoError(t, ReplaceHeader(mine, []byte("header"), []byte("second")))
}

func TestHeaderLockWaitIsBounded(t *testing.T) {
	t.Parallel()
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	require.NoError(t, lockHeader(openFile(t, d, "f", unix.O_RDWR)))
	start := time.Now()
	err := SetHeader(openFile(t, d, "f", unix.O_RDWR), []byte("x"))
	require.ErrorIs(t, err, ErrHeaderBusy)
	require.ErrorIs(t, err, unix.EAGAIN)
	require.Less(t, time.Since(start), 3*headerLockWait)
}

// Of many who replace the same header, one wins each round.
func TestReplaceHeaderComparesAndSets(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "stored")
	require.NoError(t, SetHeader(openFile(t, d, "f", unix.O_RDWR), []byte{0}))
	const writers, rounds = 4, 15
	var wg sync.WaitGroup
	for range writers {
		fd := openFile(t, d, "f", unix.O_RDWR)
		wg.Go(func() {
			for won := 0; won < rounds; {
				old, err := ReadHeader(fd)
				if err == nil {
					err = ReplaceHeader(fd, old, []byte{old[0] + 1})
				}
				if err == nil {
					won++
				} else if !errors.Is(err, ErrHeaderChanged) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, err := ReadHeader(openFile(t, d, "f", unix.O_RDONLY))
	require.NoError(t, err)
	require.Equal(t, []byte{writers * rounds}, got)
}

func TestStored(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "")
	s := NewBacking(openFile(t, d, "f", unix.O_RDWR))
	n, err := s.WriteAt([]byte("hello"), 1<<20)
	require.NoError(t, err)
	require.Equal(t, 5, n)
	buf := make([]byte, 10)
	n, err = s.ReadAt(buf, 1<<20)
	require.Equal(t, io.EOF, err)
	require.Equal(t, "hello", string(buf[:n]))
	n, err = s.ReadAt(buf, 0)
	require.NoError(t, err)
	require.Equal(t, 10, n)
	off, err := s.SeekData(0)
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, off)
	off, err = s.SeekHole(0)
	require.NoError(t, err)
	require.Zero(t, off)
	_, err = s.SeekData(2 << 20)
	require.ErrorIs(t, err, unix.ENXIO)
	require.NoError(t, s.Allocate(0, 8192))
	require.NoError(t, s.PunchHole(1<<20, 4096))
	_, err = s.ReadAt(buf[:5], 1<<20)
	require.NoError(t, err)
	require.Equal(t, make([]byte, 5), buf[:5])
	require.NoError(t, s.Sync())

	mark, err := s.SparseMark()
	require.NoError(t, err)
	require.Nil(t, mark)
	require.NoError(t, s.SetSparseMark([]byte("mark")))
	mark, err = s.SparseMark()
	require.NoError(t, err)
	require.Equal(t, "mark", string(mark))
	require.NoError(t, s.SetHeader(fileHeader(t, v, 184)))
	mark, err = s.SparseMark()
	require.NoError(t, err)
	require.Nil(t, mark, "a new generation takes no old mark along")
	require.NoError(t, s.SetSparseMark([]byte("mark")))
	again := fileHeader(t, v, 185)
	require.NoError(t, s.FirstHeader(again), "it was not new")
	mark, err = s.SparseMark()
	require.NoError(t, err)
	require.Nil(t, mark)
	raw, err := OwnHeader(s.Fd())
	require.NoError(t, err)
	require.Equal(t, again, raw)
	require.NoError(t, s.Truncate(3))
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(s.Fd(), &st))
	require.EqualValues(t, 3, st.Size)
	ro := NewBacking(openFile(t, d, "f", unix.O_RDONLY))
	_, err = ro.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, unix.EBADF)
}

// crypt.File over a real backing file, from nothing to something and back.
func TestStoredCarriesAFile(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "f", "")
	f, err := crypt.NewFile(NewBacking(openFile(t, d, "f", unix.O_RDWR)), v.BlockSize(), 0, nil)
	require.NoError(t, err)
	defer f.Close()
	id, err := crypt.NewIdentity(v.ID(), crypt.UseFile, 12)
	require.NoError(t, err)
	key, err := crypt.RandomKey()
	require.NoError(t, err)
	defer key.Wipe()
	secrets, err := crypt.Commit(&id, key)
	require.NoError(t, err)
	h := &crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}
	require.True(t, f.Prime(&crypt.Fresh{Header: h, Secrets: secrets}))
	data := bytes.Repeat([]byte("0123456789"), 1000)
	_, err = f.WriteAt(data, 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	var st unix.Stat_t
	require.NoError(t, d.Lstat("f", &st))
	require.EqualValues(t, len(data), st.Size)
	raw, err := ReadHeader(openFile(t, d, "f", unix.O_RDONLY))
	require.NoError(t, err)
	got, err := v.ParseHeader(raw)
	require.NoError(t, err)
	require.Equal(t, id, got.Identity)
	back := make([]byte, len(data))
	_, err = f.ReadAt(back, 0)
	require.True(t, err == nil || err == io.EOF)
	require.Equal(t, data, back)
}

func TestWithAccessLeavesForeignChangesAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	require.NoError(t, os.WriteFile(path, nil, 0o444))
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	calls := 0
	require.NoError(t, withAccess(fd, accessFile, func() error {
		if calls++; calls == 1 {
			return unix.EACCES
		}
		require.EqualValues(t, 0o644, modeOf(fd))
		return unix.Fchmod(fd, 0o755) // somebody else's chmod meanwhile
	}))
	require.EqualValues(t, 0o755, modeOf(fd))
	require.NoError(t, unix.Fchmod(fd, 0o444))
	require.ErrorIs(t, withAccess(fd, accessFile, func() error { return unix.EACCES }), unix.EACCES)
	require.EqualValues(t, 0o444, modeOf(fd))
	require.ErrorIs(t, withAccess(fd, accessFile, func() error { return unix.ENOSPC }), unix.ENOSPC)
}
