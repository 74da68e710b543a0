package fs

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// The first write to a file installs its header, and fails (the disk is full). The file
// stores no byte, but keeps that generation for the next write. A rekey sweeps such
// files like others; then there is room, and the contents go under the header that the
// rekey has left, not under the one of before.
func TestFirstWriteFailsAndARekeyComes(t *testing.T) {
	small, err := os.MkdirTemp("", "small")
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH); _ = os.Remove(small) })
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m,mode=0777"); err != nil {
		require.NotZero(t, os.Geteuid(), "mounting a tmpfs: %v", err)
		t.Skip("only root may mount: ", err)
	}
	t.Setenv("TMPDIR", small)
	w := newWorld(t, plainNames, func(s *setup) { s.opts.Writeback = false })
	f, err := os.Create(w.path("f"))
	require.NoError(t, err)
	defer f.Close()
	full := filepath.Join(small, "full")
	_ = os.WriteFile(full, make([]byte, 2<<20), 0o600)
	_, err = f.Write([]byte("contents"))
	require.ErrorIs(t, err, unix.ENOSPC)

	stored := filepath.Join(w.backing, "f")
	header := func() string {
		buf := make([]byte, crypt.MaxHeader)
		n, err := unix.Getxattr(stored, crypt.HeaderXattr, buf)
		if err != nil {
			return ""
		}
		return string(buf[:n])
	}
	st, err := os.Stat(stored)
	require.NoError(t, err)
	require.Zero(t, st.Size(), "the sweep says Empty")
	h, err := crypt.ParseHeader([]byte(header()))
	require.NoError(t, err)
	h.Copies = []crypt.Copy{{Key: "local:rekeyed", Blob: []byte("rewrapped")}}
	raw, err := h.Marshal()
	require.NoError(t, err)
	require.NoError(t, unix.Setxattr(stored, crypt.HeaderXattr, raw, 0))
	require.NoError(t, w.srv.Reprime(context.Background()))
	require.NoError(t, os.Remove(full))
	_, err = f.WriteAt([]byte("contents"), 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.Equal(t, string(raw), header(), "the header of before the rekey came back")
}
