#!/usr/bin/env bash
# Rekeys one volume with N workers on this machine, with GNU parallel if it is there:
#
#   deploy/rekey-shards.sh N DIR --to KEY [--from KEY] [...]
#
# Everything after DIR is handed to "kmsfs rekey". The same three steps are a Slurm
# job array (docs/MIGRATION.md has the lines).
set -euo pipefail
if [ $# -lt 4 ]; then
	echo "usage: $0 N DIR --to KEY [rekey options]" >&2
	exit 1
fi
n=$1 dir=$2
shift 2
export KMSFS=${KMSFS:-kmsfs}

"$KMSFS" rekey "$dir" "$@" --prepare --yes
status=0
if command -v parallel >/dev/null; then
	parallel --halt never -j "$n" "$KMSFS" rekey "$dir" "$@" --shard "{}/$n" --yes ::: $(seq "$n") || status=$?
else
	workers=()
	for i in $(seq "$n"); do
		"$KMSFS" rekey "$dir" "$@" --shard "$i/$n" --yes &
		workers+=($!)
	done
	for pid in "${workers[@]}"; do
		wait "$pid" || status=$?
	done
fi
if [ "$status" != 0 ]; then
	echo "$0: not every worker has finished its part; the last step goes over the whole tree anyway" >&2
fi
exec "$KMSFS" rekey "$dir" "$@" --yes
