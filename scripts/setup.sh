#!/usr/bin/env bash
# Installs what is missing, and only that. "setup.sh demo" is enough to mount and
# compare; "setup.sh test" adds the programs that the tests run on a mount and a
# moto_server (an independent KMS) in a private virtual environment, .venv;
# "setup.sh posix" has what is compared side by side, "setup.sh bench" what speed is
# compared with.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-test}
no_cluster=

need() { # need PROGRAM PACKAGE: remembers PACKAGE if PROGRAM is not there
	command -v "$1" >/dev/null || packages+=("$2")
}

if ! command -v go >/dev/null; then
	echo "setup: Go 1.26 or newer is needed: https://go.dev/doc/install" >&2
	exit 1
fi

packages=()
need fusermount3 fuse3
need setfattr attr
need rsync rsync
if [ "$what" = posix ]; then
	need gocryptfs gocryptfs
	need prove perl
	need openssl openssl # pjdfstest makes names with it
	need bc bc           # and xfstests wants these two
	need mkfs.xfs xfsprogs
fi
if [ "$what" = bench ]; then
	need sqlite3 sqlite3
	need git git
	need setpriv util-linux
	for peer in gocryptfs cryfs securefs encfs rclone; do
		need $peer $peer
	done
	compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || {
		packages+=(postgresql)
		no_cluster=yes
	}
fi
if [ "$what" = test ]; then
	need setfacl acl
	need sqlite3 sqlite3
	need git git
	need tar tar
	need setcap libcap2-bin
	need systemd-analyze systemd
	need setpriv util-linux
	need mkfs.ext4 e2fsprogs
	need mkfs.xfs xfsprogs
	need mkfs.btrfs btrfs-progs
	need gcc gcc
	need make make
	need stress-ng stress-ng
	if ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
		packages+=(postgresql)
		no_cluster=yes
	fi
	command -v moto_server >/dev/null || [ -x .venv/bin/moto_server ] ||
		python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
fi

if [ ${#packages[@]} -gt 0 ]; then
	echo "setup: installing ${packages[*]}"
	if ! command -v apt-get >/dev/null; then
		echo "setup: no apt-get here; please install: ${packages[*]}" >&2
		exit 1
	fi
	root=()
	[ "$(id -u)" = 0 ] || root=(sudo)
	export DEBIAN_FRONTEND=noninteractive
	if [ -n "$no_cluster" ] && [ ! -e /etc/postgresql-common/createcluster.conf ]; then
		# The tests make clusters of their own; nobody asked for one that runs for good.
		"${root[@]}" mkdir -p /etc/postgresql-common
		echo 'create_main_cluster = false' | "${root[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
	fi
	"${root[@]}" apt-get update -qq
	"${root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

if [ "$what" = test ] && ! command -v moto_server >/dev/null && [ ! -x .venv/bin/moto_server ]; then
	echo "setup: installing moto_server into .venv"
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check 'moto[kms,server]>=5,<6'
fi

if [ ! -c /dev/fuse ]; then
	echo "setup: there is no /dev/fuse: load the kernel module (modprobe fuse), or give the container --device /dev/fuse --cap-add SYS_ADMIN" >&2
	exit 1
fi
