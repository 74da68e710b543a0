package rekey

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// under checks that a header has copies under exactly these keys and that each opens.
func (s *stage) under(h *crypt.Header, keys ...string) {
	s.t.Helper()
	var have []string
	for _, c := range h.Copies {
		have = append(have, c.Key)
		require.NoError(s.t, s.vault.unwrap(h, c.Key))
	}
	require.ElementsMatch(s.t, keys, have)
}

func (s *stage) files(n int, keys ...string) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprintf("d%d/f%d", i%3, i))
		s.file(names[i], keys...)
	}
	return names
}

// Adding keeps what is there, the new key comes first, and a second run completes
// what has appeared since without moving it to the front again.
func TestAdd(t *testing.T) {
	s := newStage(t, oldKey)
	names := s.files(10, oldKey)
	r, err := s.run(Options{Action: Add})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 10, r.Changed)
	require.Empty(t, r.Retired)
	require.Equal(t, map[string]int{oldKey: 10, newKey: 10}, r.Now.Headers)
	for _, n := range names {
		s.under(s.read(n), oldKey, newKey)
	}
	require.Equal(t, []string{newKey, oldKey}, s.open().Settings().Keys)
	s.under(s.open().Header(), oldKey, newKey)

	s.file("later", newKey)
	r, err = s.run(Options{Action: Add, Key: oldKey})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 1, r.Changed)
	s.under(s.read("later"), oldKey, newKey)
	require.Equal(t, []string{newKey, oldKey}, s.open().Settings().Keys, "completing is not a change of the first key")
}

