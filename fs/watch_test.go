package fs

import (
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// links finds every stored path of what is at a name now, by its inode.
func (w *world) links(name string) (paths []string) {
	w.t.Helper()
	var st unix.Stat_t
	require.NoError(w.t, unix.Lstat(w.path(name), &st))
	require.NoError(w.t, filepath.WalkDir(w.backing, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Sys().(*syscall.Stat_t).Ino == st.Ino {
			paths = append(paths, p[len(w.backing)+1:])
		}
		return err
	}))
	return paths
}

// moved drains a watch that must have missed nothing.
func moved(t *testing.T, watch *Watch) []string {
	t.Helper()
	list, lost := watch.Moved()
	require.False(t, lost)
	return pathsOf(list)
}

func pathsOf(list []Move) (paths []string) {
	for _, m := range list {
		paths = append(paths, m.Path)
	}
	return paths
}

// names that are awkward, each one component.
var awkward = []string{
	"plain", "new\nline", "bad\xff\xfe", "gone (deleted)", strings.Repeat("l", 255), " ", "back\\slash", strings.Repeat("\xc3\x28", 120),
}

func bothNames(t *testing.T, test func(t *testing.T, w *world)) {
	t.Run("encrypted", func(t *testing.T) { test(t, newWorld(t)) })
	t.Run("plain", func(t *testing.T) { test(t, newWorld(t, plainNames)) })
}

