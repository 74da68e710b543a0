package rekey

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

const (
	oldKey   = "arn:aws:kms:us-east-1:111122223333:key/11111111-1111-4111-8111-111111111111"
	newKey   = "arn:aws:kms:us-east-1:444455556666:key/22222222-2222-4222-8222-222222222222"
	otherKey = "local:other"
)

// A vault is a Rewrapper and the key service behind it: blobs are tickets.
type vault struct {
	mu    sync.Mutex
	keys  map[string]*crypt.Key // by ticket
	under map[string]string     // ticket -> KMS key
	calls map[crypt.FileID]int  // rewraps
	tests map[crypt.FileID]int  // verifies and proofs
	asked map[string]int        // by the name of the source that was called
	bill  int                   // all of these but verifies and proofs under local keys
	fail  func(h *crypt.Header) error
	size  int // length of a ticket under newKey; 0 = as the others
}

func newVault() *vault {
	return &vault{keys: map[string]*crypt.Key{}, under: map[string]string{}, calls: map[crypt.FileID]int{}, tests: map[crypt.FileID]int{}, asked: map[string]int{}}
}

func (v *vault) wrap(kms string, k *crypt.Key) crypt.Copy {
	size := 184
	if kms == newKey && v.size > 0 {
		size = v.size
	}
	blob := make([]byte, size)
	_, _ = rand.Read(blob)
	v.keys[string(blob)], v.under[string(blob)] = k, kms
	return crypt.Copy{Key: kms, Blob: blob}
}

// unwrap opens the header's copy under kms and checks the commitment.
func (v *vault) unwrap(h *crypt.Header, kms string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := exact(h, kms)
	if c == nil {
		return fmt.Errorf("no copy under %s", kms)
	}
	if v.under[string(c.Blob)] != kms {
		return fmt.Errorf("the blob is not under %s", kms)
	}
	s, err := crypt.Unlock(h.Identity, v.keys[string(c.Blob)])
	if err == nil {
		s.Wipe()
	}
	return err
}

func (v *vault) Route(from, to string) (Route, error) {
	return Route{Name: "ReEncrypt", Calls: 1}, nil
}

func (v *vault) Rewrap(_ context.Context, h *crypt.Header, from, to string) (crypt.Copy, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls[h.File]++
	v.asked[from]++
	v.bill++
	if v.fail != nil {
		if err := v.fail(h); err != nil {
			return crypt.Copy{}, err
		}
	}
	c := h.Find(from)
	if c == nil || v.under[string(c.Blob)] != from {
		return crypt.Copy{}, crypt.ErrDamaged
	}
	return v.wrap(to, v.keys[string(c.Blob)]), nil
}

// A stage is a volume on disk with files under known keys.
type stage struct {
	t     testing.TB
	dir   string
	vault *vault
	id    crypt.VolumeID
}

func newStage(t testing.TB, keys ...string) *stage {
	t.Helper()
	s := &stage{t: t, dir: filepath.Join(t.TempDir(), "vol"), vault: newVault()}
	_, err := rand.Read(s.id[:])
	require.NoError(t, err)
	h, secrets := s.header(crypt.UseVolume, keys...)
	raw, err := h.Marshal()
	require.NoError(t, err)
	require.NoError(t, volume.Create(s.dir, volume.Settings{
		Format: volume.Format, ID: s.id, BlockSize: crypt.DefaultBlockSize, Names: volume.NamesPlain, Keys: keys, Header: raw,
	}, secrets))
	secrets.Wipe()
	return s
}

// Verify implements Rewrapper.
func (v *vault) Verify(_ context.Context, h *crypt.Header, key string) error {
	v.note(h, key)
	if v.fail != nil {
		if err := v.fail(h); err != nil {
			return err
		}
	}
	return v.unwrap(h, key)
}

// Prove implements Rewrapper.
func (v *vault) Prove(ctx context.Context, h *crypt.Header, key string) error {
	return v.Verify(ctx, h, key)
}

// Calls implements Rewrapper.
func (v *vault) Calls() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.bill
}

func (v *vault) note(h *crypt.Header, key string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tests[h.File]++
	v.asked[key]++
	v.bill += billed(key)
}

