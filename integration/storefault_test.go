package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// longName needs a sidecar where names are encrypted.
var longName = strings.Repeat("long", 60)

// A deed is what a program does in a directory of its own, with what stands there
// before. It stops at the first call that fails, and can be done again.
type deed struct {
	name    string
	prepare func(dir string) error
	do      func(dir string) error
	// whole: it is one call, which happens or does not.
	whole bool
}

func writeSynced(path string, flags int, off int64, p []byte) error {
	fd, err := harness.Open(path, flags|unix.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	for n := 0; err == nil && len(p) > 0; {
		n, err = unix.Pwrite(fd, p, off) // which may end early
		p, off = p[max(n, 0):], off+int64(n)
	}
	if err == nil {
		err = unix.Fsync(fd)
	}
	if errClose := unix.Close(fd); err == nil {
		err = errClose
	}
	return err
}

func kept(dir string) error {
	return writeSynced(filepath.Join(dir, "kept"), unix.O_CREAT, 0, harness.Noise(3*block+100))
}

// deeds are one of everything; calls on paths are raw, so that errors are errnos.
func deeds() []deed {
	in := func(names ...string) func(dir string) string {
		return func(dir string) string { return filepath.Join(append([]string{dir}, names...)...) }
	}
	one := func(name string, prepare, do func(dir string) error) deed { return deed{name, prepare, do, true} }
	file, long, moved := in("kept"), in(longName), in("moved")
	again := func(err, done error) error { // what an earlier try may have done
		if err == done {
			return nil
		}
		return err
	}
	fallocate := func(mode uint32, off, n int64) func(dir string) error {
		return func(dir string) error {
			fd, err := harness.Open(file(dir), unix.O_RDWR, 0)
			if err != nil {
				return err
			}
			err = unix.Fallocate(fd, mode, off, n)
			if err == nil {
				err = unix.Fsync(fd)
			}
			return errors.Join(err, unix.Close(fd))
		}
	}
	put := func(at int64, n int) func(dir string) error {
		return func(dir string) error { return writeSynced(file(dir), 0, at, harness.Noise(n + 1)[1:]) }
	}
	return []deed{
		{"create", kept, func(dir string) error {
			return writeSynced(in("new")(dir), unix.O_CREAT, 0, harness.Noise(5*block+7))
		}, false},
		{"create, long name", kept, func(dir string) error {
			return writeSynced(long(dir), unix.O_CREAT, 0, harness.Noise(5000))
		}, false},
		{"replace", kept, func(dir string) error {
			if err := writeSynced(in("tmp")(dir), unix.O_CREAT, 0, harness.Noise(9000)); err != nil {
				return err
			}
			return again(unix.Rename(in("tmp")(dir), file(dir)), nil)
		}, false},
		{"overwrite", kept, put(block+50, 2*block), false},
		{"append", kept, put(3*block+100, block+3), false},
		{"append at a boundary", func(dir string) error {
			return writeSynced(file(dir), unix.O_CREAT, 0, harness.Noise(2*block))
		}, put(2*block, 77), false},
		{"write beyond a gap", kept, put(20*block, 100), false},
		{"write beyond a large gap", kept, put(3<<20, 100), false},
		{"write anew", kept, func(dir string) error {
			return writeSynced(file(dir), unix.O_TRUNC, 0, harness.Noise(block + 9)[1:])
		}, false},
		one("cut", kept, func(dir string) error { return unix.Truncate(file(dir), 2*block+9) }),
		one("cut to nothing", kept, func(dir string) error { return unix.Truncate(file(dir), 0) }),
		one("lengthen", kept, func(dir string) error { return unix.Truncate(file(dir), 9*block) }),
		one("lengthen by a hole", kept, func(dir string) error { return unix.Truncate(file(dir), 4<<20) }),
		{"punch", kept, fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 100, 2*block), false},
		{"allocate", kept, fallocate(0, 0, 7*block), false},
		{"read", kept, func(dir string) error { _, err := harness.TryReadAt(file(dir), 0, 4*block); return err }, true},
		{"list", func(dir string) error {
			return errors.Join(kept(dir), unix.Mkdir(in("sub")(dir), 0o700), writeSynced(long(dir), unix.O_CREAT, 0, nil))
		}, func(dir string) error { _, err := os.ReadDir(dir); return err }, true},
		one("mkdir", kept, func(dir string) error { return unix.Mkdir(in("sub")(dir), 0o700) }),
		one("mkdir, long name", kept, func(dir string) error { return unix.Mkdir(long(dir), 0o700) }),
		{"in a new directory", kept, func(dir string) error {
			if err := again(unix.Mkdir(in("sub")(dir), 0o700), unix.EEXIST); err != nil {
				return err
			}
			return writeSynced(in("sub", "file")(dir), unix.O_CREAT, 0, harness.Noise(10))
		}, false},
		one("rmdir", func(dir string) error { return errors.Join(kept(dir), unix.Mkdir(long(dir), 0o700)) },
			func(dir string) error { return unix.Rmdir(long(dir)) }),
		one("rename", kept, func(dir string) error { return unix.Rename(file(dir), moved(dir)) }),
		one("rename to a long name", kept, func(dir string) error { return unix.Rename(file(dir), long(dir)) }),
		one("rename from a long name", func(dir string) error {
			return writeSynced(long(dir), unix.O_CREAT, 0, harness.Noise(5000))
		}, func(dir string) error { return unix.Rename(long(dir), moved(dir)) }),
		one("rename over", func(dir string) error {
			return errors.Join(kept(dir), writeSynced(long(dir), unix.O_CREAT, 0, harness.Noise(99)))
		}, func(dir string) error { return unix.Rename(file(dir), long(dir)) }),
		one("exchange", func(dir string) error {
			return errors.Join(kept(dir), writeSynced(long(dir), unix.O_CREAT, 0, harness.Noise(99)))
		}, func(dir string) error {
			return unix.Renameat2(unix.AT_FDCWD, file(dir), unix.AT_FDCWD, long(dir), unix.RENAME_EXCHANGE)
		}),
		one("unlink", kept, func(dir string) error { return unix.Unlink(file(dir)) }),
		one("unlink a long name", func(dir string) error {
			return errors.Join(kept(dir), writeSynced(long(dir), unix.O_CREAT, 0, harness.Noise(99)))
		}, func(dir string) error { return unix.Unlink(long(dir)) }),
		one("link", kept, func(dir string) error { return unix.Link(file(dir), long(dir)) }),
		// No symlinks of the user's: their times can't be set through this store. Those
		// beside long names can do without.
		one("fifo", kept, func(dir string) error { return unix.Mkfifo(in("fifo")(dir), 0o600) }),
		one("chmod", kept, func(dir string) error { return unix.Chmod(file(dir), 0o640) }),
		one("set attribute", kept, func(dir string) error { return unix.Setxattr(file(dir), "user.mine", []byte("value"), 0) }),
		one("remove attribute", func(dir string) error {
			return errors.Join(kept(dir), unix.Setxattr(file(dir), "user.mine", []byte("value"), 0))
		}, func(dir string) error { return again(unix.Removexattr(file(dir), "user.mine"), unix.ENODATA) }),
		{"get attribute", func(dir string) error {
			return errors.Join(kept(dir), unix.Setxattr(file(dir), "user.mine", []byte("value"), 0))
		}, func(dir string) error {
			_, err := unix.Getxattr(file(dir), "user.mine", make([]byte, 100))
			return err
		}, true},
	}
}

