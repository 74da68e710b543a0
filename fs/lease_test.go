package fs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// leasedKeys are fakeKeys with leases that a test ends and grants.
type leasedKeys struct {
	*fakeKeys

	mu      sync.Mutex
	over    map[string]bool // guarded by mu; keys whose lease has ended
	changed func()          // guarded by mu
	inUse   func() [][]string
	asked   func() // guarded by mu; when a key is on its way to who asked
}

// arrives runs the hook, once.
func (k *leasedKeys) arrives() {
	k.mu.Lock()
	hook := k.asked
	k.asked = nil
	k.mu.Unlock()
	if hook != nil {
		hook()
	}
}

// whenAsked has hook run when the next key is on its way.
func (k *leasedKeys) whenAsked(hook func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = hook
}

var errEnded = fmt.Errorf("the lease has ended: %w", crypt.ErrKeyDisabled)

func (k *leasedKeys) Governing(h *crypt.Header) (under []string) {
	for _, c := range h.Copies {
		under = append(under, c.Key)
	}
	return under[:1]
}

func (k *leasedKeys) Ended(under []string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range under {
		if k.over[key] {
			return errEnded
		}
	}
	return nil
}

func (k *leasedKeys) Follow(inUse func() [][]string, changed func()) func() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.inUse, k.changed = inUse, changed
	return func() {}
}

func (k *leasedKeys) Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	under := k.Governing(h)
	if err := k.Ended(under); err != nil {
		return nil, err
	}
	s, err := k.fakeKeys.Open(ctx, h)
	if err == nil {
		s.SetUnder(under)
		k.arrives()
	}
	return s, err
}

func (k *leasedKeys) Fresh(ctx context.Context) (*crypt.Fresh, error) {
	if err := k.Ended([]string{testKey}); err != nil {
		return nil, err
	}
	f, err := k.fakeKeys.Fresh(ctx)
	if err == nil {
		f.Secrets.SetUnder([]string{testKey})
		k.arrives()
	}
	return f, err
}

// end ends a lease, or grants it again.
func (k *leasedKeys) end(key string, over bool) {
	k.mu.Lock()
	k.over[key] = over
	changed := k.changed
	k.mu.Unlock()
	changed()
}

// newLeased is a world whose keys have leases.
func newLeased(t *testing.T, tune ...func(*setup)) (*world, *leasedKeys) {
	t.Helper()
	w := newWorld(t, tune...)
	k := &leasedKeys{fakeKeys: w.keys, over: map[string]bool{}}
	w.opts.Keys = k
	w.remount()
	return w, k
}

// drained waits until the keys of what was revoked are gone.
func (w *world) drained() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 3*drainWait)
	defer cancel()
	require.NoError(w.t, w.srv.Drained(ctx))
}

// healed waits until a read through an open handle works again.
func healed(t *testing.T, f *os.File) {
	t.Helper()
	eventually(t, func() bool {
		_, err := f.ReadAt(make([]byte, 1), 0)
		return err == nil || err == io.EOF
	})
}

func eventually(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		require.True(t, time.Now().Before(end), "it did not happen")
	}
}

func (w *world) openFile(name string, flags int) *os.File {
	w.t.Helper()
	f, err := os.OpenFile(w.path(name), flags, 0o644)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { f.Close() })
	return f
}

func readErr(f *os.File, off int64) error {
	_, err := f.ReadAt(make([]byte, 4096), off)
	return err
}

// TestRevokedFile: pages that the kernel had cached and open handles are closed, names
// are not, and all of it goes on when the lease is there again.
func TestRevokedFile(t *testing.T) {
	w, k := newLeased(t)
	data := randomBytes(300_000)
	w.write("f", data)
	w.write("closed", data)
	require.Equal(t, data, w.read("closed"))
	f := w.openFile("f", os.O_RDWR)
	require.Equal(t, data, w.read("f"), "it is in the page cache now")
	require.Contains(t, k.inUse(), []string{testKey})
	live := crypt.LiveKeys()

	k.end(testKey, true)
	w.drained()
	require.Positive(t, w.srv.Stats().Wiped) // the other may not have been released yet
	require.Less(t, crypt.LiveKeys(), live, "the keys are gone")
	for off := int64(0); off < int64(len(data)); off += 4096 {
		require.ErrorIs(t, readErr(f, off), unix.EKEYREVOKED)
	}
	for _, name := range []string{"f", "closed"} {
		_, err := os.ReadFile(w.path(name))
		require.ErrorIs(t, err, unix.EKEYREVOKED)
	}
	_, err := os.Create(w.path("new"))
	require.ErrorIs(t, err, unix.EKEYREVOKED)
	require.ErrorIs(t, f.Truncate(5), unix.EKEYREVOKED)
	require.ErrorIs(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096), unix.EKEYREVOKED)
	st, err := f.Stat()
	require.NoError(t, err)
	require.EqualValues(t, len(data), st.Size())
	require.NoError(t, os.Rename(w.path("f"), w.path("g")))
	require.NoError(t, f.Chmod(0o600))
	require.NoError(t, f.Sync(), "nothing is waiting to be written")

	k.end(testKey, false)
	healed(t, f)
	require.Equal(t, data, w.read("g"))
	_, err = f.WriteAt([]byte("again"), 100)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	copy(data[100:], "again")
	require.NoError(t, f.Close())
	w.remount()
	require.Equal(t, data, w.read("g"))
	require.EqualValues(t, 0, w.srv.Stats().Wiped)
}