func (s *stage) header(use crypt.Use, keys ...string) (*crypt.Header, *crypt.Secrets) {
	s.t.Helper()
	id, err := crypt.NewIdentity(s.id, use, 12)
	require.NoError(s.t, err)
	k, err := crypt.RandomKey()
	require.NoError(s.t, err)
	secrets, err := crypt.Commit(&id, k)
	require.NoError(s.t, err)
	h := &crypt.Header{Identity: id}
	for _, kms := range keys {
		h.Copies = append(h.Copies, s.vault.wrap(kms, k))
	}
	return h, secrets
}

// file makes a file with contents and a header with copies under keys.
func (s *stage) file(name string, keys ...string) crypt.FileID {
	s.t.Helper()
	h, secrets := s.header(crypt.UseFile, keys...)
	secrets.Wipe()
	raw, err := h.Marshal()
	require.NoError(s.t, err)
	s.raw(name, raw)
	return h.File
}

func (s *stage) raw(name string, header []byte) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	require.NoError(s.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(s.t, os.WriteFile(path, []byte("sealed records"), 0o644))
	if header != nil {
		require.NoError(s.t, unix.Setxattr(path, crypt.HeaderXattr, header, 0))
	}
}

func (s *stage) read(name string) *crypt.Header {
	s.t.Helper()
	h, err := crypt.ParseHeader(s.bytes(name))
	require.NoError(s.t, err)
	return h
}

func (s *stage) bytes(name string) []byte {
	s.t.Helper()
	buf := make([]byte, crypt.MaxHeader)
	n, err := unix.Getxattr(filepath.Join(s.dir, name), crypt.HeaderXattr, buf)
	require.NoError(s.t, err)
	return buf[:n]
}

func (s *stage) open() *volume.Volume {
	s.t.Helper()
	v, err := volume.Open(s.dir)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { v.Close() })
	return v
}

func (s *stage) run(o Options) (Report, error) {
	s.t.Helper()
	if o.Key == "" && o.Action != Refresh {
		o.Key = newKey
	}
	if o.Trusted == nil {
		o.Trusted = []string{oldKey, newKey}
	}
	return run(context.Background(), s.open(), s.vault, o)
}

// moved checks that a file and the volume key are under newKey alone and open.
func (s *stage) moved(name string) {
	s.t.Helper()
	h := s.read(name)
	require.Len(s.t, h.Copies, 1, name)
	require.NoError(s.t, s.vault.unwrap(h, newKey), name)
}

func (s *stage) closed() {
	s.t.Helper()
	v := s.open()
	require.Equal(s.t, []string{newKey}, v.Settings().Keys)
	require.Len(s.t, v.Header().Copies, 1)
	require.NoError(s.t, s.vault.unwrap(v.Header(), newKey))
}

func (s *stage) stillBoth() {
	s.t.Helper()
	v := s.open()
	require.Equal(s.t, []string{newKey, oldKey}, v.Settings().Keys)
	require.NoError(s.t, s.vault.unwrap(v.Header(), newKey))
	require.NoError(s.t, s.vault.unwrap(v.Header(), oldKey))
}

func TestMovesATree(t *testing.T) {
	s := newStage(t, oldKey)
	var names []string
	for i := range 50 {
		names = append(names, fmt.Sprintf("d%d/e/f%d", i%7, i))
		s.file(names[i], oldKey)
	}
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, "empty"), nil, 0o644))
	var pinned [][]string
	var order []string
	r, err := s.run(Options{
		Pin:    func(keys []string) error { pinned = append(pinned, keys); return nil },
		Reload: func(context.Context, []string) error { order = append(order, "reload"); return nil },
		Event: func(e Event) {
			if e.Kind == "step" {
				order = append(order, e.Step)
			}
		},
	})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, []string{oldKey}, r.Retired)
	require.Equal(t, 50, r.Changed)
	require.Equal(t, 51, r.Calls, "one call a file and one for the volume key")
	require.Equal(t, 2, r.Passes, "the last pass finds nothing")
	require.Equal(t, [][]string{{newKey, oldKey}, {newKey}}, pinned)
	require.Equal(t, []string{"prepare", "pin", "reload", "reload", "sweep", "reload", "sync", "close", "pin", "reload", "reload"}, order)
	for _, n := range names {
		s.moved(n)
	}
	s.closed()
}

