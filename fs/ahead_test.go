package fs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/keys/kmstest"
)

// A gate is a Provider whose Decrypts can be held up, or refused, and are counted by
// file: what is asked for is known from the encryption context.
type gate struct {
	keys.Provider

	mu     sync.Mutex
	held   chan struct{}  // guarded by mu; Decrypts wait until it is closed
	asked  map[string]int // guarded by mu; by file id
	refuse map[string]int // guarded by mu; how many Decrypts of a file are yet to be refused
}

func (g *gate) Decrypt(ctx context.Context, key string, ec keys.EncryptionContext, blob []byte) (*crypt.Key, error) {
	id := ec["kmsfs:file"]
	g.mu.Lock()
	g.asked[id]++
	held, refused := g.held, g.refuse[id] > 0
	if refused {
		g.refuse[id]--
	}
	g.mu.Unlock()
	if held != nil {
		select {
		case <-held:
		case <-ctx.Done():
		}
	}
	if refused {
		return nil, &keys.Error{Kind: keys.KindDenied, Op: "Decrypt", Key: key, Code: "AccessDeniedException"}
	}
	return g.Provider.Decrypt(ctx, key, ec, blob)
}

// deny refuses the next Decrypt of each of some files.
func (g *gate) deny(ids ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, id := range ids {
		g.refuse[id] = 1
	}
}

// shut holds up every Decrypt from now on until release is called.
func (g *gate) shut() (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = make(chan struct{})
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		close(g.held)
		g.held = nil
	})
}

// files is how many files a Decrypt was asked for, and total how many Decrypts.
func (g *gate) count() (files, total int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, n := range g.asked {
		total += n
	}
	return len(g.asked), total
}

// was reports whether a file's key was asked for.
func (g *gate) was(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked[id] > 0
}

// An aheadWorld is a mount whose files are under a key of a loopback KMS.
type aheadWorld struct {
	*world
	gate *gate
	key  string
	ring *keys.Ring
	logs bytes.Buffer
}

// aheadMost is how many keys the tests' mounts open at once ahead.
const aheadMost = 32

func newAheadWorld(t *testing.T, tune ...func(*setup)) *aheadWorld {
	t.Helper()
	srv := kmstest.New(t, nil)
	srv.Setenv(t)
	aws, err := keys.NewAWS(keys.AWSOptions{})
	require.NoError(t, err)
	tune = append(tune, func(s *setup) { s.opts.Prefetch = aheadMost })
	w := &aheadWorld{world: newWorld(t, tune...), gate: &gate{Provider: aws}, key: srv.CreateKey("us-east-1")}
	w.opts.Logger = slog.New(slog.NewTextHandler(&w.logs, nil))
	w.again(w.key)
	t.Cleanup(func() {
		w.end()
		w.srv = nil
		w.ring.Close()
	})
	return w
}

// again mounts it with empty caches.
func (w *aheadWorld) again(key string) {
	w.t.Helper()
	w.unmount()
	if w.ring != nil {
		w.ring.Close()
	}
	w.gate.asked, w.gate.refuse = map[string]int{}, map[string]int{}
	w.ring = keys.NewRing(keys.RingOptions{Volume: w.keys.volume, Trusted: []string{key}, Provider: w.gate, Prefetch: aheadMost, Deadline: time.Minute})
	w.opts.Keys, w.opts.Deadline = w.ring, time.Minute
	w.mount()
}

// fill makes files that tell their own names, and mounts again.
func (w *aheadWorld) fill(dir string, files int) {
	w.t.Helper()
	require.NoError(w.t, os.MkdirAll(w.path(dir), 0o755))
	for i := range files {
		name := filepath.Join(dir, fmt.Sprintf("f%d", (i*37)%files)) // so that no two orders agree
		w.write(name, []byte(name))
	}
}

// in lists the files of a directory in an order.
func (w *aheadWorld) in(o order, dir string) []string {
	w.t.Helper()
	d, err := os.Open(w.path(dir))
	require.NoError(w.t, err)
	defer d.Close()
	list, err := d.ReadDir(-1)
	require.NoError(w.t, err)
	type file struct {
		name string
		ino  uint64
	}
	var files []file
	for _, e := range list {
		if e.Type().IsRegular() {
			var st unix.Stat_t
			require.NoError(w.t, unix.Lstat(w.path(filepath.Join(dir, e.Name())), &st))
			files = append(files, file{filepath.Join(dir, e.Name()), st.Ino})
		}
	}
	switch o {
	case byName:
		slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	case byInode:
		slices.SortFunc(files, func(a, b file) int { return cmp.Compare(a.ino, b.ino) })
	}
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.name
	}
	return names
}

