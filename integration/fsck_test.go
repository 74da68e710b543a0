package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// A finding is one line of fsck --json.
type finding struct {
	Event, Kind, Level, Path, Stored, Error, Did string
	From, To                                     *int64
	Busy                                         bool
}

// A checked is the last line.
type checked struct {
	Event                              string
	Done, Keys                         bool
	Files, Empty, Opened, Bytes        int64
	Damage, Untidy, Unread, Refused    int64
	Unavailable, Repaired, Quarantined int64
	Error                              string
}

// fsck runs a check and reads what it reports; every line must be JSON.
func fsck(t *testing.T, v *harness.Volume, args ...string) (found []finding, end checked, r harness.Result) {
	t.Helper()
	r = v.Env.Kmsfs(append([]string{"fsck", v.Dir, "--json"}, args...)...)
	for line := range strings.Lines(r.Stdout) {
		var f finding
		require.NoError(t, json.Unmarshal([]byte(line), &f), line)
		switch f.Event {
		case "finding":
			found = append(found, f)
		case "done":
			require.NoError(t, json.Unmarshal([]byte(line), &end), line)
		default:
			require.Equal(t, "progress", f.Event)
		}
	}
	require.Equal(t, "done", end.Event, "the last event: %v", r)
	return found, end, r
}

// said are findings as "path kind", sorted.
func said(found []finding) []string {
	out := []string{}
	for _, f := range found {
		out = append(out, f.Path+" "+f.Kind)
	}
	slices.Sort(out)
	return out
}

// badBlocks are the blocks of each path that a check says can't be read; -1 stands
// for a file that can't be opened.
func badBlocks(found []finding) map[string][]int {
	bad := map[string][]int{}
	for _, f := range found {
		switch f.Kind {
		case "data", "end":
			if *f.From == *f.To {
				bad[f.Path] = append(bad[f.Path], -1)
			}
			for at := *f.From; at < *f.To; at += block {
				bad[f.Path] = append(bad[f.Path], int(at/block))
			}
		case "header", "key":
			bad[f.Path] = append(bad[f.Path], -1)
		}
	}
	for path := range bad {
		slices.Sort(bad[path])
		bad[path] = slices.Compact(bad[path])
	}
	return bad
}

// requireFsckDamage checks an unmounted volume, all blocks: exactly these must be
// named, of this file and no other, and nothing may be changed.
func requireFsckDamage(t *testing.T, v *harness.Volume, path string, want damage) {
	t.Helper()
	same := harness.Unchanged(t, v.Dir)
	found, _, r := fsck(t, v, "--data")
	same()
	bad := want.bad
	if want.size == 0 {
		bad = []int{-1}
	}
	if len(bad) == 0 {
		require.Zero(t, r.Status, "%v", r)
		require.Empty(t, found)
		return
	}
	require.Equal(t, statusDamaged, r.Status, "%v", r)
	got := badBlocks(found)
	require.Equal(t, bad, got[path], "%v", r)
	require.Len(t, got, 1, "%v", r)
}

// requireFsckSays checks an unmounted volume: these findings, and no change.
func requireFsckSays(t *testing.T, v *harness.Volume, want ...string) {
	t.Helper()
	same := harness.Unchanged(t, v.Dir)
	found, _, r := fsck(t, v)
	same()
	require.Equal(t, statusDamaged, r.Status, "%v", r)
	slices.Sort(want)
	require.Equal(t, want, said(found), "%v", r)
}