// A sight is what stands at a path: what kind of thing, and its bytes.
type sight struct {
	kind  string
	bytes []byte
}

// see looks at all that is beneath dir.
func see(t *testing.T, dir string) map[string]sight {
	t.Helper()
	all := map[string]sight{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		s := sight{kind: fmt.Sprintf("%v", info.Mode())}
		switch {
		case info.Mode().IsRegular():
			s.bytes, err = os.ReadFile(path)
			s.kind += fmt.Sprintf(" %q", harness.Xattrs(t, path))
		case info.Mode()&os.ModeSymlink != 0:
			var target string
			target, err = os.Readlink(path)
			s.bytes = []byte(target)
		}
		all[rel] = s
		return err
	}))
	return all
}

func sameSight(a, b map[string]sight) string {
	for path, x := range a {
		y, ok := b[path]
		switch {
		case !ok:
			return path + " is missing"
		case x.kind != y.kind:
			return fmt.Sprintf("%s was %s, is %s", path, x.kind, y.kind)
		case !bytes.Equal(x.bytes, y.bytes):
			return fmt.Sprintf("%s has other bytes: it had %s, has %s", path, outline(x.bytes), outline(y.bytes))
		}
	}
	for path := range b {
		if _, ok := a[path]; !ok {
			return path + " is new"
		}
	}
	return ""
}