// The first source may be out of order; another copy serves as well.
func TestAddFromAnotherCopy(t *testing.T) {
	s := newStage(t, oldKey, otherKey)
	s.file("a", oldKey, otherKey)
	h := s.read("a")
	h.Copies[0].Blob = []byte("no longer a ticket")
	raw, err := h.Marshal()
	require.NoError(t, err)
	s.raw("a", raw)
	r, err := s.run(Options{Action: Add, Trusted: []string{oldKey, otherKey}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.NoError(t, s.vault.unwrap(s.read("a"), newKey))
}

func TestAddNeedsATrustedSource(t *testing.T) {
	s := newStage(t, oldKey)
	id := s.file("a", otherKey)
	r, err := s.run(Options{Action: Add})
	require.NoError(t, err)
	require.Equal(t, 1, r.Strange)
	require.ErrorIs(t, r.Problems[0].Err, ErrUntrusted)
	require.Zero(t, s.vault.calls[id])
}

// A header holds eight copies; a ninth is refused and nothing is lost.
func TestAddBeyondEight(t *testing.T) {
	s := newStage(t, oldKey)
	keys := []string{oldKey}
	for i := range crypt.MaxCopies - 1 {
		keys = append(keys, fmt.Sprint("local:k", i))
	}
	id := s.file("a", keys...)
	before := s.bytes("a")
	r, err := s.run(Options{Action: Add})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.Equal(t, 1, r.Failed)
	require.Zero(t, s.vault.calls[id])
	require.Equal(t, before, s.bytes("a"))
}

// A copy goes only after another was proven, and never the last one.
func TestRemove(t *testing.T) {
	s := newStage(t, oldKey, newKey)
	names := s.files(8, oldKey, newKey)
	s.file("new", newKey)
	r, err := s.run(Options{Action: Remove, Key: oldKey})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, []string{oldKey}, r.Retired)
	require.Equal(t, 8, r.Changed)
	require.Empty(t, s.vault.calls, "nothing is rewrapped")
	for _, n := range names {
		s.under(s.read(n), newKey)
		require.Equal(t, 1, s.vault.tests[s.read(n).File])
	}
	s.closed()
	require.Zero(t, r.Remaining)
}

func TestRemoveNeverTheLastCopy(t *testing.T) {
	s := newStage(t, oldKey, newKey)
	s.file("both", oldKey, newKey)
	s.file("last", oldKey)
	s.file("stranger", oldKey, otherKey)
	r, err := s.run(Options{Action: Remove, Key: oldKey, Trusted: []string{oldKey, newKey}})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.Equal(t, 2, r.Failed)
	require.Equal(t, 2, r.Remaining)
	for _, p := range r.Problems {
		require.ErrorIs(t, p.Err, ErrLastCopy, p.Path)
	}
	s.under(s.read("both"), newKey)
	s.under(s.read("last"), oldKey)
	s.under(s.read("stranger"), oldKey, otherKey)
	require.Equal(t, []string{newKey, oldKey}, s.open().Settings().Keys, "the key stays while headers need it")

	_, err = s.run(Options{Action: Remove, Key: newKey, Trusted: []string{newKey}})
	require.ErrorIs(t, err, ErrUntrusted, "the other key of the volume is not trusted by this client")
	alone := newStage(t, oldKey)
	_, err = alone.run(Options{Action: Remove, Key: oldKey})
	require.ErrorIs(t, err, ErrLastCopy)
}

// A copy that does not open proves nothing: the other stays.
func TestRemoveNeedsProof(t *testing.T) {
	s := newStage(t, oldKey, newKey)
	s.file("good", oldKey, newKey)
	s.file("bad", oldKey, newKey)
	h := s.read("bad")
	i := slices.IndexFunc(h.Copies, func(c crypt.Copy) bool { return c.Key == newKey })
	h.Copies[i].Blob = s.read("good").Find(newKey).Blob // opens, to another file's data key
	raw, err := h.Marshal()
	require.NoError(t, err)
	s.raw("bad", raw)
	r, err := s.run(Options{Action: Remove, Key: oldKey})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.Equal(t, 1, r.Failed)
	s.under(s.read("good"), newKey)
	require.NoError(t, s.vault.unwrap(s.read("bad"), oldKey))
	require.Contains(t, s.open().Settings().Keys, oldKey)
}

// A key may be taken out of headers that the volume does not list any more.
func TestRemoveLeftovers(t *testing.T) {
	s := newStage(t, newKey)
	s.file("a", oldKey, newKey)
	r, err := s.run(Options{Action: Remove, Key: oldKey})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("a")
	s.closed()
}

// Refresh wraps each copy anew and touches no other.
func TestRefresh(t *testing.T) {
	s := newStage(t, oldKey, otherKey)
	id := s.file("a", oldKey, otherKey)
	s.file("b", otherKey)
	before, volumeBefore := s.read("a"), s.open().Header()
	r, err := s.run(Options{Action: Refresh, Key: oldKey, Trusted: []string{oldKey, otherKey}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 1, r.Passes)
	require.Equal(t, 1, s.vault.calls[id])
	after := s.read("a")
	s.under(after, oldKey, otherKey)
	require.NotEqual(t, before.Find(oldKey).Blob, after.Find(oldKey).Blob)
	require.Equal(t, before.Find(otherKey).Blob, after.Find(otherKey).Blob)
	require.NotEqual(t, volumeBefore.Find(oldKey).Blob, s.open().Header().Find(oldKey).Blob)
	require.Equal(t, []string{oldKey, otherKey}, s.open().Settings().Keys)

	_, err = s.run(Options{Action: Refresh})
	require.ErrorIs(t, err, ErrAmbiguous)
	_, err = s.run(Options{Action: Refresh, Key: newKey})
	require.ErrorIs(t, err, ErrNotListed)
	_, err = s.run(Options{Action: Refresh, Key: otherKey, Trusted: []string{oldKey}})
	require.ErrorIs(t, err, ErrUntrusted)
	only := newStage(t, oldKey)
	only.file("a", oldKey)
	r, err = only.run(Options{Action: Refresh})
	require.NoError(t, err)
	require.Equal(t, 1, r.Changed)
}

// Verify opens every copy under the new key, also of files that were moved before;
// one that does not open keeps its header as it was.
func TestVerify(t *testing.T) {
	s := newStage(t, oldKey)
	moved := s.file("moved", oldKey)
	done := s.file("done", newKey)
	s.file("lying", newKey)
	h := s.read("lying")
	h.Copies[0].Blob = []byte("no ticket")
	raw, err := h.Marshal()
	require.NoError(t, err)
	s.raw("lying", raw)
	r, err := s.run(Options{Verify: true})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.Equal(t, 1, r.Failed)
	require.Equal(t, "lying", r.Problems[0].Path)
	require.NotZero(t, s.vault.tests[moved])
	require.NotZero(t, s.vault.tests[done])
	s.moved("moved")
	require.Equal(t, 5, r.Plan.Calls, "a rewrap and a verification, two verifications, and the volume key")
}

// What does not verify is not written.
func TestVerifyBeforeWriting(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	calls := 0
	s.vault.fail = func(h *crypt.Header) error {
		if h.Use == crypt.UseFile && h.Copies[0].Key == newKey {
			calls++
			return crypt.ErrDamaged
		}
		return nil
	}
	before := s.bytes("a")
	r, err := s.run(Options{Verify: true})
	require.NoError(t, err)
	require.Equal(t, 1, r.Failed)
	require.NotZero(t, calls)
	require.Equal(t, before, s.bytes("a"))
	s.stillBoth()
}

// Workers share a tree without touching each other's files; before them the volume
// is prepared, after them a run closes.
func TestShards(t *testing.T) {
	s := newStage(t, oldKey)
	names := s.files(200, oldKey)
	_, err := s.run(Options{Shard: Shard{1, 4}})
	require.ErrorIs(t, err, ErrNotPrepared)
	r, err := s.run(Options{Prepare: true})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Zero(t, r.Changed)
	s.stillBoth()

	sum := 0
	for i := range 4 {
		r, err := s.run(Options{Shard: Shard{i + 1, 4}})
		require.NoError(t, err)
		require.True(t, r.Done)
		require.Greater(t, r.Changed, 20, "the parts are about equal")
		require.Equal(t, r.Plan.Change, r.Changed)
		require.Empty(t, r.Retired)
		sum += r.Changed
	}
	require.Equal(t, 200, sum)
	s.stillBoth()
	r, err = s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Zero(t, r.Changed)
	for _, n := range names {
		s.moved(n)
	}
	s.closed()
}

func TestParseShard(t *testing.T) {
	for _, bad := range []string{"", "1", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/4/2", "1/99999999"} {
		_, err := ParseShard(bad)
		require.Error(t, err, bad)
	}
	sh, err := ParseShard("3/4")
	require.NoError(t, err)
	require.Equal(t, "3/4", sh.String())
	for ino := range uint64(1000) {
		in := 0
		for i := range 7 {
			if (Shard{i + 1, 7}).has(ino) {
				in++
			}
		}
		require.Equal(t, 1, in, "every inode is in one part")
	}
	// Other versions count on the same parts.
	require.True(t, Shard{1, 4}.has(12) == (mix(12)%4 == 0))
	require.Equal(t, uint64(0x910a2dec89025cc1), mix(1), "the first number of splitmix64 from seed 1")
}

// mix is the published finalizer, written out once more.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb
	return x ^ (x >> 31)
}

// A script is a Watch whose answers a test writes.
type script struct {
	mounted bool
	moved   func() ([]Spot, error)
}

func watchOf(w Watch) func(context.Context) (Watch, error) {
	return func(context.Context) (Watch, error) { return w, nil }
}

// spot is what a mount tells of a thing that it has just moved to a name.
func (s *stage) spot(name string) Spot {
	s.t.Helper()
	var st unix.Stat_t
	require.NoError(s.t, unix.Lstat(filepath.Join(s.dir, name), &st))
	return Spot{name, st.Ino}
}

// rename moves a thing and tells of it as a mount does.
func (s *stage) rename(from, to string) Spot {
	s.t.Helper()
	if !filepath.IsAbs(from) {
		from = filepath.Join(s.dir, from)
	}
	require.NoError(s.t, os.Rename(from, filepath.Join(s.dir, to)))
	return s.spot(to)
}

func (s script) Mounted() bool                         { return s.mounted }
func (s script) Moved(context.Context) ([]Spot, error) { return s.moved() }
func (s script) Close()                                {}

// While a mount renames and deletes files all the time, the run ends well: what it
// moved is looked at where it went, what vanished is not waited for.
func TestBusyMountEnds(t *testing.T) {
	s := newStage(t, oldKey)
	for i := range 30 {
		s.file(fmt.Sprint("f", i), newKey)
	}
	s.file("z/old", oldKey)
	name, n := "z/old", 0
	var noted []Spot
	tree := &restless{tree: s.open(), during: func(int) {
		n++
		next := fmt.Sprint("moved", n)
		noted = append(noted, s.rename(name, next))
		require.NoError(t, os.Remove(filepath.Join(s.dir, fmt.Sprint("f", n))))
		name = next
	}}
	w := script{mounted: true, moved: func() ([]Spot, error) {
		defer func() { noted = nil }()
		return noted, nil
	}}
	r, err := run(context.Background(), tree, s.vault, Options{Key: newKey, Trusted: []string{oldKey}, Watch: func(context.Context) (Watch, error) { return w, nil }})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.LessOrEqual(t, r.Passes, 2)
	s.moved(name)
	s.closed()
}

// A directory that moves past the walk is swept where it went, again if it moved on.
func TestMovedDirectoryIsSwept(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("first", newKey)
	outside := filepath.Join(filepath.Dir(s.dir), "aside")
	s.file("dir/sub/hidden", oldKey)
	require.NoError(t, os.Rename(filepath.Join(s.dir, "dir"), outside)) // unseen by the walk
	steps := []func() []Spot{
		func() []Spot { // the walk has ended
			first := s.rename(outside, "one")
			s.rename("one", "two") // is not noted yet
			return []Spot{first}
		},
		func() []Spot { return []Spot{s.spot("two")} },
	}
	w := script{mounted: true, moved: func() ([]Spot, error) {
		if len(steps) == 0 {
			return nil, nil
		}
		next := steps[0]
		steps = steps[1:]
		return next(), nil
	}}
	r, err := s.run(Options{Watch: func(context.Context) (Watch, error) { return w, nil }})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("two/sub/hidden")
	s.closed()
}

// A mount that came or went during a pass, or was not heard, makes it count for
// nothing.
func TestUnheardPassDoesNotCount(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	passes := 0
	r, err := s.run(Options{Watch: func(context.Context) (Watch, error) {
		passes++
		pass := passes
		return script{moved: func() ([]Spot, error) {
			if pass < 4 {
				return nil, errors.New("a mount came")
			}
			return nil, nil
		}}, nil
	}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 4, r.Passes)
	s.closed()

	deaf := errors.New("on another host")
	_, err = s.run(Options{Key: oldKey, Watch: func(context.Context) (Watch, error) { return nil, deaf }})
	require.ErrorIs(t, err, deaf)
}

// A crash at every step of adding and removing: the next run finishes, and every
// header opens under a listed key in between.
func TestCrashWhileAddingAndRemoving(t *testing.T) {
	points := []string{"file-rewrapped"}
	for _, step := range []string{"prepare", "sweep", "sync", "close"} {
		points = append(points, "before-"+step, "after-"+step)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			s := newStage(t, oldKey)
			names := s.files(6, oldKey)
			for _, o := range []Options{{Action: Add}, {Action: Remove, Key: oldKey}} {
				o.Jobs = 1
				nth := 0
				o.fault = func(p string) error {
					if p == point {
						if nth++; nth == 3 || p != "file-rewrapped" {
							return crash{p}
						}
					}
					return nil
				}
				_, err := s.run(o)
				require.True(t, err == nil || crashed(err), err)
				listed := s.open().Settings().Keys
				for _, n := range names {
					h := s.read(n)
					require.True(t, slices.ContainsFunc(listed, func(k string) bool { return s.vault.unwrap(h, k) == nil }), n)
				}
				o.fault = nil
				r, err := s.run(o)
				require.NoError(t, err)
				require.True(t, r.Done)
			}
			for _, n := range names {
				s.moved(n)
			}
			s.closed()
		})
	}
}