// Every kind of move is noted under the name it has on disk.
func TestWatchNotesEveryMove(t *testing.T) {
	bothNames(t, func(t *testing.T, w *world) {
		require.NoError(t, os.MkdirAll(w.path("from"), 0o755))
		require.NoError(t, os.MkdirAll(w.path("to/deep (deleted)"), 0o755))
		before, after := w.srv.Watch(), (*Watch)(nil)
		w.write("from/unmoved", []byte("x"))
		require.Empty(t, moved(t, before), "to make a file moves nothing")
		rename := func(flags uint) func(from, to string) error {
			return func(from, to string) error {
				return unix.Renameat2(unix.AT_FDCWD, w.path(from), unix.AT_FDCWD, w.path(to), flags)
			}
		}
		check := func(what string, want ...string) {
			t.Helper()
			for _, watch := range []*Watch{before, after} {
				if watch != nil {
					list, lost := watch.Moved()
					require.False(t, lost)
					require.ElementsMatch(t, want, pathsOf(list), what)
					for _, m := range list {
						var st unix.Stat_t
						require.NoError(t, unix.Lstat(filepath.Join(w.backing, m.Path), &st))
						require.Equal(t, st.Ino, m.Ino, "%s: what was moved is told", what)
					}
					require.Empty(t, moved(t, watch), "%s: told twice", what)
				}
			}
		}
		for i, name := range awkward {
			if i == 1 {
				after = w.srv.Watch()
			}
			w.write("from/"+name, []byte(name))
			to := "to/deep (deleted)/" + name
			require.NoError(t, os.Rename(w.path("from/"+name), w.path(to)))
			check("across directories", w.links(to)...)
			require.NoError(t, os.Rename(w.path(to), w.path(to[:len(to)-1]+"x")))
			check("in its directory", w.links(to[:len(to)-1]+"x")...)
			require.NoError(t, os.Rename(w.path(to[:len(to)-1]+"x"), w.path(name)))
			check("to the root", w.links(name)...)
		}
		w.write("over", []byte("old"))
		require.NoError(t, os.Rename(w.path("plain"), w.path("over")))
		check("over another", w.links("over")...)

		require.NoError(t, rename(unix.RENAME_EXCHANGE)("over", "from/unmoved"))
		check("exchange", append(w.links("over"), w.links("from/unmoved")...)...)
		require.NoError(t, rename(unix.RENAME_EXCHANGE)("from", "to/deep (deleted)"))
		check("exchange of directories", append(w.links("from"), w.links("to/deep (deleted)")...)...)
		require.NoError(t, rename(unix.RENAME_EXCHANGE)("from", "to/deep (deleted)"))
		check("and back", append(w.links("from"), w.links("to/deep (deleted)")...)...)

		require.NoError(t, rename(unix.RENAME_WHITEOUT)("over", "under"))
		check("whiteout", w.links("under")...)
		require.NoError(t, os.Remove(w.path("over")))
		require.NoError(t, rename(unix.RENAME_NOREPLACE)("under", "over"))
		check("noreplace", w.links("over")...)
		require.ErrorIs(t, rename(unix.RENAME_NOREPLACE)("over", "bad\xff\xfe"), unix.EEXIST)
		check("nothing moved")

		require.NoError(t, os.Rename(w.path("from"), w.path("to/from")))
		check("a directory", w.links("to/from")...)
		require.NoError(t, os.Symlink("x", w.path("link")))
		require.NoError(t, os.Rename(w.path("link"), w.path("to/link")))
		check("a symlink", w.links("to/link")...)

		had := w.links("over")
		long := strings.Repeat("L", 255)
		require.NoError(t, os.Link(w.path("over"), w.path("to/"+long)))
		check("a hard link", without(w.links("over"), had)...)
		fd, err := unix.Open(w.path("to"), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		require.NoError(t, err)
		defer unix.Close(fd)
		check("nothing has a name yet")
		require.NoError(t, link(fd, w.path("from-nothing")))
		check("the first name", w.links("from-nothing")...)

		after.Close()
		require.NoError(t, os.Rename(w.path("from-nothing"), w.path("on")))
		require.Empty(t, moved(t, after))
		require.Equal(t, w.links("on"), moved(t, before))
		before.Close()
		require.Empty(t, w.srv.fs.moves.watchers)
	})
}

func without(list, drop []string) (out []string) {
	for _, s := range list {
		if !covered(s, drop) {
			out = append(out, s)
		}
	}
	return out
}

// covered says whether a path, or a directory above it, is in a list.
func covered(path string, list []string) bool {
	for _, p := range list {
		if path == p || strings.HasPrefix(path, p+"/") {
			return true
		}
	}
	return false
}

// What a watch can't keep, or can't name, it says it lost; once.
func TestWatchSaysWhatItLost(t *testing.T) {
	w := newWorld(t, plainNames)
	watch := w.srv.Watch()
	defer watch.Close()
	for i := range maxMoved + 10 {
		watch.note(Move{Path: fmt.Sprint(i)}, true)
	}
	paths, lost := watch.Moved()
	require.Len(t, paths, maxMoved)
	require.True(t, lost)
	require.Empty(t, moved(t, watch))
	long := strings.Repeat("x", 4000)
	for i := range maxMovedBytes/4000 + 1 {
		watch.note(Move{Path: fmt.Sprint(i, long)}, true)
	}
	_, lost = watch.Moved()
	require.True(t, lost)

	// The kernel names no path of more than a page.
	part := strings.Repeat("d", 250)
	fd, err := unix.Open(w.mnt, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	for range 17 {
		require.NoError(t, unix.Mkdirat(fd, part, 0o755))
		sub, err := unix.Openat(fd, part, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		unix.Close(fd)
		fd = sub
	}
	defer unix.Close(fd)
	require.NoError(t, unix.Mkdirat(fd, "a", 0o755))
	require.Empty(t, moved(t, watch))
	require.NoError(t, unix.Renameat(fd, "a", fd, "b"))
	_, lost = watch.Moved()
	require.True(t, lost)
	require.Empty(t, moved(t, watch))
}

// A tree is churned while a sweep goes over it. The sweep misses files; with what
// two watches tell, each by itself, none is missed.
func TestWatchTellsWhatASweepMisses(t *testing.T) {
	bothNames(t, func(t *testing.T, w *world) {
		const dirs, files, workers = 6, 40, 4
		for d := range dirs {
			require.NoError(t, os.MkdirAll(w.path(fmt.Sprintf("d%d/s", d)), 0o755))
			for f := range files {
				w.write(fmt.Sprintf("d%d/f%d", d, f), []byte("x"))
			}
		}
		watches := []*Watch{w.srv.Watch(), w.srv.Watch()}
		var stop atomic.Bool
		var churn, drains sync.WaitGroup
		for seed := range workers {
			churn.Go(func() { w.churn(uint64(seed), &stop, dirs) })
		}
		swept := make(map[uint64]bool)
		w.sweep("", swept, time.Millisecond/2)
		met := make([]map[uint64]bool, len(watches))
		for i, watch := range watches {
			defer watch.Close()
			met[i] = maps.Clone(swept)
			drains.Go(func() {
				for done := false; !done; {
					done = stop.Load()
					paths, lost := watch.Moved()
					if lost {
						t.Error("lost")
					}
					for _, m := range paths {
						w.sweep(m.Path, met[i], 0)
					}
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		stop.Store(true)
		churn.Wait()
		drains.Wait()
		for i, watch := range watches {
			for _, p := range moved(t, watch) {
				w.sweep(p, met[i], 0)
			}
		}
		all := make(map[uint64]bool)
		w.sweep("", all, 0)
		require.Greater(t, len(all), dirs*files/2, "two that link and remove at once can remove a file's last name; but not so many")
		require.Less(t, len(swept), len(all), "the sweep missed nothing, so this shows nothing")
		for i := range met {
			for ino := range all {
				require.True(t, met[i][ino], "inode %d was moved unnoticed", ino)
			}
		}
	})
}

// sweep meets every regular file of the backing tree below a stored path, as far as
// things stay where they are for as long.
func (w *world) sweep(path string, met map[uint64]bool, pause time.Duration) {
	_ = filepath.WalkDir(filepath.Join(w.backing, path), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it is gone
		}
		time.Sleep(pause)
		var st unix.Stat_t
		if unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && filepath.Dir(p) != w.backing {
			met[st.Ino] = true
		}
		return nil
	})
}

// churn renames, exchanges, links and unlinks at random, directories too; others do
// so at the same time, so that much fails. New names are never used again: what was
// missed once stays missed.
func (w *world) churn(seed uint64, stop *atomic.Bool, dirs int) {
	r := rand.New(rand.NewPCG(1, seed))
	dir := func() string { return w.path(fmt.Sprintf("d%d%s", r.IntN(dirs), []string{"", "", "/s"}[r.IntN(3)])) }
	entry := func() string {
		in := dir()
		list, err := os.ReadDir(in)
		if err != nil || len(list) == 0 {
			return in + "/none"
		}
		return filepath.Join(in, list[r.IntN(len(list))].Name())
	}
	for i := 0; !stop.Load(); i++ {
		from, to := entry(), fmt.Sprintf("%s/%d-%d", dir(), seed, i)
		switch r.IntN(6) {
		case 0:
			_ = unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, entry(), unix.RENAME_EXCHANGE)
		case 1:
			if i%100 == 0 { // seldom: each covers much of the tree
				_ = unix.Renameat2(unix.AT_FDCWD, dir(), unix.AT_FDCWD, dir(), unix.RENAME_EXCHANGE)
			}
		case 2:
			if os.Link(from, to) == nil {
				_ = os.Remove(from)
			}
		default:
			if filepath.Base(from) != "s" {
				_ = os.Rename(from, to)
			}
		}
	}
}

// Who asks, or begins to watch, waits for a move that is under way: what can be
// seen to have moved has been noted by then.
func TestWatchWaitsForWhatIsUnderWay(t *testing.T) {
	w := newWorld(t, plainNames)
	w.write("a", []byte("x"))
	watch := w.srv.Watch()
	defer watch.Close()
	d, err := w.vol.Root() // its own: the server's is closed by goroutines that this test does not wait for
	require.NoError(t, err)
	defer d.Close()
	var all sync.WaitGroup
	defer all.Wait()
	renamed, end := make(chan error, 1), make(chan struct{})
	all.Go(func() {
		_ = w.srv.fs.moves.moving(func() error {
			err := d.Rename("a", d, "b", 0)
			renamed <- err
			<-end
			return err
		}, spot{d, "b", 7})
	})
	require.NoError(t, <-renamed)
	require.FileExists(t, filepath.Join(w.backing, "b"))
	told, late := make(chan []Move, 1), make(chan *Watch, 1)
	all.Go(func() {
		paths, _ := watch.Moved()
		told <- paths
	})
	all.Go(func() { late <- w.srv.Watch() })
	select {
	case paths := <-told:
		t.Errorf("told %v before the move was noted", paths)
	case <-late:
		t.Error("a watch began that does not know of the move under way")
	case <-time.After(200 * time.Millisecond):
	}
	close(end)
	require.Equal(t, []Move{{"b", 7}}, <-told)
	require.Empty(t, moved(t, <-late), "that move was over before")
}
