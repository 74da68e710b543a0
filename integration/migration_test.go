package integration

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

const (
	east = "us-east-1"
	west = "eu-west-1"
)

// TestRegionMigration is the runbook of docs/MIGRATION.md: a tree under us-east-1
// goes to eu-west-1 in two phases, with a check between them, while a program
// writes and checks through the mount all the time. Then us-east-1 is gone, and
// everything opens.
func TestRegionMigration(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	old, next := kms.CreateKey(east), kms.CreateKey(west)
	v := e.Init("volume", "--key", old)
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	e.Do("cp", "-a", tree, v.Path("tree"))
	program := churnOn(t, v)
	program.busy(50)

	out := e.Must("rekey", v.Dir, "--add", next, "--verify", "--yes")
	require.Contains(t, out, "every file opens under "+next)
	counts := v.KeysOf()
	require.GreaterOrEqual(t, counts[next], counts[old], "every file has a copy under the new key: %v", counts)
	require.Contains(t, e.Must("status", v.Dir), next)

	// The mount has switched by itself: its key of new files is the new one.
	program.busy(200)
	kms.Reset()
	program.busy(50)
	for _, c := range kms.Calls() {
		if c.Op == "GenerateDataKey" {
			require.Equal(t, next, c.Key)
		}
	}
	out = e.Must("rekey", v.Dir, "--remove", old, "--yes")
	require.Contains(t, out, "no longer needs "+old)
	require.Equal(t, []string{next}, keysIn(v.KeysOf()))

	kms.SetDown(east, true)
	kms.SetState(old, kmstest.Disabled)
	program.busy(200)
	program.Stop()
	v.Remount()
	harness.Same(t, tree, v.Path("tree"))
	program.Check()
	require.Equal(t, []string{next}, keysIn(v.KeysOf()))
}

