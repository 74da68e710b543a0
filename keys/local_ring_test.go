package keys

import (
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// TestLocalByTrustedKeys: the copies that count are those of trusted keys, whatever the
// header holds; which makes new data keys is the client's order.
func TestLocalByTrustedKeys(t *testing.T) {
	const local = "local:here"
	f := newFake()
	h := newHeader(t, f, arnA, local)
	for _, c := range []struct {
		trusted      []string
		open, create bool
	}{
		{[]string{local, arnA}, false, true}, // the next copy is asked for over a network
		{[]string{arnA, local}, false, false},
		{[]string{arnB, local}, true, false},
		{[]string{local, arnB}, true, true},
		{[]string{arnA}, false, false},
		{[]string{arnB}, false, false}, // opens nothing
	} {
		r := newTestRing(t, f, nil, c.trusted...)
		require.Equal(t, c.open, r.Local(h), "%v", c.trusted)
		require.Equal(t, c.create, r.Local(nil), "%v", c.trusted)
	}
	only := &crypt.Header{Identity: h.Identity, Copies: h.Copies[:1]}
	require.False(t, newTestRing(t, f, nil, local, arnA).Local(only))
}
