package fs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// openRaw is open(2) without Go's retry after EINTR.
func openRaw(path string, flags int) error {
	fd, err := syscall.Open(path, flags, 0o644)
	if err == nil {
		syscall.Close(fd)
	}
	return err
}

// Each kind of KMS failure is the errno of the call that needed a key, and nothing
// was made or cut.
func TestKeyFailures(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	w.write("empty", nil)
	w.remount() // nothing is open, nothing cached
	for _, row := range []struct {
		err   error
		errno syscall.Errno
	}{
		{crypt.ErrKeyDenied, syscall.EACCES},
		{crypt.ErrKeyDisabled, syscall.EKEYREVOKED},
		{crypt.ErrKeyNotFound, syscall.ENOKEY},
		{crypt.ErrKeyRejected, syscall.EKEYREJECTED},
		{crypt.ErrKeyUnavailable, syscall.EAGAIN},
		{crypt.ErrKeyTimeout, syscall.ETIMEDOUT},
		{crypt.ErrDamaged, syscall.EBADMSG},
		{context.DeadlineExceeded, syscall.ETIMEDOUT},
		{fmt.Errorf("something nobody thought of"), syscall.EIO},
	} {
		t.Run(row.errno.Error(), func(t *testing.T) {
			w.keys.set(fmt.Errorf("asking KMS: %w", row.err), nil)
			defer w.keys.set(nil, nil)
			before := snapshot(t, w.backing)
			require.Equal(t, row.errno, openRaw(w.path("f"), syscall.O_RDONLY))
			require.Equal(t, row.errno, openRaw(w.path("f"), syscall.O_WRONLY|syscall.O_TRUNC))
			require.Equal(t, row.errno, openRaw(w.path("empty"), syscall.O_WRONLY))
			require.Equal(t, row.errno, openRaw(w.path("new"), syscall.O_WRONLY|syscall.O_CREAT))
			require.Equal(t, row.errno, syscall.Truncate(w.path("f"), 4))
			require.Equal(t, row.errno, syscall.Truncate(w.path("empty"), 4))
			require.Equal(t, before, snapshot(t, w.backing))
		})
	}
	require.Equal(t, "contents", string(w.read("f")), "it recovers by itself")
	require.NoError(t, syscall.Truncate(w.path("f"), 0), "cutting to nothing needs no key")
}

// snapshot lists names, sizes and headers of a tree.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	require.NoError(t, filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		require.NoError(t, err)
		info, err := d.Info()
		require.NoError(t, err)
		header, _ := unixGetxattr(p, crypt.HeaderXattr)
		all[p] = fmt.Sprint(info.Size(), header)
		return nil
	}))
	return all
}