// clear drops files from the front of an order until the first two are neighbours in no
// other order: what a program does must not be ambiguous.
func (w *aheadWorld) clear(list []string, dir string) []string {
	w.t.Helper()
	for i := range len(list) / 2 {
		orders := 0
		for _, o := range []order{listed, byName, byInode} {
			if near(w.in(o, dir), list[i], list[i+1]) {
				orders++
			}
		}
		if orders == 1 {
			return list[i:]
		}
	}
	require.Fail(w.t, "the orders are too much alike")
	return nil
}

// near reports whether one name comes a leap after another, at most.
func near(list []string, before, name string) bool {
	step := slices.Index(list, name) - slices.Index(list, before)
	return step > 0 && step <= leap+1
}

// id is what the encryption context calls a file.
func (w *aheadWorld) id(name string) string {
	w.t.Helper()
	raw, err := unixGetxattr(w.stored(name), crypt.HeaderXattr)
	require.NoError(w.t, err)
	h, err := crypt.ParseHeader(raw)
	require.NoError(w.t, err)
	return hex.EncodeToString(h.File[:])
}

// reads opens files one after another, and checks what they hold.
func (w *aheadWorld) reads(names ...string) {
	w.t.Helper()
	for _, name := range names {
		require.Equal(w.t, name, string(w.read(name)))
	}
}

// readsHeld opens a file that has to wait.
func (w *aheadWorld) readsHeld(name string) (wait func()) {
	done := make(chan error, 1)
	go func() {
		data, err := os.ReadFile(w.path(name))
		if err == nil && string(data) != name {
			err = fmt.Errorf("%s holds %q", name, data)
		}
		done <- err
	}()
	return func() {
		w.t.Helper()
		require.NoError(w.t, <-done)
	}
}

// When a program has opened two neighbours, in whatever order it goes through the
// directory, the keys of those that follow are asked for before they are opened; and
// each is asked for once.
func TestAheadOfAWalk(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 80)
	for o, name := range []string{"listed", "by name", "by inode"} {
		t.Run(name, func(t *testing.T) {
			list := w.clear(w.in(order(o), "d"), "d")
			files := len(list)
			w.again(w.key)
			w.reads(list[0])
			release := w.gate.shut()
			defer release()
			wait := w.readsHeld(list[1])
			eventually(t, func() bool { n, _ := w.gate.count(); return n >= 2+firstWindow })
			n, _ := w.gate.count()
			require.Equal(t, 2+firstWindow, n, "no more than the first window")
			release()
			wait()
			w.reads(list[2:]...)
			n, total := w.gate.count()
			require.Equal(t, files, n)
			require.Equal(t, files, total, "no key was asked for twice")
			s := w.ring.Stats()
			require.EqualValues(t, 1, w.srv.Stats().Walks)
			require.GreaterOrEqual(t, s.AheadUsed, int64(firstWindow))
			require.Equal(t, s.Ahead, s.AheadUsed)
			require.Zero(t, s.AheadWasted+s.AheadFailed)
		})
	}
}

// Who jumps about in a directory has nothing decrypted that he does not open.
func TestNothingAheadOfRandomAccess(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 120)
	orders := [][]string{w.in(listed, "d"), w.in(byName, "d"), w.in(byInode, "d")}
	w.again(w.key)
	opened, last := 0, ""
	for i := range 120 {
		name := orders[0][(i*49)%120]
		if last != "" && slices.ContainsFunc(orders, func(list []string) bool { return near(list, last, name) }) {
			continue
		}
		w.reads(name)
		last = name
		opened++
	}
	require.Greater(t, opened, 60)
	eventually(t, func() bool { return len(w.srv.fs.ahead.opens) == 0 })
	require.Zero(t, w.ring.Stats().Ahead)
	_, total := w.gate.count()
	require.Equal(t, opened, total)
}

