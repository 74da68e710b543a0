package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// walk collects the paths of a walk, and its errors by path.
func walk(t testing.TB, v *Volume) (files []string, bad map[string]error) {
	t.Helper()
	bad = map[string]error{}
	require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
		if it.Err != nil {
			bad[it.Path()] = it.Err
			return nil
		}
		files = append(files, it.Path())
		fd, err := it.Open(unix.O_RDONLY)
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(fd, &st))
		require.Equal(t, st.Ino, it.Ino)
		require.NoError(t, unix.Close(fd))
		return nil
	}))
	sort.Strings(files)
	return files, bad
}

func TestWalkMeetsEveryFileOnce(t *testing.T) {
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		require.NoError(t, v.Lock(""))
		d := root(t, v)
		want := []string{}
		for i := range 12 {
			sub := mkdir(t, d, fmt.Sprintf("dir%02d", i))
			for j := range 5 {
				touch(t, sub, fmt.Sprintf("f%d", j), "x")
				want = append(want, fmt.Sprintf("dir%02d/f%d", i, j))
			}
			require.NoError(t, sub.Symlink("/etc", "link"))
			require.NoError(t, sub.Mknod("fifo", unix.S_IFIFO|0o600, 0))
		}
		touch(t, d, longName("l"), "x")
		fd, err := d.OpenPath(longName("l"))
		require.NoError(t, err)
		require.NoError(t, d.Link(fd, "second-link"))
		unix.Close(fd)
		touch(t, mkdir(t, d, longName("D")), longName("f"), "x")
		want = append(want, longName("l"), "second-link", longName("D")+"/"+longName("f"))
		sort.Strings(want)
		fds := openFDs(t)
		files, bad := walk(t, v)
		require.Empty(t, bad)
		require.Equal(t, want, files)
		require.LessOrEqual(t, openFDs(t), fds)

		locked, err := Open(v.Path())
		require.NoError(t, err)
		files, bad = walk(t, locked)
		require.Empty(t, bad)
		require.Len(t, files, len(want))
		if mode == NamesEncrypted {
			require.NotContains(t, strings.Join(files, " "), "second-link")
		}
		for _, f := range files {
			require.FileExists(t, filepath.Join(v.Path(), f), "without the key, paths are the stored ones")
		}
		require.NoError(t, locked.Close())
	}
}

func TestWalkOfADeepTree(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d, err := v.Root()
	require.NoError(t, err)
	const depth = 150
	files := 0
	for range depth {
		for j := range 3 { // before and after the way down, in hash order
			touch(t, d, fmt.Sprintf("file%d", j), "x")
			require.NoError(t, d.Mkdir(fmt.Sprintf("side%d", j), 0o700))
			side, err := d.OpenDir(fmt.Sprintf("side%d", j))
			require.NoError(t, err)
			touch(t, side, "leaf", "x")
			side.Close()
			files += 2
		}
		require.NoError(t, d.Mkdir("down", 0o700))
		next, err := d.OpenDir("down")
		require.NoError(t, err)
		d.Close()
		d = next
	}
	d.Close()
	before, most := openFDs(t), 0
	n := 0
	seen := map[string]bool{}
	require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
		require.NoError(t, it.Err, it.Path())
		require.False(t, seen[it.Path()], it.Path())
		seen[it.Path()] = true
		if n++; n%20 == 0 {
			most = max(most, openFDs(t)-before)
		}
		return nil
	}))
	require.Equal(t, files, n)
	require.LessOrEqual(t, openFDs(t), before)
	require.LessOrEqual(t, most, 2*walkOpen+8, "descriptors don't grow with the depth")
}

func TestWalkHeapDoesNotGrowWithTheTree(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	d := root(t, v)
	const files = 8000
	for i := range files {
		require.NoError(t, d.Mknod(fmt.Sprintf("a-file-of-some-name-length-%d", i), unix.S_IFREG|0o600, 0))
	}
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	n, worst := 0, uint64(0)
	require.NoError(t, v.Walk(context.Background(), func(*Item) error {
		if n++; n%2000 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&now)
			worst = max(worst, now.HeapAlloc)
		}
		return nil
	}))
	require.Equal(t, files, n)
	require.Less(t, worst, before.HeapAlloc+512<<10)
}

func TestWalkGoesOnAfterErrors(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, "good", "x")
	sub := mkdir(t, d, "sub")
	touch(t, sub, "f", "x")
	require.NoError(t, unix.Removexattr(dirPath(t, sub), DirXattr))
	files, bad := walk(t, v)
	require.Empty(t, bad)
	require.Len(t, files, 2, "a damaged directory's files have headers too")
	require.Contains(t, files[0]+files[1], "sub/"+DamagedPrefix)
	require.Equal(t, "sub", path.Dir(files[1]))

	other := mkdir(t, d, "mnt")
	if err := unix.Mount("tmpfs", dirPath(t, other), "tmpfs", 0, ""); err == nil {
		defer unix.Unmount(dirPath(t, other), unix.MNT_DETACH)
		touchRaw(t, dirPath(t, other), "not-ours")
		files, bad = walk(t, v)
		require.Len(t, files, 2)
		require.ErrorIs(t, bad["mnt"], ErrOtherDevice)
	}
}

