package fs

import (
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"github.com/stretchr/testify/require"

	"kmsfs/volume"
)

func TestFirstMount(t *testing.T) {
	w := newWorld(t)
	data := randomBytes(100_000)
	w.write("hello", data)
	require.Equal(t, data, w.read("hello"))
	w.remount()
	require.Equal(t, data, w.read("hello"))
	raw, err := os.ReadFile(w.stored("hello"))
	require.NoError(t, err)
	require.Greater(t, len(raw), len(data))
	require.NotContains(t, string(raw), string(data[:64]))
}

// againstPosix wants record locks of one process to conflict with each other, which
// fcntl(2) rules out: it fails on any plain directory, and go-fuse leaves it out
// there too. TestLocks has what does hold.
const againstPosix = "FcntlFlockLocksFile"

// TestPosix runs go-fuse's suite in both names modes, with and without the
// writeback cache.
func TestPosix(t *testing.T) {
	for _, mode := range []volume.NamesMode{volume.NamesEncrypted, volume.NamesPlain} {
		for _, writeback := range []bool{true, false} {
			for name, test := range posixtest.All {
				label := string(mode) + "/"
				if writeback {
					label += "writeback/"
				} else {
					label += "through/"
				}
				if name == againstPosix {
					continue
				}
				t.Run(label+name, func(t *testing.T) {
					w := newWorld(t, func(s *setup) { s.names, s.opts.Writeback = mode, writeback })
					test(t, w.mnt)
				})
			}
		}
	}
}
