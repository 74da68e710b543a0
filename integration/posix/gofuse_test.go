package posix

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestGoFuse is go-fuse's suite on the backing file system: what fails there is not
// asked of kmsfs. The mounts have it in integration.TestPosix.
func TestGoFuse(t *testing.T) {
	parent := *elsewhere
	if parent == "" {
		parent = t.TempDir()
	}
	var here, root unix.Stat_t
	require.NoError(t, unix.Stat(parent, &here))
	require.NoError(t, unix.Stat("/etc/passwd", &root))
	for name, test := range posixtest.All {
		if name == "FcntlFlockLocksFile" {
			continue // no file system of the kernel's own passes it; integration.notPosix says why
		}
		if name == "OpenSymlinkRace" && here.Dev == root.Dev {
			continue // it tells by the device whether the kernel or the server followed a link
		}
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(parent, name)
			require.NoError(t, os.Mkdir(dir, 0o700))
			test(t, dir)
		})
	}
}