func TestWalkStops(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	for i := range 10 {
		touch(t, d, fmt.Sprint(i), "x")
	}
	stop := errors.New("enough")
	n := 0
	require.ErrorIs(t, v.Walk(context.Background(), func(*Item) error { n++; return stop }), stop)
	require.Equal(t, 1, n)
	ctx, cancel := context.WithCancel(context.Background())
	require.ErrorIs(t, v.Walk(ctx, func(*Item) error { cancel(); return nil }), context.Canceled)
}

// Items may be worked on after the callback, and what took a file's place
// meanwhile is not opened instead.
func TestWalkItemsCanBeHeld(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	sub := mkdir(t, d, "sub")
	for _, name := range []string{"kept", "replaced", "gone", "link", "fifo"} {
		touch(t, sub, name, "x")
	}
	before := openFDs(t)
	held := map[string]*Item{}
	require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
		it.Hold()
		held[path.Base(it.Path())] = it
		return it.Err
	}))
	require.NoError(t, d.Rename("sub", d, "moved", 0))
	for name, attack := range map[string]func(p string) error{
		"replaced": func(p string) error { return errors.Join(os.Rename(p, p+"x"), os.WriteFile(p, nil, 0o600)) },
		"gone":     os.Remove,
		"link":     func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/etc/passwd", p)) },
		"fifo":     func(p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o666)) },
	} {
		require.NoError(t, attack(storedPath(t, sub, name)))
	}
	inTime(t, func() {
		for name, it := range held {
			fd, err := it.Open(unix.O_RDWR)
			raw, st, errPeek := it.Peek()
			if name == "kept" {
				require.NoError(t, errPeek)
				require.Nil(t, raw)
				require.Equal(t, it.Ino, st.Ino)
				require.NoError(t, err)
				unix.Close(fd)
				fd, err = it.Open(unix.O_PATH)
				require.NoError(t, err)
				require.NoError(t, SetHeader(fd, []byte("through O_PATH")))
				unix.Close(fd)
				raw, _, err = it.Peek()
				require.NoError(t, err)
				require.Equal(t, "through O_PATH", string(raw))
			} else {
				require.ErrorIs(t, err, ErrGone, name)
				require.ErrorIs(t, errPeek, ErrGone, name)
			}
			it.Release()
		}
	})
	require.LessOrEqual(t, openFDs(t), before)
}

// Directories that are moved away while the walk is deep inside them.
func TestWalkWhileTheTreeMoves(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	r := root(t, v)
	mkdir(t, r, "elsewhere")
	d := r
	for range walkOpen + 20 {
		sub := mkdir(t, d, "down")
		touch(t, sub, "f", "x")
		d = sub
	}
	moved := false
	inTime(t, func() {
		require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
			require.True(t, it.Err == nil || errors.Is(it.Err, ErrMoved) || errors.Is(it.Err, ErrGone), "%v", it.Err)
			if !moved && strings.Count(it.Path(), "/") > walkOpen+10 {
				moved = true
				half := openDir(t, openDir(t, r, "down"), "down")
				require.NoError(t, half.Rename("down", openDir(t, r, "elsewhere"), "x", 0))
			}
			return nil
		}))
	})
	require.True(t, moved)
}

func TestWalkSkipsNothingPlantedAsOurs(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	sub := mkdir(t, root(t, v), "sub")
	touchRaw(t, dirPath(t, sub), "kmsfs.toml")
	files, bad := walk(t, v)
	require.Empty(t, bad)
	require.Equal(t, []string{"sub/" + DamagedPrefix + "kmsfs.toml"}, files)
	_, err := v.names.DecryptName(sub.id, "kmsfs.toml")
	require.ErrorIs(t, err, crypt.ErrDamaged)
}

// Whoever must not miss a file has to know that an entry vanished before it could
// be looked at: it may have been renamed to a place that was already walked.
func TestWalkReportsWhatVanished(t *testing.T) {
	for name, change := range map[string]func(p string) error{
		"removed file":    os.Remove,
		"renamed file":    func(p string) error { return os.Rename(p, filepath.Join(filepath.Dir(p), "..", "elsewhere")) },
		"other kind":      func(p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) },
		"now a directory": func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			v, _ := newVolume(t, NamesPlain)
			sub := mkdir(t, root(t, v), "sub")
			touch(t, sub, "a", "x")
			touch(t, sub, "b", "x")
			met := ""
			gone := map[string]error{}
			require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
				_, _, err := it.Peek()
				switch {
				case it.Err != nil || err != nil:
					gone[it.Path()] = err
				case met == "": // both are listed by now
					met = it.Name
					return change(storedPath(t, sub, map[string]string{"a": "b", "b": "a"}[met]))
				}
				return nil
			}))
			other := map[string]string{"a": "sub/b", "b": "sub/a"}[met]
			require.Len(t, gone, 1)
			require.ErrorIs(t, gone[other], ErrGone)
		})
	}
}

