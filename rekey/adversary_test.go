package rekey

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// What happens at the worst moment, or is there on purpose.

// what stood at a noted place has moved on, and something else has taken the
// place, as when logs are rotated (log.1 -> log.2, log -> log.1). The round finds a
// file, of which none has vanished, and the pass ends without having met the old one.
func TestRotatedFileIsSwept(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("first", newKey)
	at := func(name string) string { return filepath.Join(s.dir, name) }
	aside := filepath.Join(filepath.Dir(s.dir), "aside")
	s.file("zz/log", oldKey)
	require.NoError(t, os.Rename(at("zz/log"), aside)) // the walk does not meet it
	asked := 0
	w := script{mounted: true, moved: func() ([]Spot, error) {
		switch asked++; asked {
		case 1: // after the walk: zz/log has become log.1 during it
			noted := s.rename(aside, "log.1")
			// and goes on before anybody looks there; these are noted for the next time
			s.rename("log.1", "log.2")
			s.file("log.1", newKey)
			return []Spot{noted}, nil
		case 2:
			return []Spot{s.spot("log.1"), s.spot("log.2")}, nil
		}
		return nil, nil
	}}
	r, err := s.run(Options{Watch: watchOf(w)})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("log.2")
}

// The same where what takes the place is no file at all.
func TestPlaceTakenBySymlink(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("first", newKey)
	at := func(name string) string { return filepath.Join(s.dir, name) }
	aside := filepath.Join(filepath.Dir(s.dir), "aside")
	s.file("zz/data", oldKey)
	require.NoError(t, os.Rename(at("zz/data"), aside))
	asked := 0
	w := script{mounted: true, moved: func() ([]Spot, error) {
		switch asked++; asked {
		case 1:
			noted := s.rename(aside, "current")
			s.rename("current", "data.v2")
			require.NoError(t, os.Symlink("data.v2", at("current")))
			return []Spot{noted}, nil
		case 2:
			return []Spot{s.spot("data.v2")}, nil
		}
		return nil, nil
	}}
	r, err := s.run(Options{Watch: watchOf(w)})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("data.v2")
}

// a file that stores nothing yet, but has its header: a live mount installed it
// and is about to write (crypt.File: header first, then sealing, then the write), or
// will try again after a full disk. The sweep does not count it, and closes.
func TestEmptyFileWithAnOldHeader(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	s.file("growing", oldKey)
	path := filepath.Join(s.dir, "growing")
	require.NoError(t, os.Truncate(path, 0))
	r, err := s.run(Options{fault: func(point string) error {
		if point == "before-close" {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.Write([]byte("sealed records")) // the mount's write, under the header it installed
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}
		return nil
	}})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("growing")
}

// A header that is worth nothing on a file that stores nothing keeps no key.
func TestEmptyFileWithAnyHeader(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("planted", oldKey)
	h := s.read("planted")
	h.Copies[0].Blob = []byte("no ticket")
	raw, err := h.Marshal()
	require.NoError(t, err)
	s.raw("planted", raw)
	s.raw("rubbish", []byte("rubbish"))
	s.file("stranger", otherKey)
	for _, name := range []string{"planted", "rubbish", "stranger"} {
		require.NoError(t, os.Truncate(filepath.Join(s.dir, name), 0))
	}
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Empty(t, r.Problems)
	require.Equal(t, 3, r.Now.Empty)
}

// while one run moves old -> new, somebody prepares the way back (new -> old).
// From then on a mount makes new files under old, behind the first run's last pass;
// that run only looks whether new is still listed, not whether it is still first.
func TestTheWayBackIsNotClosedOver(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	o := Options{apart: true}
	o.fault = func(point string) error {
		if point == "before-close" { // every pass is over
			_, err := s.run(Options{Key: oldKey, From: newKey, Prepare: true, apart: true})
			require.NoError(t, err)
			require.Equal(t, []string{oldKey, newKey}, s.open().Settings().Keys)
			s.file("made by the mount", s.open().Settings().Keys[0])
		}
		return nil
	}
	r, err := s.run(o)
	require.ErrorIs(t, err, ErrOvertaken)
	require.False(t, r.Done)
	require.Empty(t, r.Retired)
	require.Contains(t, s.open().Settings().Keys, oldKey)
}

