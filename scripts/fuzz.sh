#!/usr/bin/env bash
# Fuzzes every target of the repository, one after the other, for the time given.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
count=0
for pkg in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		echo "fuzz: $pkg $target for $time"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$pkg"
		count=$((count + 1))
	done
done
[ "$count" -gt 0 ] || { echo "fuzz: there is no fuzz target: that can't be" >&2; exit 1; }
echo "fuzz: $count targets, no failure"
