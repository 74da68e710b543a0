package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/config"
	"kmsfs/rekey"
	"kmsfs/volume"
)

// A fakeMount holds a volume's lock and answers on its control socket.
type fakeMount struct {
	t       *testing.T
	dir, id string
	v       *volume.Volume
	server  *controlServer

	mu      sync.Mutex
	replies []controlReply // guarded by mu; to moves, one after another; then nothing moved
}

// newFakeMount makes a volume that nobody has mounted yet.
func newFakeMount(t *testing.T) *fakeMount {
	t.Helper()
	c := newClient(t)
	dir, _ := c.volume()
	t.Setenv("XDG_RUNTIME_DIR", c.path("run"))
	return &fakeMount{t: t, dir: dir, id: volumeIDOf(t, dir)}
}

// lock is the first thing that a mount does, listen comes later; stop does both the
// other way round.
func (m *fakeMount) lock() {
	m.t.Helper()
	var err error
	m.v, err = volume.Open(m.dir)
	require.NoError(m.t, err)
	require.NoError(m.t, m.v.Lock("mount on /mnt"))
}

func (m *fakeMount) listen() {
	m.t.Helper()
	var err error
	m.server, err = listenControl(must(config.RuntimeDir()), m.id+".sock", m.answer)
	require.NoError(m.t, err)
}

func (m *fakeMount) stop() {
	m.t.Helper()
	m.server.Close()
	require.NoError(m.t, m.v.Close())
}

func (m *fakeMount) answer(_ context.Context, _ controlRequest) controlReply {
	m.mu.Lock()
	defer m.mu.Unlock()
	reply := controlReply{}
	if len(m.replies) > 0 {
		reply, m.replies = m.replies[0], m.replies[1:]
	}
	reply.OK = reply.Error == ""
	return reply
}

func (m *fakeMount) will(replies ...controlReply) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.replies = append(m.replies, replies...)
}

func (m *fakeMount) watch() *mountWatch {
	m.t.Helper()
	w, err := watchMounts(m.t.Context(), m.dir, m.id)
	require.NoError(m.t, err)
	m.t.Cleanup(w.Close)
	return w
}

func movesOf(paths ...string) (r controlReply) {
	for _, p := range paths {
		r.Moves = append(r.Moves, controlMove{Path: []byte(p)})
	}
	return r
}

func movedOf(t *testing.T, w *mountWatch) []string {
	t.Helper()
	list, err := w.Moved(t.Context())
	require.NoError(t, err)
	return pathsOf(list)
}

func pathsOf(list []rekey.Spot) (paths []string) {
	for _, m := range list {
		paths = append(paths, m.Path)
	}
	return paths
}

func TestWatchHearsTheMount(t *testing.T) {
	m := newFakeMount(t)
	m.lock()
	m.listen()
	w := m.watch()
	require.True(t, w.Mounted())
	require.Empty(t, movedOf(t, w))
	odd := "a\xff\xfe\n/b"
	first, second := movesOf("z", odd), movesOf("z", "y")
	first.More = true
	m.will(first, second)
	require.Equal(t, []string{odd, "y", "z"}, movedOf(t, w))
	require.Empty(t, movedOf(t, w))

	// It asks by itself, and what it hears is not lost.
	m.will(movesOf("meanwhile"))
	eventually(t, "asked", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.replies) == 0
	})
	m.will(movesOf("later"))
	require.Equal(t, []string{"later", "meanwhile"}, movedOf(t, w))

	// What was lost is said once, and the watch goes on.
	lost := movesOf("x")
	lost.Lost = true
	m.will(lost)
	_, err := w.Moved(t.Context())
	require.ErrorIs(t, err, errMovesLost)
	m.will(movesOf("x"))
	require.Equal(t, []string{"x"}, movedOf(t, w))

	m.stop()
	for range 2 {
		_, err = w.Moved(t.Context())
		require.ErrorIs(t, err, errMountChanged)
	}
	next := m.watch()
	require.False(t, next.Mounted())
	require.Empty(t, movedOf(t, next))
}

// Without a mount nothing moves; with one that came, or came and went, anything may
// have.
func TestWatchOfNoMount(t *testing.T) {
	m := newFakeMount(t)
	fails := func(w *mountWatch) {
		t.Helper()
		for range 2 {
			_, err := w.Moved(t.Context())
			require.ErrorIs(t, err, errMountChanged)
		}
	}
	w := m.watch()
	require.False(t, w.Mounted())
	for range 3 {
		require.Empty(t, movedOf(t, w))
		_ = m.watch() // looks, and is no mount
	}
	m.lock()
	fails(w)
	require.NoError(t, m.v.Close())
	fails(w)

	w = m.watch()
	require.Empty(t, movedOf(t, w))
	m.lock()
	require.NoError(t, m.v.Close())
	fails(w)
	require.Empty(t, movedOf(t, m.watch()))
}