// Where locks are shared, the second is told to wait.
func TestRunsThatDoNotGoTogether(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	for _, other := range []Options{{Key: oldKey, From: newKey}, {Key: otherKey, From: oldKey}, {Action: Remove, Key: newKey}, {Action: Refresh, Key: oldKey}} {
		seen := false
		_, err := s.run(Options{fault: func(point string) error {
			if point != "before-sweep" {
				return nil
			}
			seen = true
			other.Trusted = []string{oldKey, newKey, otherKey}
			_, err := s.run(other)
			var busy *volume.JobError
			require.ErrorAs(t, err, &busy)
			require.Equal(t, "to "+newKey, busy.Other)
			return crash{point}
		}})
		require.True(t, seen)
		require.True(t, crashed(err))
	}
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done)
}

// The same, with the first run's close in the middle of the way back.
func TestTwoMovesWithOppositeTargets(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	_, err := s.run(Options{fault: func(point string) error {
		if point == "before-close" {
			return crash{point} // stands still here; closes below
		}
		return nil
	}})
	require.True(t, crashed(err))
	var once sync.Once
	var closing error
	back := Options{Key: oldKey, From: newKey, apart: true}
	back.fault = func(point string) error {
		if point == "file-rewrapped" { // it has asked KMS and is about to write
			once.Do(func() {
				j := newJob(s.open(), s.vault, Options{Key: newKey, Trusted: []string{oldKey, newKey}})
				if closing = j.resolve(); closing == nil {
					closing = j.close()
				}
			})
		}
		return nil
	}
	r, err := s.run(back)
	require.NoError(t, err)
	require.True(t, r.Done)
	require.ErrorIs(t, closing, ErrOvertaken)
	require.Equal(t, []string{oldKey}, s.open().Settings().Keys)
	s.under(s.read("a"), oldKey)
}