// outline is how many bytes there are, and the first of each block.
func outline(p []byte) string {
	var b strings.Builder
	for at := 0; at < min(len(p), 8*block); at += block {
		fmt.Fprintf(&b, " %x", p[at:min(at+4, len(p))])
	}
	return fmt.Sprintf("%d bytes,%s", len(p), b.String())
}

// between judges what a deed has left that failed: nothing but what was there before,
// or is there after, and each block as it was or will be; or if it was written anew, nothing.
func between(before, after, now map[string]sight, anew bool) string {
	for path, x := range now {
		b, was := before[path]
		a, will := after[path]
		if !was && !will && filepath.Base(path) != "tmp" {
			return path + " was not there and is not to be"
		}
		if strings.HasPrefix(x.kind, "-") {
			if at := strayBlock(x.bytes, b.bytes, a.bytes); at >= 0 && filepath.Base(path) != "tmp" {
				return fmt.Sprintf("block %d of %s is neither old nor new", at, path)
			}
		}
		if was && will && len(x.bytes) < min(len(b.bytes), len(a.bytes)) && (!anew || len(x.bytes) > 0) {
			return path + " is shorter than ever"
		}
	}
	for path := range before {
		_, will := after[path]
		if _, is := now[path]; will && !is {
			return path + " is lost"
		}
	}
	return ""
}

// strayBlock is the first block that neither version has, or -1. Zeros beyond the old
// end are a file that grew and was not written.
func strayBlock(p, old, new []byte) int {
	has := func(v []byte, from, to int) bool { return to <= len(v) && bytes.Equal(v[from:to], p[from:to]) }
	for from := 0; from < len(p); from += block {
		to := min(len(p), from+block)
		zero := from >= len(old) && len(bytes.Trim(p[from:to], "\x00")) == 0
		if !zero && !has(old, from, to) && !has(new, from, to) {
			return from / block
		}
	}
	return -1
}

// TestStoreFails has the store under a mount fail at one call after the other of
// everything that a program does. The program hears of it; what was synced before is
// there, and what it was about to change is old or new; tried again it works; the
// daemon goes on and keeps no descriptor; and fsck finds no damage.
//
// KMSFS_TEST_FAULTS=all tries each errno at each call, and short writes, with both kinds
// of names; else every third call has one of the errnos.
func TestStoreFails(t *testing.T) {
	all, kinds := os.Getenv("KMSFS_TEST_FAULTS") == "all", []string{"encrypted"}
	if all {
		kinds = append(kinds, "plain")
	}
	for _, names := range kinds {
		t.Run(names, func(t *testing.T) {
			e := harness.New(t)
			store := e.Store()
			v := e.InitOn(store, "volume", "--key", localKey(e, "one"), "--names", names)
			s := &sweep{v: v, store: store, all: all}
			for _, d := range deeds() {
				if !t.Run(d.name, func(t *testing.T) { s.one(t, d) }) {
					return
				}
			}
			hits := store.Hits()
			if s.done < len(deeds()) {
				return // only some were asked for
			}
			for _, call := range []string{"lookup", "getattr", "write", "fsync", "setxattr", "getxattr"} {
				require.NotZero(t, hits[call], "no fault has hit %s: %v", call, hits)
			}
			total := 0
			for _, n := range hits {
				total += n
			}
			t.Logf("faults injected: %d (%v), bytes compared: %d, losses: 0", total, hits, s.compared)
		})
	}
}

type sweep struct {
	t              *testing.T // of the deed
	v              *harness.Volume
	store          *harness.Store
	all            bool
	done, compared int
}

// A try is one directory in which a deed met a fault.
type try struct {
	dir   string
	again bool // it was done again after that
}