// A mount that has the lock and does not listen yet is waited for; one that hangs up
// at once is asked again, one that refuses is not.
func TestWatchWaitsForAMountThatStarts(t *testing.T) {
	m := newFakeMount(t)
	m.lock()
	began := make(chan *mountWatch, 1)
	go func() {
		w, err := watchMounts(t.Context(), m.dir, m.id)
		if err != nil {
			t.Error(err)
		}
		began <- w
	}()
	select {
	case <-began:
		require.Fail(t, "it did not wait")
	case <-time.After(300 * time.Millisecond):
	}
	m.listen()
	w := <-began
	require.NotNil(t, w)
	defer w.Close()
	require.True(t, w.Mounted())
	m.will(controlReply{Error: "no such request"})
	_, err := watchMounts(t.Context(), m.dir, m.id)
	require.ErrorContains(t, err, "no such request")
	m.stop()
}

// A mount on another host can't be watched.
func TestWatchOfAnotherHost(t *testing.T) {
	m := newFakeMount(t)
	m.lock()
	defer m.v.Close()
	lock := filepath.Join(m.dir, volume.LockFile)
	require.NoError(t, os.WriteFile(lock, []byte(`{"pid":7,"host":"elsewhere","boot_id":"b","session":"s"}`), 0o600))
	_, err := watchMounts(t.Context(), m.dir, m.id)
	require.ErrorContains(t, err, "process 7 on elsewhere")
}

// A caller who is interrupted has lost the watch, and knows it.
func TestWatchIsInterrupted(t *testing.T) {
	m := newFakeMount(t)
	m.lock()
	m.listen()
	defer m.stop()
	w := m.watch()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := w.Moved(ctx)
	require.ErrorIs(t, err, errMountChanged)
	_, err = w.Moved(t.Context())
	require.ErrorIs(t, err, errMountChanged)
}

// More than the client keeps is lost, not kept.
func TestWatchKeepsNoEndOfPaths(t *testing.T) {
	w := &mountWatch{moved: map[rekey.Spot]struct{}{}}
	path := strings.Repeat("x", 4000)
	for i := range watchMaxBytes/4000 + 1 {
		w.keepLocked(rekey.Spot{Path: fmt.Sprint(i, path)})
	}
	require.True(t, w.lost)
	require.Empty(t, w.moved)
}

// A real mount: what is moved is told in as many replies as it takes, under the
// names that lie on disk.
func TestWatchOfARealMount(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	t.Setenv("XDG_RUNTIME_DIR", c.path("run"))
	id := volumeIDOf(t, dir)
	c.mount(dir, point)
	const files = 700
	for i := range files {
		c.write(filepath.Join(point, "from", fmt.Sprint(i)), "x")
	}
	require.NoError(t, os.Mkdir(filepath.Join(point, "to"), 0o755))
	w, err := watchMounts(t.Context(), dir, id)
	require.NoError(t, err)
	other, err := watchMounts(t.Context(), dir, id)
	require.NoError(t, err)
	defer other.Close()
	require.True(t, w.Mounted())
	require.Empty(t, movedOf(t, w))
	want := map[uint64]bool{}
	for i := range files {
		name := fmt.Sprintf("%d%s\xff", i, strings.Repeat("l", 100))
		to := filepath.Join(point, "to", name)
		require.NoError(t, os.Rename(filepath.Join(point, "from", fmt.Sprint(i)), to))
		want[inodeOf(t, to)] = true
	}
	for _, watch := range []*mountWatch{w, other} {
		paths := movedOf(t, watch)
		require.Len(t, paths, files)
		require.Greater(t, len(strings.Join(paths, "")), controlMaxMove, "one reply would have done")
		for _, p := range paths {
			require.True(t, want[inodeOf(t, filepath.Join(dir, p))], p)
		}
		require.Empty(t, movedOf(t, watch))
	}

	w.Close() // ends the server's part, too: the mount goes on, and so does the other
	require.NoError(t, os.Rename(filepath.Join(point, "to"), filepath.Join(point, "on")))
	paths := movedOf(t, other)
	require.Len(t, paths, 1)
	require.DirExists(t, filepath.Join(dir, paths[0]))

	c.ok("umount", point)
	_, err = other.Moved(t.Context())
	require.ErrorIs(t, err, errMountChanged)

	unmounted, err := watchMounts(t.Context(), dir, id)
	require.NoError(t, err)
	defer unmounted.Close()
	require.False(t, unmounted.Mounted())
	require.Empty(t, movedOf(t, unmounted))
	c.mount(dir, point)
	c.ok("umount", point)
	_, err = unmounted.Moved(t.Context())
	require.ErrorIs(t, err, errMountChanged)
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	st, err := os.Lstat(path)
	require.NoError(t, err)
	return st.Sys().(*syscall.Stat_t).Ino
}