func bindStage(t *testing.T) *stage {
	s := newStage(t, oldKey)
	s.file("a", newKey)
	s.file("elsewhere/real", oldKey)
	outside := filepath.Join(filepath.Dir(s.dir), "outside")
	require.NoError(t, os.Rename(filepath.Join(s.dir, "elsewhere"), outside))
	s.raw("bound", nil)
	if err := unix.Mount(filepath.Join(outside, "real"), filepath.Join(s.dir, "bound"), "", unix.MS_BIND, ""); err != nil {
		require.NotZero(t, os.Geteuid(), "mounting: %v", err)
		t.Skip("only root may mount: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(s.dir, "bound"), unix.MNT_DETACH) })
	return s
}

// where the number in the listing is not that of the file (a bind mount of the
// same file system, FUSE stores without use_ino) the file is "gone" for ever. On a
// live mount that counts as seen.
func TestListedNumberIsNotTheFilesMounted(t *testing.T) {
	s := bindStage(t)
	r, err := s.run(Options{Watch: watchOf(script{mounted: true, moved: func() ([]Spot, error) { return nil, nil }})})
	require.NoError(t, err)
	require.False(t, r.Done, "a file of the tree is under the old key")
	require.ErrorIs(t, r.Problems[0].Err, volume.ErrOtherDevice)
}

// and not mounted, a hundred passes later, the tree "never rests".
func TestListedNumberIsNotTheFilesUnmounted(t *testing.T) {
	s := bindStage(t)
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.Less(t, r.Passes, maxPasses, "%v", r.Problems)
}

// two --remove at once, of two keys, where the third key's copy of the volume
// key is no good (its region is gone, say). Each proves the volume key by the copy
// that the other is about to take away, long before it takes its own.
func TestTwoRemovesLoseTheVolumeKey(t *testing.T) {
	const third = "local:third"
	s := newStage(t, oldKey, newKey, third)
	v := s.open()
	s.vault.mu.Lock()
	s.vault.under[string(v.Header().Find(third).Blob)] = "a key that is gone"
	s.vault.mu.Unlock()
	trusted := []string{oldKey, newKey, third}

	o := Options{Action: Remove, Key: oldKey, Trusted: trusted, apart: true}
	o.fault = func(point string) error {
		if point == "before-close" {
			r, err := s.run(Options{Action: Remove, Key: newKey, Trusted: trusted, apart: true})
			require.NoError(t, err)
			require.True(t, r.Done)
		}
		return nil
	}
	_, err := s.run(o)
	require.ErrorIs(t, err, ErrOvertaken)
	h := s.open().Header()
	opens := 0
	for _, c := range h.Copies {
		if s.vault.unwrap(h, c.Key) == nil {
			opens++
		}
	}
	require.NotZero(t, opens, "the volume key opens under no key any more")
}

// relabeller goes between the replicas of a multi-Region key as package keys does:
// nobody is asked, the blob gets another label.
type relabeller struct{ *vault }

func (r relabeller) Route(from, to string) (Route, error) {
	if from != to && crypt.SameKey(from, to) {
		return Route{Name: "relabel"}, nil
	}
	return r.vault.Route(from, to)
}

func (r relabeller) Rewrap(ctx context.Context, h *crypt.Header, from, to string) (crypt.Copy, error) {
	if from != to && crypt.SameKey(from, to) {
		return crypt.Copy{Key: to, Blob: h.Find(from).Blob}, nil
	}
	return r.vault.Rewrap(ctx, h, from, to)
}

// Prove and Verify open a replica's blobs too.
func (r relabeller) Prove(_ context.Context, h *crypt.Header, key string) error {
	return r.opens(h, key)
}

func (r relabeller) Verify(_ context.Context, h *crypt.Header, key string) error {
	return r.opens(h, key)
}

func (r relabeller) opens(h *crypt.Header, key string) error {
	c := exact(h, key)
	if c == nil {
		return crypt.ErrDamaged
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !crypt.SameKey(r.under[string(c.Blob)], key) {
		return crypt.ErrDamaged
	}
	secrets, err := crypt.Unlock(h.Identity, r.keys[string(c.Blob)])
	if err == nil {
		secrets.Wipe()
	}
	return err
}

// a header with a good copy under the new key and a bad one under its replica.
// The move relabels the bad blob, of which nothing is proven, and drops the good one.
func TestRelabelDropsTheOnlyGoodCopy(t *testing.T) {
	s := newStage(t, mrkEast, mrkWest)
	s.file("a", mrkEast, mrkWest)
	h := s.read("a")
	exact(h, mrkEast).Blob = []byte("damaged by whoever")
	raw, err := h.Marshal()
	require.NoError(t, err)
	s.raw("a", raw)
	require.NoError(t, s.vault.unwrap(s.read("a"), mrkWest), "it opens")
	r, err := run(context.Background(), s.open(), relabeller{s.vault}, Options{Key: mrkWest, Trusted: []string{mrkEast, mrkWest}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Len(t, s.read("a").Copies, 1)
	require.NoError(t, relabeller{s.vault}.opens(s.read("a"), mrkWest))
}

// Nor while the key service can't be asked which of the two is good.
func TestRelabelWaitsForTheService(t *testing.T) {
	s := newStage(t, mrkEast, mrkWest)
	s.file("a", mrkEast, mrkWest)
	before := s.bytes("a")
	out := outage{relabeller{s.vault}}
	r, err := run(context.Background(), s.open(), out, Options{Key: mrkWest, Trusted: []string{mrkEast, mrkWest}})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.ErrorIs(t, r.Problems[0].Err, crypt.ErrKeyUnavailable)
	require.Equal(t, before, s.bytes("a"))
}

// outage is a service that opens the volume key and then nothing.
type outage struct{ relabeller }

func (o outage) Prove(ctx context.Context, h *crypt.Header, key string) error {
	if h.Use == crypt.UseFile {
		return crypt.ErrKeyUnavailable
	}
	return o.relabeller.Prove(ctx, h, key)
}

// --verify decrypts every copy under the new key but the one on which all
// depend, the volume key's, before the old one is dropped.
func TestVerifyCoversTheVolumeKey(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	id := s.open().Header().File
	r, err := s.run(Options{Verify: true})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.NotZero(t, s.vault.tests[id], "the volume key's new copy was never opened")
}

// a volume with as many keys as there may be can't be moved from one of them
// to another: the new one has to fit beside the old in between.
func TestMoveWithEightKeys(t *testing.T) {
	keys := []string{oldKey, "local:1", "local:2", "local:3", "local:4", "local:5", "local:6", "local:7"}
	s := newStage(t, keys...)
	_, err := s.run(Options{From: oldKey, Trusted: keys})
	require.ErrorIs(t, err, ErrTooMany)
	require.Empty(t, s.vault.calls, "refused before a call is paid for")
}

// Nothing tells what a refresh has done: with workers there is no run after them, for
// it would do everything again.
func TestShardedRefresh(t *testing.T) {
	s := newStage(t, oldKey)
	s.files(20, oldKey)
	o := Options{Action: Refresh, Key: oldKey}
	prepare := o
	prepare.Prepare = true
	r, err := s.run(prepare)
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 1, r.Calls, "the volume key")
	sum := 0
	for i := range 2 {
		p := o
		p.Shard = Shard{i + 1, 2}
		r, err := s.run(p)
		require.NoError(t, err)
		require.True(t, r.Done)
		sum += r.Changed
	}
	require.Equal(t, 20, sum)
}

// while copies under a key are added, another run takes that key out. The
// first says "every file opens under it now", of a key that kmsfs.toml does not list
// and under which the volume key has no copy.
func TestAddIsUndoneMeanwhile(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	o := Options{Action: Add, apart: true}
	o.fault = func(point string) error {
		if point == "before-sync" {
			r, err := s.run(Options{Action: Remove, Key: newKey, apart: true})
			require.NoError(t, err)
			require.True(t, r.Done)
		}
		return nil
	}
	r, err := s.run(o)
	require.ErrorIs(t, err, ErrOvertaken)
	require.False(t, r.Done)
}

// --remove OLD --from X: the copy that is left is under a key that no client
// finds in kmsfs.toml, nor in its pin.
func TestRemoveLeavesAListedKey(t *testing.T) {
	s := newStage(t, newKey, oldKey)
	s.file("a", oldKey, otherKey)
	r, err := s.run(Options{Action: Remove, Key: oldKey, From: otherKey})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.ErrorIs(t, r.Problems[0].Err, ErrLastCopy)
	s.under(s.read("a"), oldKey, otherKey)
}

// what kmsfs.toml calls a replica is written back under this client's name of
// it, though nobody asked to move it: other clients then call another region.
func TestOtherKeysKeepTheirNames(t *testing.T) {
	s := newStage(t, mrkWest)
	s.file("a", mrkWest)
	for blob := range s.vault.under {
		s.vault.under[blob] = mrkEast // their material is one
	}
	_, err := s.run(Options{Action: Add, Trusted: []string{mrkEast}})
	require.NoError(t, err)
	require.Contains(t, s.open().Settings().Keys, mrkWest)
}

// files whose blobs are damaged are no refusal of the key service. A hundred
// of them side by side (a directory restored badly, or planted) end each run at the
// same place, for ever, and what comes after them is never moved.
func TestManyBadBlobsDoNotEndTheRun(t *testing.T) {
	s := newStage(t, oldKey)
	for i := range giveUp + 50 {
		name := fmt.Sprint("bad/", i)
		s.file(name, oldKey)
		h := s.read(name)
		h.Copies[0].Blob = []byte("no ticket")
		raw, err := h.Marshal()
		require.NoError(t, err)
		s.raw(name, raw)
	}
	s.file("good/after/them", oldKey)
	r, err := s.run(Options{Jobs: 1})
	require.NoError(t, err, "bad files are counted, they do not stop a run")
	require.Equal(t, giveUp+50, r.Failed)
	s.moved("good/after/them")
}

// --add of a key that is not first, to complete what has appeared since (what
// the first --add tells people to run), never comes to an end while a mount makes
// files: they are under the first key alone, and every pass finds some.
func TestCompletingOnABusyMount(t *testing.T) {
	s := newStage(t, newKey, oldKey)
	s.file("a", newKey)
	n := 0
	tree := &restless{tree: s.open(), during: func(int) {
		n++
		s.file(fmt.Sprint("new", n), newKey)
	}}
	w := script{mounted: true, moved: func() ([]Spot, error) { return nil, nil }}
	r, err := run(context.Background(), tree, s.vault, Options{Action: Add, Key: oldKey, Trusted: []string{newKey, oldKey}, Watch: watchOf(w)})
	require.NoError(t, err)
	require.True(t, r.Done)
}

// this client knows the volume's multi-Region key by its own region's name
// (mount --key allows that) and makes that official.
func TestMoveToTheReplicaThatIsTrusted(t *testing.T) {
	s := newStage(t, mrkEast)
	s.file("a", mrkEast)
	r, err := run(context.Background(), s.open(), relabeller{s.vault}, Options{Key: mrkWest, Trusted: []string{mrkWest}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, mrkWest, s.read("a").Copies[0].Key)
}

// each item held keeps a directory's descriptor; --jobs goes to 1024, and then
// five thousand are held. What can't be opened any more is a failure of the tree.
func TestManyJobsFewDescriptors(t *testing.T) {
	s := newStage(t, oldKey)
	for i := range 600 {
		s.file(fmt.Sprintf("d%d/f", i), oldKey)
	}
	s.vault.fail = func(*crypt.Header) error { time.Sleep(time.Millisecond); return nil }
	var was unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 256, Max: was.Max}))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	r, err := s.run(Options{Jobs: 128})
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	require.NoError(t, err)
	require.Zero(t, r.Failed, "%v", r.Problems)
}

// on the recommended ext4 (mkfs.ext4 -I 512) a second copy needs a block
// outside the inode. Once one file was given one, nothing is tried any more: when
// the disk is full, each further file's call is paid for and thrown away, in every run.
func TestFullDiskIsRefusedBeforeTheCall(t *testing.T) {
	base, err := os.MkdirTemp("", "full")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(base) }) // after the unmount
	img, mnt := filepath.Join(base, "img"), filepath.Join(base, "mnt")
	require.NoError(t, os.WriteFile(img, make([]byte, 4<<20), 0o600))
	require.NoError(t, os.Mkdir(mnt, 0o755))
	if out, err := exec.Command("sh", "-c", "mkfs.ext4 -q -I 512 -b 4096 -m 0 "+img+" && mount -o loop "+img+" "+mnt).CombinedOutput(); err != nil {
		require.NotZero(t, os.Geteuid(), "mounting an ext4: %s", out)
		t.Skipf("only root may mount: %s", out)
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	t.Setenv("TMPDIR", mnt)
	s := newStage(t, oldKey)
	s.files(60, oldKey)
	full := filepath.Join(mnt, "full")
	// Room for the settings and some ten headers.
	reserve := filepath.Join(mnt, "reserve")
	require.NoError(t, os.WriteFile(reserve, make([]byte, 16<<12), 0o600))
	f, err := os.Create(full)
	require.NoError(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	require.NoError(t, f.Close())
	v := s.open()
	sync, err := v.OpenSync()
	require.NoError(t, err)
	defer sync.Close()
	require.NoError(t, sync.Sync())
	require.NoError(t, os.Remove(reserve))
	require.NoError(t, sync.Sync()) // freed blocks are to be had after a commit
	r, err := s.run(Options{Action: Add, Jobs: 1})
	require.NoError(t, err)
	require.NotZero(t, r.Failed)
	require.LessOrEqual(t, r.Calls, r.Changed+2, "the volume key, and the first that there was no room for")
}
