package rekey

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/keys/kmstest"
	"kmsfs/volume"
)

// sharedStage is a volume whose files share intermediate keys, wrapped by a real KMS
// protocol.
type sharedStage struct {
	*stage
	srv      *kmstest.Server
	provider keys.Provider
	first    string
	inters   int
}

const filesPerKey = 20

// newSharedStage makes a volume with inters intermediate keys of filesPerKey files each.
func newSharedStage(t *testing.T, inters int) *sharedStage {
	t.Helper()
	srv := kmstest.New(t, nil)
	aws, err := keys.NewAWS(keys.AWSOptions{Endpoint: srv.URL(), Credentials: srv.Admin().Credentials()})
	require.NoError(t, err)
	s := &sharedStage{stage: newStage(t, oldKey), srv: srv, provider: aws, first: srv.CreateKey("us-east-1"), inters: inters}
	s.dir = filepath.Join(t.TempDir(), "vol")
	for i := range inters {
		ring := s.ring(s.first)
		if i == 0 {
			s.create(ring)
		}
		for n := range filesPerKey {
			f, err := ring.NewKey(context.Background(), crypt.UseFile)
			require.NoError(t, err)
			raw, err := f.Header.Marshal()
			require.NoError(t, err)
			f.Secrets.Wipe()
			s.raw(name(i, n), raw)
		}
		ring.Close() // the next one makes another intermediate key
	}
	srv.Reset()
	return s
}

// name puts files of one intermediate key all over the tree.
func name(inter, n int) string { return fmt.Sprintf("d%d/f%d-%d", n%3, n, inter) }

func (s *sharedStage) ring(key string) *keys.Ring {
	return keys.NewRing(keys.RingOptions{Volume: s.id, Shared: true, Trusted: []string{key}, Provider: s.provider, PoolSize: -1})
}

func (s *sharedStage) create(ring *keys.Ring) {
	fresh, err := ring.NewKey(context.Background(), crypt.UseVolume)
	require.NoError(s.t, err)
	defer fresh.Secrets.Wipe()
	raw, err := fresh.Header.Marshal()
	require.NoError(s.t, err)
	require.NoError(s.t, volume.Create(s.dir, volume.Settings{
		Format: volume.Format, ID: s.id, BlockSize: crypt.DefaultBlockSize, Names: volume.NamesPlain, Shared: true, Keys: []string{s.first}, Header: raw,
	}, fresh.Secrets))
}

// rekey runs with a rewrapper of its own, as a process does.
func (s *sharedStage) rekey(o Options) Report {
	s.t.Helper()
	w := keys.NewRewrapper(s.provider, s.id)
	defer w.Close()
	o.Trusted = append(o.Trusted, s.first)
	s.srv.Reset()
	r, err := Run(context.Background(), s.open(), realKeys{w}, o)
	require.NoError(s.t, err)
	if !o.DryRun {
		require.True(s.t, r.Done, "%v", r.Problems)
	}
	require.Equal(s.t, s.srv.Count(), r.Calls, "what is reported is what was sent")
	return r
}

// opens checks every file under a key alone.
func (s *sharedStage) opens(key string, copies int) {
	s.t.Helper()
	ring := s.ring(key)
	defer ring.Close()
	for i := range s.inters {
		for n := range filesPerKey {
			h := s.read(name(i, n))
			require.Len(s.t, h.Copies, copies)
			secrets, err := ring.Open(context.Background(), h)
			require.NoError(s.t, err)
			secrets.Wipe()
		}
	}
}