func TestSecondRunHasNothingToDo(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	_, err := s.run(Options{})
	require.NoError(t, err)
	before := s.bytes("a")
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Zero(t, r.Calls)
	require.Zero(t, r.Changed)
	require.Equal(t, 1, r.Already)
	require.Equal(t, before, s.bytes("a"))
}

// A crash at every named point, and at every file: the next run finishes, and in
// between every file opens under a key that kmsfs.toml lists.
func TestCrashAnywhereThenRunAgain(t *testing.T) {
	points := []string{"file-rewrapped"}
	for _, step := range []string{"prepare", "pin", "reload", "sweep", "sync", "close"} {
		points = append(points, "before-"+step, "after-"+step)
	}
	for _, point := range points {
		for nth := 1; nth <= 6; nth++ {
			t.Run(fmt.Sprintf("%s/%d", point, nth), func(t *testing.T) {
				s := newStage(t, oldKey)
				names := []string{"a", "b", "d/c", "d/e", "f"}
				for _, n := range names {
					s.file(n, oldKey)
				}
				hit, seen := false, 0
				o := Options{Jobs: 1, Pin: func([]string) error { return nil }, Reload: func(context.Context, []string) error { return nil }}
				o.fault = func(p string) error {
					if p == point {
						if seen++; seen == nth {
							hit = true
							return crash{p}
						}
					}
					return nil
				}
				_, err := s.run(o)
				if !hit {
					t.Skip("the point is passed less often")
				}
				require.True(t, crashed(err))
				listed := s.open().Settings().Keys
				for _, n := range names {
					h := s.read(n)
					require.Len(t, h.Copies, 1)
					require.Contains(t, listed, h.Copies[0].Key)
					require.NoError(t, s.vault.unwrap(h, h.Copies[0].Key))
				}
				o.fault = nil
				r, err := s.run(o)
				require.NoError(t, err)
				require.True(t, r.Done)
				for _, n := range names {
					s.moved(n)
				}
				s.closed()
			})
		}
	}
}

func TestBadFilesNeverStopIt(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("good", oldKey)
	s.raw("noheader", nil)
	good := s.bytes("good")
	flipped := slices.Clone(good)
	flipped[30] ^= 1
	s.raw("damaged", flipped)
	s.raw("short", good[:40])
	foreign := newStage(t, oldKey)
	foreign.vault = s.vault
	foreignID := foreign.file("f", oldKey)
	s.raw("foreign", foreign.bytes("f"))
	untrusted := s.file("untrusted", otherKey)

	r, err := s.run(Options{})
	require.NoError(t, err)
	require.Equal(t, 4, r.Bad)
	require.Equal(t, 4, r.Plan.Bad)
	require.Equal(t, 1, r.Strange)
	require.Equal(t, 1, r.Plan.Strange)
	require.Zero(t, r.Failed)
	require.Equal(t, 1, r.Changed)
	s.moved("good")
	require.Zero(t, s.vault.calls[foreignID], "a foreign header must cost no call")
	require.Zero(t, s.vault.calls[untrusted], "an untrusted source must cost no call")
	why := map[string]error{}
	for _, p := range r.Problems {
		why[p.Path] = p.Err
	}
	require.ErrorIs(t, why["noheader"], crypt.ErrNoHeader)
	require.ErrorIs(t, why["damaged"], crypt.ErrDamaged)
	require.ErrorIs(t, why["short"], crypt.ErrDamaged)
	require.ErrorIs(t, why["foreign"], crypt.ErrForeign)
	require.ErrorIs(t, why["untrusted"], ErrUntrusted)
	require.True(t, r.Done, "none of these is under the old key")
	s.closed()
	require.Equal(t, flipped, s.bytes("damaged"))
}