// When the header grows, whether it fits is tried on the first file of a kind only.
func TestGrowingHeaders(t *testing.T) {
	s := newStage(t, oldKey)
	names := s.files(30, oldKey)
	path := filepath.Join(s.dir, names[3])
	require.NoError(t, unix.Setxattr(path, "user.big", make([]byte, 3600), 0))
	full := unix.Setxattr(path, "user.more", make([]byte, 200), 0) != nil // ext4: 4 KiB for all
	r, err := s.run(Options{Action: Add, Jobs: 1})
	require.NoError(t, err)
	if full {
		require.Equal(t, 1, r.Failed)
		require.Zero(t, s.vault.calls[s.read(names[3]).File], "refused before the call")
		require.Equal(t, 29, r.Changed)
	} else {
		require.Equal(t, 30, r.Changed)
	}
}

// Made-up labels cost no memory without bound.
func TestCensusIsBounded(t *testing.T) {
	var c Census
	for i := range 3 * maxLabels {
		c.add(&crypt.Header{Copies: []crypt.Copy{{Key: fmt.Sprint("local:", i)}}})
	}
	require.LessOrEqual(t, len(c.Headers), maxLabels+1)
	require.Equal(t, 2*maxLabels, c.Headers[otherLabels])

	var l linksSeen
	for ino := range uint64(5 * maxLinks) {
		require.False(t, l.again(&unix.Stat_t{Ino: ino, Nlink: 2}))
		require.True(t, l.again(&unix.Stat_t{Ino: ino, Nlink: 2}))
	}
	require.LessOrEqual(t, len(l.young)+len(l.aged), 2*maxLinks)
}