// A guess that is refused is nobody's error: the open that comes asks for itself.
func TestRefusedGuess(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 40)
	list := w.clear(w.in(listed, "d"), "d")
	ids := make([]string, len(list))
	for i, name := range list {
		ids[i] = w.id(name)
	}
	w.again(w.key)
	w.gate.deny(ids[2:]...)
	w.reads(list[:2]...)
	eventually(t, func() bool { return w.ring.Stats().AheadFailed > 0 })
	// What was not guessed is refused in earnest; the rest opens.
	w.gate.mu.Lock()
	clear(w.gate.refuse)
	w.gate.mu.Unlock()
	w.reads(list...)
	require.Empty(t, w.srv.Stats().Errors)
	require.NotContains(t, w.logs.String(), "failed")
}

// An open that meets a guess under way which then fails asks for itself.
func TestOpenMeetsAFailingGuess(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 40)
	list := w.clear(w.in(listed, "d"), "d")
	third := w.id(list[2])
	w.again(w.key)
	w.reads(list[0])
	release := w.gate.shut()
	defer release()
	w.gate.deny(third)
	second := w.readsHeld(list[1])
	eventually(t, func() bool { return w.gate.was(third) })
	met := w.readsHeld(list[2])
	eventually(t, func() bool { return w.ring.Stats().Coalesced > 0 })
	release()
	second()
	met()
	require.Empty(t, w.srv.Stats().Errors)
}

// What is removed, renamed or replaced ahead of a walk changes nothing of what is read.
func TestSiblingsChangeAhead(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 40)
	list := w.clear(w.in(listed, "d"), "d")
	w.again(w.key)
	w.reads(list[0])
	release := w.gate.shut()
	defer release()
	second := w.readsHeld(list[1])
	eventually(t, func() bool { n, _ := w.gate.count(); return n >= 2+firstWindow })
	require.NoError(t, os.Remove(w.path(list[2])))
	require.NoError(t, os.Rename(w.path(list[4]), w.path(list[3])))
	w.write("new", []byte(list[5]))
	require.NoError(t, os.Rename(w.path("new"), w.path(list[5])))
	release()
	second()
	require.Equal(t, list[4], string(w.read(list[3])))
	w.reads(list[5:]...)
	require.NoFileExists(t, w.path(list[2]))
	require.Empty(t, w.srv.Stats().Errors)
}

// "kmsfs lock" wipes what was decrypted ahead, and nothing more is.
func TestLockDropsWhatIsAhead(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 60)
	list := w.clear(w.in(listed, "d"), "d")
	w.again(w.key)
	before := crypt.LiveKeys()
	w.reads(list[:4]...)
	eventually(t, func() bool { return w.ring.Stats().AheadUnused > 0 })
	w.ring.Lock()
	// Calls of the ring before may have been wiping their keys when that was counted.
	eventually(t, func() bool { return crypt.LiveKeys() <= before && w.ring.Stats().CacheKeys == 0 })
	require.Zero(t, w.ring.Stats().AheadUnused)
	total := 0
	eventually(t, func() bool { // those that were let go before it arrive
		before := total
		time.Sleep(50 * time.Millisecond)
		_, total = w.gate.count()
		return total == before
	})
	require.ErrorIs(t, retryEINTR(func() error { return openRaw(w.path(list[4]), unix.O_RDONLY) }), unix.EKEYREVOKED)
	eventually(t, func() bool { return len(w.srv.fs.ahead.opens) == 0 })
	_, now := w.gate.count()
	require.Equal(t, total, now)
	require.Positive(t, w.ring.Stats().AheadWasted, "the waste is told")
	w.ring.Unlock()
	w.reads(list...)
}

// A program that went from one directory into the next is expected in the one after.
func TestAheadIntoTheNextDirectory(t *testing.T) {
	w := newAheadWorld(t)
	dirs := []string{"t/a", "t/b", "t/c"}
	for _, dir := range dirs {
		w.fill(dir, 20)
	}
	d, err := os.ReadDir(w.path("t"))
	require.NoError(t, err)
	for i, e := range d {
		dirs[i] = "t/" + e.Name() // by name
	}
	var lists [][]string
	for _, dir := range dirs {
		lists = append(lists, w.in(byName, dir))
	}
	lists[0] = w.clear(lists[0], dirs[0])
	var third []string
	for _, name := range lists[2] {
		third = append(third, w.id(name))
	}
	w.again(w.key)
	w.reads(lists[0]...)
	for _, id := range third {
		require.False(t, w.gate.was(id), "it may stop at the end of the directory")
	}
	w.reads(lists[1][:19]...)
	eventually(t, func() bool { return w.gate.was(third[0]) })
	w.reads(lists[1][19])
	w.reads(lists[2]...)
	_, total := w.gate.count()
	require.Equal(t, len(lists[0])+40, total)
	require.EqualValues(t, 1, w.srv.Stats().Walks)
}