// A truncate with writers open takes its key before it cuts.
func TestTruncateUnderAWriter(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	f, err := os.OpenFile(w.path("f"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	w.keys.set(crypt.ErrKeyDisabled, nil)
	require.Equal(t, syscall.EKEYREVOKED, syscall.Ftruncate(int(f.Fd()), 0))
	require.Equal(t, syscall.EKEYREVOKED, syscall.Truncate(w.path("f"), 0))
	got := make([]byte, 8)
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, "contents", string(got))
	w.keys.set(nil, nil)
	require.NoError(t, f.Truncate(0))
	w.keys.set(crypt.ErrKeyDisabled, nil) // what is written now has its key
	_, err = f.WriteAt([]byte("again"), 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	w.keys.set(nil, nil)
	require.NoError(t, f.Close())
	w.remount()
	require.Equal(t, "again", string(w.read("f")))
}

// Whatever needs no contents asks nobody, and works while KMS says no.
func TestNoKeyNeeded(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, os.Mkdir(w.path("d"), 0o755))
	for i := range 20 {
		w.write(fmt.Sprintf("d/%d", i), randomBytes(i*1000))
	}
	open, err := os.OpenFile(w.path("d/open"), os.O_RDWR|os.O_CREATE, 0o644)
	require.NoError(t, err)
	defer open.Close()
	// KMS calls: one a create; opens of files just closed need one each.
	_, err = open.Write(randomBytes(100_000))
	require.NoError(t, err)
	w.keys.set(crypt.ErrKeyDisabled, nil)
	opens, fresh, _ := w.keys.calls()
	require.LessOrEqual(t, fresh, 21)
	require.Zero(t, opens)

	out, err := exec.Command("ls", "-lR", w.mnt).CombinedOutput()
	require.NoError(t, err, "%s", out)
	_, err = open.WriteAt(randomBytes(200_000), 50_000)
	require.NoError(t, err)
	require.NoError(t, open.Sync())
	require.NoError(t, open.Truncate(10))
	require.NoError(t, os.Rename(w.path("d/1"), w.path("moved")))
	require.NoError(t, os.Chmod(w.path("moved"), 0o600))
	require.NoError(t, os.Chtimes(w.path("moved"), time.Now(), time.Now()))
	require.NoError(t, os.Link(w.path("moved"), w.path("linked")))
	require.NoError(t, unix.Setxattr(w.path("moved"), "user.a", []byte("b"), 0))
	require.NoError(t, os.Symlink("x", w.path("sym")))
	require.NoError(t, os.Mkdir(w.path("d2"), 0o755))
	require.NoError(t, os.Remove(w.path("d/2")))
	require.NoError(t, os.Truncate(w.path("d/3"), 0))
	require.Equal(t, []byte{}, w.read("d/3"), "an empty file can be read without a key")
	require.NoError(t, open.Close())
	require.NoError(t, os.RemoveAll(w.path("d")))
	o, f, _ := w.keys.calls()
	require.Equal(t, opens, o)
	require.Equal(t, fresh, f)
}

// A key that was taken and not used goes back.
func TestUnusedKeysReturn(t *testing.T) {
	w := newWorld(t)
	for i := range 5 {
		w.write(fmt.Sprint(i), nil)
	}
	w.write("used", []byte("x"))
	w.unmount()
	_, fresh, returned := w.keys.calls()
	require.Equal(t, 6, fresh)
	require.Equal(t, 5, returned)
	w.mount()
}

// Opens of one file at once ask once, and share the answer.
func TestOpensCoalesce(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	w.remount()
	block := make(chan struct{})
	w.keys.set(nil, block)
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			data, err := os.ReadFile(w.path("f"))
			if err != nil || string(data) != "contents" {
				t.Errorf("%q, %v", data, err)
			}
		}()
	}
	require.Eventually(t, func() bool { return w.srv.fs.waiting() == 8 }, 20*time.Second, time.Millisecond)
	// While KMS hangs, what doesn't need it goes on.
	_, err := os.Stat(w.path("f"))
	require.NoError(t, err)
	require.NoError(t, os.Chmod(w.path("f"), 0o600))
	close(block)
	wg.Wait()
	opens, _, _ := w.keys.calls()
	require.Equal(t, 1, opens)
}

// Who joins an open that has waited for long has his own time to wait, and not what is
// left of the other's.
func TestWaiterOutlastsLeader(t *testing.T) {
	const deadline = 4 * time.Second
	w := newWorld(t, func(s *setup) { s.opts.Deadline = deadline })
	w.write("f", []byte("contents"))
	w.remount()
	block := make(chan struct{})
	w.keys.set(nil, block)
	open := func(waiting int) chan error {
		done := make(chan error, 1)
		go func() { done <- retryEINTR(func() error { return openRaw(w.path("f"), syscall.O_RDONLY) }) }()
		require.Eventually(t, func() bool { return w.srv.fs.waiting() == waiting }, 20*time.Second, time.Millisecond)
		return done
	}
	leader := open(1)
	time.Sleep(deadline / 2)
	waiter := open(2)
	require.Equal(t, syscall.ETIMEDOUT, <-leader)
	close(block)
	require.NoError(t, <-waiter)
}

// waiting counts the opens of all files.
func (fs *fileSystem) waiting() (n int) {
	fs.files.mu.Lock()
	defer fs.files.mu.Unlock()
	for _, f := range fs.files.byID {
		n += f.refs
	}
	return n
}

// A signal ends an open that waits for KMS at once, as EINTR; the others' go on.
func TestInterruptedOpen(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	w.remount()
	block := make(chan struct{})
	w.keys.set(nil, block)
	other := make(chan error, 1)
	script := exec.Command("cat", w.path("f"))
	require.NoError(t, script.Start())
	time.Sleep(150 * time.Millisecond)
	go func() {
		_, err := os.ReadFile(w.path("f"))
		other <- err
	}()
	start := time.Now()
	require.NoError(t, script.Process.Signal(syscall.SIGINT))
	_ = script.Wait()
	require.Less(t, time.Since(start), time.Second)
	close(block)
	require.NoError(t, <-other)
}

// localKeys are fakeKeys on this machine, or not.
type localKeys struct {
	*fakeKeys
	local bool
}

func (k *localKeys) Local(*crypt.Header) bool { return k.local }