func TestSurvey(t *testing.T) {
	s := newStage(t, oldKey)
	s.files(5, oldKey)
	s.file("both", oldKey, newKey)
	s.raw("none", nil)
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, "empty"), nil, 0o644))
	require.NoError(t, os.Link(filepath.Join(s.dir, "both"), filepath.Join(s.dir, "link")))
	c, problems, err := Survey(context.Background(), s.open(), 3, nil)
	require.NoError(t, err)
	require.Equal(t, Census{Files: 7, Empty: 1, Bad: 1, Headers: map[string]int{oldKey: 6, newKey: 1}}, c)
	require.Len(t, problems, 1)
	require.Equal(t, "none", problems[0].Path)
	require.ErrorIs(t, problems[0].Err, crypt.ErrNoHeader)
}

// While the key service is asked, nobody is kept from the header.
func TestNoCallUnderTheHeaderLock(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	asked := 0
	s.vault.fail = func(h *crypt.Header) error {
		if h.Use != crypt.UseFile {
			return nil
		}
		asked++
		fd, err := unix.Open(filepath.Join(s.dir, "a"), unix.O_RDWR, 0)
		require.NoError(t, err)
		defer unix.Close(fd)
		raw := s.bytes("a")
		return volume.ReplaceHeader(fd, raw, raw) // ErrHeaderBusy if somebody had the lock
	}
	r, err := s.run(Options{Verify: true})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 2, asked, "the rewrap and the verification")
	s.moved("a")
}