func keysIn(counts map[string]int) (keys []string) {
	for k := range counts {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// TestRegionMigrationMoto is the same on a KMS that others wrote, as far as it goes:
// it has regions, and no way to shut one down.
func TestRegionMigrationMoto(t *testing.T) {
	e := harness.New(t)
	newKey := e.Moto()
	old, next := newKey(), newKey(west)
	require.Contains(t, next, west)
	v := e.Init("volume", "--key", old)
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding", "json")
	e.Do("cp", "-a", tree, v.Path("tree"))
	e.Must("rekey", v.Dir, "--add", next, "--verify", "--yes")
	files := v.KeysOf()[old]
	require.NotZero(t, files)
	require.Equal(t, map[string]int{old: files, next: files}, v.KeysOf())
	e.Must("rekey", v.Dir, "--remove", old, "--yes")
	require.Equal(t, map[string]int{next: files}, v.KeysOf())
	v.Remount()
	harness.Same(t, tree, v.Path("tree"))
}

// A trip is one rekey, and what KMS may be asked for by it.
type trip struct {
	name string
	args []string
	to   []string       // keys of each header afterwards
	each map[string]int // calls for each file, by "Operation region"
	ever []string       // operations of which there is none, not for the volume key either
}

// TestEveryRoute takes the same files along each route of DESIGN section 6, in the
// built program, and counts what KMS was asked for.
func TestEveryRoute(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	a, b := kms.CreateKey(east), kms.CreateKey(east)
	other := kms.Create(kmstest.KeySpec{Region: east, Account: "444455556666"})
	far := kms.CreateKey(west)
	mrk := kms.Create(kmstest.KeySpec{Region: east, MultiRegion: true})
	mrkWest := kms.Replicate(mrk, west)
	local := localKey(e, "home")

	v := e.Init("volume", "--key", a)
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding", "json")
	e.Do("cp", "-a", tree, v.Path("tree"))
	v.Umount()
	files := v.KeysOf()[a]
	require.NotZero(t, files)

	plain := []string{"Decrypt", "Encrypt", "GenerateDataKey"}
	for _, trip := range []trip{
		{"same region", []string{"--to", b}, []string{b}, map[string]int{"ReEncrypt " + east: 1}, plain},
		{"another account", []string{"--to", other}, []string{other}, map[string]int{"ReEncrypt " + east: 1}, plain},
		{"newer material", []string{"--refresh"}, []string{other}, map[string]int{"ReEncrypt " + east: 1}, plain},
		{"to a region by way of a multi-Region key", []string{"--to", far, "--via", mrk}, []string{far}, map[string]int{"ReEncrypt " + east: 1, "ReEncrypt " + west: 1}, plain},
		{"back, decrypted", []string{"--to", a}, []string{a}, map[string]int{"Decrypt " + west: 1, "Encrypt " + east: 1}, []string{"ReEncrypt"}},
		{"to a multi-Region key", []string{"--to", mrk}, []string{mrk}, map[string]int{"ReEncrypt " + east: 1}, plain},
		{"to its replica", []string{"--to", mrkWest}, []string{mrkWest}, nil, []string{"ReEncrypt", "Encrypt", "GenerateDataKey"}},
		{"to a local key", []string{"--to", local}, []string{local}, map[string]int{"Decrypt " + west: 1}, []string{"ReEncrypt", "Encrypt"}},
		{"from a local key", []string{"--to", b}, []string{b}, map[string]int{"Encrypt " + east: 1}, []string{"ReEncrypt", "Decrypt"}},
		{"one more", []string{"--add", a}, []string{a, b}, map[string]int{"ReEncrypt " + east: 1}, plain},
		{"a third, from the nearest", []string{"--add", far}, []string{a, b, far}, map[string]int{"Decrypt " + east: 1, "Encrypt " + west: 1}, nil},
		{"one less", []string{"--remove", a}, []string{b, far}, nil, []string{"ReEncrypt", "Encrypt"}},
		{"one of two, named", []string{"--to", mrkWest, "--from", far}, []string{b, mrkWest}, map[string]int{"ReEncrypt " + west: 1}, plain},
		{"the last but one", []string{"--remove", b}, []string{mrkWest}, map[string]int{"Decrypt " + west: 1}, []string{"ReEncrypt", "Encrypt"}},
	} {
		t.Run(trip.name, func(t *testing.T) {
			if trip.name == "newer material" {
				kms.Rotate(other)
			}
			kms.Reset()
			e.Must(append([]string{"rekey", v.Dir, "--yes"}, trip.args...)...)
			calls := kms.Calls()
			want := map[string]int{}
			for _, k := range trip.to {
				want[k] = files
			}
			require.Equal(t, want, v.KeysOf())
			count := map[string]int{}
			for _, c := range calls {
				require.Empty(t, c.Error)
				require.NotContains(t, trip.ever, c.Op)
				count[c.Op+" "+c.Region]++
			}
			for call, n := range trip.each {
				require.GreaterOrEqual(t, count[call], n*files, call)
				require.LessOrEqual(t, count[call], n*files+3, "%s: the volume key, and aliases", call)
			}
			if trip.each == nil && trip.to[0] == mrkWest {
				require.LessOrEqual(t, len(calls), 2, "%v", count)
			}
			v.Mount()
			harness.Same(t, tree, v.Path("tree"))
			v.Umount()
		})
	}
	v.Mount()
}

// TestRekeyEverythingMoves: what a program creates, renames, links, moves with its
// directory and leaves without a name during a rekey of a live mount ends under the
// new key with that one run.
func TestRekeyEverythingMoves(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	keys := []string{kms.NewKey(), kms.NewKey()}
	v := e.Init("volume", "--key", keys[0])
	v.Mount()
	e.Do("cp", "-a", filepath.Join(harness.GOROOT(t), "src", "encoding"), v.Path("tree"))
	program := churnOn(t, v)
	program.busy(300)
	for i := range 4 {
		next, last := keys[(i+1)%2], keys[i%2]
		out := e.Must("rekey", v.Dir, "--to", next, "--yes")
		require.Contains(t, out, "no longer needs "+last)
		require.Equal(t, []string{next}, keysIn(v.KeysOf()), "run %d: %s", i, out)
	}
	kms.SetState(keys[1], kmstest.Disabled)
	program.busy(100)
	program.Stop()
	v.Remount()
	program.Check()
}

// TestTwoRekeysAtOnce: both end well, whichever does the work.
func TestTwoRekeysAtOnce(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first)
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	e.Do("cp", "-a", tree, v.Path("tree"))
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			r := e.Run("kmsfs", "rekey", v.Dir, "--to", second, "--yes")
			if r.Status != 0 {
				t.Errorf("%v", r)
			}
		})
	}
	both.Wait()
	require.Equal(t, []string{second}, keysIn(v.KeysOf()))
	kms.SetState(first, kmstest.Disabled)
	v.Remount()
	harness.Same(t, tree, v.Path("tree"))
}

