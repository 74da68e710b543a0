package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

const (
	alice  = 30001
	bob    = 30002
	nobody = 65534 // fusermount3 wants a user that has a name
)

// TestOwnDirectory: a user without privilege mounts his own directory through
// fusermount3 and works in it.
func TestOwnDirectory(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	e := harness.New(t).As(nobody, nobody)
	v := e.Init("volume", "--key", localKey(e, "one"))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(v.Dir, &st))
	require.EqualValues(t, nobody, st.Uid)
	require.EqualValues(t, 0o700, st.Mode&0o7777)
	v.Mount()
	e.Set("GIT_AUTHOR_NAME", "Alice")
	e.Set("GIT_AUTHOR_EMAIL", "alice@example.org")
	e.Set("GIT_COMMITTER_NAME", "Alice")
	e.Set("GIT_COMMITTER_EMAIL", "alice@example.org")
	work := `cd "$1"
		echo secret >file; test "$(stat -c %u:%g:%a file)" = 65534:65534:644
		(umask 277; echo read-only >created); test "$(stat -c %a created)" = 400; test "$(cat created)" = read-only
		if echo more >>created 2>/dev/null; then echo "a 0400 file was written"; exit 1; fi
		touch empty; chmod 444 empty
		git init -q repo; cd repo; cp -r "$2" tree; git add .; git commit -qm one
		test -n "$(find .git/objects -type f -perm 0444)"
		git gc -q; git fsck --full --strict; cd ..
		mkdir -p a/b; mv file a/b; ln -s b/file a/link; cat a/link; setfattr -n user.colour -v blue a/b/file; getfattr -n user.colour a/b/file
		rm -r a/b; mv created renamed; rm -f empty`
	e.Shell(work, v.Mnt, filepath.Join(harness.GOROOT(t), "src", "encoding", "json"))
	e.Shell(`cd "$1"; printf x >late; chmod 444 late; mv -f late late2; chmod 644 late2; printf y >>late2; test "$(cat late2)" = xy`, v.Mnt)

	second := localKey(e, "two")
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	require.Len(t, v.KeysOf(), 1, "files that could not be rekeyed: %v", v.KeysOf())
	v.Umount()
	v.Mount()
	e.Shell(`cd "$1/repo"; git fsck --full --strict; test -z "$(git status --porcelain)"; test "$(cat ../renamed)" = read-only`, v.Mnt)
	v.Umount()
}

// inNamespace runs the test again in a mount namespace of its own, where
// /dev/fuse is open to everybody, as it is on a machine with udev; here the
// device may well be root's alone. It reports whether we are inside.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const variable = "KMSFS_TEST_NAMESPACE"
	if os.Getenv(variable) != "" {
		return true
	}
	dir := t.TempDir()
	node := filepath.Join(dir, "fuse")
	require.NoError(t, unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))))
	require.NoError(t, os.Chmod(node, 0o666))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	args := []string{"-c", `mount --bind "$0" /dev/fuse && exec "$@"`, node, "/proc/self/exe"}
	self, err := os.Executable()
	require.NoError(t, err)
	args[3] = self
	args = append(args, "-test.run", "^"+t.Name()+"$", "-test.v")
	if testing.Short() {
		args = append(args, "-test.short")
	}
	cmd := exec.Command("sh", args...)
	cmd.Env = append(os.Environ(), variable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "in a mount namespace of its own:\n%s", out)
	require.Contains(t, string(out), "--- PASS: "+t.Name(), "%s", out)
	return false
}

