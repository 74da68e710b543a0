package keys

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// slowly answers after a while, as it is told.
type slowly struct {
	Provider
	err error
}

func (s *slowly) Decrypt(context.Context, string, EncryptionContext, []byte) (*crypt.Key, error) {
	time.Sleep(3 * time.Millisecond)
	return nil, s.err
}

// Calls are counted by what they came to, and their time in every bucket that is wide
// enough for it.
func TestCallsAreCounted(t *testing.T) {
	s := &slowly{}
	c := newCounted(s)
	for i := range 3 {
		if i == 2 {
			s.err = newError(KindDenied, opDecrypt, "b", nil)
		}
		_, _ = c.Decrypt(t.Context(), string("aab"[i]), nil, nil)
	}
	var st Stats
	c.addTo(&st)
	require.Equal(t, []CallCount{{opDecrypt, "a", "ok", 2}, {opDecrypt, "b", "denied", 1}}, st.ByKey)
	require.Equal(t, map[string]int64{opDecrypt: 3}, st.Calls)
	require.Equal(t, map[string]int64{"denied": 1}, st.Failures)
	l := st.Latency[opDecrypt]
	require.EqualValues(t, 3, l.Count)
	require.Equal(t, st.CallTime, l.Sum)
	require.GreaterOrEqual(t, l.Sum, 9*time.Millisecond)
	require.Zero(t, l.Within[1], "2.5 ms are too short")
	last := int64(0)
	for i, n := range l.Within {
		require.GreaterOrEqual(t, n, last, "buckets are cumulative: %v", LatencyBounds[i])
		last = n
	}
}
