package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// A Volume is a backing directory and the place where it is mounted.
type Volume struct {
	Env  *Env
	Dir  string // the backing directory
	Mnt  string // the mountpoint
	mode []string

	mounted bool
	damaged bool
}

// Init makes a volume NAME with the arguments of kmsfs init. It is unmounted and
// checked when the test ends.
func (e *Env) Init(name string, args ...string) *Volume {
	e.T.Helper()
	return e.initIn(filepath.Join(name, "backing"), name, args...)
}

// initIn makes a volume in the directory dir of this world.
func (e *Env) initIn(dir, name string, args ...string) *Volume {
	e.T.Helper()
	e.Mkdir(name)
	v := &Volume{Env: e, Dir: e.Mkdir(dir), Mnt: e.Mkdir(filepath.Join(name, "mnt"))}
	e.T.Cleanup(v.end)
	e.Must(append([]string{"init", v.Dir}, args...)...)
	var st unix.Stat_t
	require.NoError(e.T, unix.Stat(v.Dir, &st))
	e.T.Cleanup(func() { // what a daemon that was killed left in memory
		left, _ := filepath.Glob(fmt.Sprintf("/dev/shm/kmsfs-*-%x-%x", st.Dev, st.Ino))
		for _, path := range left {
			_ = os.Remove(path)
		}
	})
	return v
}

// Damaged says that the test harms the volume: its end is not compared.
func (v *Volume) Damaged() { v.damaged = true }

// Options are added to every later mount.
func (v *Volume) Options(args ...string) { v.mode = args }

// TryMount mounts, whatever comes of it.
func (v *Volume) TryMount(args ...string) Result {
	v.Env.T.Helper()
	r := v.Env.Kmsfs(slices.Concat([]string{"mount", v.Dir, v.Mnt}, v.mode, args)...)
	v.mounted = r.Status == 0
	return r
}

// Mount mounts; the file system must be there when the command returns.
func (v *Volume) Mount(args ...string) {
	v.Env.T.Helper()
	r := v.TryMount(args...)
	require.Zero(v.Env.T, r.Status, "%v", r)
	require.True(v.Env.T, v.IsMounted(), "kmsfs mount said done, and nothing is mounted on %s", v.Mnt)
}

// Adopt says that the volume was mounted by other means than Mount.
func (v *Volume) Adopt() { v.mounted = true }

// IsMounted asks the kernel.
func (v *Volume) IsMounted() bool { return slices.Contains(mountsUnder(v.Env.Root), v.Mnt) }

// Umount unmounts; daemon and mount must be gone soon after.
func (v *Volume) Umount() {
	v.Env.T.Helper()
	pids := v.Daemons()
	v.Env.Must("umount", v.Mnt)
	v.mounted = false
	require.False(v.Env.T, v.IsMounted(), "kmsfs umount said done, and %s is still mounted", v.Mnt)
	for _, pid := range pids {
		require.True(v.Env.T, waitGone(pid, 10*time.Second), "the daemon %d outlives its mount", pid)
	}
}

// Remount forgets every cache, the kernel's and the daemon's.
func (v *Volume) Remount(args ...string) {
	v.Env.T.Helper()
	v.Umount()
	v.Mount(args...)
}

// Daemons are the processes that serve this volume's mount.
func (v *Volume) Daemons() []int { return daemonsOf(v.Dir) }

// Kill ends the daemon without a word, and leaves the dead mountpoint.
func (v *Volume) Kill() {
	v.Env.T.Helper()
	pids := v.Daemons()
	require.NotEmpty(v.Env.T, pids, "no daemon to kill")
	for _, pid := range pids {
		require.NoError(v.Env.T, syscall.Kill(pid, syscall.SIGKILL))
	}
	for _, pid := range pids {
		require.True(v.Env.T, waitGone(pid, 10*time.Second))
	}
	v.mounted = false
}

// Path is a path on the mount.
func (v *Volume) Path(elem ...string) string {
	return filepath.Join(append([]string{v.Mnt}, elem...)...)
}

// end is the consistency check: what was there before the unmount is there after
// a fresh, read-only mount, and nothing runs on.
func (v *Volume) end() {
	t := v.Env.T
	if t.Failed() || v.damaged || !v.mounted {
		v.drop()
		return
	}
	before := Snapshot(t, v.Mnt)
	v.Umount()
	v.Mount("--read-only")
	if diff := Diff(before, Snapshot(t, v.Mnt), 0); len(diff) > 0 {
		t.Errorf("the volume reads differently after the unmount:\n%s", lines(diff))
	}
	require.ErrorIs(t, os.WriteFile(v.Path("new"), nil, 0o600), unix.EROFS)
	v.Umount()
}

// drop gets rid of mount and daemon, without judging.
func (v *Volume) drop() {
	for range 3 { // mounts may lie on one another
		if v.IsMounted() {
			_ = v.Env.Kmsfs("umount", v.Mnt)
		}
		if v.IsMounted() {
			release(v.Mnt)
		}
	}
	for _, pid := range v.Daemons() {
		if !waitGone(pid, 2*time.Second) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			waitGone(pid, 5*time.Second)
		}
	}
}

// Stored is the backing file of a path on the mount, whose names may be
// encrypted: the file of the same inode number.
func (v *Volume) Stored(elem ...string) string {
	t := v.Env.T
	t.Helper()
	var want unix.Stat_t
	require.NoError(t, unix.Lstat(v.Path(elem...), &want))
	var found string
	walk(t, v.Dir, func(path string, st *unix.Stat_t) {
		if st.Ino == want.Ino && st.Mode&unix.S_IFMT == want.Mode&unix.S_IFMT {
			found = path
		}
	})
	require.NotEmpty(t, found, "no backing file has the inode of %v", elem)
	return found
}

// HeaderOf parses the header of a backing file; nil if it has none.
func HeaderOf(path string) (*crypt.Header, error) {
	raw, err := getxattr(path, crypt.HeaderXattr)
	if err == unix.ENODATA {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return crypt.ParseHeader(raw)
}

// KeysOf counts the headers under each key, over the whole volume; files with
// bytes and without a header are under "". A program may be at work meanwhile.
func (v *Volume) KeysOf() map[string]int {
	t := v.Env.T
	t.Helper()
	count := map[string]int{}
	err := filepath.WalkDir(v.Dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && !ours(v.Dir, path) {
			err = countKeys(count, path)
		}
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
	require.NoError(t, err)
	return count
}

func countKeys(count map[string]int, path string) error {
	h, err := HeaderOf(path)
	if err != nil {
		return fmt.Errorf("the header of %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	switch {
	case h != nil:
		for _, c := range h.Copies {
			count[c.Key]++
		}
	case st.Size > 0:
		count[""]++
	}
	return nil
}

// ours reports whether path is one of the volume's own files at its root.
func ours(dir, path string) bool {
	name := filepath.Base(path)
	return filepath.Dir(path) == dir && strings.HasPrefix(name, "kmsfs.") && !strings.HasPrefix(name, "kmsfs.long.")
}