// furnish makes one of everything on a mount.
func furnish(t *testing.T, v *harness.Volume) {
	t.Helper()
	long := strings.Repeat("long", 60)
	for _, dir := range []string{"dir", long} {
		require.NoError(t, os.Mkdir(v.Path(dir), 0o755))
		for i, n := range []int{0, 1, block - 1, block, block + 1, size, 3<<20 + 5} {
			require.NoError(t, os.WriteFile(v.Path(dir, fmt.Sprint("file", i)), harness.Noise(n), 0o644))
		}
	}
	require.NoError(t, os.WriteFile(v.Path("dir", long), harness.Noise(size), 0o444))
	require.NoError(t, os.Link(v.Path("dir", "file5"), v.Path("second name")))
	require.NoError(t, os.Symlink("to nowhere", v.Path("dir", "link")))
	require.NoError(t, unix.Mkfifo(v.Path("fifo"), 0o600))
	require.NoError(t, unix.Setxattr(v.Path("dir", "file1"), "user.mine", []byte("value"), 0))
	require.NoError(t, unix.Setxattr(v.Path("dir"), "user.mine", []byte("value"), 0))
	require.NoError(t, os.WriteFile(v.Path("sparse"), harness.Noise(5000), 0o600))
	require.NoError(t, os.Truncate(v.Path("sparse"), 30<<20))
	harness.WriteAt(t, v.Path("sparse"), 20<<20+77, harness.Noise(9000))
}

// TestFsckClean: a volume that was written through a mount has no finding, whatever
// is checked, and is not touched. Each data key is asked for once.
func TestFsckClean(t *testing.T) {
	for _, s := range services[:2] {
		for _, names := range []string{"encrypted", "plain"} {
			t.Run(s.name+"/"+names, func(t *testing.T) {
				e := harness.New(t)
				v := e.Init("volume", "--key", s.use(e)(), "--names", names)
				v.Mount()
				furnish(t, v)
				v.Umount()
				same := harness.Unchanged(t, v.Dir)
				for _, args := range [][]string{{}, {"--data"}, {"--data", "--jobs", "1"}, {"--no-keys"}} {
					found, end, r := fsck(t, v, args...)
					require.Zero(t, r.Status, "%v", r)
					require.Empty(t, found)
					require.True(t, end.Done)
					require.EqualValues(t, 14, end.Files)
					require.EqualValues(t, 2, end.Empty)
					if len(args) > 0 && args[0] == "--data" {
						require.EqualValues(t, 2*(1+3*block+size+3<<20+5)+size+30<<20, end.Bytes)
					}
					require.Equal(t, len(args) == 0 || args[0] != "--no-keys", end.Keys)
				}
				out := e.Must("fsck", v.Dir, "--data")
				require.Contains(t, out, "14 files, 14 of them with their key")
				same()
				found, end, r := fsck(t, v, "--repair", "--cut-ends", "--quarantine", filepath.Join(e.Root, "quarantine"))
				require.Zero(t, r.Status, "%v", r)
				require.Empty(t, found)
				require.Zero(t, end.Repaired+end.Quarantined)
				same()
				v.Mount()
			})
		}
	}
}

// TestFsckKMSCalls: one Decrypt a file and one for the volume key, at the pace that
// was asked for, and none without keys.
func TestFsckKMSCalls(t *testing.T) {
	e := harness.New(t)
	k := e.KMS()
	v := e.Init("volume", "--key", k.NewKey())
	v.Mount()
	for i := range 20 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), harness.Noise(100), 0o600))
	}
	v.Umount()
	ops := k.During(func() { e.Must("fsck", v.Dir) })
	count := map[string]int{}
	for _, op := range ops {
		count[op]++
	}
	require.Equal(t, map[string]int{"Decrypt": 21}, count)
	require.Empty(t, k.During(func() { e.Must("fsck", v.Dir, "--no-keys") }))
	r := e.Kmsfs("fsck", v.Dir, "--max-rps", "10", "--jobs", "16")
	require.Zero(t, r.Status, "%v", r)
	require.Greater(t, r.Took.Seconds(), 1.8, "21 requests at 10 a second")
}