// TestShardedRekey: prepared once, swept by four workers at a time, closed once.
func TestShardedRekey(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first)
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	e.Do("cp", "-a", tree, v.Path("tree"))
	e.Refused(statusUsage, []string{"--prepare"}, "rekey", v.Dir, "--to", second, "--shard", "1/4", "--yes")
	require.Contains(t, e.Must("rekey", v.Dir, "--to", second, "--prepare", "--yes"), "prepared")
	files := v.KeysOf()[first]
	kms.Reset()
	var workers sync.WaitGroup
	for i := range 4 {
		workers.Go(func() {
			r := e.Run("kmsfs", "rekey", v.Dir, "--to", second, "--shard", fmt.Sprintf("%d/4", i+1), "--yes")
			if r.Status != 0 {
				t.Errorf("%v", r)
			}
		})
	}
	workers.Wait()
	require.Equal(t, files, kms.Count("ReEncrypt"), "no file is done twice")
	require.Equal(t, map[string]int{second: files}, v.KeysOf())
	out := e.Must("rekey", v.Dir, "--to", second, "--yes")
	require.Contains(t, out, "no longer needs "+first)
	v.Remount()
	harness.Same(t, tree, v.Path("tree"))
}

// TestCopiesOutlastARegion: with a copy in each of two regions, the mount opens
// files through the second while the first is down, without a remount; a first key
// that says no is not gone around.
func TestCopiesOutlastARegion(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	old, next := kms.CreateKey(east), kms.CreateKey(west)
	v := e.Init("volume", "--key", old)
	v.Options("-o", "cache_age=1s")
	v.Mount()
	content := harness.Noise(5000)
	for i := range 40 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), content, 0o600))
	}
	e.Must("rekey", v.Dir, "--add", next, "--yes")
	v.Remount()
	read := func(i int) error {
		got, err := os.ReadFile(v.Path(fmt.Sprint(i)))
		if err == nil {
			require.Equal(t, content, got)
		}
		return err
	}
	kms.Reset()
	require.NoError(t, read(0))
	for _, c := range kms.Calls() {
		require.Equal(t, west, c.Region, "the first key governs")
	}
	kms.SetDown(west, true)
	start := time.Now()
	for i := 1; i < 30; i++ {
		require.NoError(t, read(i))
	}
	t.Logf("29 opens with the first region down: %v", time.Since(start))
	require.Less(t, time.Since(start), 29*time.Second, "the dead region is not waited for at each open")
	kms.SetDown(west, false)
	require.NoError(t, read(30))

	kms.SetState(next, kmstest.Disabled)
	require.True(t, harness.Eventually(45*time.Second, func() bool { return read(31) != nil }), "a disabled key is gone around")
	kms.SetState(next, kmstest.Enabled)
	require.True(t, harness.Eventually(10*time.Second, func() bool { return read(32) == nil }))
}

// TestStatus: headers by key, what has none, local keys named for what they are.
func TestStatus(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	key, home := kms.NewKey(), localKey(e, "home")
	v := e.Init("volume", "--key", home)
	v.Mount()
	for i := range 5 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), []byte("x"), 0o600))
	}
	require.NoError(t, os.WriteFile(v.Path("empty"), nil, 0o600))
	out := e.Must("status", v.Dir)
	require.Contains(t, out, home+": 5 headers")
	require.Contains(t, out, "LOCAL KEY: not KMS")
	require.Contains(t, out, "mount on "+v.Mnt)
	require.Contains(t, out, "empty files: 1")
	e.Must("rekey", v.Dir, "--add", key, "--yes")
	kms.Reset()
	out = e.Must("status", v.Dir, "--json")
	require.Contains(t, out, fmt.Sprintf(`{"key":%q,"local":false,"listed":true,"first":true,"retired":false,"headers":5}`, key))
	require.Zero(t, kms.Count(), "status asks nobody")
	e.Must("rekey", v.Dir, "--remove", home, "--yes")
	require.NotContains(t, e.Must("status", v.Dir), home)
	v.Umount()

	v.Damaged()
	victim := harness.Find(t, v.Dir, func(st *unix.Stat_t) bool { return st.Size == 33 })
	setHeader(t, victim, []byte("KMSF rubbish"))
	r := e.Refused(statusDamaged, []string{"no valid header"}, "status", v.Dir)
	require.Contains(t, r.Stderr, filepath.Base(victim))
}

