#!/usr/bin/env bash
# The main job of kmsfs from end to end, on a real tree, with a local key:
# init, mount, copy a tree in, compare it, look at what lies on disk, rekey it to
# a second key, compare again, unmount. Everything happens in one temporary
# directory, and nothing is left behind. DEMO_TREE names another tree to copy.
set -euo pipefail
cd "$(dirname "$0")/.."

bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'
[ -t 1 ] || bold="" dim="" plain=""
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
show() { # prints a command, then runs it
	printf '%s$ %s%s\n' "$dim" "${*//$work\//}" "$plain"
	"$@"
}
die() {
	echo "demo: $*" >&2
	exit 1
}

scripts/setup.sh demo

work=$(mktemp -d "${TMPDIR:-/tmp}/kmsfs-demo.XXXXXX")
finish() {
	status=$?
	trap - EXIT
	cd /
	if mountpoint -q "$work/mnt"; then
		kmsfs umount "$work/mnt" 2>/dev/null || fusermount3 -uz "$work/mnt" || umount -l "$work/mnt" || true
	fi
	rm -rf --one-file-system "$work"
	[ "$status" = 0 ] || echo "demo: failed with status $status" >&2
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Settings, pins and keys of this demo live in the temporary directory too.
export XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state XDG_RUNTIME_DIR=$work/run
export KMSFS_KEYRING=$work/keys PATH=$work/bin:$PATH
mkdir -p "$work"/{bin,config,state,run,mnt}
chmod 700 "$work/run"

say "Building kmsfs"
CGO_ENABLED=0 go build -trimpath -o "$work/bin/kmsfs" ./cmd/kmsfs
kmsfs version | sed -n 1,3p

tree=${DEMO_TREE:-$(go env GOROOT)/src}
[ -d "$tree" ] || die "there is no tree $tree"
files=$(find "$tree" -type f | wc -l)
cd "$work"

# same TREE: fails unless the mount holds exactly what TREE holds. The first
# comparison reads every byte of both; the second sees owners, modes, times,
# links and extended attributes, and prints a line for each difference.
same() {
	diff -r --no-dereference "$tree" "$1" || die "the contents differ"
	local differences
	differences=$(rsync -aHAXn --delete --itemize-changes "$tree/" "$1/")
	[ -z "$differences" ] || die "the attributes differ:"$'\n'"$differences"
	echo "$files files: every byte and every attribute is the same"
}

say "1. A volume with a local key"
show kmsfs key create first
show kmsfs init backing --key local:first

say "2. Mount it and copy $files files in"
show kmsfs mount backing mnt
started=$SECONDS
mkdir mnt/src
rsync -aHAX "$tree/" mnt/src/
echo "copied $(du -sh --apparent-size "$tree" | cut -f1) in $((SECONDS - started)) s"

say "3. Compare it on the way out"
show kmsfs umount mnt
show kmsfs mount backing mnt
same mnt/src

say "4. What lies on disk: names, contents, and one header"
stored=$(find backing -mindepth 3 -type f -size +2k -print -quit)
show ls -l "$(dirname "$stored")" | sed -n 1,8p
echo
show hexdump -C -n 96 "$stored" 2>/dev/null || od -A x -t x1z -N 96 "$stored"
echo
show kmsfs inspect "$stored"
if grep -rqsm1 'package' backing; then die "plain text in the backing directory"; fi
echo "no file of the backing directory contains the word \"package\""

say "5. Rekey the whole tree to a second key, while it is mounted"
show kmsfs key create second
started=$SECONDS
show kmsfs rekey backing --to local:second --yes
echo "took $((SECONDS - started)) s; the same header now:"
show kmsfs inspect "$stored"

say "6. Compare again, from a fresh mount that has only the second key"
show kmsfs umount mnt
mv keys/first* .
show kmsfs mount backing mnt
same mnt/src

say "7. Unmount"
show kmsfs umount mnt
cd /
say "Done in $SECONDS s. Nothing is left behind."