// A file that could not be moved keeps the old key in kmsfs.toml.
func TestFailedFileKeepsTheOldKey(t *testing.T) {
	s := newStage(t, oldKey)
	bad := s.file("bad", oldKey)
	s.file("good", oldKey)
	s.vault.fail = func(h *crypt.Header) error {
		if h.File == bad {
			return crypt.ErrKeyUnavailable
		}
		return nil
	}
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.Equal(t, 1, r.Failed)
	require.Empty(t, r.Retired)
	require.ErrorIs(t, r.Problems[0].Err, crypt.ErrKeyUnavailable)
	s.moved("good")
	s.stillBoth()

	s.vault.fail = nil
	r, err = s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("bad")
	s.closed()
}

// A key that goes away in mid-run ends it, with the service's own reason.
func TestGivesUpWhenTheServiceRefusesEverything(t *testing.T) {
	s := newStage(t, oldKey)
	for i := range 3 * giveUp {
		s.file(fmt.Sprint("f", i), oldKey)
	}
	s.vault.fail = func(h *crypt.Header) error {
		if h.Use == crypt.UseFile {
			return crypt.ErrKeyDisabled
		}
		return nil
	}
	r, err := s.run(Options{Jobs: 4})
	require.ErrorIs(t, err, ErrGaveUp)
	require.ErrorIs(t, err, crypt.ErrKeyDisabled)
	require.Less(t, r.Calls, 2*giveUp)
	s.stillBoth()
}

// Nothing is changed when the volume key can't be moved.
func TestRefusedAtTheVolumeKey(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	s.vault.fail = func(*crypt.Header) error { return crypt.ErrKeyDenied }
	before, err := os.ReadFile(filepath.Join(s.dir, volume.SettingsFile))
	require.NoError(t, err)
	_, err = s.run(Options{})
	require.ErrorIs(t, err, crypt.ErrKeyDenied)
	after, err := os.ReadFile(filepath.Join(s.dir, volume.SettingsFile))
	require.NoError(t, err)
	require.Equal(t, before, after)
	require.NoError(t, s.vault.unwrap(s.read("a"), oldKey))
}

func TestHardLinksCountOnce(t *testing.T) {
	s := newStage(t, oldKey)
	id := s.file("a", oldKey)
	for i := range 20 {
		require.NoError(t, os.Link(filepath.Join(s.dir, "a"), filepath.Join(s.dir, fmt.Sprint("link", i))))
	}
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.Equal(t, 1, r.Changed)
	require.Equal(t, 1, r.Plan.Files)
	require.Equal(t, 1, s.vault.calls[id])
}

// The header changes while the key service is asked: the file starts over, and
// the other writer's header is not lost.
func TestStartsOverWhenTheHeaderChanged(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	next, secrets := s.header(crypt.UseFile, oldKey)
	secrets.Wipe()
	raw, err := next.Marshal()
	require.NoError(t, err)
	once := sync.Once{}
	o := Options{}
	o.fault = func(p string) error {
		if p == "file-rewrapped" {
			once.Do(func() { s.raw("a", raw) })
		}
		return nil
	}
	r, err := s.run(o)
	require.NoError(t, err)
	require.True(t, r.Done)
	s.moved("a")
	require.Equal(t, next.File, s.read("a").File)
}

// A header that would not fit is refused before a call is paid for.
func TestTooBigIsRefusedBeforeTheCall(t *testing.T) {
	s := newStage(t, oldKey)
	s.vault.size = crypt.MaxBlob
	id := s.file("full", oldKey)
	path := filepath.Join(s.dir, "full")
	for n := 4096; n > 0; n /= 2 { // fill what is left for attributes
		for i := 0; unix.Setxattr(path, fmt.Sprintf("user.fill%d.%d", n, i), make([]byte, n), 0) == nil; i++ {
			if i > 64 {
				t.Skip("this file system has no small limit for attributes")
			}
		}
	}
	before := s.bytes("full")
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.Equal(t, 1, r.Failed)
	require.Zero(t, s.vault.calls[id])
	require.True(t, errors.Is(r.Problems[0].Err, unix.ENOSPC) || errors.Is(r.Problems[0].Err, unix.E2BIG), r.Problems[0].Err)
	require.Equal(t, before, s.bytes("full"))
	s.stillBoth()
}

