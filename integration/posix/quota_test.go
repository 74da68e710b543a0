package posix

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// quotaDisk is a file system whose subvolume "it" may hold size bytes. btrfs, since its
// quotas are there in every kernel that has it, and bind root too.
func quotaDisk(t *testing.T, e *harness.Env, size int64) {
	t.Helper()
	e.Mkdir("btrfs")
	e.Shell(`truncate -s 512M image; mkfs.btrfs -q image; mount -o loop image btrfs; chmod 755 btrfs
		btrfs quota enable btrfs; btrfs -q subvolume create btrfs/it; btrfs qgroup limit "$1" btrfs/it`, fmt.Sprint(size))
	t.Cleanup(func() { e.Do("umount", filepath.Join(e.Root, "btrfs")) })
}

// TestQuota writes until the quota is used up. Whoever writes hears of it, at the
// latest from fsync; what was synced before stays whole, nothing is damaged, files can
// be removed, and then everything goes on.
func TestQuota(t *testing.T) {
	e := harness.New(t)
	quotaDisk(t, e, 48<<20)
	e.Must("key", "create", "quota")
	v := e.Init("btrfs/it/volume", "--key", "local:quota")
	v.Mount()
	kept := harness.Noise(3<<20 + 17)
	require.NoError(t, writeSynced(v.Path("kept"), kept))
	for _, name := range []string{"tail", "unsynced"} { // none can be made when there is no room
		require.NoError(t, writeSynced(v.Path(name), nil))
	}
	before := fillUp(t, v, unix.EDQUOT)
	require.NotZero(t, before, "nothing fitted")
	tail := appendUntilFull(t, v, unix.EDQUOT)
	refused := overQuota(t, v)
	require.Contains(t, refused, "write")
	closeWithoutSync(t, v.Path("unsynced"))
	intact := func() {
		t.Helper()
		got, err := os.ReadFile(v.Path("kept"))
		require.NoError(t, err)
		require.Equal(t, sha256.Sum256(kept), sha256.Sum256(got))
		got, err = os.ReadFile(v.Path("tail"))
		require.NoError(t, err)
		require.True(t, bytes.HasPrefix(got, tail), "what was synced is not there any more")
	}
	intact()
	for i := range before {
		require.NoError(t, os.Remove(v.Path(fmt.Sprint(i))))
	}
	e.Do("sync", "-f", v.Dir)
	v.Remount()
	intact()
	require.NoError(t, os.WriteFile(v.Path("again"), kept, 0o600))
	require.NoError(t, syncFile(v.Path("again")))
	v.Umount()
	e.Must("fsck", v.Dir, "--data")
	v.Mount()
}

// closeWithoutSync: who does not sync hears by close that something went wrong; the
// kernel's FUSE keeps ENOSPC for it, and EIO for the rest.
func closeWithoutSync(t *testing.T, path string) {
	t.Helper()
	fd, err := harness.Open(path, unix.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = unix.Write(fd, harness.Noise(1<<20))
	require.NoError(t, err, "the kernel holds it back")
	require.ErrorIs(t, unix.Close(fd), unix.EIO)
}

// overQuota tries what needs room; each works or says EDQUOT, and what is refused
// leaves nothing. It gives what was refused.
func overQuota(t *testing.T, v *harness.Volume) (refused []string) {
	t.Helper()
	kept := v.Path("kept")
	for name, try := range map[string]func(path string) error{
		"create": createIn,
		"mkdir":  func(p string) error { return unix.Mkdir(p, 0o755) },
		"mkfifo": func(p string) error { return unix.Mkfifo(p, 0o644) },
		"link":   func(p string) error { return unix.Link(kept, p) },
		"symlink": func(p string) error {
			return unix.Symlink(string(bytes.Repeat([]byte("t"), 3000)), p)
		},
		"tmpfile": func(p string) error {
			return harness.Try(v.Mnt, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		},
		"long":   func(p string) error { return createIn(p + string(bytes.Repeat([]byte("n"), 240))) },
		"write":  func(p string) error { return writeSynced(p, harness.Noise(200_000)) },
		"rename": func(p string) error { return os.Rename(kept, p) },
		"xattr":  func(string) error { return unix.Setxattr(kept, "user.a", harness.Noise(2000), 0) },
		"grow":   func(string) error { return unix.Truncate(kept, 5<<20) },
	} {
		err := try(v.Path("over-" + name))
		if err == nil {
			undo(t, v, name)
			continue
		}
		require.ErrorIs(t, err, unix.EDQUOT, name)
		refused = append(refused, name)
		if name != "write" {
			require.NoFileExists(t, v.Path("over-"+name))
		}
	}
	return refused
}

// undo puts back what worked all the same.
func undo(t *testing.T, v *harness.Volume, name string) {
	t.Helper()
	switch name {
	case "rename":
		require.NoError(t, os.Rename(v.Path("over-rename"), v.Path("kept")))
	case "grow":
		require.NoError(t, os.Truncate(v.Path("kept"), 3<<20+17))
	}
}

// TestQuotasBind: the daemon may not write past the quota of whom a file belongs to,
// as root's programs may. (It can't, anyhow, where root lacks the capability for it;
// TestDaemonKeepsFewCapabilities in cmd/kmsfs shows that it is born without.)
func TestQuotasBind(t *testing.T) {
	e := harness.New(t)
	v := volume(t, e, "volume")
	require.True(t, bound(t, v))
	v.Umount()
	e.Shell(`setsid kmsfs mount "$1" "$2" -f </dev/null >/dev/null 2>&1 & until mountpoint -q "$2"; do sleep 0.1; done`, v.Dir, v.Mnt)
	v.Adopt()
	require.True(t, bound(t, v))
}

// bound reports whether the daemon lacks CAP_SYS_RESOURCE and has the rest.
func bound(t *testing.T, v *harness.Volume) bool {
	t.Helper()
	pids := v.Daemons()
	require.Len(t, pids, 1)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0]))
	require.NoError(t, err)
	found := regexp.MustCompile(`CapEff:\t([0-9a-f]+)`).FindSubmatch(status)
	require.NotNil(t, found)
	caps, err := strconv.ParseUint(string(found[1]), 16, 64)
	require.NoError(t, err)
	require.NotZero(t, caps&(1<<unix.CAP_DAC_OVERRIDE), "%x", caps)
	return caps&(1<<unix.CAP_SYS_RESOURCE) == 0
}
