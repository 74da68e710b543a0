package volume

import (
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
		require.Equal(t, tt.want, x.v.RecoverEnds(t.Context(), tt.since, x.open))
	}
	got, err := x.read(x.v)
	require.NoError(t, err)
	require.Equal(t, make([]byte, 4096), got)
}