// TestFsckKeysThatCannotBeHad: KMS that refuses or fails is no damage; what needs no
// key is checked all the same, and the status says which it was.
func TestFsckKeysThatCannotBeHad(t *testing.T) {
	rows := []struct {
		name   string
		start  func(k *harness.KMS, key string)
		status int
	}{
		{"denied", func(k *harness.KMS, _ string) {
			k.SetRules(k.Admin(), kmstest.Rule{Actions: []string{"DescribeKey"}})
		}, statusRefused},
		{"disabled", func(k *harness.KMS, key string) { k.SetState(key, kmstest.Disabled) }, statusRefused},
		{"throttled", func(k *harness.KMS, _ string) { k.Inject(kmstest.Fault{Status: 503}) }, statusUnavailable},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			e := harness.New(t)
			k := e.KMS()
			configure(t, e, "[kms]\ndeadline = '1s'\n")
			key := k.NewKey()
			v := e.Init("volume", "--key", key, "--names", "plain")
			v.Mount()
			require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(size), 0o600))
			v.Umount()
			row.start(k, key)
			same := harness.Unchanged(t, v.Dir)
			found, end, r := fsck(t, v, "--data")
			require.Equal(t, row.status, r.Status, "%v", r)
			require.Empty(t, found)
			require.False(t, end.Keys)
			require.Contains(t, r.Stderr, key)
			found, _, r = fsck(t, v, "--no-keys")
			require.Zero(t, r.Status, "%v", r)
			require.Empty(t, found)
			same()
			v.Damaged()
			require.NoError(t, os.Truncate(filepath.Join(v.Dir, "file"), record))
			found, _, r = fsck(t, v)
			require.Equal(t, statusDamaged, r.Status, "damage counts above all: %v", r)
			require.Equal(t, []string{"file end"}, said(found))
		})
	}
}

// configure writes the client's configuration file.
func configure(t *testing.T, e *harness.Env, text string) {
	t.Helper()
	dir := filepath.Join(e.Var("XDG_CONFIG_HOME"), "kmsfs")
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte(text), 0o600))
}

// TestFsckSomeKeysThatCannotBeHad: the volume opens, and some files don't.
func TestFsckSomeKeysThatCannotBeHad(t *testing.T) {
	e := harness.New(t)
	k := e.KMS()
	configure(t, e, "[kms]\ndeadline = '1s'\n")
	files, whole := k.NewKey(), k.NewKey()
	v := e.Init("volume", "--key", files, "--key", whole, "--names", "plain")
	v.Mount()
	require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(size), 0o600))
	v.Umount()
	v.Damaged()
	k.SetState(files, kmstest.Disabled)
	found, end, r := fsck(t, v, "--data", "--key", whole, "--key", files)
	require.Equal(t, statusRefused, r.Status, "%v", r)
	require.Equal(t, []string{"file key"}, said(found))
	require.EqualValues(t, 1, end.Refused)
	require.Zero(t, end.Damage)
	quarantine := filepath.Join(e.Root, "quarantine")
	_, end, r = fsck(t, v, "--quarantine", quarantine, "--key", whole, "--key", files)
	require.Equal(t, statusRefused, r.Status, "%v", r)
	require.Zero(t, end.Quarantined, "what was not checked is not moved")
	k.SetState(files, kmstest.Enabled)
	_, _, r = fsck(t, v, "--data")
	require.Zero(t, r.Status, "%v", r)
}

// TestFsckTrust: keys are trusted as by a mount, and nothing is asked of a key that
// is not.
func TestFsckTrust(t *testing.T) {
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	localKey(e, "two")
	e.Set("XDG_STATE_HOME", e.Mkdir("another client"))
	same := harness.Unchanged(t, v.Dir)
	e.Refused(statusUsage, []string{"local:one", "--key local:one", "--no-keys"}, "fsck", v.Dir, "--repair")
	require.NoFileExists(t, filepath.Join(v.Dir, "kmsfs.lock"), "nothing is written before there is trust")
	e.Refused(statusUsage, []string{"local:two"}, "fsck", v.Dir, "--key", "local:two")
	e.Must("fsck", v.Dir, "--no-keys")
	e.Must("fsck", v.Dir, "--accept-new")
	e.Must("fsck", v.Dir)
	same()
	for _, args := range [][]string{{"--no-keys", "--data"}, {"--no-keys", "--cut-ends"}, {"--jobs", "0"}, {"--no-keys", "--key", "local:one"}} {
		e.Refused(statusUsage, nil, append([]string{"fsck", v.Dir}, args...)...)
	}
	e.Refused(statusUsage, []string{"kmsfs.toml"}, "fsck", e.Mkdir("no volume"))
}

