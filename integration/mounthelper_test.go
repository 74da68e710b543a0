package integration

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

// helped makes a mount namespace where mount(8) and umount(8) find kmsfs as their
// helper, and a file fstab, and runs a script in it. Of the machine nothing is changed.
func helped(e *harness.Env, v *harness.Volume, options, script string) string {
	e.T.Helper()
	return e.Shell(`unshare --mount --propagation private bash -euo pipefail -c '
		dir=$1 mnt=$2 root=$3 sbin=$(readlink -f /sbin)
		# A copy of the mount of another test would keep it alive after its end.
		{ findmnt -rno TARGET -t fuse.kmsfs || true; } | while read -r other; do umount -l "$other" || true; done
		mkdir -p "$root/helpers"
		for name in mount umount; do ln -sf "$(type -P kmsfs)" "$root/helpers/$name.fuse.kmsfs"; done
		mount -t overlay overlay -o "ro,lowerdir=$root/helpers:$sbin" "$sbin"
		echo "$dir $mnt fuse.kmsfs $4 0 0" >"$root/fstab"
		refused() { if "$@" 2>&1; then echo "$* was not refused"; exit 1; fi; }
		'"$5" bash "$1" "$2" "$3" "$4"`, v.Dir, v.Mnt, e.Root, options, script)
}

func helpedVolume(t *testing.T) (*harness.Env, *harness.Volume) {
	e := harness.New(t)
	e.Must("key", "create", "one")
	return e, e.Init("volume", "--key", "local:one")
}

// TestFstab mounts by a line of fstab, and again as soon as umount(8) has returned:
// then the daemon must be gone, and have written everything.
func TestFstab(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "noauto,nofail,user,exec,x-systemd.automount,x-systemd.idle-timeout=60,_netdev,allow_other,noatime,key=local:one", `
		for round in 1 2 3 4 5; do
			mount -T "$root/fstab" "$mnt"
			echo $round >>"$mnt/file"
			cat "$mnt/file" | wc -l
			umount "$mnt"
		done
		mount -T "$root/fstab" "$mnt"
		findmnt -no FSTYPE,SOURCE "$mnt"
		findmnt -no OPTIONS "$mnt" | tr , "\n" | grep -E "allow_other|atime|exec|suid|dev|^rw"
		umount "$mnt"`)
	require.Equal(t, "1\n2\n3\n4\n5\nfuse.kmsfs "+v.Dir+"\nrw\nnosuid\nnodev\nnoatime\nallow_other\n", said)
	require.Empty(t, v.Daemons())
}

// TestMountAgain: without options that mount(8) writes down, umount(8) does not ask
// for a helper, and returns while the daemon still has what it must write. The next
// mount waits for that.
func TestMountAgain(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "rw", `
		for round in 1 2 3 4 5; do
			mount -t fuse.kmsfs "$dir" "$mnt"
			for file in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of="$mnt/$file" bs=1M count=4 status=none; done
			umount "$mnt"
		done
		mount -t fuse.kmsfs "$dir" "$mnt"
		kmsfs fsck "$dir" 2>&1 | grep -c "in use by" || true
		umount "$mnt"
		kmsfs fsck "$dir" >/dev/null
		echo checked`)
	require.Equal(t, "1\nchecked\n", said)
}

// TestUmountBind: a bind mount of a directory ends alone, and the mount that it was
// made of may end before it; the daemon serves until both are gone.
func TestUmountBind(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "_netdev", `
		mkdir "$root/bind"
		mount -T "$root/fstab" "$mnt"
		mkdir "$mnt/dir"
		mount --bind "$mnt/dir" "$root/bind"
		umount "$root/bind"
		echo one >"$mnt/dir/file"
		mount --bind "$mnt/dir" "$root/bind"
		kmsfs umount "$mnt"
		cat "$root/bind/file"
		kmsfs umount "$root/bind"
		refused mountpoint -q "$root/bind"`)
	require.Equal(t, "one\n", said)
	require.Empty(t, v.Daemons(), "the last umount waits")
}

// TestUmountElsewhere: while a process has the volume mounted in a mount namespace of its
// own, an umount here says which, and how to end it.
func TestUmountElsewhere(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "rw", `
		kmsfs mount "$dir" "$mnt"
		unshare -m --propagation private sleep 60 &
		until grep -q " $mnt " /proc/$!/mountinfo && [ "$(readlink /proc/$!/ns/mnt)" != "$(readlink /proc/self/ns/mnt)" ]; do sleep 0.01; done
		code=0
		kmsfs umount "$mnt" 2>"$root/said" || code=$?
		sed "s/ $! / PID /g; s|$root|ROOT|g" "$root/said"
		echo "$code"
		refused mountpoint -q "$mnt"
		nsenter -t $! -m umount "$mnt"
		kmsfs fsck "$dir" >/dev/null
		kill $!`)
	require.Equal(t, "kmsfs: ROOT/volume/mnt is unmounted here, but process PID has a mount namespace in which it is still mounted, and the daemon goes on to serve it; "+
		"end that process, or run: nsenter -t PID -m umount -- ROOT/volume/mnt\n6\n", said)
	require.Empty(t, v.Daemons())
}