// A signal (Go programs send themselves many) ends no open whose key is on this machine:
// neither that which asks for the key, nor one that waits for that; nor one that needs a
// new key. If the key is elsewhere, it ends all of them.
func TestSignalsEndNoLocalOpen(t *testing.T) {
	for _, local := range []bool{true, false} {
		t.Run(fmt.Sprintf("local=%v", local), func(t *testing.T) {
			w := newWorld(t)
			w.opts.Keys = &localKeys{w.keys, local}
			w.remount()
			w.write("f", []byte("contents"))
			w.write("empty", nil)
			w.remount()
			nodes := map[string]*node{}
			for _, name := range []string{"f", "empty"} {
				_, err := os.Stat(w.path(name))
				require.NoError(t, err)
				nodes[name] = w.srv.fs.root.GetChild(name).Operations().(*node)
			}
			opens, fresh, _ := w.keys.calls()
			block, signal := make(chan struct{}), make(chan struct{})
			w.keys.set(nil, block)
			errs := make(chan syscall.Errno, 3)
			open := func(name string, flags uint32) {
				fh, _, errno := nodes[name].Open(&fuse.Context{Cancel: signal}, flags)
				if errno == ok {
					nodes[name].Release(context.Background(), fh)
				}
				errs <- errno
			}
			go open("f", syscall.O_RDONLY)
			go open("f", syscall.O_RDONLY)
			go open("empty", syscall.O_WRONLY)
			eventually(t, func() bool {
				o, f, _ := w.keys.calls()
				return o > opens && f > fresh
			})
			close(signal)
			want := syscall.EINTR
			if local {
				want = ok
				time.Sleep(50 * time.Millisecond) // for those who would leave
				require.Empty(t, errs)
				close(block)
			}
			for range 3 {
				require.Equal(t, want, <-errs)
			}
			if !local {
				close(block)
			}
		})
	}
}

// A create waits no longer than CreateWait: it holds its directory.
func TestCreateWaitsBriefly(t *testing.T) {
	w := newWorld(t, func(s *setup) {
		s.opts.CreateWait = 200 * time.Millisecond
		s.opts.Deadline = 600 * time.Millisecond
	})
	w.write("f", []byte("contents"))
	w.remount()
	block := make(chan struct{})
	defer close(block)
	w.keys.set(nil, block)
	start := time.Now()
	require.Equal(t, syscall.ETIMEDOUT, retryEINTR(func() error { return openRaw(w.path("new"), syscall.O_CREAT|syscall.O_WRONLY) }))
	require.Less(t, time.Since(start), 500*time.Millisecond)
	start = time.Now()
	require.Equal(t, syscall.ETIMEDOUT, retryEINTR(func() error { return openRaw(w.path("f"), syscall.O_RDONLY) }))
	require.GreaterOrEqual(t, time.Since(start), 500*time.Millisecond)
	require.NoFileExists(t, w.path("new"))
}

func retryEINTR(call func() error) error {
	for {
		if err := call(); err != syscall.EINTR {
			return err
		}
	}
}

// A header replaced while its key was being asked for (a rekey) is read again.
func TestHeaderReadAgain(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("contents"))
	w.remount()
	stored := w.stored("f")
	raw, err := unixGetxattr(stored, crypt.HeaderXattr)
	require.NoError(t, err)
	h, err := crypt.ParseHeader(raw)
	require.NoError(t, err)
	bad := h.Clone()
	bad.Copies = []crypt.Copy{{Key: testKey, Blob: randomBytes(crypt.KeySize)}}
	rawBad, err := bad.Marshal()
	require.NoError(t, err)
	require.NoError(t, unix.Setxattr(stored, crypt.HeaderXattr, rawBad, 0))
	w.keys.mu.Lock()
	w.keys.onOpen = func(*crypt.Header) error { // the rekey comes in between
		return unix.Setxattr(stored, crypt.HeaderXattr, raw, 0)
	}
	w.keys.mu.Unlock()
	require.Equal(t, "contents", string(w.read("f")))
	opens, _, _ := w.keys.calls()
	require.Equal(t, 2, opens)
}