// TestDirtyPagesLand: what a program wrote while that was allowed reaches the disk,
// gaps included, though nobody synced it; what it writes later does not, and fsync says
// so.
func TestDirtyPagesLand(t *testing.T) {
	w, k := newLeased(t)
	f := w.openFile("f", os.O_RDWR|os.O_CREATE)
	want := randomBytes(6 << 20)
	_, err := f.WriteAt(want, 0)
	require.NoError(t, err)
	gap := int64(len(want)) + 200_000
	_, err = f.WriteAt([]byte("past a gap"), gap)
	require.NoError(t, err)
	want = append(append(want, make([]byte, 200_000)...), "past a gap"...)
	st, err := os.Stat(w.stored("f"))
	require.NoError(t, err)
	require.Less(t, st.Size(), int64(len(want)), "nothing is held back: this tests nothing")

	k.end(testKey, true)
	w.drained()
	late := randomBytes(4096)
	_, err = f.WriteAt(late, 8192)
	if err == nil { // the page cache took it
		err = f.Sync()
	}
	require.Error(t, err, "what is written too late is lost, and reported")

	k.end(testKey, false)
	healed(t, f)
	eventually(t, func() bool { return bytes.Equal(w.read("f"), want) })
	_, err = f.WriteAt(late, 8192)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	copy(want[8192:], late)
	require.NoError(t, f.Close())
	w.remount()
	require.True(t, bytes.Equal(want, w.read("f")))
}

// TestReadsStopBeforeTheKeysGo: while the kernel writes out what it held back nothing
// can be read any more, and what is written still lands.
func TestReadsStopBeforeTheKeysGo(t *testing.T) {
	w, k := newLeased(t)
	data := randomBytes(40_000)
	w.write("f", data)
	w.remount() // nothing is cached
	f := w.openFile("f", os.O_RDWR)
	files := w.srv.fs.files.all()
	require.Len(t, files, 1)
	defer w.srv.fs.files.release(files[0])
	files[0].mu.Lock() // the drain can't end
	unlock := sync.OnceFunc(files[0].mu.Unlock)
	defer unlock()
	k.end(testKey, true)
	require.ErrorIs(t, readErr(f, 0), unix.EKEYREVOKED)
	_, err := unix.CopyFileRange(int(f.Fd()), new(int64), int(f.Fd()), &[]int64{20_000}[0], 4096, 0)
	require.ErrorIs(t, err, unix.EKEYREVOKED)
	_, err = f.WriteAt(data[:8192], 4096)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.False(t, files[0].view.Load().Suspended())
	unlock()
	w.drained()
	require.True(t, files[0].view.Load().Suspended())
	k.end(testKey, false)
	healed(t, f)
	copy(data[4096:], bytes.Clone(data[:8192]))
	require.True(t, bytes.Equal(data, w.read("f")))
}

// TestGapsAreSettledBeforeTheKeysGo: a gap that a write left is zeros also if the file
// is closed before the lease is granted again.
func TestGapsAreSettledBeforeTheKeysGo(t *testing.T) {
	w, k := newLeased(t)
	f := w.openFile("f", os.O_RDWR|os.O_CREATE)
	_, err := f.WriteAt([]byte("far"), 100_000)
	require.NoError(t, err)
	k.end(testKey, true)
	w.drained()
	require.NoError(t, f.Close())
	k.end(testKey, false)
	w.remount()
	require.Equal(t, append(make([]byte, 100_000), "far"...), w.read("f"))
}