// TestFsckSettings: kmsfs.toml and its backup.
func TestFsckSettings(t *testing.T) {
	for _, names := range [][2]string{{"kmsfs.toml", "kmsfs.toml.bak"}, {"kmsfs.toml.bak", "kmsfs.toml"}} {
		e := harness.New(t)
		v := e.Init("volume", "--key", localKey(e, "one"))
		lost, kept := filepath.Join(v.Dir, names[0]), filepath.Join(v.Dir, names[1])
		require.NoError(t, os.Remove(lost))
		requireFsckSays(t, v, names[0]+" settings")
		found, _, r := fsck(t, v, "--repair")
		require.Zero(t, r.Status, "%v", r)
		require.Equal(t, "written from "+names[1], found[0].Did)
		require.Equal(t, contents(t, kept), contents(t, lost))
		require.NoError(t, os.WriteFile(lost, []byte("junk"), 0o600))
		found, _, r = fsck(t, v, "--repair")
		require.Equal(t, statusDamaged, r.Status, "%v", r)
		require.Equal(t, []string{names[0] + " settings"}, said(found))
		require.Equal(t, "junk", string(contents(t, lost)))
		require.NoError(t, os.WriteFile(kept, []byte("junk"), 0o600))
		e.Refused(statusDamaged, []string{"kmsfs.toml"}, "fsck", v.Dir)
	}
}

// TestFsckQuarantine: what can't be used is moved, and the mount has the rest; brought
// back where it was and given its header again, it is whole.
func TestFsckQuarantine(t *testing.T) {
	v := local(t)
	furnish(t, v)
	stripped, flipped := v.Stored("dir", "file5"), v.Stored("dir", strings.Repeat("long", 60))
	v.Umount()
	v.Damaged()
	export := filepath.Join(v.Env.Root, "export")
	v.Env.Must("headers", "export", v.Dir, export)
	strip(t, stripped)
	b := contents(t, flipped)[5*record+99]
	harness.WriteAt(t, flipped, 5*record+99, []byte{b ^ 1})
	quarantine := filepath.Join(v.Env.Root, "volume", "quarantine")
	same := harness.Unchanged(t, v.Dir)
	v.Env.Refused(statusUsage, []string{"inside", "beside"}[1:], "fsck", v.Dir, "--quarantine", filepath.Join(v.Dir, "q"))
	v.Env.Refused(statusUsage, []string{"file system"}, "fsck", v.Dir, "--quarantine", "/dev/shm")
	same()
	_, end, r := fsck(t, v, "--data", "--quarantine", quarantine)
	require.Equal(t, statusDamaged, r.Status, "%v", r)
	require.EqualValues(t, 3, end.Quarantined, "a file goes with both its names")
	_, _, r = fsck(t, v, "--data")
	require.Zero(t, r.Status, "%v", r)
	v.Mount()
	require.Len(t, readdir(t, v.Path("dir")), 7)
	require.NoFileExists(t, v.Path("second name"))
	_ = harness.Snapshot(t, v.Mnt) // every byte of what is left can be read
	v.Umount()
	back(t, v, quarantine)
	v.Env.Must("headers", "import", v.Dir, export, "--yes")
	harness.WriteAt(t, flipped, 5*record+99, []byte{b})
	_, _, r = fsck(t, v, "--data")
	require.Zero(t, r.Status, "%v", r)
	v.Mount()
	require.Equal(t, harness.Noise(size), harness.ReadAt(t, v.Path("second name"), 0, size+1))
	require.Equal(t, harness.Noise(size), harness.ReadAt(t, v.Path("dir", strings.Repeat("long", 60)), 0, size+1))
}