// Damage is EBADMSG on exactly the affected range, and can always be removed.
func TestDamage(t *testing.T) {
	everyMode(t, func(t *testing.T, w *world) {
		data := randomBytes(20 * crypt.DefaultBlockSize)
		w.write("block", data)
		w.write("header", data)
		w.write("noheader", data)
		w.write("foreign", data)
		w.unmountKeepingFiles()
		record := int64(crypt.DefaultBlockSize + crypt.RecordOverhead)
		paths := w.storedPaths
		flip(t, paths["block"], 7*record+100)
		raw, err := unixGetxattr(paths["header"], crypt.HeaderXattr)
		require.NoError(t, err)
		require.NoError(t, unix.Setxattr(paths["header"], crypt.HeaderXattr, raw[:20], 0))
		require.NoError(t, unix.Removexattr(paths["noheader"], crypt.HeaderXattr))
		h, err := crypt.ParseHeader(raw)
		require.NoError(t, err)
		h.Volume[0] ^= 1
		raw, err = h.Marshal()
		require.NoError(t, err)
		require.NoError(t, unix.Setxattr(paths["foreign"], crypt.HeaderXattr, raw, 0))
		w.mount()

		f, err := os.Open(w.path("block"))
		require.NoError(t, err)
		defer f.Close()
		got := make([]byte, crypt.DefaultBlockSize)
		for i := range int64(20) {
			_, err := f.ReadAt(got, i*crypt.DefaultBlockSize)
			if i == 7 {
				require.ErrorIs(t, err, syscall.EBADMSG)
				continue
			}
			require.NoError(t, err, "block %d", i)
			require.Equal(t, data[i*crypt.DefaultBlockSize:][:len(got)], got)
		}
		for _, name := range []string{"header", "noheader", "foreign"} {
			require.Equal(t, syscall.EBADMSG, openRaw(w.path(name), syscall.O_RDONLY))
			info, err := os.Stat(w.path(name))
			require.NoError(t, err)
			require.EqualValues(t, len(data), info.Size())
			require.NoError(t, os.Chmod(w.path(name), 0o600))
			require.NoError(t, os.Rename(w.path(name), w.path(name+"2")))
		}
		w.write("header2", []byte("repaired"))
		require.Equal(t, "repaired", string(w.read("header2")))
		require.NoError(t, os.Truncate(w.path("noheader2"), 0))
		require.Empty(t, w.read("noheader2"))
		require.NoError(t, os.Remove(w.path("foreign2")))
	})
}

func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	require.NoError(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], off)
	require.NoError(t, err)
}

func TestErrnoTable(t *testing.T) {
	for _, row := range errnos {
		require.NotEqual(t, syscall.ENOENT, row.errno)
		got, known := errnoOf(fmt.Errorf("x: %w", row.err))
		require.True(t, known)
		require.Equal(t, row.errno, got)
	}
	got, known := errnoOf(os.ErrNotExist)
	require.False(t, known)
	require.Equal(t, syscall.EIO, got, "never ENOENT by accident")
	got, _ = errnoOf(fmt.Errorf("x: %w", syscall.ENOSPC))
	require.Equal(t, syscall.ENOSPC, got)
}

func TestMountRefuses(t *testing.T) {
	w := newWorld(t)
	o := w.opts
	o.Volume, o.Keys = w.vol, w.keys
	inside := filepath.Join(w.backing, "inside")
	require.NoError(t, os.Mkdir(inside, 0o755))
	for _, at := range []string{inside, filepath.Dir(w.backing), w.backing} {
		o.Mountpoint = at
		_, err := Mount(o)
		require.ErrorIs(t, err, ErrNested, at)
	}
	o.Mountpoint = filepath.Join(w.backing, "missing")
	_, err := Mount(o)
	require.ErrorIs(t, err, syscall.ENOENT)
}

func TestMountTable(t *testing.T) {
	w := newWorld(t)
	table, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	var line string
	for l := range strings.Lines(string(table)) {
		if strings.Contains(l, " "+w.mnt+" ") {
			line = l
		}
	}
	require.True(t, strings.HasPrefix(line, w.backing+" "+w.mnt+" fuse.kmsfs rw,nosuid,nodev,"), line)
	ahead, err := os.ReadFile("/sys/class/bdi/" + deviceOf(w.mnt) + "/read_ahead_kb")
	require.NoError(t, err)
	require.Equal(t, "2048\n", string(ahead))
}

func TestUnmountBusy(t *testing.T) {
	w := newWorld(t)
	f, err := os.Create(w.path("f"))
	require.NoError(t, err)
	require.Error(t, w.srv.Unmount())
	_, err = f.WriteString("still works")
	require.NoError(t, err)
	require.NoError(t, f.Close())
	w.remount()
	require.Equal(t, "still works", string(w.read("f")))
}

func TestReadOnly(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("x"))
	w.unmount()
	w.opts.ReadOnly = true
	w.mount()
	require.Equal(t, "x", string(w.read("f")))
	require.ErrorIs(t, os.WriteFile(w.path("g"), nil, 0o600), syscall.EROFS)
	require.ErrorIs(t, os.Remove(w.path("f")), syscall.EROFS)
}

func TestUpkeepSyncs(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("x"))
	require.Eventually(t, func() bool { return w.srv.Stats().Syncs > 0 }, 12*time.Second, 100*time.Millisecond)
	s := w.srv.Stats()
	require.EqualValues(t, 1, s.Creates)
	require.EqualValues(t, 1, s.KeyFresh)
}