// TestLeaseEndsWhileAKeyIsOnItsWay: the key is not used, whoever asked for it.
func TestLeaseEndsWhileAKeyIsOnItsWay(t *testing.T) {
	w, k := newLeased(t)
	w.write("f", []byte("contents"))
	w.write("empty", nil)
	w.remount()
	for what, op := range map[string]func() error{
		"open":       func() error { _, err := os.ReadFile(w.path("f")); return err },
		"open empty": func() error { return os.WriteFile(w.path("empty"), []byte("x"), 0o644) },
		"create":     func() error { return os.WriteFile(w.path("new"), []byte("x"), 0o644) },
		"truncate":   func() error { return os.Truncate(w.path("f"), 3) },
	} {
		k.whenAsked(func() { k.end(testKey, true) })
		require.ErrorIs(t, op(), unix.EKEYREVOKED, what)
		require.NoFileExists(t, w.path("new"))
		w.drained()
		k.end(testKey, false)
	}
	require.Equal(t, []byte("contents"), w.read("f"))
	require.Empty(t, w.read("empty"))
}

// resident counts the pages of a file that the kernel has cached.
func resident(t *testing.T, f *os.File, size int) (pages int) {
	t.Helper()
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	defer unix.Munmap(mem)
	vec := make([]byte, (size+4095)/4096)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(size), uintptr(unsafe.Pointer(&vec[0])))
	require.Zero(t, errno)
	for _, v := range vec {
		pages += int(v & 1)
	}
	return pages
}

// TestClosedFilesLeaveTheCache: the kernel keeps no plaintext of files that were closed,
// either; of files under another lease it does.
func TestClosedFilesLeaveTheCache(t *testing.T) {
	w, k := newLeased(t)
	const size = 40_000
	require.NoError(t, os.Mkdir(w.path("d"), 0o755))
	for _, name := range []string{"d/f", "other"} {
		w.write(name, randomBytes(size))
	}
	w.rewrapped("other")
	w.remount()
	look := func(name string) int {
		f := w.openFile(name, os.O_RDONLY)
		defer f.Close()
		return resident(t, f, size)
	}
	w.read("d/f")
	w.read("other")
	require.Positive(t, look("d/f"))
	eventually(t, func() bool { return w.srv.Stats().OpenFiles == 0 })
	k.end(testKey, true)
	w.drained()
	k.end(testKey, false)
	require.Zero(t, look("d/f"))
	require.Positive(t, look("other"))
}

// TestSyncedDataOutlivesRevocation: appends and their fsync go on until the lease ends;
// then the loop is told, and what was acknowledged is there.
func TestSyncedDataOutlivesRevocation(t *testing.T) {
	w, k := newLeased(t)
	f := w.openFile("log", os.O_RDWR|os.O_CREATE)
	var acknowledged []byte
	for round := range 3 {
		for i := 0; ; i++ {
			line := fmt.Appendf(nil, "round %d, record %d: %x\n", round, i, randomBytes(40))
			_, err := f.WriteAt(line, int64(len(acknowledged)))
			if err == nil {
				err = f.Sync()
			}
			if err != nil {
				require.Greater(t, i, 5)
				break
			}
			acknowledged = append(acknowledged, line...)
			if i == 5 {
				go k.end(testKey, true)
			}
		}
		w.drained()
		k.end(testKey, false)
		healed(t, f)
		got := w.read("log")
		require.True(t, bytes.HasPrefix(got, acknowledged), "round %d", round)
		require.NoError(t, f.Truncate(int64(len(acknowledged))))
	}
	require.NoError(t, f.Close())
	w.remount()
	require.True(t, bytes.Equal(acknowledged, w.read("log")))
}

// TestWithoutWriteback: the same where each write is a request.
func TestWithoutWriteback(t *testing.T) {
	w, k := newLeased(t, func(s *setup) { s.opts.Writeback = false })
	data := randomBytes(50_000)
	w.write("f", data)
	f := w.openFile("f", os.O_RDWR)
	k.end(testKey, true)
	w.drained()
	_, err := f.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, unix.EKEYREVOKED)
	require.ErrorIs(t, readErr(f, 0), unix.EKEYREVOKED)
	k.end(testKey, false)
	healed(t, f)
	require.True(t, bytes.Equal(data, w.read("f")))
}

