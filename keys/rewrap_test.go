package keys

import (
	"context"
	"strings"
	"testing"

	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

const (
	arnChina   = "arn:aws-cn:kms:cn-north-1:111122223333:key/eeeeeeee-5555-4555-8555-555555555555"
	arnAccount = "arn:aws:kms:us-east-1:444455556666:key/ffffffff-6666-4666-8666-666666666666"
	arnVia     = "arn:aws:kms:ap-south-1:444455556666:key/mrk-77777777777777777777777777777777"
)

func TestRoutes(t *testing.T) {
	for _, c := range []struct {
		via, from, to string
		method        Method
		calls         int
		plaintext     bool
	}{
		{"", arnA, arnC, ReEncrypt, 1, false},
		{"", arnA, arnAccount, ReEncrypt, 1, false},
		{"", arnA, arnA, ReEncrypt, 1, false}, // refresh
		{"", arnA, arnB, DecryptEncrypt, 2, true},
		{"", arnA, arnChina, DecryptEncrypt, 2, true},
		{"", arnMRK, arnMRK2, Relabel, 0, false},
		{"", arnA, arnMRK, ReEncrypt, 1, false},
		{"", arnA, "local:a", DecryptEncrypt, 1, true},
		{"", "local:a", arnA, DecryptEncrypt, 1, true},
		{"", "local:a", "local:b", ReEncrypt, 0, true},

		{arnVia, arnA, arnB, ReEncryptVia, 2, false},
		{arnMRK, arnA, arnB, ReEncryptVia, 2, false},
		{arnMRK2, arnMRK, arnB, ReEncryptVia, 1, false},
		{arnMRK, arnA, arnMRK2, ReEncryptVia, 1, false},
		// Where there is nothing to carry, what is in between plays no part.
		{arnVia, arnA, arnC, ReEncrypt, 1, false},
		{arnVia, arnA, arnA, ReEncrypt, 1, false},
		{arnVia, arnMRK, arnMRK2, Relabel, 0, false},
		{arnVia, arnA, "local:a", DecryptEncrypt, 1, true},
		{arnVia, "local:a", arnB, DecryptEncrypt, 1, true},
		{arnVia, "local:a", "local:a", ReEncrypt, 0, true},
	} {
		r, err := NewRewrapperVia(newFake(), testVolume, c.via).Route(c.from, c.to)
		require.NoError(t, err)
		want := Route{From: c.from, To: c.to, Method: c.method, Calls: c.calls, Plaintext: c.plaintext}
		name := c.method.String()
		if c.method == ReEncryptVia {
			want.Via, name = c.via, "re-encrypt via "+c.via
		}
		require.Equal(t, want, r)
		require.Equal(t, name, r.Name())
		require.Contains(t, r.String(), name)
	}
	for _, bad := range []string{"", "x", "arn:aws:kms:us-east-1:111122223333:alias/a"} {
		_, err := NewRewrapper(newFake(), testVolume).Route(arnA, bad)
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
	}
}

// TestViaRefuses: a route that can't be taken is refused before any call.
func TestViaRefuses(t *testing.T) {
	mrkChina := strings.NewReplacer("arn:aws:", "arn:aws-cn:", "us-east-1", "cn-north-1").Replace(arnMRK)
	for _, c := range []struct{ via, from, to, want string }{
		{arnC, arnA, arnB, "only a multi-Region key"},
		{"local:a", arnA, arnB, "only a multi-Region key"},
		{"x", arnA, arnB, "only a multi-Region key"},
		{"arn:aws:kms:us-east-1:111122223333:alias/mrk-a", arnA, arnB, "only a multi-Region key"},
		{mrkChina, arnA, arnB, "another partition"},
		{arnVia, arnA, arnChina, "another partition"},
		{arnVia, arnChina, arnA, "another partition"},
	} {
		f := newFake()
		h := newHeader(t, f, c.from)
		f.calls = nil
		w := NewRewrapperVia(f, testVolume, c.via)
		_, err := w.Route(c.from, c.to)
		requireKind(t, err, KindRejected, opReEncrypt, c.via)
		require.ErrorContains(t, err, c.want)
		_, err = w.Rewrap(context.Background(), h, c.from, c.to)
		requireKind(t, err, KindRejected, opReEncrypt, c.via)
		require.Zero(t, f.count())
	}
}

// A sent call is what a test of routes compares of a call that KMS saw.
type sent struct{ op, region, key, source string }

func sentTo(srv *kmstest.Server) (out []sent) {
	for _, c := range srv.Calls() {
		out = append(out, sent{c.Op, c.Region, c.Key, c.Source})
	}
	return out
}

// TestRewrapEveryRoute moves a data key along every route on the real protocol,
// compares every call that KMS saw, and opens the key at the other end. Routes
// without plaintext are taken by an operator who can't read.
func TestRewrapEveryRoute(t *testing.T) {
	noLeaks(t)
	srv := kmstest.New(t, nil)
	east, east2, west := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1"), srv.CreateKey("us-west-2")
	mrk := srv.Create(kmstest.KeySpec{MultiRegion: true})
	replica := srv.Replicate(mrk, "us-west-2")
	tokyo := srv.Replicate(mrk, "ap-northeast-1")
	local := newTestLocal(t, "local:a", "local:b")
	admin := NewRouter(newTestAWS(t, srv), local)
	a := newTestAWS(t, srv)
	a.clients.opts.Credentials = srv.AddPrincipal("migrator", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo"}}).Credentials()
	migrator := NewRouter(a, local)
	for _, c := range []struct {
		via, from, to string
		calls         []sent
	}{
		{"", east, east2, []sent{{opReEncrypt, "us-east-1", east2, east}}},
		{"", east, east, []sent{{opReEncrypt, "us-east-1", east, east}}},
		{"", east, west, []sent{{opDecrypt, "us-east-1", east, ""}, {opEncrypt, "us-west-2", west, ""}}},
		{"", mrk, replica, nil},
		{"", east, "local:a", []sent{{opDecrypt, "us-east-1", east, ""}}},
		{"", "local:a", west, []sent{{opEncrypt, "us-west-2", west, ""}}},
		{"", "local:a", "local:b", nil},
		{"", "local:a", "local:a", nil},
		{mrk, east, west, []sent{{opReEncrypt, "us-east-1", mrk, east}, {opReEncrypt, "us-west-2", west, replica}}},
		{tokyo, east, west, []sent{{opReEncrypt, "us-east-1", mrk, east}, {opReEncrypt, "us-west-2", west, replica}}},
		{tokyo, mrk, west, []sent{{opReEncrypt, "us-west-2", west, replica}}},
		{tokyo, east, replica, []sent{{opReEncrypt, "us-east-1", mrk, east}}},
		{mrk, east, east2, []sent{{opReEncrypt, "us-east-1", east2, east}}},
	} {
		h := newHeader(t, admin, c.from)
		srv.Rotate(mrk)
		srv.Reset()
		p := admin
		if !IsLocal(c.from) && (c.via != "" || sameRegion(c.from, c.to)) {
			p = migrator
		}
		w := NewRewrapperVia(p, testVolume, c.via)
		moved, err := w.Rewrap(context.Background(), h, c.from, c.to)
		w.Close()
		require.NoError(t, err)
		require.Equal(t, c.calls, sentTo(srv), "%s -> %s via %s", c.from, c.to, c.via)
		for _, call := range srv.Calls() {
			require.Empty(t, call.Error)
			require.Equal(t, h.EncryptionContext(testVolume), call.Context)
			if call.Op == opReEncrypt {
				require.Equal(t, call.Context, call.DestinationContext)
			}
		}
		require.Equal(t, c.to, moved.Key)
		h.Copies = []crypt.Copy{moved}
		require.NoError(t, open(t, newTestRing(t, admin, nil, c.to), h))
	}
}

// TestViaNamesTheKeyAtFault: of the three keys of a route, the error is about
// the one that refused, in the region that refused it.
func TestViaNamesTheKeyAtFault(t *testing.T) {
	srv := kmstest.New(t, nil)
	east, west := srv.CreateKey("us-east-1"), srv.CreateKey("us-west-2")
	mrk := srv.Create(kmstest.KeySpec{MultiRegion: true})
	a := newTestAWS(t, srv)
	h := newHeader(t, a, east)
	rewrap := func() error {
		_, err := NewRewrapperVia(a, testVolume, mrk).Rewrap(context.Background(), h, east, west)
		return err
	}
	there := strings.Replace(mrk, "us-east-1", "us-west-2", 1)
	requireKind(t, rewrap(), KindNotFound, opReEncrypt, there)
	require.Equal(t, there, srv.Replicate(mrk, "us-west-2"))
	for _, key := range []string{east, mrk, there, west} {
		srv.SetState(key, kmstest.Disabled)
		requireKind(t, rewrap(), KindDisabled, opReEncrypt, key)
		srv.SetState(key, kmstest.Enabled)
	}
	require.NoError(t, rewrap())
}

// TestRefresh: a key rotated on demand wraps a data key again with its newest
// material, by one call that shows the key to nobody.
func TestRefresh(t *testing.T) {
	srv := kmstest.New(t, nil)
	single, mrk := srv.CreateKey("us-east-1"), srv.Create(kmstest.KeySpec{MultiRegion: true})
	a := newTestAWS(t, srv)
	c, err := a.clients.of(context.Background(), single)
	require.NoError(t, err)
	for _, key := range []string{single, mrk} {
		h := newHeader(t, a, key)
		old := srv.MaterialOf(h.Copies[0].Blob)
		require.Equal(t, old, srv.CurrentMaterial(key))
		_, err := c.RotateKeyOnDemand(context.Background(), &awskms.RotateKeyOnDemandInput{KeyId: &key})
		require.NoError(t, err)
		srv.Reset()
		moved, err := NewRewrapper(a, testVolume).Rewrap(context.Background(), h, key, key)
		require.NoError(t, err)
		require.Equal(t, []sent{{opReEncrypt, "us-east-1", key, key}}, sentTo(srv))
		require.NotEqual(t, old, srv.MaterialOf(moved.Blob))
		require.Equal(t, srv.CurrentMaterial(key), srv.MaterialOf(moved.Blob))
		h.Copies = []crypt.Copy{moved}
		require.NoError(t, open(t, newTestRing(t, a, nil, key), h))
	}

	l := newTestLocal(t, "local:a")
	h := newHeader(t, l, "local:a")
	moved, err := NewRewrapper(l, testVolume).Rewrap(context.Background(), h, "local:a", "local:a")
	require.NoError(t, err)
	require.NotEqual(t, h.Copies[0].Blob, moved.Blob)
	h.Copies = []crypt.Copy{moved}
	require.NoError(t, open(t, newTestRing(t, l, nil, "local:a"), h))
}

// TestMigratorWhoCannotRead: ReEncryptFrom and ReEncryptTo are enough in a
// region, and what they made is proved without reading it.
func TestMigratorWhoCannotRead(t *testing.T) {
	srv := kmstest.New(t, nil)
	from, to := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	admin := newTestAWS(t, srv)
	h := newHeader(t, admin, from)
	p := srv.AddPrincipal("migrator", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo"}})
	a := newTestAWS(t, srv)
	a.clients.opts.Credentials = p.Credentials()
	w, ctx := NewRewrapper(a, testVolume), context.Background()
	moved, err := w.Rewrap(ctx, h, from, to)
	require.NoError(t, err)
	h.Copies = append(h.Copies, moved)
	require.ErrorIs(t, open(t, newTestRing(t, a, nil, to), h), crypt.ErrKeyDenied)
	require.NoError(t, open(t, newTestRing(t, admin, nil, to), h))

	requireKind(t, w.Verify(ctx, h, to), KindDenied, opDecrypt, to)
	srv.Reset()
	require.NoError(t, w.Prove(ctx, h, to))
	require.Equal(t, []sent{{opDecrypt, "us-east-1", to, ""}, {opReEncrypt, "us-east-1", to, to}}, sentTo(srv))
	for _, c := range srv.Calls() {
		require.Equal(t, h.EncryptionContext(testVolume), c.Context)
	}
	// The blob of another file of the volume, and one of another key.
	other := newHeader(t, admin, to)
	h.Copies[1].Blob = other.Copies[0].Blob
	requireKind(t, w.Prove(ctx, h, to), KindBadBlob, opReEncrypt, to)
	h.Copies[1].Blob = h.Copies[0].Blob
	requireKind(t, w.Prove(ctx, h, to), KindIncorrectKey, opReEncrypt, to)
	// Only a denial falls back.
	h.Copies[1] = moved
	srv.SetState(to, kmstest.Disabled)
	srv.SetRules(p, kmstest.Rule{})
	srv.Reset()
	requireKind(t, w.Prove(ctx, h, to), KindDisabled, opDecrypt, to)
	require.Zero(t, srv.Count(opReEncrypt))
	srv.SetState(to, kmstest.Enabled)
	srv.SetRules(p, kmstest.Rule{Actions: []string{"ReEncryptFrom"}})
	requireKind(t, w.Prove(ctx, h, to), KindDenied, opReEncrypt, to)
}

// TestVerify: the copy with the key's own label is the one that counts; another
// data key in it, another file's blob or no copy at all are refused.
func TestVerify(t *testing.T) {
	noLeaks(t)
	f, ctx := newFake(), context.Background()
	w := NewRewrapper(f, testVolume)
	defer w.Close()
	h := newHeader(t, f, arnA, arnMRK)
	f.calls = nil
	for _, check := range []func(context.Context, *crypt.Header, string) error{w.Verify, w.Prove} {
		require.NoError(t, check(ctx, h, arnA))
		require.NoError(t, check(ctx, h, arnMRK))
		require.NoError(t, check(ctx, h, arnMRK2), "a replica opens it, under its own name")
	}
	require.Equal(t, []string{opDecrypt + " " + arnA, opDecrypt + " " + arnMRK, opDecrypt + " " + arnMRK2}, f.calls[:3])

	other, err := crypt.RandomKey()
	require.NoError(t, err)
	defer other.Wipe()
	bad := crypt.Copy{Key: arnMRK2, Blob: f.wrap(arnMRK2, h.EncryptionContext(testVolume), other)}
	both := h.Clone()
	both.Copies = append(both.Copies, bad)
	for _, check := range []func(context.Context, *crypt.Header, string) error{w.Verify, w.Prove} {
		require.NoError(t, check(ctx, both, arnMRK))
		err := check(ctx, both, arnMRK2)
		requireKind(t, err, KindBadBlob, opDecrypt, arnMRK2)
		require.ErrorIs(t, err, crypt.ErrDamaged)
		requireKind(t, check(ctx, h, arnB), KindRejected, opDecrypt, arnB)
		foreign := h.Clone()
		foreign.Volume = crypt.VolumeID{1}
		require.ErrorIs(t, check(ctx, foreign, arnA), crypt.ErrForeign)
	}
	require.NotContains(t, f.calls, opReEncrypt+" "+arnMRK2)
}

// TestRewrapperLeavesTimeToTheProvider: waiting for a turn under a rate limit may
// take longer than a call may.
func TestRewrapperLeavesTimeToTheProvider(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnA)
	f.before = func(ctx context.Context, _, _ string) error {
		_, bounded := ctx.Deadline()
		require.False(t, bounded)
		return nil
	}
	w := NewRewrapper(f, testVolume)
	for _, to := range []string{arnB, arnC} {
		_, err := w.Rewrap(context.Background(), h, arnA, to)
		require.NoError(t, err)
	}
	require.NoError(t, w.Prove(context.Background(), h, arnA))
}

func TestRewrapRefuses(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnA)
	w := NewRewrapper(f, testVolume)
	f.calls = nil
	foreign := h.Clone()
	foreign.Volume = crypt.VolumeID{1}
	_, err := w.Rewrap(context.Background(), foreign, arnA, arnB)
	require.ErrorIs(t, err, crypt.ErrForeign)
	_, err = w.Rewrap(context.Background(), h, arnB, arnC)
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
	require.Zero(t, f.count())

	// A copy that opens to another data key is not laundered into the new key.
	other, err := crypt.RandomKey()
	require.NoError(t, err)
	defer other.Wipe()
	h.Copies[0].Blob = f.wrap(arnA, h.EncryptionContext(testVolume), other)
	_, err = w.Rewrap(context.Background(), h, arnA, arnB)
	require.ErrorIs(t, err, crypt.ErrDamaged)
	require.Equal(t, []string{opDecrypt + " " + arnA}, f.calls)
}

// TestRewrapGoesWhereItIsTold: a multi-Region key's label, which whoever writes
// the backing directory can change, finds the copy and chooses no region.
func TestRewrapGoesWhereItIsTold(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnMRK)
	h.Copies[0].Key = arnMRK2
	f.calls = nil
	moved, err := NewRewrapper(f, testVolume).Rewrap(context.Background(), h, arnMRK, arnC)
	require.NoError(t, err)
	require.Equal(t, []string{opReEncrypt + " " + arnMRK}, f.calls)
	require.Equal(t, arnC, moved.Key)
}
