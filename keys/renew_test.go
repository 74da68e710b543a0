package keys

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// Which headers are renewed, and to what.
func TestRenew(t *testing.T) {
	noLeaks(t)
	for name, c := range map[string]struct {
		copies, trusted []string
		renewed         bool
	}{
		"as new":              {[]string{arnA}, []string{arnA}, false},
		"old stays trusted":   {[]string{arnA, arnB}, []string{arnA, arnB}, false},
		"first is new":        {[]string{arnB}, []string{arnA, arnB}, true},
		"old one left":        {[]string{arnA, arnB}, []string{arnA}, true},
		"all left":            {[]string{arnB, arnC}, []string{arnA}, true},
		"another region's":    {[]string{arnMRK2}, []string{arnMRK}, true},
		"both regions'":       {[]string{arnMRK, arnMRK2}, []string{arnMRK}, false},
		"nothing is trusted":  {[]string{arnA}, nil, false},
		"order of the header": {[]string{arnB, arnA}, []string{arnA, arnB}, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			h := newHeader(t, f, c.copies...)
			h.Padding = 30
			opening := newTestRing(t, f, nil, c.copies...)
			s, err := opening.Open(context.Background(), h)
			require.NoError(t, err)
			defer s.Wipe()
			r := newTestRing(t, f, nil, c.trusted...)
			f.calls = nil
			next, err := r.Renew(context.Background(), h, s)
			require.NoError(t, err)
			if !c.renewed {
				require.Nil(t, next)
				require.Zero(t, f.count())
				return
			}
			require.Equal(t, []string{opEncrypt + " " + c.trusted[0]}, f.calls)
			require.Equal(t, h.Identity, next.Identity)
			require.Len(t, next.Copies, 1)
			require.Equal(t, c.trusted[0], next.Copies[0].Key)
			require.Zero(t, next.Padding)
			require.Len(t, h.Copies, len(c.copies), "the old header was changed")
			require.NoError(t, open(t, newTestRing(t, f, nil, c.trusted[0]), next))
			again, err := r.Renew(context.Background(), next, s)
			require.NoError(t, err)
			require.Nil(t, again)
		})
	}
}

func TestRenewRefuses(t *testing.T) {
	f := newFake()
	h := newHeader(t, f, arnB)
	r := newTestRing(t, f, nil, arnA, arnB)
	s, err := r.Open(context.Background(), h)
	require.NoError(t, err)
	defer s.Wipe()
	f.calls = nil
	foreign := h.Clone()
	foreign.Volume[0] ^= 1
	_, err = r.Renew(context.Background(), foreign, s)
	require.ErrorIs(t, err, crypt.ErrForeign)
	_, err = r.Renew(context.Background(), newHeader(t, f, arnB), s)
	require.ErrorIs(t, err, crypt.ErrDamaged, "another file's header")

	f.calls = nil
	f.before = func(ctx context.Context, op, key string) error {
		_, bounded := ctx.Deadline()
		require.True(t, bounded)
		return newError(KindDenied, op, key, nil)
	}
	_, err = r.Renew(context.Background(), h, s)
	require.ErrorIs(t, err, crypt.ErrKeyDenied)
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, "kms:Encrypt", e.Action)
	require.Equal(t, 1, f.count())
}
