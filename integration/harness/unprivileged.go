package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/stretchr/testify/require"
)

// unprivilegedVariable says that this test binary was started by AsUser.
const unprivilegedVariable = "KMSFS_TEST_UNPRIVILEGED"

// Unprivileged reports whether the tests run as a user who is not root, and so mount
// through fusermount3.
func Unprivileged() bool { return os.Getenv(unprivilegedVariable) != "" }

// userNamed is a user who has a name, which fusermount3 wants, and nothing else.
const userNamed = 65534

// AsUser runs tests of this binary again, those whose name matches run, as a user
// without privileges: test code, programs and daemon. It does so in a mount namespace,
// where /dev/fuse is open to everybody, as udev makes it, and where fuse.conf lets
// users share their mounts; what is mounted there goes with it. The tests must pass.
func (e *Env) AsUser(run string, flags ...string) (output string) {
	e.T.Helper()
	device, conf := filepath.Join(e.Root, "fuse"), filepath.Join(e.Root, "fuse.conf")
	require.NoError(e.T, syscall.Mknod(device, syscall.S_IFCHR|0o666, 10<<8|229))
	require.NoError(e.T, os.Chmod(device, 0o666))
	require.NoError(e.T, os.WriteFile(conf, []byte("user_allow_other\n"), 0o644))
	id := strconv.Itoa(userNamed)
	args := []string{"-euc", `mount --bind "$1" /dev/fuse; touch /etc/fuse.conf; mount --bind "$2" /etc/fuse.conf; shift 2
		exec setpriv --reuid=` + id + ` --regid=` + id + ` --clear-groups "$@"`, "sh", device, conf,
		shared.self, "-test.v", "-test.timeout", commandLimit.String(), "-test.run", run}
	cmd := e.As(userNamed, userNamed).Command("sh", append(args, flags...)...)
	cmd.Env = append(cmd.Env, unprivilegedVariable+"=1", "KMSFS_TEST_PROGRAM="+shared.kmsfs)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setsid: true, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil {
		require.ErrorAs(e.T, err, &exit)
	}
	require.NoError(e.T, err, "as user %s:\n%s", id, out)
	return string(out)
}