// Files that appear under the old key behind the first pass are found by the next.
func TestSweepsUntilAPassFindsNothing(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	late := 0
	r, err := s.run(Options{Event: func(e Event) {
		if e.Kind == "file" && e.Outcome == Changed && late < 3 {
			late++
			s.file(fmt.Sprint("late", late), oldKey)
		}
	}})
	require.NoError(t, err)
	require.True(t, r.Done)
	for i := range 3 {
		s.moved(fmt.Sprint("late", i+1))
	}
}

func TestRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		keys []string
		o    Options
		want error
	}{
		"untrusted volume key": {[]string{oldKey}, Options{Trusted: []string{otherKey}}, ErrUntrusted},
		"two old keys":         {[]string{oldKey, otherKey}, Options{Trusted: []string{oldKey, otherKey}}, ErrAmbiguous},
		"planted key":          {[]string{oldKey, otherKey}, Options{}, ErrUntrusted},
		"planted, with --from": {[]string{oldKey, otherKey}, Options{From: oldKey}, ErrUntrusted},
		"planted in front":     {[]string{otherKey, oldKey}, Options{From: oldKey, Trusted: []string{oldKey}}, ErrUntrusted},
		"same key":             {[]string{oldKey}, Options{Key: oldKey, From: oldKey}, ErrSameKey},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, tc.keys...)
			id := s.file("a", tc.keys...)
			_, err := s.run(tc.o)
			require.ErrorIs(t, err, tc.want)
			require.Zero(t, s.vault.calls[id])
			require.Equal(t, tc.keys, s.open().Settings().Keys)
		})
	}
}

// With --from only that copy is replaced; the others stay.
func TestFromReplacesOneCopy(t *testing.T) {
	s := newStage(t, oldKey, otherKey)
	s.file("both", oldKey, otherKey)
	s.file("other", otherKey)
	before := s.bytes("other")
	r, err := s.run(Options{From: oldKey, Trusted: []string{oldKey, otherKey}})
	require.NoError(t, err)
	require.True(t, r.Done)
	h := s.read("both")
	require.NoError(t, s.vault.unwrap(h, newKey))
	require.NoError(t, s.vault.unwrap(h, otherKey))
	require.Nil(t, exact(h, oldKey))
	require.Equal(t, before, s.bytes("other"))
	require.Equal(t, []string{newKey, otherKey}, s.open().Settings().Keys)
}

// A copy under the new key that somebody planted in kmsfs.toml proves nothing: it
// is made afresh before the old copy goes.
func TestPlantedVolumeKeyCopyIsReplaced(t *testing.T) {
	s := newStage(t, oldKey)
	require.NoError(t, s.open().Update(func(now *volume.Settings) error {
		h, err := crypt.ParseHeader(now.Header)
		require.NoError(t, err)
		h.Copies = append(h.Copies, crypt.Copy{Key: newKey, Blob: []byte("planted")})
		now.Keys = []string{newKey, oldKey}
		now.Header, err = h.Marshal()
		return err
	}))
	_, err := s.run(Options{})
	require.NoError(t, err)
	s.closed()
}

func TestDryRunAndRefusalChangeNothing(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	s.file("b", newKey)
	s.raw("c", nil)
	r, err := s.run(Options{DryRun: true})
	require.NoError(t, err)
	require.Equal(t, 1, r.Plan.Change)
	require.Equal(t, 3, r.Plan.Files)
	require.Equal(t, 1, r.Plan.Bad)
	require.Equal(t, 2, r.Plan.Calls)
	require.InDelta(t, 2*0.03/10000, r.Plan.Price, 1e-12)
	require.Equal(t, map[string]int{oldKey: 1, newKey: 1}, r.Plan.Headers)
	no := errors.New("no")
	_, err = s.run(Options{Confirm: func(Plan) error { return no }})
	require.ErrorIs(t, err, no)
	require.Empty(t, s.vault.calls)
	require.Equal(t, []string{oldKey}, s.open().Settings().Keys)
	require.NoError(t, s.vault.unwrap(s.read("a"), oldKey))
}

// A live mount that does not follow stops the run before a single file is moved.
func TestReloadRefused(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	_, err := s.run(Options{Reload: func(context.Context, []string) error { return errors.New("deaf") }})
	require.ErrorIs(t, err, ErrReload)
	require.NoError(t, s.vault.unwrap(s.read("a"), oldKey))
	s.stillBoth()
}

