package volume

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// TestMarker: it says what it was made with, nobody without the volume key can make or
// change one, and it goes.
func TestMarker(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	m, err := v.Unclean()
	require.NoError(t, err)
	require.Nil(t, m)
	since := time.Now().Add(-time.Hour)
	require.NoError(t, v.MarkMounted(since))
	m, err = v.Unclean()
	require.NoError(t, err)
	require.True(t, m.SameBoot())
	require.True(t, since.Equal(m.Since))

	path := filepath.Join(v.Path(), MarkerFile)
	good, err := os.ReadFile(path)
	require.NoError(t, err)
	forged := 0
	for i := range good {
		bad := append([]byte(nil), good...)
		if bad[i] < '0' || bad[i] > '9' {
			continue
		}
		bad[i] = '0' + (bad[i]-'0'+1)%10
		require.NoError(t, os.WriteFile(path, bad, 0o600))
		if _, err = v.Unclean(); err == nil { // the last digit of base64 may hold bits that don't count
			continue
		}
		require.ErrorIs(t, err, crypt.ErrDamaged)
		forged++
	}
	require.Greater(t, forged, 20)
	require.NoError(t, os.WriteFile(path, []byte("{}"), 0o600))
	_, err = v.Unclean()
	require.ErrorIs(t, err, crypt.ErrDamaged)

	var before, after os.FileInfo
	before, err = os.Stat(v.Path())
	require.NoError(t, err)
	for i := range 5 {
		require.NoError(t, v.MarkMounted(since.Add(time.Duration(i))))
		m, err = v.Unclean()
		require.NoError(t, err)
		require.True(t, since.Add(time.Duration(i)).Equal(m.Since))
		require.NoError(t, v.Unmark())
		m, err = v.Unclean()
		require.NoError(t, err)
		require.Nil(t, m)
	}
	after, err = os.Stat(v.Path())
	require.NoError(t, err)
	require.Equal(t, before.ModTime(), after.ModTime(), "users see the time of the root")
}

// TestMarkerOfAnotherVolume counts for nothing.
func TestMarkerOfAnotherVolume(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	other, _ := newVolume(t, NamesPlain)
	require.NoError(t, other.MarkMounted(time.Now()))
	require.NoError(t, os.Rename(filepath.Join(other.Path(), MarkerFile), filepath.Join(v.Path(), MarkerFile)))
	_, err := v.Unclean()
	require.ErrorIs(t, err, crypt.ErrDamaged)
}

// TestTornMarker: a power cut while it is written leaves the one before.
func TestTornMarker(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	since := time.Now()
	require.NoError(t, v.MarkMounted(since))
	require.NoError(t, v.MarkMounted(since.Add(time.Minute)))
	path := filepath.Join(v.Path(), MarkerFile)
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	clear(text[markerPlace+20 : markerPlace+60])
	require.NoError(t, os.WriteFile(path, text, 0o600))
	m, err := v.Unclean()
	require.NoError(t, err)
	require.True(t, since.Equal(m.Since))
}

// TestEndsAreCutIfChangedSince: a bad end of a file that was changed after the marker's
// time is cut back to the last good record; of one that was changed before it is left.
func TestEndsAreCutIfChangedSince(t *testing.T) {
	x := newVictim(t)
	_, err := x.f.WriteAt(make([]byte, 4096+100), 0)
	require.NoError(t, err)
	require.NoError(t, x.b.Truncate(4128+70))
	now := time.Now()
	for _, tt := range []struct {
		since time.Time
		want  EndRecovery
	}{
		{now.Add(time.Hour), EndRecovery{}},
		{now.Add(-time.Hour), EndRecovery{Looked: 1, Cut: []EndCut{{Ino: x.b.inode.Ino, From: 4096 + 38, To: 4096}}}},
		{now.Add(-time.Hour), EndRecovery{Looked: 1}},
	} {
		require.Equal(t, tt.want, x.v.RecoverEnds(t.Context(), &Marker{Since: tt.since}, x.open))
	}
	got, err := x.read(x.v)
	require.NoError(t, err)
	require.Equal(t, make([]byte, 4096), got)
}