// TestEmptyFileLosesItsFreshKey: a file opened empty holds a key for what is to come.
func TestEmptyFileLosesItsFreshKey(t *testing.T) {
	w, k := newLeased(t)
	f := w.openFile("f", os.O_RDWR|os.O_CREATE)
	_, _, returned := k.calls()
	k.end(testKey, true)
	w.drained()
	_, _, after := k.calls()
	require.Equal(t, returned+1, after, "its key is given back, to be wiped")
	_, err := f.WriteAt(randomBytes(4096), 0)
	if err == nil {
		err = f.Sync()
	}
	require.Error(t, err)
	require.ErrorIs(t, f.Truncate(0), unix.EKEYREVOKED, "its writer would have no key")
	k.end(testKey, false)
	eventually(t, func() bool { return f.Truncate(0) == nil }) // what the page cache still thinks is there
	eventually(t, func() bool {
		_, err := f.WriteAt([]byte("now"), 0)
		return err == nil && f.Sync() == nil
	})
	require.NoError(t, f.Close())
	w.remount()
	require.Equal(t, []byte("now"), w.read("f"))
}

// TestOtherLeases: a file is not touched by the end of a lease that it does not depend
// on.
func TestOtherLeases(t *testing.T) {
	w, k := newLeased(t)
	data := randomBytes(20_000)
	w.write("f", data)
	f := w.openFile("f", os.O_RDWR)
	k.end(nextKey, true)
	w.drained()
	require.NoError(t, readErr(f, 0))
	require.Equal(t, data, w.read("f"))
	_, err := f.WriteAt([]byte("x"), 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.Zero(t, w.srv.Stats().Wiped)
}

// rewrapped puts the file's header under another key, as a rekey does.
func (w *world) rewrapped(name string) {
	w.t.Helper()
	fd, err := unix.Open(w.stored(name), unix.O_RDWR, 0)
	require.NoError(w.t, err)
	defer unix.Close(fd)
	raw, err := volume.ReadHeader(fd)
	require.NoError(w.t, err)
	h, err := w.vol.ParseHeader(raw)
	require.NoError(w.t, err)
	h.Copies[0].Key = nextKey
	next, err := h.Marshal()
	require.NoError(w.t, err)
	require.NoError(w.t, volume.ReplaceHeader(fd, raw, next))
}

// TestRekeyedFileGoesOn: an open file that a rekey put under another key depends on that
// one's lease, whether or not somebody has noted it.
func TestRekeyedFileGoesOn(t *testing.T) {
	w, k := newLeased(t)
	data := randomBytes(20_000)
	w.write("noted", data)
	w.write("found", data)
	noted := w.openFile("noted", os.O_RDWR)
	w.rewrapped("noted")
	w.srv.Regovern()
	found := w.openFile("found", os.O_RDWR)
	w.rewrapped("found")

	k.end(testKey, true)
	require.NoError(t, readErr(noted, 0))
	healed(t, found) // found out by a look at its header
	w.drained()
	healed(t, found)
	k.end(nextKey, true)
	w.drained()
	for _, f := range []*os.File{noted, found} {
		require.ErrorIs(t, readErr(f, 0), unix.EKEYREVOKED)
	}
	k.end(nextKey, false)
	for _, f := range []*os.File{noted, found} {
		healed(t, f)
	}
}

// TestHealingWaitsForNobody: while the key service hangs, files that wait for their key
// fail, and nothing hangs with it.
func TestHealingWaitsForNobody(t *testing.T) {
	w, k := newLeased(t)
	w.write("f", randomBytes(20_000))
	f := w.openFile("f", os.O_RDWR)
	k.end(testKey, true)
	w.drained()
	block := make(chan struct{})
	k.set(nil, block)
	k.end(testKey, false)
	eventually(t, func() bool { opens, _, _ := k.calls(); return opens > 1 })
	start := time.Now()
	require.ErrorIs(t, readErr(f, 0), unix.EKEYREVOKED)
	_, err := f.WriteAt(randomBytes(4096), 0)
	if err == nil {
		err = f.Sync()
	}
	require.Error(t, err)
	_, err = f.Stat()
	require.NoError(t, err)
	require.Less(t, time.Since(start), defaultDeadline/2)
	k.set(nil, nil)
	close(block)
	healed(t, f)
}

// TestTruncatedToNothing: what needs no key needs no lease, and what follows is under
// another key.
func TestTruncatedToNothing(t *testing.T) {
	w, k := newLeased(t)
	w.write("f", randomBytes(20_000))
	reader := w.openFile("f", os.O_RDONLY)
	f := w.srv.fs.files.find(w.srv.fs.root.known("f").id)
	w.srv.fs.files.release(f)
	eventually(t, f.unwritten) // a writer would need a key for what it may write next
	k.end(testKey, true)
	w.drained()
	require.NoError(t, os.Truncate(w.path("f"), 0))
	require.Empty(t, w.read("f"))
	_, err := reader.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, io.EOF)
	k.end(testKey, false)
	w.write("f", []byte("new"))
	require.Equal(t, []byte("new"), w.read("f"))
}

