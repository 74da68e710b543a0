package keys

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

func TestRoutes(t *testing.T) {
	w := NewRewrapper(newFake(), testVolume)
	china := "arn:aws-cn:kms:cn-north-1:111122223333:key/eeeeeeee-5555-4555-8555-555555555555"
	account := "arn:aws:kms:us-east-1:444455556666:key/ffffffff-6666-4666-8666-666666666666"
	for _, c := range []struct {
		from, to  string
		method    Method
		calls     int
		plaintext bool
	}{
		{arnA, arnC, ReEncrypt, 1, false},
		{arnA, account, ReEncrypt, 1, false},
		{arnA, arnA, ReEncrypt, 1, false}, // refresh
		{arnA, arnB, DecryptEncrypt, 2, true},
		{arnA, china, DecryptEncrypt, 2, true},
		{arnMRK, arnMRK2, Relabel, 0, false},
		{arnA, arnMRK, ReEncrypt, 1, false},
		{arnA, "local:a", DecryptEncrypt, 1, true},
		{"local:a", arnA, DecryptEncrypt, 1, true},
		{"local:a", "local:b", ReEncrypt, 0, true},
	} {
		r, err := w.Route(c.from, c.to)
		require.NoError(t, err)
		require.Equal(t, Route{c.from, c.to, c.method, c.calls, c.plaintext}, r)
		require.Contains(t, r.String(), c.method.String())
	}
	for _, bad := range []string{"", "x", "arn:aws:kms:us-east-1:111122223333:alias/a"} {
		_, err := w.Route(arnA, bad)
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
	}
}

// TestRewrapEveryRoute moves a data key along every route on the real protocol,
// counting calls, and opens it at the other end.
func TestRewrapEveryRoute(t *testing.T) {
	noLeaks(t)
	srv := kmstest.New(t, nil)
	east, east2, west := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1"), srv.CreateKey("us-west-2")
	mrk := srv.Create(kmstest.KeySpec{MultiRegion: true})
	replica := srv.Replicate(mrk, "us-west-2")
	p := NewRouter(newTestAWS(t, srv), newTestLocal(t, "local:a", "local:b"))
	w := NewRewrapper(p, testVolume)
	for _, c := range []struct {
		from, to string
		ops      map[string]int
	}{
		{east, east2, map[string]int{opReEncrypt: 1}},
		{east, east, map[string]int{opReEncrypt: 1}},
		{east, west, map[string]int{opDecrypt: 1, opEncrypt: 1}},
		{mrk, replica, nil},
		{east, "local:a", map[string]int{opDecrypt: 1}},
		{"local:a", west, map[string]int{opEncrypt: 1}},
		{"local:a", "local:b", nil},
	} {
		h := newHeader(t, p, c.from)
		srv.Rotate(mrk)
		srv.Reset()
		moved, err := w.Rewrap(context.Background(), h, c.from, c.to)
		require.NoError(t, err)
		total := 0
		for op, n := range c.ops {
			require.Equal(t, n, srv.Count(op), "%s -> %s", c.from, c.to)
			total += n
		}
		require.Equal(t, total, srv.Count())
		require.Equal(t, c.to, moved.Key)
		h.Copies = []crypt.Copy{moved}
		require.NoError(t, open(t, newTestRing(t, p, nil, c.to), h))
	}
}

// TestMigratorWhoCannotRead: ReEncryptFrom and ReEncryptTo are enough in a region.
func TestMigratorWhoCannotRead(t *testing.T) {
	srv := kmstest.New(t, nil)
	from, to := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	admin := newTestAWS(t, srv)
	h := newHeader(t, admin, from)
	p := srv.AddPrincipal("migrator", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo"}})
	a := newTestAWS(t, srv)
	a.clients.opts.Credentials = p.Credentials()
	moved, err := NewRewrapper(a, testVolume).Rewrap(context.Background(), h, from, to)
	require.NoError(t, err)
	h.Copies = append(h.Copies, moved)
	require.ErrorIs(t, open(t, newTestRing(t, a, nil, to), h), crypt.ErrKeyDenied)
	require.NoError(t, open(t, newTestRing(t, admin, nil, to), h))
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
