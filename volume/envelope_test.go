package volume

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
)

func newSharedVolume(t *testing.T) (*Volume, *testKey) {
	t.Helper()
	k := newTestKey(t, NamesPlain)
	k.settings.Shared = true
	dir := filepath.Join(t.TempDir(), "vol")
	require.NoError(t, Create(dir, k.settings, k.secrets))
	return openVolume(t, dir, k), k
}

func TestSharedEnvelopeIsKept(t *testing.T) {
	v, k := newSharedVolume(t)
	s := v.Settings()
	require.True(t, s.Shared)
	require.Equal(t, EnvelopeShared, s.Envelope())
	require.NotEqual(t, k.settings.Digest(), (&Settings{Format: s.Format, ID: s.ID, BlockSize: s.BlockSize, Names: s.Names}).Digest(), "a pin would not notice")
	require.NoError(t, v.Update(func(s *Settings) error { return nil }))
	again := openVolume(t, v.Path(), k)
	require.True(t, again.Settings().Shared)
	require.Error(t, again.Update(func(s *Settings) error { s.Shared = false; return nil }))
	raw, err := os.ReadFile(filepath.Join(v.Path(), SettingsFile))
	require.NoError(t, err)
	require.Contains(t, string(raw), "envelope = 'shared'")
}

// What kmsfs.toml of an ordinary volume says, and what its MAC covers, is what it was
// before there was a choice: such volumes open, and older programs read new ones.
func TestPerFileEnvelopeLeavesNoTrace(t *testing.T) {
	k := newTestKey(t, NamesPlain)
	require.Equal(t, "kmsfs settings\nformat 1\nvolume 05050505050505050505050505050505\nblock_size 4096\nnames plain\n", string(k.settings.unchanging()))
	raw, err := k.settings.encode()
	require.NoError(t, err)
	require.NotContains(t, string(raw), "envelope")
}

// Who can write the backing directory and not the MAC can neither make a volume shared
// nor the reverse, and a word that is not known is refused.
func TestEnvelopeIsAuthenticated(t *testing.T) {
	edit := func(v *Volume, old, new string) error {
		for _, name := range []string{SettingsFile, BackupFile} {
			path := filepath.Join(v.Path(), name)
			raw, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Contains(t, string(raw), old)
			require.NoError(t, os.WriteFile(path, []byte(strings.Replace(string(raw), old, new, 1)), 0o600))
		}
		_, err := v.Reload()
		require.Error(t, err, "a live mount")
		again, err := Open(v.Path())
		if err != nil {
			return err
		}
		defer again.Close()
		k := newTestKey(t, NamesPlain)
		k.secrets = v.secrets
		return again.Unlock(k.clone(t))
	}
	shared, _ := newSharedVolume(t)
	require.ErrorIs(t, edit(shared, "envelope = 'shared'\n", ""), crypt.ErrDamaged)
	plain, _ := newVolume(t, NamesPlain)
	require.ErrorIs(t, edit(plain, "keys = [", "envelope = 'shared'\nkeys = ["), crypt.ErrDamaged)
	for _, word := range []string{"per-file", "Shared", "none"} {
		odd, _ := newSharedVolume(t)
		require.ErrorContains(t, edit(odd, "'shared'", "'"+word+"'"), word)
	}
}

// A header of one kind is damage on a volume of the other.
func TestHeaderOfAnotherEnvelope(t *testing.T) {
	header := func(v *Volume, shared bool) []byte {
		id, err := crypt.NewIdentity(v.ID(), crypt.UseFile, 12)
		require.NoError(t, err)
		id.Shared, id.File[14] = shared, 1
		raw, err := (&crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:test", Blob: []byte("blob")}}}).Marshal()
		require.NoError(t, err)
		return raw
	}
	shared, _ := newSharedVolume(t)
	plain, _ := newVolume(t, NamesPlain)
	for _, v := range []*Volume{shared, plain} {
		_, err := v.ParseHeader(header(v, v == shared))
		require.NoError(t, err)
		_, err = v.ParseHeader(header(v, v != shared))
		require.ErrorIs(t, err, crypt.ErrDamaged)
		require.ErrorContains(t, err, "another envelope")
	}
}