// back renames everything in a quarantine to where the manifest says that it was.
func back(t *testing.T, v *harness.Volume, quarantine string) {
	t.Helper()
	for line := range strings.Lines(string(contents(t, filepath.Join(quarantine, "manifest.jsonl")))) {
		var m struct{ Entry, Stored string }
		require.NoError(t, json.Unmarshal([]byte(line), &m))
		to := filepath.Join(v.Dir, m.Stored)
		require.NoError(t, os.Rename(filepath.Join(quarantine, m.Entry), to))
		if strings.HasPrefix(filepath.Base(m.Stored), "kmsfs.long.") {
			require.NoError(t, os.Rename(filepath.Join(quarantine, m.Entry)+".n", to+".n"))
		}
	}
}

// TestFsckRepairs: what loses nothing is mended when it is asked for, and a bad end is
// cut only when that is.
func TestFsckRepairs(t *testing.T) {
	v := local(t)
	furnish(t, v)
	require.NoError(t, os.Mkdir(v.Path("empty"), 0o700))
	long, torn, empty := v.Stored("dir", strings.Repeat("long", 60)), v.Stored("second name"), v.Stored("empty")
	v.Umount()
	v.Damaged()
	require.NoError(t, os.Remove(long))
	require.NoError(t, os.Truncate(torn, 7*record+9))
	require.NoError(t, unix.Removexattr(empty, "user.kmsfs.dir"))
	found, end, r := fsck(t, v)
	require.Equal(t, statusDamaged, r.Status, "%v", r)
	require.Len(t, found, 3)
	require.EqualValues(t, 2, end.Untidy)
	found, end, r = fsck(t, v, "--repair")
	require.Equal(t, statusDamaged, r.Status, "%v", r)
	require.Len(t, found, 3)
	require.EqualValues(t, 2, end.Repaired)
	require.NoFileExists(t, long+".n")
	found, _, r = fsck(t, v)
	require.Equal(t, statusDamaged, r.Status, "%v", r)
	require.Len(t, found, 1)
	require.Equal(t, "end", found[0].Kind)
	found, _, r = fsck(t, v, "--cut-ends")
	require.Zero(t, r.Status, "%v", r)
	require.Contains(t, found[0].Did, fmt.Sprint(7*block))
	v.Mount()
	require.Equal(t, harness.Noise(size)[:7*block], harness.ReadAt(t, v.Path("second name"), 0, size))
	require.NoError(t, os.WriteFile(v.Path("empty", "file"), []byte("x"), 0o600))
}

// TestFsckLive: beside a mount that writes, a check changes nothing and cries no wolf:
// whatever it names is marked as being written. What would change the volume is refused.
func TestFsckLive(t *testing.T) {
	v := local(t)
	furnish(t, v)
	v.Env.Refused(statusFUSE, []string{"mount"}, "fsck", v.Dir, "--repair")
	v.Env.Refused(statusFUSE, []string{"mount"}, "fsck", v.Dir, "--cut-ends")
	v.Env.Refused(statusFUSE, []string{"mount"}, "fsck", v.Dir, "--quarantine", filepath.Join(v.Env.Root, "quarantine"))
	var stop atomic.Bool
	var g errgroup.Group
	for i := range 3 {
		g.Go(func() error { return scribble(v.Path(fmt.Sprint("busy", i)), &stop) })
	}
	for range 4 {
		found, end, r := fsck(t, v, "--data")
		require.Contains(t, r.Stderr, "in use by process")
		require.True(t, end.Done)
		for _, f := range found {
			require.True(t, f.Busy, "%+v", f)
			require.True(t, strings.HasPrefix(f.Path, "busy"), "%+v", f)
		}
	}
	stop.Store(true)
	require.NoError(t, g.Wait())
	v.Umount()
	_, _, r := fsck(t, v, "--data")
	require.Zero(t, r.Status, "%v", r)
}