// TestRekeyFullAttributes: a file whose own attributes leave no room is refused
// before a call is paid for, and loses nothing; the others go on.
func TestRekeyFullAttributes(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first)
	v.Mount()
	for _, name := range []string{"full", "other"} {
		require.NoError(t, os.WriteFile(v.Path(name), harness.Noise(5000), 0o600))
	}
	fill := e.Run("sh", "-c", `i=0; while [ $i -lt 100 ] && setfattr -n user.fill$i -v "$(head -c 150 /dev/zero | tr '\0' x)" "$1"; do i=$((i+1)); done; [ $i -lt 100 ]`, "sh", v.Path("full"))
	if fill.Status != 0 {
		t.Log("this file system has room for any attribute: the refusal is tested in package rekey")
		return
	}
	before := harness.Xattrs(t, v.Path("full"))
	r := e.Refused(statusPartial, []string{"does not fit"}, "rekey", v.Dir, "--add", second, "--yes")
	require.Contains(t, r.Stdout, "added a copy to 1 headers")
	require.Equal(t, map[string]int{first: 2, second: 1}, v.KeysOf())
	require.Equal(t, before, harness.Xattrs(t, v.Path("full")))
	got, err := os.ReadFile(v.Path("full"))
	require.NoError(t, err)
	require.Equal(t, harness.Noise(5000), got)
	e.Shell(`for n in $(getfattr --absolute-names "$1" | grep user.fill); do setfattr -x $n "$1"; done`, v.Path("full"))
	e.Must("rekey", v.Dir, "--add", second, "--yes")
	require.Equal(t, map[string]int{first: 2, second: 2}, v.KeysOf())
}

// TestRekeyByOwner: a user moves his own tree, with files that forbid him to write
// or to read them; their modes stay.
func TestRekeyByOwner(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	e := harness.New(t).As(nobody, nobody)
	one, two := localKey(e, "one"), localKey(e, "two")
	v := e.Init("volume", "--key", one)
	v.Mount()
	e.Shell(`cd "$1"; for m in 0444 0400 0000 0600; do echo $m >f$m; chmod $m f$m; done; mkdir d; echo x >d/f; chmod 0500 d`, v.Mnt)
	v.Umount()
	e.Must("rekey", v.Dir, "--to", two, "--yes")
	require.Equal(t, map[string]int{two: 5}, v.KeysOf())
	v.Mount()
	e.Shell(`cd "$1"; for m in 444 400 0 600; do test "$(stat -c %a f$(printf %04d $m))" = $m; done; cat f0444 f0400 f0600 d/f >/dev/null`, v.Mnt)
	v.Umount()
}

// TestRekeyFilesOfOthers: what the one who rekeys may not write is named and counted,
// the rest is done, and the old key stays.
func TestRekeyFilesOfOthers(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	e := harness.New(t).As(nobody, nobody)
	one, two := localKey(e, "one"), localKey(e, "two")
	v := e.Init("volume", "--key", one)
	v.Mount()
	e.Shell(`cd "$1"; for n in 1 2 3 4 5; do head -c $n /dev/zero >f$n; done`, v.Mnt)
	v.Umount()
	victim := harness.Find(t, v.Dir, func(st *unix.Stat_t) bool { return st.Size == 33 })
	require.NoError(t, os.Chown(victim, 0, 0))
	r := e.Refused(statusPartial, []string{"could not be dealt with"}, "rekey", v.Dir, "--to", two, "--yes")
	require.Contains(t, r.Stderr, filepath.Base(victim)+": failed")
	require.Contains(t, r.Stdout, "1 headers remain under "+one)
	require.Equal(t, map[string]int{one: 1, two: 4}, v.KeysOf())
	require.NoError(t, os.Chown(victim, nobody, nobody))
	require.Contains(t, e.Must("rekey", v.Dir, "--to", two, "--yes"), "no longer needs "+one)
	require.Equal(t, map[string]int{two: 5}, v.KeysOf())
}

// TestRekeyObeysMaxRPS: the ceiling holds over the whole run, and slowness is no
// failure.
func TestRekeyObeysMaxRPS(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first)
	v.Mount()
	const files, rps = 100, 40
	for i := range files {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), []byte("x"), 0o600))
	}
	kms.Quiet()
	kms.Reset()
	e.Must("rekey", v.Dir, "--to", second, "--yes", "--max-rps", fmt.Sprint(rps))
	var calls []kmstest.Call
	for _, c := range kms.Calls() {
		if c.Op == "ReEncrypt" {
			calls = append(calls, c)
		}
	}
	require.Len(t, calls, files+1)
	took := calls[files].Time.Sub(calls[0].Time)
	require.Greater(t, took, time.Duration(files-rps)*time.Second/rps, "at most %d a second, but for one second's burst", rps)
}