// TestTwoUsers: with --allow-other the mount is a file system like any other.
// Files belong to who makes them, and the kernel keeps users apart.
func TestTwoUsers(t *testing.T) {
	e := harness.New(t)
	v := e.Init("volume", "--key", localKey(e, "one"))
	require.NoError(t, os.Chmod(filepath.Dir(v.Mnt), 0o755))
	v.Options("--allow-other")
	v.Mount()
	require.NoError(t, os.Chmod(v.Mnt, 0o777|os.ModeSticky))
	as := func(uid int) *harness.Env { return e.As(uid, uid) }
	fails := func(uid int, script string) {
		t.Helper()
		r := as(uid).Run("sh", "-c", script, "sh", v.Mnt)
		require.NotZero(t, r.Status, "user %d was allowed to: %s", uid, script)
		require.Contains(t, strings.ToLower(r.Stderr), denied(r.Stderr), "%v", r)
	}
	as(alice).Shell(`cd "$1"; umask 022; echo mine >alice; (umask 077; mkdir private; echo secret >private/file); mkdir shared; chmod 2777 shared; ln -s alice link; mkfifo fifo; umask 0; echo all >open`, v.Mnt)
	for name, mode := range map[string]uint32{"alice": 0o100644, "private": 0o40700, "shared": 0o42777, "link": 0o120777, "fifo": 0o10644, "open": 0o100666} {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(v.Path(name), &st))
		require.EqualValues(t, alice, st.Uid, name)
		require.EqualValues(t, alice, st.Gid, name)
		require.Equal(t, mode, st.Mode, "%s has mode %o", name, st.Mode)
	}
	// (dd, since fs.protected_regular of proc(5) forbids the shell's O_CREAT of another's file here.)
	as(bob).Shell(`cd "$1"; test "$(cat alice)" = mine; echo more | dd of=open oflag=append conv=notrunc,nocreat status=none; echo bob >shared/bob; test "$(stat -c %u:%g shared/bob)" = 30002:30001; mkdir shared/dir; test -g shared/dir`, v.Mnt)
	fails(bob, `cat "$1/private/file"`)
	fails(bob, `ls "$1/private"`)
	fails(bob, `echo x >>"$1/alice"`)
	fails(bob, `rm -f "$1/alice"`)
	fails(bob, `mv "$1/alice" "$1/bob"`)
	fails(bob, `chmod 777 "$1/alice"`)
	fails(bob, `chown 30002 "$1/alice"`)
	fails(bob, `touch -d 2001-01-01 "$1/alice"`)
	fails(bob, `setfattr -n user.x -v y "$1/alice"`)
	e.Do("setfacl", "-m", "u:30002:r", v.Path("private"), v.Path("private", "file"))
	e.Do("setfacl", "-m", "u:30002:rx", v.Path("private"))
	as(bob).Shell(`test "$(cat "$1/private/file")" = secret`, v.Mnt)
	fails(bob, `echo x >>"$1/private/file"`)
	v.Umount()
	v.Options() // without --allow-other it is the mounter's alone
	v.Mount()
	fails(alice, `cat "$1/alice"`)
	require.Empty(t, v.Env.Shell(`getfattr -d -m - "$1/private" 2>&1 >/dev/null`, v.Mnt), "attributes are listed that can't be read")
	v.Umount()
	v.Options("--allow-other")
	v.Mount()
	as(bob).Shell(`test "$(cat "$1/private/file")" = secret`, v.Mnt)
}

// denied picks the words in which a program says that it may not.
func denied(stderr string) string {
	for _, words := range []string{"permission denied", "operation not permitted"} {
		if strings.Contains(strings.ToLower(stderr), words) {
			return words
		}
	}
	return "permission denied"
}

// TestNoSuidNoDev: set-user-id programs and device files in a volume, whose
// modes nobody authenticates, have no power unless root asks for it.
func TestNoSuidNoDev(t *testing.T) {
	v := local(t)
	require.NoError(t, unix.Mknod(v.Path("zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
	require.ErrorIs(t, harness.Try(v.Path("zero"), unix.O_RDONLY, 0), unix.EACCES)
	var fs unix.Statfs_t
	require.NoError(t, unix.Statfs(v.Mnt, &fs))
	require.NotZero(t, fs.Flags&unix.ST_NOSUID)
	require.NotZero(t, fs.Flags&unix.ST_NODEV)
	v.Umount()
	v.Mount("-o", "suid,dev")
	require.NoError(t, harness.Try(v.Path("zero"), unix.O_RDONLY, 0))
	require.NoError(t, unix.Statfs(v.Mnt, &fs))
	require.Zero(t, fs.Flags&unix.ST_NOSUID)
	require.NoError(t, os.Remove(v.Path("zero")))
}