const mmapHelper = "KMSFS_FS_TEST_MMAP"

// TestMappedPagesGetSIGBUS: a program that has the file mapped does not go on reading.
func TestMappedPagesGetSIGBUS(t *testing.T) {
	if path := os.Getenv(mmapHelper); path != "" {
		readMapping(path)
		return
	}
	w, k := newLeased(t)
	w.write("f", bytes.Repeat([]byte("y"), 20_000))
	cmd := exec.Command(os.Args[0], "-test.run=^TestMappedPagesGetSIGBUS$")
	cmd.Env = append(os.Environ(), mmapHelper+"="+w.path("f"))
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	pipe, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() { in.Close(); _ = cmd.Wait() }()
	out := bufio.NewScanner(pipe)
	next := func() string {
		require.True(t, out.Scan())
		return out.Text()
	}
	require.Equal(t, "121", next())
	k.end(testKey, true)
	w.drained()
	fmt.Fprintln(in)
	require.Equal(t, "fault", next())
	k.end(testKey, false)
	eventually(t, func() bool { fmt.Fprintln(in); return next() == "121" })
}

// readMapping maps a file and prints its first byte, and again for each line it reads.
func readMapping(path string) {
	debug.SetPanicOnFault(true)
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return
	}
	mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return
	}
	in := bufio.NewScanner(os.Stdin)
	for more := true; more; more = in.Scan() {
		fmt.Println(firstByte(mem))
	}
	os.Exit(0)
}

func firstByte(mem []byte) (text string) {
	defer func() {
		if recover() != nil {
			text = "fault"
		}
	}()
	return fmt.Sprint(mem[0])
}

// TestLeasesComeAndGo: under load no lease that ends and is granted again ever makes a
// wrong byte, whatever it interrupts: each block is one of those that were written to
// it.
func TestLeasesComeAndGo(t *testing.T) {
	w, k := newLeased(t)
	const blocks = 64
	fill := func(name string, version int) []byte {
		return []byte(strings.Repeat(fmt.Sprintf("%s %07d;", name, version), 512)[:4096])
	}
	ctx, stop := context.WithCancel(t.Context())
	var jobs sync.WaitGroup
	var reads, refused atomic.Int64
	for i := range 4 {
		name := fmt.Sprintf("file%d", i)
		w.write(name, bytes.Repeat(fill(name, 0), blocks))
		f := w.openFile(name, os.O_RDWR)
		// A read(2) that meets a write(2) of the same page may return some of each: the
		// kernel copies to and from the page cache without a lock.
		var busy [blocks]sync.Mutex
		jobs.Go(func() { // a writer that takes no for an answer
			for v := 1; ctx.Err() == nil; v++ {
				busy[v%blocks].Lock()
				_, _ = f.WriteAt(fill(name, v), int64(v%blocks)*4096)
				busy[v%blocks].Unlock()
				if v%16 == 0 {
					_ = f.Sync()
				}
				if v%64 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
		jobs.Go(func() {
			p := make([]byte, 4096)
			for v := 0; ctx.Err() == nil; v++ {
				block := v * 7 % blocks
				busy[block].Lock()
				n, err := f.ReadAt(p, int64(block)*4096)
				busy[block].Unlock()
				if err != nil {
					refused.Add(1)
					if !errors.Is(err, unix.EKEYREVOKED) && !errors.Is(err, syscall.EIO) {
						t.Errorf("reading %s: %v", name, err)
						return
					}
					continue
				}
				reads.Add(1)
				var got int
				if _, err := fmt.Sscanf(string(p), name+" %07d;", &got); err != nil || n != 4096 || !bytes.Equal(p, fill(name, got)) {
					t.Errorf("%s holds what was never written: %q...", name, p[:40])
					return
				}
			}
		})
		jobs.Go(func() {
			for ctx.Err() == nil {
				if f, err := os.Open(w.path(name)); err == nil {
					f.Close()
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	for range 15 {
		time.Sleep(40 * time.Millisecond)
		k.end(testKey, true)
		time.Sleep(20 * time.Millisecond)
		k.end(testKey, false)
	}
	before := reads.Load()
	eventually(t, func() bool { return reads.Load() > before+100 || t.Failed() })
	stop()
	jobs.Wait()
	require.Positive(t, refused.Load())
	require.Positive(t, w.srv.Stats().Healed)
}