// one tries a deed with a fault at its first call of the store, its second, and so on,
// until it has fewer.
func (s *sweep) one(t *testing.T, d deed) {
	s.t = t
	v := s.v
	most := 60
	if s.all {
		most = 600 // each call six times
	}
	v.Mount()
	dirs := make([]string, most)
	for i := range dirs {
		dirs[i] = v.Path(fmt.Sprint("d", i))
		require.NoError(t, unix.Mkdir(dirs[i], 0o700))
		require.NoError(t, d.prepare(dirs[i]), d.name)
	}
	before := see(t, dirs[0])
	require.NoError(t, d.do(dirs[0]), d.name)
	after := see(t, dirs[0])
	v.Remount() // so that nothing is cached
	var tries []try
	for i, plan := range s.plans() {
		require.Less(t, i+1, most, "%s: more calls than there are directories", d.name)
		if dir := dirs[i+1]; s.strike(d, dir, &plan, before, after) {
			tries = append(tries, try{dir, plan.again})
		} else {
			break
		}
	}
	require.NotEmpty(t, tries, "%s: no call of it reaches the store", d.name)
	s.descriptors(d)
	s.fsck(d)
	for _, tr := range tries {
		now := see(t, tr.dir)
		if tr.again {
			require.Empty(t, sameSight(after, now), "%s, after a remount", d.name)
		} else {
			require.Empty(t, between(before, after, now, d.name == "write anew"), "%s, after a remount", d.name)
		}
		for _, x := range now {
			s.compared += len(x.bytes)
		}
	}
	require.Empty(t, sameSight(before, see(t, dirs[most-1])), "%s: where nobody was", d.name)
	v.Env.Shell(`rm -r "$1"/d*; test -z "$(ls -A "$1")"`, v.Mnt)
	v.Umount()
	s.done++
}

// A plan is where and how the store is to fail.
type plan struct {
	at    int
	errno unix.Errno
	short bool
	again bool
}

func (s *sweep) plans() (all []plan) {
	errnos := []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EIO}
	first, step := 1+s.done%3, 3
	if s.all {
		first, step = 1, 1
	}
	for at := first; at < 200; at += step {
		ways := errnos
		if !s.all {
			ways = errnos[at/3%3 : at/3%3+1]
		}
		for i, errno := range ways {
			all = append(all, plan{at, errno, false, (at/step+i)%3 != 0})
			if s.all {
				all = append(all, plan{at, errno, true, (at+i)%3 == 0})
			}
		}
	}
	return all
}

// strike does a deed that meets a fault, and reports whether it did. The plan is
// changed if there was no need to try again.
func (s *sweep) strike(d deed, dir string, p *plan, before, after map[string]sight) bool {
	t := s.t
	s.store.Fail(p.at, p.errno, p.short)
	err := d.do(dir)
	hit := s.store.Lift()
	what := fmt.Sprintf("%s: call %d of the store, a %s, fails with %v (%+v): %v", d.name, p.at, hit, s.store.Struck(), *p, err)
	if hit == "" {
		require.NoError(t, err, what)
		require.Empty(t, sameSight(after, see(t, dir)), what)
		return false
	}
	if err != nil {
		require.ErrorIs(t, err, s.store.Struck(), what)
	}
	if err == nil && d.name == "list" {
		return true // the kernel may keep the list, with a name that could not be read
	}
	if d.whole {
		want := before
		now := see(t, dir)
		if err == nil || !strings.HasPrefix(d.name, "cut") && !strings.HasPrefix(d.name, "lengthen") &&
			slices.Contains([]string{"getattr", "lookup"}, hit) && sameSight(after, now) == "" {
			want = after // done, and what came of it could not be looked at
			p.again = false
		}
		require.Empty(t, sameSight(want, now), what)
	}
	if p.again {
		if err != nil {
			require.NoError(t, d.do(dir), "%s; tried again", what)
		}
		require.Empty(t, sameSight(after, see(t, dir)), "%s; tried again", what)
	}
	return true
}

// descriptors: the daemon holds no file open, and no directory twice.
func (s *sweep) descriptors(d deed) {
	t := s.t
	var left []string
	require.True(t, harness.Eventually(20*time.Second, func() bool { left = s.leaked(); return len(left) == 0 }),
		"%s: the daemon holds on to %q", d.name, left)
}

func (s *sweep) leaked() (left []string) {
	for _, pid := range s.v.Daemons() {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		seen := map[string]bool{}
		for _, fd := range fds {
			to, _ := os.Readlink(fd)
			if rel, under := strings.CutPrefix(to, s.v.Dir+"/"); under && !strings.HasPrefix(rel, "kmsfs.") {
				var st unix.Stat_t
				if unix.Stat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && !seen[to] {
					seen[to] = true
					continue
				}
				left = append(left, to)
			}
		}
	}
	return left
}

// fsck unmounts, checks, and mounts again.
func (s *sweep) fsck(d deed) {
	s.v.Umount()
	found, _, r := fsck(s.t, s.v, "--data")
	require.Zero(s.t, r.Status, "%s: %v", d.name, r)
	found = slices.DeleteFunc(found, func(f finding) bool { return f.Level == "untidy" })
	require.Empty(s.t, found, d.name)
	s.v.Mount()
}
