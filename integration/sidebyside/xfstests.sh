#!/bin/bash
# Runs xfstests' check on a FUSE file system, in the mount namespace that this script
# was started in: nothing of the machine is changed, and all ends with it.
#
#	xfstests.sh WORK SUITE BACKING FSTYPE ARGS...
#
# WORK holds helpers/ (what mount(8) and umount(8) call), prepare and verify (make and
# check a backing directory) and mount-options; a disk with the file system BACKING for
# each of the two devices is made there. FSTYPE is what follows "fuse.". ARGS are for
# check.
set -eu
mount --make-rprivate /
# A copy of another's mount would keep it alive after its end.
findmnt -rn -o TARGET,FSTYPE,SOURCE | awk '$2 ~ /^fuse/ || $3 ~ /^\/dev\/loop/ {print $1}' | tac | while read -r mount; do
	umount -l "$mount" || true
done
work=$1 suite=$2 backing=$3 fstype=$4
shift 4

# mount(8) looks for helpers in /sbin alone.
sbin=$(readlink -f /sbin)
mount -t overlay overlay -o "ro,lowerdir=$work/helpers:$sbin" "$sbin"

# The users that the suite acts as.
cp /etc/passwd /etc/group "$work/"
id=61000
for user in fsgqa fsgqa2 123456-fsgqa; do
	id=$((id + 1))
	getent passwd $user >/dev/null || echo "$user:*:$id:$id::/tmp:/bin/bash" >>"$work/passwd"
	getent group $user >/dev/null || echo "$user:*:$id:" >>"$work/group"
done
mount --bind "$work/passwd" /etc/passwd
mount --bind "$work/group" /etc/group

for device in test scratch; do
	mkdir -p "$work/$device/disk" "$work/$device/mnt"
	truncate -s 6G "$work/$device.img"
	case $backing in
	ext4) mkfs.ext4 -q -F -I 512 "$work/$device.img" ;;
	*) "mkfs.$backing" -q -f "$work/$device.img" ;;
	esac
	mount -o loop "$work/$device.img" "$work/$device/disk"
	"$work/prepare" "$work/$device/disk/backing"
done

# The suite unmounts by the device's name, which umount(8) takes for a mountpoint when
# it is a directory; and it knows FUSE file systems by the type "fuse" alone.
mkdir -p "$work/path"
cat >"$work/path/umount" <<'SHIM'
#!/bin/bash
# It starts no program, for test 604 mounts beside it and must not overtake it.
args=()
for arg; do
	at=$arg
	if [ -d "$arg" ]; then
		while read -r _ _ _ _ point rest; do
			read -r _ source _ <<<"${rest#* - }"
			if [ "$point" = "$arg" ]; then
				at=$arg
				break
			elif [ "$source" = "$arg" ]; then
				at=$point
			fi
		done </proc/self/mountinfo
	fi
	args+=("$at")
done
exec /bin/umount "${args[@]}"
SHIM
cat >"$work/path/df" <<'SHIM'
#!/bin/bash
/bin/df "$@" | sed 's/ fuse\.[a-z]* / fuse /'
exit "${PIPESTATUS[0]}"
SHIM
chmod 755 "$work/path/umount" "$work/path/df"

options=$(cat "$work/mount-options")
cat >"$work/options" <<OPTIONS
export FSTYP=fuse FUSE_SUBTYP=.$fstype
export TEST_DEV=$work/test/disk/backing TEST_DIR=$work/test/mnt
export SCRATCH_DEV=$work/scratch/disk/backing SCRATCH_MNT=$work/scratch/mnt
export MOUNT_OPTIONS="-o $options" TEST_FS_MOUNT_OPTS="-o $options"
export RESULT_BASE=$work/results
OPTIONS
mkdir -p "$work/results"
cd "$suite"
HOST_OPTIONS=$work/options PATH=$work/path:$PATH ./check "$@" </dev/null || true

for device in test scratch; do
	if mountpoint -q "$work/$device/mnt"; then
		umount "$work/$device/mnt"
	fi
	"$work/verify" "$work/$device/disk/backing"
	umount "$work/$device/disk"
done
