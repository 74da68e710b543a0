package keys

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

// settledLocal is a keyring with one key whose file was written a while ago.
func settledLocal(t *testing.T) *Local {
	l := newTestLocal(t, "local:a")
	time.Sleep(settled + 10*time.Millisecond)
	return l
}

// What is kept of a local key is wiped a second after its file was read.
func TestRecentKeyIsWiped(t *testing.T) {
	live := crypt.LiveKeys()
	l := settledLocal(t)
	_, err := l.Describe(t.Context(), "local:a")
	require.NoError(t, err)
	require.Equal(t, live+1, crypt.LiveKeys())
	require.Eventually(t, func() bool { return crypt.LiveKeys() == live }, 5*recentFor, recentFor/20)
}

// A ring that is locked, or closed, has none of it wiped later.
func TestRecentKeyIsForgotten(t *testing.T) {
	live := crypt.LiveKeys()
	l := settledLocal(t)
	for what, end := range map[string]func(*Ring){"locked": (*Ring).Lock, "told to forget": (*Ring).Forget, "closed": (*Ring).Close} {
		r := NewRing(RingOptions{Provider: NewRouter(nil, l), BlockLog2: 12, Trusted: []string{"local:a"}})
		f, err := r.Fresh(t.Context())
		require.NoError(t, err)
		f.Secrets.Wipe()
		require.Equal(t, live+1, crypt.LiveKeys(), what)
		end(r)
		require.Equal(t, live, crypt.LiveKeys(), what)
		r.Close()
	}
}

// A change of the file counts at once, also while the key is kept.
func TestRecentKeyIsWatched(t *testing.T) {
	ec := EncryptionContext{"a": "b"}
	for what, change := range map[string]struct {
		make func(t *testing.T, l *Local, path string)
		want error
	}{
		"disabled": {func(t *testing.T, l *Local, _ string) { require.NoError(t, l.Disable("local:a")) }, KindDisabled.Sentinel()},
		"removed":  {func(t *testing.T, _ *Local, path string) { require.NoError(t, os.Remove(path)) }, KindNotFound.Sentinel()},
		"exposed":  {func(t *testing.T, _ *Local, path string) { require.NoError(t, os.Chmod(path, 0o644)) }, KindRejected.Sentinel()},
		"damaged, in place": {func(t *testing.T, _ *Local, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte("X"), 20)
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}, KindRejected.Sentinel()},
	} {
		t.Run(what, func(t *testing.T) {
			l := settledLocal(t)
			k, blob, err := l.GenerateDataKey(t.Context(), "local:a", ec)
			require.NoError(t, err)
			k.Wipe()
			again, err := l.Decrypt(t.Context(), "local:a", ec, blob)
			require.NoError(t, err)
			again.Wipe()
			require.NotNil(t, l.recent.keys[l.Path("local:a")], "it is not kept, so nothing is tried here")
			change.make(t, l, l.Path("local:a"))
			_, err = l.Decrypt(t.Context(), "local:a", ec, blob)
			require.ErrorIs(t, err, change.want)
		})
	}
}

// A file that was changed a moment ago may be changed again within the same tick of the
// kernel's clock: it is read anew each time.
func TestRecentKeyIsSettled(t *testing.T) {
	l := newTestLocal(t, "local:a")
	_, err := l.Describe(t.Context(), "local:a")
	require.NoError(t, err)
	require.Empty(t, l.recent.keys)
}
