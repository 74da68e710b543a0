package fs

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const userHelper = "KMSFS_TEST_AS_USER"

// TestAsUser runs TestUserMount in a process without privileges: it mounts with
// fusermount3, and the modes of its own files bind it.
func TestAsUser(t *testing.T) {
	dir, err := os.MkdirTemp("", "kmsfs-user-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777))
	exe := filepath.Join(dir, "fs.test")
	from, err := os.Open(os.Args[0])
	require.NoError(t, err)
	defer from.Close()
	to, err := os.OpenFile(exe, os.O_CREATE|os.O_WRONLY, 0o755)
	require.NoError(t, err)
	_, err = io.Copy(to, from)
	require.NoError(t, err)
	require.NoError(t, to.Chmod(0o755))
	require.NoError(t, to.Close())
	// In a mount namespace of its own /dev/fuse is open to all, as udev makes it;
	// whatever is mounted there goes with the process.
	cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c",
		`mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse
		exec setpriv --reuid nobody --regid nogroup --clear-groups ./fs.test -test.run '^TestUserMount$' -test.v`)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), userHelper+"=1", "TMPDIR="+dir, "HOME="+dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestUserMount")
}

func TestUserMount(t *testing.T) {
	if os.Getenv(userHelper) == "" {
		t.Skip("runs inside TestAsUser")
	}
	require.NotZero(t, os.Geteuid())
	w := newWorld(t)
	// git makes its objects 0444 and writes them through the handle it has.
	f, err := os.OpenFile(w.path("object"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	require.NoError(t, err)
	data := randomBytes(100_000)
	_, err = f.Write(data)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	info, err := os.Stat(w.path("object"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o444), info.Mode().Perm())
	require.Equal(t, data, w.read("object"))
	_, err = os.OpenFile(w.path("object"), os.O_WRONLY, 0)
	require.ErrorIs(t, err, syscall.EACCES)
	w.remount()
	require.Equal(t, data, w.read("object"))

	// The mode binds a second open too, when a descriptor is there already.
	r, err := os.Open(w.path("object"))
	require.NoError(t, err)
	defer r.Close()
	_, err = os.OpenFile(w.path("object"), os.O_RDWR, 0)
	require.ErrorIs(t, err, syscall.EACCES)
	require.NoError(t, os.Chmod(w.path("object"), 0o644))
	rw, err := os.OpenFile(w.path("object"), os.O_RDWR, 0) // upgrades the descriptor
	require.NoError(t, err)
	_, err = rw.WriteAt([]byte("changed"), 10)
	require.NoError(t, err)
	require.NoError(t, rw.Close())
	got := make([]byte, 7)
	_, err = r.ReadAt(got, 10)
	require.NoError(t, err)
	require.Equal(t, "changed", string(got))
	require.NoError(t, r.Close())

	require.NoError(t, os.Mkdir(w.path("d"), 0o700))
	require.NoError(t, os.Rename(w.path("object"), w.path("d/o")))
	require.NoError(t, os.Link(w.path("d/o"), w.path("hard")))
	fd, err := unix.Open(w.mnt, unix.O_TMPFILE|unix.O_RDWR, 0o600)
	require.NoError(t, err)
	require.NoError(t, unix.Linkat(unix.AT_FDCWD, procPath(fd), unix.AT_FDCWD, w.path("tmp"), unix.AT_SYMLINK_FOLLOW))
	require.NoError(t, unix.Close(fd))
	require.NoError(t, unix.Access(w.path("d/o"), unix.R_OK|unix.W_OK))
	require.Equal(t, unix.EACCES, unix.Access(w.path("d/o"), unix.X_OK))
	require.Equal(t, unix.EPERM, unix.Chown(w.path("hard"), 0, 0))
}
