package peers

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// What is always there mounts, stores, is mounted again and ends.
func TestPeers(t *testing.T) {
	w, err := New(t.TempDir())
	require.NoError(t, err)
	defer w.Close()
	for _, p := range []Peer{Backing, Kmsfs, Loopback} {
		t.Run(p.Short, func(t *testing.T) {
			version, err := p.Find(w)
			require.NoError(t, err)
			t.Log(p.Name, version)
			m, err := p.Mount(w, w.Path(p.Short), Options{Daemon: true})
			require.NoError(t, err)
			file := filepath.Join(m.Dir, "file")
			require.NoError(t, os.WriteFile(file, []byte("contents"), 0o644))
			require.NoError(t, m.Stop())
			require.NoError(t, m.Start())
			got, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, "contents", string(got))
			require.Equal(t, p.Short == Backing.Short, m.PID() == 0)
			require.NoError(t, m.End())
			require.NoDirExists(t, w.Path(p.Short))
		})
	}
}
