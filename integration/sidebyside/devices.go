package main

import (
	"fmt"
	"path/filepath"
)

func kmsfsDevice(names string) func(w *world) device {
	return func(w *world) device {
		program := filepath.Join(w.root, "kmsfs")
		return device{
			fstype:  "kmsfs",
			options: "allow_other,allow_suid,allow_dev",
			helpers: map[string]string{"mount.fuse.kmsfs": program, "umount.fuse.kmsfs": program},
			prepare: fmt.Sprintf(`mkdir "$1"; %s init "$1" --key local:one --names %s; chmod 755 "$1"`, program, names),
			verify:  fmt.Sprintf(`%s fsck --data "$1"`, program),
		}
	}
}

// helperStart is how the helper of a program begins that knows nothing of mount(8): it
// finds the options, and leaves remounts to the kernel.
const helperStart = `dir=$1 mnt=$2 options= readonly=()
shift 2
while getopts fnsvo:t:N: flag; do
	if [ $flag = o ]; then options=$options,$OPTARG; fi
done
case $options, in
*,remount,*) exec mount -i -o "${options#,}" "$mnt" ;;
*,ro,*) readonly=(-ro) ;;
esac
`

func loopbackDevice(w *world) device {
	return device{
		fstype:  "loopback",
		options: "allow_other",
		helpers: map[string]string{"mount.fuse.loopback": helperStart + fmt.Sprintf(`setsid %s -q -allow-other "${readonly[@]}" "$mnt" "$dir" </dev/null >/dev/null 2>&1 &
for _ in {1..200}; do
	if mountpoint -q "$mnt"; then exit 0; fi
	sleep 0.05
done
exit 32
`, filepath.Join(w.root, "loopback"))},
		prepare: `mkdir "$1"`, verify: "true",
	}
}

func gocryptfsDevice(w *world) device {
	secret := filepath.Join(w.root, "password")
	return device{
		fstype:  "gocryptfs",
		options: "allow_other",
		helpers: map[string]string{"mount.fuse.gocryptfs": helperStart + fmt.Sprintf(`exec gocryptfs -q -allow_other -suid -dev "${readonly[@]}" -passfile %s "$dir" "$mnt" >/dev/null 2>&1
`, secret)},
		prepare: fmt.Sprintf(`mkdir "$1"; echo password >%s; gocryptfs -init -q -passfile %s "$1"; chmod 755 "$1"`, secret, secret),
		verify:  fmt.Sprintf(`gocryptfs -fsck -q -passfile %s "$1"`, secret),
	}
}