// TestTermAfterAMove: a daemon whose mount was moved in its own mount namespace does not
// blame another one.
func TestTermAfterAMove(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "rw", `
		kmsfs mount "$dir" "$mnt"
		mkdir "$root/moved"
		mount --move "$mnt" "$root/moved"
		pkill -TERM -f "kmsfs mount $dir $mnt"
		log=$root/state/kmsfs/kmsfs.log
		timeout 10 bash -c "until grep -qE \"not unmounting|unmounted here\" $log; do sleep 0.01; done"
		grep -o "not unmounting: the topmost mount at the mountpoint is not this one" "$log"
		umount -i "$root/moved"`)
	require.Equal(t, "not unmounting: the topmost mount at the mountpoint is not this one\n", said)
	require.Eventually(t, func() bool { return len(v.Daemons()) == 0 }, 10*time.Second, 10*time.Millisecond)
}

// TestMountFlags: every option about times, set-user-ID and devices that mount(8) has
// arrives in the kernel, alone or with others.
func TestMountFlags(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "rw", `
		for options in rw strictatime allow_suid allow_dev allow_suid,allow_dev allow_suid,allow_dev,strictatime \
			allow_suid,allow_dev,nosuid nodiratime noatime,ro sync dirsync noexec,nosuid,strictatime; do
			mount -t fuse.kmsfs -o "$options" "$dir" "$mnt"
			echo "$options: $(findmnt -no OPTIONS "$mnt" | sed "s/,user_id.*//")"
			umount "$mnt"
		done`)
	require.Equal(t, `rw: rw,nosuid,nodev,relatime
strictatime: rw,nosuid,nodev
allow_suid: rw,nodev,relatime
allow_dev: rw,nosuid,relatime
allow_suid,allow_dev: rw,relatime
allow_suid,allow_dev,strictatime: rw
allow_suid,allow_dev,nosuid: rw,nosuid,relatime
nodiratime: rw,nosuid,nodev,nodiratime,relatime
noatime,ro: ro,nosuid,nodev,noatime
sync: rw,nosuid,nodev,relatime,sync
dirsync: rw,nosuid,nodev,relatime,dirsync
noexec,nosuid,strictatime: rw,nosuid,nodev,noexec
`, said)
}

// TestMountHelperOptions: what fstab says arrives, a wrong word in it is refused, and
// so is what would lose data or is not there.
func TestMountHelperOptions(t *testing.T) {
	e, v := helpedVolume(t)
	log := filepath.Join(e.Root, "log")
	said := helped(e, v, "ro,log_file="+log, `
		mount -T "$root/fstab" "$mnt"
		refused touch "$mnt/file" >/dev/null
		refused mount -o remount,rw "$mnt"
		refused umount -f "$mnt"
		umount "$mnt"
		refused mount -t fuse.kmsfs -o misspelled "$dir" "$mnt"
		mount --fake -t fuse.kmsfs "$dir" "$mnt"
		refused mountpoint -q "$mnt"`)
	for _, words := range []string{"was mounted read-only, and its daemon can't write", "umount -i -f", `unknown mount option "misspelled"`} {
		require.Contains(t, said, words)
	}
	require.Contains(t, e.Do("cat", log), "mounted")
	require.Empty(t, v.Daemons())
}

// TestRemount: read-only and back, with a file written before, and a busy mount that
// is taken away.
func TestRemount(t *testing.T) {
	e, v := helpedVolume(t)
	said := helped(e, v, "rw", `
		mount -T "$root/fstab" "$mnt"
		echo before >"$mnt/file"
		mount -o remount,ro "$mnt"
		refused touch "$mnt/file" >/dev/null
		refused touch "$mnt/new" >/dev/null
		cat "$mnt/file"
		mount -o remount,rw,noexec "$mnt"
		findmnt -no OPTIONS "$mnt" | tr , "\n" | grep -E "exec|suid|dev|^r[ow]$"
		umount "$mnt"
		mount -t fuse.kmsfs -o allow_suid,allow_dev,noexec "$dir" "$mnt"
		mount -o remount,ro "$mnt"
		findmnt -no OPTIONS "$mnt" | sed "s/,user_id.*//"
		mount -o remount,rw,exec,nodev "$mnt"
		findmnt -no OPTIONS "$mnt" | sed "s/,user_id.*//"
		mount -o remount,rw "$mnt"
		findmnt -no OPTIONS "$mnt" | sed "s/,user_id.*//"
		for options in noexec ro noatime rw exec,suid; do
			kmsfs mount "$dir" "$mnt" -o "remount,$options"
			findmnt -no OPTIONS "$mnt" | sed "s/,user_id.*//"
		done
		exec 3>>"$mnt/file"
		refused umount "$mnt" >/dev/null
		umount -l "$mnt"
		refused mountpoint -q "$mnt"
		echo after >&3
		exec 3>&-`)
	require.Equal(t, "before\nrw\nnosuid\nnodev\nnoexec\nro,noexec,relatime\nrw,nodev,relatime\nrw,nodev,relatime\n"+
		"rw,nodev,noexec,relatime\nro,nodev,noexec,relatime\nro,nodev,noexec,noatime\nrw,nodev,noexec,noatime\nrw,nodev,noatime\n", said)
	require.Eventually(t, func() bool { return len(v.Daemons()) == 0 }, time.Minute, 50*time.Millisecond, "the last user of a detached mount is gone")
	v.Mount()
	require.Equal(t, "before\nafter\n", e.Do("cat", v.Path("file")))
}
