package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// A churner is a program that works on a mount while something is done to the
// volume: it creates, overwrites, appends, renames files and directories, links,
// deletes, replaces atomically, and reads back what it wrote before. It remembers
// what must be there.
type churner struct {
	t    *testing.T
	v    *harness.Volume
	stop chan struct{}
	done sync.WaitGroup

	steps int
	mu    sync.Mutex
	files map[string][]byte // guarded by mu; by path on the mount, beneath the churner's own directory
}

// churnOn starts it; Stop must be called.
func churnOn(t *testing.T, v *harness.Volume) *churner {
	t.Helper()
	c := &churner{t: t, v: v, stop: make(chan struct{}), files: map[string][]byte{}}
	for _, dir := range []string{"churn/a", "churn/b", "churn/z"} {
		require.NoError(t, os.MkdirAll(v.Path(dir), 0o700))
	}
	c.done.Go(c.run)
	return c
}

// Steps is how much it has done.
func (c *churner) Steps() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.steps
}

// Stop ends it and compares everything it has written.
func (c *churner) Stop() {
	c.t.Helper()
	close(c.stop)
	c.done.Wait()
	c.Check()
}

// Check compares everything with what must be there.
func (c *churner) Check() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	require.NotEmpty(c.t, c.files)
	for name, want := range c.files {
		got, err := os.ReadFile(c.v.Path(name))
		require.NoError(c.t, err)
		require.True(c.t, bytes.Equal(want, got), "%s reads otherwise", name)
	}
}

func (c *churner) run() {
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; ; i++ {
		select {
		case <-c.stop:
			return
		default:
		}
		if err := c.step(r, i); err != nil {
			c.t.Errorf("step %d of the program on the mount: %v", i, err)
			return
		}
	}
}

func (c *churner) step(r *rand.Rand, i int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps++
	if len(c.files) > 400 {
		return c.remove(c.any(r))
	}
	name := fmt.Sprintf("churn/%s/f%d", []string{"a", "b", "z"}[r.IntN(3)], i)
	if len(c.files) < 20 {
		return c.write(name, harness.Noise(1+r.IntN(9000)))
	}
	old := c.any(r)
	switch r.IntN(9) {
	case 0, 1:
		return c.write(name, harness.Noise(1+r.IntN(20000)))
	case 2: // overwrite from nothing: a new data key
		return c.write(old, harness.Noise(1+r.IntN(9000)))
	case 3: // replace atomically, as editors do
		tmp := name + ".tmp"
		if err := os.WriteFile(c.v.Path(tmp), []byte("replaced"), 0o600); err != nil {
			return err
		}
		c.files[old] = []byte("replaced")
		return os.Rename(c.v.Path(tmp), c.v.Path(old))
	case 4:
		return c.rename(old, name)
	case 5:
		return c.renameDir()
	case 6: // move by link and unlink
		if err := os.Link(c.v.Path(old), c.v.Path(name)); err != nil {
			return err
		}
		c.files[name] = c.files[old]
		return c.remove(old)
	case 7:
		return c.nameless(name, harness.Noise(3000))
	}
	got, err := os.ReadFile(c.v.Path(old))
	if err == nil && !bytes.Equal(got, c.files[old]) {
		err = fmt.Errorf("%s has %d bytes that were not written there", old, len(got))
	}
	return err
}

func (c *churner) any(r *rand.Rand) string {
	n := r.IntN(len(c.files))
	for name := range c.files {
		if n == 0 {
			return name
		}
		n--
	}
	return ""
}

func (c *churner) write(name string, p []byte) error {
	c.files[name] = p
	return os.WriteFile(c.v.Path(name), p, 0o600)
}

func (c *churner) remove(name string) error {
	delete(c.files, name)
	return os.Remove(c.v.Path(name))
}

func (c *churner) rename(from, to string) error {
	c.files[to] = c.files[from]
	delete(c.files, from)
	return os.Rename(c.v.Path(from), c.v.Path(to))
}

// renameDir moves a directory of many files under another and back, across the
// order of any walk.
func (c *churner) renameDir() error {
	from, to := c.v.Path("churn/z"), c.v.Path("churn/a/z")
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return os.Rename(to, from)
}

// nameless writes a file before it has a name.
func (c *churner) nameless(name string, p []byte) error {
	fd, err := harness.Open(filepath.Dir(c.v.Path(name)), unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, p); err != nil {
		return err
	}
	c.files[name] = p
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, c.v.Path(name), unix.AT_SYMLINK_FOLLOW)
}

// busy waits until the program has done n more steps.
func (c *churner) busy(n int) {
	c.t.Helper()
	want := c.Steps() + n
	require.True(c.t, harness.Eventually(time.Minute, func() bool { return c.Steps() >= want || c.t.Failed() }), "the program on the mount hangs")
}