// TestWhatIsLeftIsRemembered: the files that a mount could not look at outlive it, however
// it ends, and no others are looked at after it ended well.
func TestWhatIsLeftIsRemembered(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	since := time.Now()
	require.NoError(t, v.MarkMounted(since))
	left := []uint64{3, 1 << 60}
	require.NoError(t, v.MarkLeft(since, left))
	require.NoError(t, v.MarkMounted(since.Add(time.Second)))
	m, err := v.Unclean()
	require.NoError(t, err)
	require.Equal(t, left, m.Left)
	require.False(t, m.Ended)
	require.True(t, since.Add(time.Second).Equal(m.Since))
	require.NoError(t, v.Unmark())
	m, err = v.Unclean()
	require.NoError(t, err)
	require.Equal(t, left, m.Left)
	require.True(t, m.Ended)

	// A shorter list goes to another place: if the power is cut before the marker is
	// durable that names it, the one before still counts.
	path := filepath.Join(v.Path(), MarkerFile)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, v.MarkLeft(since, left[:1]))
	m, err = v.Unclean()
	require.NoError(t, err)
	require.Equal(t, left[:1], m.Left)
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, append(before[:leftPlace:leftPlace], after[leftPlace:]...), 0o600))
	m, err = v.Unclean()
	require.NoError(t, err)
	require.Equal(t, left, m.Left)

	good, err := os.ReadFile(path)
	require.NoError(t, err)
	bad := append([]byte(nil), good...)
	bad[leftPlace] ^= 1
	for name, text := range map[string][]byte{"changed": bad, "cut": good[:leftPlace+5]} {
		require.NoError(t, os.WriteFile(path, text, 0o600))
		_, err = v.Unclean()
		require.ErrorIs(t, err, crypt.ErrDamaged, name)
	}
	require.NoError(t, os.WriteFile(path, good, 0o600))
	require.ErrorIs(t, v.MarkLeft(since, make([]uint64, leftMost+1)), ErrTooManyLeft)
	require.NoError(t, v.MarkLeft(since, nil))
	require.NoError(t, v.Unmark())
	m, err = v.Unclean()
	require.NoError(t, err)
	require.Nil(t, m)
}

// TestEndsThatAreLeft: what could not be looked at is said, and the next time it is looked
// at though it was changed long before; what was denied or is out of time comes again, what
// is damaged does not.
func TestEndsThatAreLeft(t *testing.T) {
	x := newVictim(t)
	_, err := x.f.WriteAt(make([]byte, 4096+100), 0)
	require.NoError(t, err)
	require.NoError(t, x.b.Truncate(4128+70))
	ino, hourAgo := x.b.inode.Ino, &Marker{Since: time.Now().Add(-time.Hour)}
	r := x.v.RecoverEnds(t.Context(), hourAgo, func(context.Context, *crypt.Header) (*crypt.Secrets, error) { return nil, ErrLater })
	require.Equal(t, EndRecovery{Looked: 1, Left: 1, Later: []uint64{ino}}, r)
	r = x.v.RecoverEnds(t.Context(), hourAgo, denied)
	require.Equal(t, []uint64{ino}, r.Later)
	require.ErrorContains(t, r.Errs[0], "denied")
	r = x.v.RecoverEnds(t.Context(), hourAgo, func(context.Context, *crypt.Header) (*crypt.Secrets, error) { return nil, crypt.ErrDamaged })
	require.Equal(t, 1, r.Left)
	require.Empty(t, r.Later, "nothing but a repair can mend it")

	later := time.Now().Add(time.Hour)
	require.Zero(t, x.v.RecoverEnds(t.Context(), &Marker{Since: later}, x.open).Looked)
	require.Zero(t, x.v.RecoverEnds(t.Context(), &Marker{Ended: true, Left: []uint64{ino + 1}}, x.open).Looked)
	r = x.v.RecoverEnds(t.Context(), &Marker{Since: later, Ended: true, Left: []uint64{ino}}, x.open)
	require.Equal(t, EndRecovery{Looked: 1, Cut: []EndCut{{Ino: ino, From: 4096 + 38, To: 4096}}}, r)
}

// TestOldMarkers do not count for who knows of a newer one, nor do they lead to new ones that
// would not.
func TestOldMarkers(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	path := filepath.Join(v.Path(), MarkerFile)
	require.NoError(t, v.MarkMounted(time.Now()))
	old, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, v.Unmark())
	first := v.Marked()
	for range 2 {
		v.MarkAfter(first)
		m, err := v.Unclean()
		require.NoError(t, err)
		require.Nil(t, m, "the last mount ended well")
		require.NoError(t, os.WriteFile(path, old, 0o600))
		_, err = v.Unclean()
		require.ErrorIs(t, err, ErrOldMarker)
		require.NoError(t, v.MarkMounted(time.Now()))
		require.GreaterOrEqual(t, v.Marked(), first)
		m, err = v.Unclean()
		require.NoError(t, err)
		require.NotNil(t, m)
		require.NoError(t, v.Unmark())
		first = v.Marked()
	}
	require.NoError(t, os.Remove(path))
	v.MarkAfter(first)
	require.NoError(t, v.MarkMounted(time.Now()))
	require.GreaterOrEqual(t, v.Marked(), first)
}
