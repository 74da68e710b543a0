#!/usr/bin/env bash
# benchstat.sh OLD RUN COUNT: runs the packages' own benchmarks whose names match RUN on
# revision OLD and on this tree, turn by turn COUNT times, and compares them.
set -euo pipefail
cd "$(dirname "$0")/.."
old=${1:?say which revision to compare with: make benchstat OLD=main}
run=${2:-.} count=${3:-10}
packages=(crypt volume keys rekey)

work=$(mktemp -d)
trap 'git worktree remove --force "$work/old" 2>/dev/null || true; rm -rf "$work"' EXIT
git worktree add -q --detach "$work/old" "$old"

build() { # build TREE NAME
	for p in "${packages[@]}"; do
		(cd "$1" && go test -c -o "$work/$2.$p.test" "./$p")
	done
}
build "$work/old" old
build . new

for ((i = 0; i < count; i++)); do
	for p in "${packages[@]}"; do
		for name in old new; do
			tree=.
			[ $name = new ] || tree=$work/old
			(cd "$tree/$p" && "$work/$name.$p.test" -test.run '^$' -test.bench "$run" -test.benchtime 200ms) >>"$work/$name.txt"
		done
	done
done
go tool benchstat "$work/old.txt" "$work/new.txt"
