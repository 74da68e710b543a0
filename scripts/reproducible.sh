#!/usr/bin/env bash
# Builds kmsfs in two directories and compares the programs byte by byte: "make build"
# gives the same program wherever it runs. The second build has an empty cache, or it
# would be handed what the first one compiled; that takes a minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d "${TMPDIR:-/tmp}/kmsfs-reproducible.XXXXXX")
trap 'rm -rf "$work"' EXIT
for copy in one/deeper two; do
	mkdir -p "$work/$copy"
	git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -C "$work/$copy" -xf -
	[ "$copy" = two ] && export GOCACHE=$work/cache
	make -s -C "$work/$copy" build
done
sha256sum "$work/one/deeper/bin/kmsfs" "$work/two/bin/kmsfs" | sed "s,$work/,,"
cmp "$work/one/deeper/bin/kmsfs" "$work/two/bin/kmsfs"
echo "reproducible: the same program from two directories"
