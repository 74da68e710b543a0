package fs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// as runs a shell command as another user, in the mount. The child enters it only
// after exec: between fork and exec it would wait for a server that its own parent
// is, and the parent for it.
func (w *world) as(uid, gid uint32, script string) (string, error) {
	cmd := exec.Command("sh", "-c", `cd "$0" || exit; `+script, w.mnt)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (w *world) mustAs(uid, gid uint32, script string) string {
	w.t.Helper()
	out, err := w.as(uid, gid, script)
	require.NoError(w.t, err, "%s: %s", script, out)
	return out
}

func allowOther(s *setup) { s.opts.AllowOther, s.opts.Suid = true, true }

// manyUsers is a world that anybody may enter.
func manyUsers(t *testing.T) *world {
	w := newWorld(t, allowOther)
	for p := filepath.Dir(w.mnt); p != "/tmp" && p != "/"; p = filepath.Dir(p) {
		require.NoError(t, os.Chmod(p, 0o755))
	}
	require.NoError(t, os.Chmod(w.mnt, 0o777))
	return w
}

func TestOwnership(t *testing.T) {
	w := manyUsers(t)
	stat := func(name string) string { return w.mustAs(0, 0, "stat -c '%u:%g %a' "+name) }
	w.mustAs(1001, 1002, "umask 027; echo x > f; mkdir d; mkfifo p; ln -s f l")
	require.Equal(t, "1001:1002 640", stat("f"))
	require.Equal(t, "1001:1002 750", stat("d"))
	require.Equal(t, "1001:1002 640", stat("p"))
	require.Equal(t, "1001:1002 777", stat("l"))
	_, err := w.as(1003, 1003, "cat f")
	require.Error(t, err, "the kernel enforces modes")
	require.Equal(t, "x", w.mustAs(1003, 1002, "cat f"))

	// setgid directories hand their group on.
	w.mustAs(0, 0, "mkdir s; chgrp 1005 s; chmod 2777 s")
	w.mustAs(1001, 1002, "umask 0; mkdir s/d; echo > s/f")
	require.Equal(t, "1001:1005 2777", stat("s/d"))
	require.Equal(t, "1001:1005 666", stat("s/f"))

	// sticky directories protect.
	w.mustAs(0, 0, "mkdir t; chmod 1777 t")
	w.mustAs(1001, 1002, "echo > t/f")
	_, err = w.as(1003, 1003, "rm -f t/f")
	require.Error(t, err)
}

// Setuid bits asked for at creation stay; writing by others than root clears them.
func TestSetuidBits(t *testing.T) {
	w := manyUsers(t)
	mode := func(name string) os.FileMode {
		info, err := os.Stat(w.path(name))
		require.NoError(t, err)
		return info.Mode() & (os.ModePerm | os.ModeSetuid | os.ModeSetgid)
	}
	fd, err := unix.Open(w.path("made"), unix.O_CREAT|unix.O_WRONLY, 0o6755)
	require.NoError(t, err)
	require.NoError(t, unix.Close(fd))
	require.Equal(t, os.ModeSetuid|os.ModeSetgid|0o755, mode("made"))

	for name, change := range map[string]string{
		"write":     "printf x >> f",
		"truncate":  "truncate -s 3 f",
		"otrunc":    ": > f",
		"fallocate": "fallocate -l 100000 f",
	} {
		t.Run(name, func(t *testing.T) {
			w.mustAs(1001, 1002, "rm -f f; echo contents > f; chmod 6777 f")
			require.Equal(t, os.ModeSetuid|os.ModeSetgid|0o777, mode("f"))
			w.mustAs(1003, 1003, change)
			require.Equal(t, os.FileMode(0o777), mode("f"))
		})
	}
	w.mustAs(1001, 1002, "rm -f f; echo contents > f; chmod 6777 f")
	w.mustAs(0, 0, "printf x >> f")
	require.Equal(t, os.ModeSetuid|os.ModeSetgid|0o777, mode("f"), "root may")
}

// The kernel must not go on with the old mode: it executes by it, and tells it to
// whoever asks for nothing else.
func TestSetuidIsForgottenAtOnce(t *testing.T) {
	w := manyUsers(t)
	for _, change := range []string{"printf x >> f", "printf x | dd of=f conv=notrunc status=none", "fallocate -l 100000 f", "fallocate -p -o 0 -l 4 f"} {
		w.mustAs(1001, 1002, "rm -f f; printf contents: > f; chmod 6777 f")
		w.mustAs(1003, 1003, change)
		var st unix.Statx_t
		require.NoError(t, unix.Statx(unix.AT_FDCWD, w.path("f"), 0, unix.STATX_MODE, &st))
		require.EqualValues(t, 0o777, st.Mode&0o7777, change)
	}
	// What root writes keeps the bits, and loses the capabilities.
	w.mustAs(1001, 1002, "rm -f f; printf contents: > f; chmod 6777 f")
	require.NoError(t, unix.Setxattr(w.path("f"), capsXattr, someCaps, 0))
	w.mustAs(0, 0, "printf x >> f")
	require.Equal(t, "6777", w.mustAs(0, 0, "stat -c %a f"))
	_, err := unixGetxattr(w.path("f"), capsXattr)
	require.Equal(t, unix.ENODATA, err)
}

// Setgid on what its group may not execute goes with a write from outside the group;
// with an access ACL from outside it goes from everything, and setuid stays.
func TestSetgidIsTheGroups(t *testing.T) {
	w := manyUsers(t)
	w.mustAs(1001, 1002, "printf x > f; chmod 2767 f")
	w.mustAs(1003, 1002, "printf x >> f")
	require.Equal(t, "2767", w.mustAs(0, 0, "stat -c %a f"))
	w.mustAs(0, 0, "setpriv --reuid=1003 --regid=1003 --groups=1002 sh -c 'printf x >> f'")
	require.Equal(t, "2767", w.mustAs(0, 0, "stat -c %a f"))
	w.mustAs(1003, 1003, "printf x >> f")
	require.Equal(t, "767", w.mustAs(0, 0, "stat -c %a f"))

	w.mustAs(0, 0, "mkdir d; echo x > g; chown 1001:1002 d g; chmod 6777 d g")
	w.mustAs(1001, 1003, "setfacl -d -m u:1004:r d")
	require.Equal(t, "6777", w.mustAs(0, 0, "stat -c %a d"))
	w.mustAs(1001, 1003, "setfacl -m u:1004:rx d; setfacl -m u:1004:rx g")
	require.Equal(t, "4777\n4777", w.mustAs(0, 0, "stat -c %a d g"))
}

// Attributes of root's own are listed for root only.
func TestTrustedXattrsAreHidden(t *testing.T) {
	w := manyUsers(t)
	w.mustAs(1001, 1002, "echo > f; setfattr -n user.theirs -v x f")
	require.NoError(t, unix.Setxattr(w.path("f"), "trusted.ours", []byte("x"), 0))
	require.Equal(t, "# file: f\nuser.theirs", w.mustAs(1001, 1002, "getfattr -m - f"))
	require.Equal(t, "# file: f\ntrusted.ours\nuser.theirs", w.mustAs(0, 0, "getfattr -m - f"))
}

func TestACLs(t *testing.T) {
	if _, err := exec.LookPath("setfacl"); err != nil {
		t.Log("setfacl is not installed: ACLs are set by hand")
	}
	w := manyUsers(t)
	// u::rwx u:1003:rwx g::--- m::rwx o::---, acl(5)'s on-disk form, version 2.
	acl := []byte{2, 0, 0, 0,
		1, 0, 7, 0, 255, 255, 255, 255,
		2, 0, 7, 0, 235, 3, 0, 0,
		4, 0, 0, 0, 255, 255, 255, 255,
		16, 0, 7, 0, 255, 255, 255, 255,
		32, 0, 0, 0, 255, 255, 255, 255}
	w.write("f", []byte("secret"))
	require.NoError(t, os.Chmod(w.path("f"), 0o600))
	_, err := w.as(1003, 1003, "cat f")
	require.Error(t, err)
	require.NoError(t, unix.Setxattr(w.path("f"), "system.posix_acl_access", acl, 0))
	require.Equal(t, "secret", w.mustAs(1003, 1003, "cat f"))
	_, err = w.as(1004, 1004, "cat f")
	require.Error(t, err)
	// A default ACL takes the umask's place.
	require.NoError(t, os.Mkdir(w.path("d"), 0o777))
	require.NoError(t, unix.Setxattr(w.path("d"), "system.posix_acl_default", acl, 0))
	w.mustAs(0, 0, "umask 077; echo hers > d/f; mkdir d/d")
	require.NoError(t, os.Chmod(w.path("d"), 0o777))
	require.Equal(t, "hers", w.mustAs(1003, 1003, "cat d/f"))
	got, err := unixGetxattr(w.path("d/d"), "system.posix_acl_default")
	require.NoError(t, err)
	require.Equal(t, acl, got)
	w.mustAs(0, 0, "umask 077; echo > plain")
	info, err := os.Stat(w.path("plain"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
}

// Without setuid support in the mount, what is stored has no power.
func TestNosuidByDefault(t *testing.T) {
	w := newWorld(t)
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(w.mnt, &st))
	require.NotZero(t, st.Flags&unix.ST_NOSUID)
	require.NotZero(t, st.Flags&unix.ST_NODEV)
}