// scribble overwrites, appends, renames and makes files until it is told to stop.
func scribble(path string, stop *atomic.Bool) error {
	for n := 0; !stop.Load(); n++ {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(harness.Noise(3*block+77*n%5000), int64(n%7)*5000)
		if err == nil && n%3 == 0 {
			err = f.Sync()
		}
		if errClose := f.Close(); err == nil {
			err = errClose
		}
		if err == nil && n%5 == 0 {
			err = os.Rename(path, path+".moved")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// TestFsckAgreesWithMount flips random bits of random backing files. What a mount then
// answers with EBADMSG, and nothing else, a check names.
func TestFsckAgreesWithMount(t *testing.T) {
	rounds, seed := 24, uint64(6)
	if testing.Short() {
		rounds = 6
	}
	v := local(t)
	furnish(t, v)
	v.Umount()
	v.Damaged()
	files := backingFiles(t, v)
	require.NotEmpty(t, files)
	r := rand.New(rand.NewPCG(seed, seed))
	named, compared := 0, 0
	for round := range rounds {
		var undo []func()
		for range 1 + r.IntN(4) {
			undo = append(undo, flipSomething(t, r, files[r.IntN(len(files))]))
		}
		found, _, result := fsck(t, v, "--data")
		require.Contains(t, []int{0, statusDamaged}, result.Status, "%v", result)
		v.Mount()
		want, n := unreadable(t, v)
		v.Umount()
		require.Equal(t, want, badBlocksOfInodes(t, v, found), "round %d, seed %d: %v", round, seed, result)
		named, compared = named+len(want), compared+n
		slices.Reverse(undo)
		for _, f := range undo {
			f()
		}
	}
	require.Greater(t, named, rounds/2)
	t.Logf("%d rounds, %d damaged files, %d blocks compared", rounds, named, compared)
	_, _, result := fsck(t, v, "--data")
	require.Zero(t, result.Status, "%v", result)
}

// backingFiles are the stored files with contents.
func backingFiles(t *testing.T, v *harness.Volume) (files []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(v.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Dir(path) == v.Dir && strings.HasPrefix(d.Name(), "kmsfs.") && !strings.HasPrefix(d.Name(), "kmsfs.long.") {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > 0 {
			files = append(files, path)
		}
		return err
	}))
	return files
}

// flipSomething flips bits of a byte of a file, or of its header, and returns what
// puts that right again.
func flipSomething(t *testing.T, r *rand.Rand, path string) (undo func()) {
	t.Helper()
	mask := byte(1 + r.IntN(255))
	if r.IntN(5) == 0 {
		raw := header(t, path)
		bad := slices.Clone(raw)
		bad[r.IntN(len(bad))] ^= mask
		if r.IntN(2) == 0 {
			bad = sealCRC(bad)
		}
		setHeader(t, path, bad)
		return func() { setHeader(t, path, raw) }
	}
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	at := r.Int64N(st.Size)
	b := harness.ReadAt(t, path, at, 1)
	harness.WriteAt(t, path, at, []byte{b[0] ^ mask})
	return func() { harness.WriteAt(t, path, at, b) }
}

// unreadable reads every file of a mount block by block: by inode, the blocks that
// read EBADMSG; -1 if the file can't be opened. n is how many blocks there are.
func unreadable(t *testing.T, v *harness.Volume) (bad map[uint64][]int, n int) {
	t.Helper()
	bad = map[uint64][]int{}
	require.NoError(t, filepath.WalkDir(v.Mnt, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if _, seen := bad[st.Ino]; seen {
			return nil
		}
		fd, err := harness.Open(path, unix.O_RDONLY, 0)
		if err != nil {
			require.ErrorIs(t, err, unix.EBADMSG)
			bad[st.Ino] = []int{-1}
			return nil
		}
		defer unix.Close(fd)
		p := make([]byte, block)
		for b := 0; int64(b)*block < st.Size; b++ {
			n++
			if _, err := unix.Pread(fd, p, int64(b)*block); err != nil {
				require.ErrorIs(t, err, unix.EBADMSG)
				bad[st.Ino] = append(bad[st.Ino], b)
			}
		}
		return nil
	}))
	return bad, n
}

// badBlocksOfInodes is badBlocks by inode of the stored file; a file that can't be
// opened has no blocks.
func badBlocksOfInodes(t *testing.T, v *harness.Volume, found []finding) map[uint64][]int {
	t.Helper()
	stored := map[string]string{}
	for _, f := range found {
		stored[f.Path] = f.Stored
	}
	out := map[uint64][]int{}
	for path, bad := range badBlocks(found) {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(v.Dir, stored[path]), &st))
		if slices.Contains(bad, -1) {
			bad = []int{-1}
		}
		out[st.Ino] = bad
	}
	return out
}