// TestRekeyKilledAnywhere ends a rekey without a word at random moments, again and
// again, from one key to the other and back: each time the next run finishes, and
// every file reads back with the old key out of reach. Every other moment is one
// between the first and the last header, whose time is short under a local key: when
// the header of a file taken at random has the new key. "make rekey-kills" runs it long.
func TestRekeyKilledAnywhere(t *testing.T) {
	t.Parallel()
	heavy(t)
	kills, files := fromEnv(t, "KMSFS_TEST_KILLS", 5), fromEnv(t, "KMSFS_TEST_FILES", 1000)
	for kind, start := range map[string]func(e *harness.Env) (keys [2]string, reach func(key string, yes bool)){
		"local": killLocal, "kmstest": killKMS,
	} {
		if only := os.Getenv("KMSFS_TEST_KEYS"); only != "" && only != kind {
			continue
		}
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			e := harness.New(t)
			keys, reach := start(e)
			killRekeys(t, e, keys, reach, kills, files)
		})
	}
}

func killKMS(e *harness.Env) (keys [2]string, reach func(key string, yes bool)) {
	kms := e.KMS()
	return [2]string{kms.NewKey(), kms.NewKey()}, func(key string, yes bool) {
		kms.SetState(key, map[bool]string{true: kmstest.Enabled, false: kmstest.Disabled}[yes])
	}
}

func killLocal(e *harness.Env) (keys [2]string, reach func(key string, yes bool)) {
	return [2]string{localKey(e, "one"), localKey(e, "two")}, func(key string, yes bool) {
		here := filepath.Join(e.Var("KMSFS_KEYRING"), strings.TrimPrefix(key, "local:")+".key")
		away := filepath.Join(e.Root, filepath.Base(here))
		if yes {
			here, away = away, here
		}
		require.NoError(e.T, os.Rename(here, away))
	}
}

func killRekeys(t *testing.T, e *harness.Env, keys [2]string, reach func(key string, yes bool), kills, files int) {
	v := e.Init("volume", "--key", keys[0])
	v.Mount()
	name := func(i int) string { return fmt.Sprintf("d%d/e%d/f%d", i%17, i%5, i) }
	path := func(i int) string { return v.Path(name(i)) }
	noise := harness.Noise(6000)
	want := func(i int) []byte { return noise[i%3000 : i%3000+10+i%2900] }
	require.NoError(t, eachOf(files, func(i int) error {
		return errors.Join(os.MkdirAll(filepath.Dir(path(i)), 0o700), os.WriteFile(path(i), want(i), 0o600))
	}))
	start := time.Now()
	e.Must("rekey", v.Dir, "--to", keys[1], "--yes")
	whole := time.Since(start)
	killed, midway := 0, 0
	for run := 1; killed < kills || midway == 0 && run < 50; run++ {
		from, to := keys[run%2], keys[(run+1)%2]
		wait := func() { time.Sleep(rand.N(whole * 11 / 10)) }
		if run%2 == 0 {
			wait = untilKey(v.Stored(name(rand.N(files))), to, 2*whole)
		}
		live := run%3 != 0 // mounted or not
		if !live {
			v.Umount()
		}
		if killAfter(t, e.Command("kmsfs", "rekey", v.Dir, "--to", to, "--yes"), wait) {
			killed++
		}
		if counts := v.KeysOf(); counts[from] > 0 && counts[to] > 0 {
			midway++
		}
		e.Must("rekey", v.Dir, "--to", to, "--yes")
		require.Equal(t, map[string]int{to: files}, v.KeysOf())
		if live {
			v.Umount()
		}
		reach(from, false)
		v.Mount()
		require.NoError(t, eachOf(files, func(i int) error {
			got, err := os.ReadFile(path(i))
			if err == nil && !bytes.Equal(want(i), got) {
				err = fmt.Errorf("%s reads otherwise", path(i))
			}
			return err
		}))
		reach(from, true)
	}
	t.Logf("%d files; killed %d times, of which %d between the first and the last header; files lost: 0", files, killed, midway)
	require.NotZero(t, midway)
}

// eachOf calls f for each number below n, four at a time: most of the time each waits for
// the kernel, the daemon and KMS in turn.
func eachOf(n int, f func(i int) error) error {
	const at = 4
	var jobs errgroup.Group
	for first := range at {
		jobs.Go(func() error {
			for i := first; i < n; i += at {
				if err := f(i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return jobs.Wait()
}

// untilKey returns once a file's header names the key, or after the limit.
func untilKey(path, key string, limit time.Duration) func() {
	return func() {
		for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Microsecond) {
			if h, err := harness.HeaderOf(path); err == nil && h != nil && h.Copies[0].Key == key {
				return
			}
		}
	}
}

// killAfter reports whether the program was still running then.
func killAfter(t *testing.T, cmd *exec.Cmd, wait func()) bool {
	require.NoError(t, cmd.Start())
	wait()
	_ = cmd.Process.Kill()
	return cmd.Wait() != nil
}

func fromEnv(t *testing.T, name string, otherwise int) int {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	return n
}