func TestInterrupted(t *testing.T) {
	s := newStage(t, oldKey)
	for i := range 20 {
		s.file(fmt.Sprint("f", i), oldKey)
	}
	ctx, cancel := context.WithCancel(context.Background())
	_, err := run(ctx, s.open(), s.vault, Options{Key: newKey, Trusted: []string{oldKey}, Jobs: 2, Event: func(e Event) {
		if e.Kind == "file" {
			cancel()
		}
	}})
	require.ErrorIs(t, err, context.Canceled)
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done)
	s.closed()
}

// Two runs at once: both end well, and no file is lost between them.
func TestTwoAtOnce(t *testing.T) {
	s := newStage(t, oldKey)
	for i := range 60 {
		s.file(fmt.Sprint("f", i), oldKey)
	}
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		v := s.open()
		wg.Go(func() {
			_, errs[i] = run(context.Background(), v, s.vault, Options{Key: newKey, Trusted: []string{oldKey, newKey}, Jobs: 4})
		})
	}
	wg.Wait()
	r, err := s.run(Options{})
	require.NoError(t, err)
	require.True(t, r.Done, errs)
	for i := range 60 {
		s.moved(fmt.Sprint("f", i))
	}
	s.closed()
}

// A restless tree is one where things happen while a pass has listed a directory
// and not yet looked at its entries. Pass 1 is the plan.
type restless struct {
	tree
	pass   int
	during func(pass int)
}

func (r *restless) Walk(ctx context.Context, visit func(*volume.Item) error) error {
	r.pass++
	first := true
	return r.tree.Walk(ctx, func(it *volume.Item) error {
		if first {
			first = false
			r.during(r.pass)
		}
		return visit(it)
	})
}

// renamer makes a stage whose one file under the old key is renamed during the
// first passes of the sweep.
func renamer(t *testing.T, passes int) (*stage, tree, *string) {
	s := newStage(t, oldKey)
	for i := range 30 {
		s.file(fmt.Sprint("f", i), newKey)
	}
	s.file("old", oldKey)
	name := "old"
	return s, &restless{tree: s.open(), during: func(pass int) {
		if pass == 1 || pass > passes+1 {
			return
		}
		next := fmt.Sprint("moved", pass)
		require.NoError(t, os.Rename(filepath.Join(s.dir, name), filepath.Join(s.dir, next)))
		name = next
	}}, &name
}