func TestWalkReportsARemovedDirectory(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	r := root(t, v)
	for _, name := range []string{"a", "b"} {
		touch(t, mkdir(t, r, name), "f", "x")
	}
	var gone []error
	met := false
	require.NoError(t, v.Walk(context.Background(), func(it *Item) error {
		if it.Err != nil {
			gone = append(gone, it.Err)
		} else if !met {
			met = true
			other := map[string]string{"a/f": "b", "b/f": "a"}[it.Path()]
			return os.RemoveAll(filepath.Join(v.Path(), other))
		}
		return nil
	}))
	require.Len(t, gone, 1)
	require.ErrorIs(t, gone[0], ErrGone)
}

// WalkBelow meets what stands at a stored path, and nothing beside it.
func TestWalkBelow(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	r := root(t, v)
	sub := mkdir(t, r, "sub")
	deep := mkdir(t, sub, "deep")
	for _, d := range []*Dir{r, sub, deep} {
		touch(t, d, "f", "x")
		touch(t, d, "g", "x")
	}
	require.NoError(t, r.Symlink("sub", "link"))
	below := func(stored string) (paths []string) {
		at, err := v.WalkBelow(context.Background(), stored, func(it *Item) error {
			_, _, err := it.Peek()
			require.NoError(t, err)
			paths = append(paths, it.Path())
			return nil
		})
		require.NoError(t, err)
		require.Equal(t, len(paths) > 1, at.Dir)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(v.Path(), stored), &st))
		if stored == SettingsFile {
			st.Ino = 0
		}
		require.Equal(t, st.Ino, at.Ino)
		sort.Strings(paths)
		return paths
	}
	before := openFDs(t)
	require.Equal(t, []string{"sub/deep/f", "sub/deep/g", "sub/f", "sub/g"}, below("sub"))
	require.Equal(t, []string{"sub/deep/f", "sub/deep/g"}, below("sub/deep"))
	require.Equal(t, []string{"sub/f"}, below("sub/f"))
	require.Empty(t, below("link"), "a symlink leads nowhere")
	require.Empty(t, below("kmsfs.toml"), "our own files are not the user's")
	for _, bad := range []string{"", "/", "..", "sub/../sub", "/sub"} {
		_, err := v.WalkBelow(context.Background(), bad, func(*Item) error { return nil })
		require.Error(t, err, bad)
	}
	for _, gone := range []string{"absent", "absent/x", "sub/absent", "sub/f/x", "link/f"} {
		met := 0
		_, err := v.WalkBelow(context.Background(), gone, func(it *Item) error {
			require.ErrorIs(t, it.Err, ErrGone)
			met++
			return nil
		})
		require.NoError(t, err)
		require.Equal(t, 1, met, gone)
	}
	require.LessOrEqual(t, openFDs(t), before)
}

// A live mount makes files in the order of DESIGN 4a: entry, header, data. Peek
// reads the header first and the size last, so a file that gets both in between must not
// look like one with contents and no header: that would be a damaged one.
func TestPeekOfAFileBeingMade(t *testing.T) {
	h := t.TempDir()
	stop := make(chan struct{})
	var maker sync.WaitGroup
	maker.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			path := filepath.Join(h, "new")
			fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
			if err != nil {
				t.Error(err)
				return
			}
			_ = unix.Fsetxattr(fd, crypt.HeaderXattr, []byte("a header"), 0)
			_, _ = unix.Write(fd, []byte("contents"))
			unix.Close(fd)
			_ = os.Remove(path)
		}
	})
	defer maker.Wait()
	defer close(stop)
	dir, err := unix.Open(h, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer unix.Close(dir)
	looks := 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); looks++ {
		var st unix.Stat_t
		if unix.Fstatat(dir, "new", &st, 0) != nil {
			continue
		}
		it := &Item{Name: "new", Ino: st.Ino, dir: &walkDir{fd: dir, dev: st.Dev}}
		raw, now, err := it.Peek()
		if err == nil && raw == nil && now.Size > 0 {
			t.Fatalf("after %d looks: contents without a header, where there never were any", looks)
		}
	}
	require.NotZero(t, looks)
}

// TestDeepTreesAreCheap: a user makes a tree as deep as he likes, and every job over the
// volume, a mount after a kill too, walks down. The memory of that does not grow with the
// square of the depth.
func TestDeepTreesAreCheap(t *testing.T) {
	const depth = 2000
	v, _ := newVolume(t, NamesPlain)
	name := strings.Repeat("d", 250)
	fd, err := unix.Open(v.Path(), unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	for range depth {
		require.NoError(t, unix.Mkdirat(fd, name, 0o700))
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		unix.Close(fd)
		fd = next
	}
	file, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY, 0o600)
	require.NoError(t, err)
	unix.Close(file)
	unix.Close(fd)
	alloc := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, met := alloc(), 0
	require.NoError(t, v.Walk(t.Context(), func(it *Item) error {
		require.NoError(t, it.Err)
		require.Less(t, alloc()-before, uint64(30<<20))
		require.Len(t, it.Path(), depth*251+len("file"))
		require.Equal(t, it.Path(), it.StoredPath())
		met++
		return nil
	}))
	require.Equal(t, 1, met)
}