// TestFsckAsUser: an owner without privilege checks his volume. What its mode hides
// from him is not touched, not for a moment: he is told that it was not checked.
func TestFsckAsUser(t *testing.T) {
	v := local(t)
	for _, dir := range []string{"dir", "hidden"} {
		require.NoError(t, os.Mkdir(v.Path(dir), 0o700))
		require.NoError(t, os.WriteFile(v.Path(dir, "file"), harness.Noise(size), 0o444))
	}
	require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(size), 0o444))
	hidden := []string{v.Stored("hidden"), v.Stored("file")}
	v.Umount()
	v.Damaged()
	v.Env.Do("chown", "-R", fmt.Sprintf("%d:%d", nobody, nobody), v.Env.Root)
	v.Env = v.Env.As(nobody, nobody)
	same := harness.Unchanged(t, v.Dir)
	found, _, r := fsck(t, v, "--data")
	require.Zero(t, r.Status, "%v", r)
	require.Empty(t, found)
	same()
	var before [2]unix.Stat_t
	for i, path := range hidden {
		require.NoError(t, os.Chmod(path, 0))
		require.NoError(t, unix.Lstat(path, &before[i]))
	}
	found, end, r := fsck(t, v, "--data")
	require.Equal(t, statusPartial, r.Status, "%v", r)
	require.Equal(t, []string{"file access", "hidden access"}, slices.Compact(said(found)))
	require.NotZero(t, end.Unread)
	for i, path := range hidden {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(path, &st))
		require.Equal(t, before[i].Ctim, st.Ctim, path)
	}
}

// TestFsckInterrupted: a signal ends a check at once, with the status that says so.
func TestFsckInterrupted(t *testing.T) {
	e := harness.New(t)
	k := e.KMS()
	v := e.Init("volume", "--key", k.NewKey())
	v.Mount()
	for i := range 30 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), []byte("x"), 0o600))
	}
	v.Umount()
	cmd := e.Command("kmsfs", "fsck", v.Dir, "--max-rps", "1", "--jobs", "2")
	require.NoError(t, cmd.Start())
	k.Reset()
	require.True(t, harness.Eventually(slack, func() bool { return k.Count() > 0 }))
	require.NoError(t, cmd.Process.Signal(unix.SIGINT))
	start := time.Now()
	require.Error(t, cmd.Wait())
	require.Less(t, time.Since(start), slack)
	require.Equal(t, statusPartial, cmd.ProcessState.ExitCode())
}