// A file renamed while a pass is under way may have gone where that pass has been.
func TestRenamedFileMeansAnotherPass(t *testing.T) {
	s, tree, name := renamer(t, 5)
	r, err := run(context.Background(), tree, s.vault, Options{Key: newKey, Trusted: []string{oldKey}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Zero(t, r.Gone)
	s.moved(*name)
	s.closed()
}

// A tree that never rests keeps its old key, and is told so.
func TestRestlessTreeKeepsTheOldKey(t *testing.T) {
	s, tree, name := renamer(t, 10*maxPasses)
	r, err := run(context.Background(), tree, s.vault, Options{Key: newKey, Trusted: []string{oldKey}})
	require.NoError(t, err)
	require.False(t, r.Done)
	require.NoError(t, s.vault.unwrap(s.read(*name), oldKey))
	require.Equal(t, maxPasses, r.Passes)
	require.Equal(t, 1, r.Failed)
	require.ErrorIs(t, r.Problems[0].Err, ErrRestless)
	require.Empty(t, r.Retired)
	s.stillBoth()
}

// What vanishes under the plan, or under a pass, is no bad file.
func TestVanishedIsNotBad(t *testing.T) {
	s := newStage(t, newKey)
	names := []string{"a", "b", "c", "d"}
	for _, n := range names {
		s.file(n, newKey)
	}
	tree := &restless{tree: s.open(), during: func(pass int) {
		if pass <= 2 {
			for _, n := range names[2*pass-2 : 2*pass] {
				require.NoError(t, os.Remove(filepath.Join(s.dir, n)))
			}
		}
	}}
	r, err := run(context.Background(), tree, s.vault, Options{Key: newKey})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Zero(t, r.Plan.Bad)
	require.Equal(t, 2, r.Passes, "the first pass had files vanish")
	require.Empty(t, r.Problems)
}

const (
	mrkEast  = "arn:aws:kms:us-east-1:111122223333:key/mrk-33333333333333333333333333333333"
	mrkWest  = "arn:aws:kms:us-west-2:111122223333:key/mrk-33333333333333333333333333333333"
	mrkSouth = "arn:aws:kms:af-south-1:111122223333:key/mrk-33333333333333333333333333333333"
)

// relabel changes the region that a header's copy claims, as whoever writes the
// backing directory can.
func (s *stage) relabel(name, label string) {
	s.t.Helper()
	h := s.read(name)
	h.Copies[0].Key = label
	raw, err := h.Marshal()
	require.NoError(s.t, err)
	s.raw(name, raw)
}

// The region called is that of the client's own key, whatever a header says; and
// such a file is not passed over, for its data key is under the old key.
func TestLabelDoesNotChooseTheRegion(t *testing.T) {
	for name, from := range map[string]string{"the only copy": "", "with --from": mrkEast} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, mrkEast)
			s.file("a", mrkEast)
			s.file("b", mrkEast)
			s.relabel("b", mrkSouth)
			r, err := s.run(Options{From: from, Trusted: []string{mrkEast, newKey}})
			require.NoError(t, err)
			require.True(t, r.Done)
			require.Equal(t, map[string]int{mrkEast: 3}, s.vault.asked)
			require.Equal(t, []PlanRoute{{From: mrkEast, Route: r.Plan.Routes[0].Route, Files: 2, Keys: 2}}, r.Plan.Routes)
			s.moved("b")
			s.closed()
		})
	}
}

// The same in kmsfs.toml: it is neither called nor written back.
func TestRelabelledVolumeKey(t *testing.T) {
	s := newStage(t, mrkEast)
	s.file("a", mrkEast)
	require.NoError(t, s.open().Update(func(now *volume.Settings) error {
		h, err := crypt.ParseHeader(now.Header)
		require.NoError(t, err)
		h.Copies[0].Key = mrkSouth
		now.Keys = []string{mrkSouth}
		now.Header, err = h.Marshal()
		return err
	}))
	var pinned [][]string
	r, err := s.run(Options{Trusted: []string{mrkEast}, Pin: func(keys []string) error { pinned = append(pinned, keys); return nil }})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, [][]string{{newKey, mrkEast}, {newKey}}, pinned)
	require.Equal(t, map[string]int{mrkEast: 2}, s.vault.asked)
	s.closed()
}

// From one replica to another is a change of label, from exactly that label.
func TestReplicaToReplica(t *testing.T) {
	s := newStage(t, mrkEast)
	s.file("a", mrkEast)
	s.file("b", mrkWest)
	r, err := run(context.Background(), s.open(), relabeller{s.vault}, Options{Key: mrkWest, Trusted: []string{mrkEast, mrkWest}})
	require.NoError(t, err)
	require.True(t, r.Done)
	require.Equal(t, 1, r.Changed)
	require.Equal(t, mrkWest, s.read("a").Copies[0].Key)
	require.Equal(t, []string{mrkWest}, s.open().Settings().Keys)
	require.Len(t, s.open().Header().Copies, 1)
}

// A key that is planted in kmsfs.toml after the start is not signed off by the
// rewriting of step 5.
func TestKeyPlantedMidway(t *testing.T) {
	s := newStage(t, oldKey)
	s.file("a", oldKey)
	_, err := s.run(Options{Event: func(e Event) {
		if e.Step != "close" {
			return
		}
		require.NoError(t, s.open().Update(func(now *volume.Settings) error {
			h, err := crypt.ParseHeader(now.Header)
			require.NoError(t, err)
			h.Copies = append(h.Copies, crypt.Copy{Key: otherKey, Blob: []byte("planted")})
			now.Keys = append(now.Keys, otherKey)
			now.Header, err = h.Marshal()
			return err
		}))
	}})
	require.ErrorIs(t, err, ErrUntrusted)
	require.Contains(t, s.open().Settings().Keys, oldKey, "nothing was rewritten")
}
