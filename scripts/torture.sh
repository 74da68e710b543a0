#!/usr/bin/env bash
# Crashes, faults and mutations, at length. Each test says at its end what it tried;
# those lines are repeated at the end of all. How much of each is set by the environment:
#   CRASHES    kill -9 of the daemon under load (default 300)
#   KILLS      kill -9 of a rekey (100), among FILES files (20000)
#   SCRIPTS    random scripts of operations, in which the store fails at each call (200)
#   FAULTS     all: each errno at each call of the store under a mount, and a power cut there (all)
#   MUTATIONS  volumes that are harmed at random (1000); KMSFS_TEST_SEED repeats one
#   INODES     how many are looked up for the daemon's memory (100000,1000000)
set -euo pipefail
cd "$(dirname "$0")/.."
export KMSFS_TEST_CRASHES=${CRASHES:-300} KMSFS_TEST_KILLS=${KILLS:-100} KMSFS_TEST_FILES=${FILES:-20000}
export KMSFS_TEST_FAULT_SCRIPTS=${SCRIPTS:-200} KMSFS_TEST_FAULTS=${FAULTS:-all} KMSFS_TEST_MUTATIONS=${MUTATIONS:-1000}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

run() { # packages, tests
	echo "=== $2 in $1 ($(date -u +%H:%M:%S))"
	go test -count=1 -timeout 24h -v -run "$2" "$1" | tee -a "$log"
}

run ./crypt '^(TestKilled|TestPowerCut|TestStoreFails)'
run ./integration '^(TestKill|TestRekeyKilledAnywhere)'
run ./integration '^(TestStoreFails|TestStoreDies|TestMutations|TestKMSRefusalIsAnErrno|TestCreateWithoutKMS)'
run ./integration/posix '^TestFull'
go run ./integration/bench inodes -files "${INODES:-100000,1000000}" | tee -a "$log"
echo
echo "torture: what was tried"
grep -E '[0-9] crashes, |crashes survived|power cuts survived|killed [0-9]+ times|faults injected|mutations tried|inodes looked up' "$log" | sed 's/^ *[a-z_]*\.go:[0-9]*: */  /; s/^\([0-9]\)/  \1/'