// TestSharedRoutes: each way of a rekey asks once for an intermediate key, as the plan
// says, whatever number of files is under it.
func TestSharedRoutes(t *testing.T) {
	s := newSharedStage(t, 3)
	files := 3 * filesPerKey
	second, abroad := s.srv.CreateKey("us-east-1"), s.srv.CreateKey("eu-west-1")
	for _, c := range []struct {
		name          string
		o             Options
		perKey, extra int // requests: for each intermediate key, and for the volume key
		ops           string
		key           string
		copies        int
	}{
		{"move", Options{Key: second}, 1, 1, "ReEncrypt", second, 1},
		{"refresh", Options{Action: Refresh, Key: second, Trusted: []string{second}}, 1, 1, "ReEncrypt", second, 1},
		{"add abroad", Options{Action: Add, Key: abroad, Trusted: []string{second}}, 2, 2, "Encrypt", abroad, 2},
		{"remove", Options{Action: Remove, Key: second, Trusted: []string{abroad}}, 1, 1, "Decrypt", abroad, 1},
		{"move and verify", Options{Key: s.first, Trusted: []string{abroad}, Verify: true}, 3, 3, "Decrypt", s.first, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			dry := c.o
			dry.DryRun = true
			plan := s.rekey(dry).Plan
			require.Zero(t, s.srv.Count())
			require.Equal(t, files, plan.Change)
			require.Equal(t, []int{files, 3}, []int{plan.Routes[0].Files, plan.Routes[0].Keys})
			r := s.rekey(c.o)
			require.Equal(t, files, r.Changed)
			require.Equal(t, 3*c.perKey+c.extra, r.Calls)
			require.InDelta(t, plan.Calls, r.Calls, 1, "the volume key may be proven besides")
			require.NotZero(t, s.srv.Count(c.ops))
			s.opens(c.key, c.copies)
		})
	}
}

// TestSharedParts: each worker asks for itself.
func TestSharedParts(t *testing.T) {
	s := newSharedStage(t, 2)
	second := s.srv.CreateKey("us-east-1")
	s.rekey(Options{Key: second, Prepare: true})
	for i := 1; i <= 2; i++ {
		require.LessOrEqual(t, s.rekey(Options{Key: second, Shard: Shard{i, 2}}).Calls, 2)
	}
	require.Zero(t, s.rekey(Options{Key: second}).Changed)
	s.opens(second, 1)
}

// TestSharedResume: a run that was killed half-way is finished by another, which may
// give an intermediate key a second blob, and no file is worse for it.
func TestSharedResume(t *testing.T) {
	s := newSharedStage(t, 1)
	second := s.srv.CreateKey("us-east-1")
	seen := 0
	w := keys.NewRewrapper(s.provider, s.id)
	defer w.Close()
	_, err := Run(context.Background(), s.open(), realKeys{w}, Options{Key: second, Trusted: []string{s.first}, Jobs: 1, fault: func(point string) error {
		if point == "file-rewrapped" {
			if seen++; seen > filesPerKey/2 {
				return crash{point}
			}
		}
		return nil
	}})
	require.Error(t, err)
	require.LessOrEqual(t, s.rekey(Options{Key: second}).Calls, 2)
	s.opens(second, 1)
}

// TestSharedHeaderThatIsPlanted: a header with the blob of another intermediate key, or
// an id of another, is not laundered by what the run remembers: it fails, alone.
func TestSharedHeaderThatIsPlanted(t *testing.T) {
	s := newSharedStage(t, 2)
	second := s.srv.CreateKey("us-east-1")
	blob, id := s.read(name(0, 5)), s.read(name(0, 6))
	blob.Copies = s.read(name(1, 5)).Copies
	id.File = s.read(name(1, 6)).File
	for at, h := range map[string]*crypt.Header{name(0, 5): blob, name(0, 6): id} {
		raw, err := h.Marshal()
		require.NoError(t, err)
		s.raw(at, raw)
	}
	w := keys.NewRewrapper(s.provider, s.id)
	defer w.Close()
	r, err := Run(context.Background(), s.open(), realKeys{w}, Options{Key: second, Trusted: []string{s.first}})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.Equal(t, 2, r.Failed)
	for _, p := range r.Problems {
		require.ErrorIs(t, p.Err, crypt.ErrDamaged)
	}
	require.Equal(t, 2*filesPerKey-2, r.Changed)
}

// TestDistinctIsNeverTooLow: beyond what is remembered each header counts.
func TestDistinctIsNeverTooLow(t *testing.T) {
	s := newStage(t, oldKey)
	d := newDistinct()
	h, secrets := s.header(crypt.UseFile, oldKey)
	secrets.Wipe()
	h.Shared = true
	for range 3 {
		d.add("k", h, oldKey)
	}
	require.Equal(t, 1, d.n["k"])
	h.Shared = false
	d.add("k", h, oldKey)
	d.add("k", h, oldKey)
	require.Equal(t, 3, d.n["k"], "what is each file's own")
	h.Shared = true
	for i := range maxDistinct + 10 {
		h.Copies[0].Blob = fmt.Append(nil, i)
		d.add("many", h, oldKey)
	}
	require.Equal(t, maxDistinct+10, d.n["many"])
	require.LessOrEqual(t, len(d.seen), maxDistinct)
}