// A program that goes through one directory twice is not on its way into others.
func TestNothingAheadOfTheSameDirectoryAgain(t *testing.T) {
	w := newAheadWorld(t)
	for _, dir := range []string{"t/a", "t/b", "t/c", "t/d"} {
		w.fill(dir, 20)
	}
	d, err := os.ReadDir(w.path("t"))
	require.NoError(t, err)
	dir := "t/" + d[0].Name()
	list := w.clear(w.in(byName, dir), dir)
	w.again(w.key)
	for range 3 {
		w.reads(list...)
		eventually(t, func() bool { return len(w.srv.fs.ahead.opens) == 0 })
	}
	time.Sleep(50 * time.Millisecond) // for what must not come
	_, total := w.gate.count()
	require.Equal(t, len(list), total)
}

// Subdirectories are met among files, entered, and left again.
func TestAheadDownAndUp(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("t", 40)
	w.fill("t/f1x", 30) // by name, between files
	list, sub := w.clear(w.in(byName, "t"), "t"), w.in(byName, "t/f1x")
	w.again(w.key)
	at := slices.IndexFunc(list, func(name string) bool { return name > "t/f1x" })
	w.reads(list[:at]...)
	w.reads(sub...)
	w.reads(list[at:]...)
	_, total := w.gate.count()
	require.Equal(t, len(list)+len(sub), total)
	s := w.ring.Stats()
	require.EqualValues(t, 1, w.srv.Stats().Walks)
	require.Equal(t, s.Ahead, s.AheadUsed)
}

// A directory costs each open a bounded amount of listing, however large it is, and
// whoever finds no walk in it looks ever more rarely.
func TestLargeDirectoryIsNotListedByOpens(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 34,816 files; the full suite runs it")
	}
	const files, opens = (stepsMost + 2) * listStep, 200
	w := newAheadWorld(t, plainNames)
	require.NoError(t, os.Mkdir(filepath.Join(w.backing, "d"), 0o755))
	for i := range files {
		fd, err := unix.Open(filepath.Join(w.backing, "d", fmt.Sprintf("f%d", (i*37)%files)), unix.O_CREAT|unix.O_WRONLY, 0o644)
		require.NoError(t, err)
		unix.Close(fd)
	}
	for i := range opens {
		require.NoError(t, openRaw(w.path(fmt.Sprintf("d/f%d", (i*7919)%files)), unix.O_RDONLY))
	}
	eventually(t, func() bool { return len(w.srv.fs.ahead.opens) == 0 })
	looks := int64(8) // after 1, 2, 4, ... opens
	require.LessOrEqual(t, w.srv.Stats().Listed, looks*(stepsMost+1)*listStep)
	require.Zero(t, w.srv.Stats().Ahead)
}

// Local keys open sooner than a guess is made: there are none.
func TestNothingAheadOfLocalKeys(t *testing.T) {
	w := newAheadWorld(t)
	dir := filepath.Join(t.TempDir(), "keys")
	require.NoError(t, os.Mkdir(dir, 0o700))
	local := keys.NewLocal(dir)
	require.NoError(t, local.Create("local:test"))
	w.gate.Provider = local
	w.again("local:test")
	w.fill("d", 20)
	w.again("local:test")
	w.reads(w.in(listed, "d")...)
	require.Zero(t, w.srv.Stats().Walks)
	require.Zero(t, w.ring.Stats().Ahead)
}

// Switched off, nothing is decrypted that was not opened.
func TestNothingAheadWhenOff(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 20)
	w.opts.Prefetch = 0
	w.again(w.key)
	w.reads(w.in(listed, "d")[:10]...)
	_, total := w.gate.count()
	require.Equal(t, 10, total)
}

// What is read a second time is not looked at file by file.
func TestKnownKeysAreNotLookedFor(t *testing.T) {
	w := newAheadWorld(t)
	w.fill("d", 200)
	list := w.clear(w.in(listed, "d"), "d")
	w.again(w.key)
	w.reads(list...)
	_, total := w.gate.count()
	w.reads(list...)
	_, now := w.gate.count()
	require.Equal(t, total, now)
}