// TestFsckRandomNamesAndIDs edits directory ids, names and sidecars at random: a check
// always ends, without a crash, and names something.
func TestFsckRandomNamesAndIDs(t *testing.T) {
	v := local(t)
	furnish(t, v)
	v.Umount()
	v.Damaged()
	before := filepath.Join(v.Env.Root, "before")
	r := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		v.Env.Do("cp", "-a", v.Dir, before)
		what := spoilNames(t, r, v)
		_, _, result := fsck(t, v)
		require.Equal(t, statusDamaged, result.Status, "%s: %v", what, result)
		require.NotContains(t, result.Stderr, "goroutine ", what)
		require.NoError(t, os.RemoveAll(v.Dir))
		require.NoError(t, os.Rename(before, v.Dir))
	}
	_, _, result := fsck(t, v, "--data")
	require.Zero(t, result.Status, "%v", result)
}

// spoilNames does one thing to the names of a tree, and says what.
func spoilNames(t *testing.T, r *rand.Rand, v *harness.Volume) string {
	t.Helper()
	dirs, links := map[string]bool{}, map[string]bool{}
	require.NoError(t, filepath.WalkDir(v.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != v.Dir {
			dirs[path] = true
		}
		if err == nil && d.Type()&fs.ModeSymlink != 0 {
			links[path] = true
		}
		return err
	}))
	pick := func(m map[string]bool) string { return slices.Sorted(maps.Keys(m))[r.IntN(len(m))] }
	switch r.IntN(4) {
	case 0:
		dir := pick(dirs)
		raw := []byte(harness.Xattrs(t, dir)["user.kmsfs.dir"])
		raw[r.IntN(len(raw))] ^= 1
		require.NoError(t, unix.Setxattr(dir, "user.kmsfs.dir", raw, 0))
		return "directory id of " + dir
	case 1:
		link := pick(links)
		target, err := os.Readlink(link)
		require.NoError(t, err)
		raw := []byte(target)
		raw[r.IntN(len(raw))] ^= 0x41
		require.NoError(t, os.Remove(link))
		require.NoError(t, unix.Symlinkat(strings.ReplaceAll(string(raw), "\x00", "z"), unix.AT_FDCWD, link))
		return "target of " + link
	case 2:
		file := backingFiles(t, v)[0]
		require.NoError(t, os.Rename(file, filepath.Join(filepath.Dir(file), strings.Repeat("B", 30+r.IntN(30)))))
		return "name of " + file
	default:
		file := backingFiles(t, v)[0]
		require.NoError(t, unix.Setxattr(file, crypt.UserXattrPrefix+strings.Repeat("C", 30), []byte("x"), 0))
		return "attribute of " + file
	}
}

// TestFsckRandomSettings edits kmsfs.toml and its backup at random: a check ends with a
// sentence, a known status, and no call with a key that is not trusted.
func TestFsckRandomSettings(t *testing.T) {
	e := harness.New(t)
	k := e.KMS()
	key, strange := k.NewKey(), k.NewKey()
	v := e.Init("volume", "--key", key, "--names", "plain")
	v.Mount()
	require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(100), 0o600))
	v.Umount()
	good := contents(t, filepath.Join(v.Dir, "kmsfs.toml"))
	k.Quiet()
	k.Reset()
	r := rand.New(rand.NewPCG(3, 4))
	statuses := map[int]int{}
	for range 40 {
		for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
			raw := slices.Clone(good)
			switch r.IntN(4) {
			case 0:
				raw = raw[:r.IntN(len(raw))]
			case 1:
				raw = []byte(strings.Replace(string(raw), key, strange, 1))
			default:
				raw[r.IntN(len(raw))] ^= byte(1 + r.IntN(255))
			}
			overwrite(t, filepath.Join(v.Dir, name), raw)
		}
		result := e.Kmsfs("fsck", v.Dir, "--data")
		require.NotContains(t, result.Stderr, "goroutine ", "%v", result)
		require.LessOrEqual(t, result.Status, statusDamaged, "%v", result)
		statuses[result.Status]++
	}
	require.NotEmpty(t, statuses[statusDamaged])
	for _, c := range k.Calls() {
		require.Equal(t, key, c.Key, "%+v", c)
	}
}
