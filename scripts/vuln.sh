#!/usr/bin/env bash
# Looks for known vulnerabilities in what kmsfs calls. The database is vuln.go.dev, or
# GOVULNDB=URL (file:///DIR too). If it can't be reached nothing was checked: that is said,
# and is status 3, never 0. "vuln.sh --if-reachable" makes it status 0, for CI without a
# network, and says the same.
set -uo pipefail
cd "$(dirname "$0")/.."
db=${GOVULNDB:-https://vuln.go.dev}
out=$(go tool govulncheck -db "$db" ./... 2>&1)
status=$?
echo "$out"
if [ "$status" != 0 ] && grep -q 'fetching vulnerabilities' <<<"$out"; then
	echo "vuln: NOT CHECKED: the database $db can't be reached; run this where it can, or name a copy with GOVULNDB"
	[ "${1:-}" = --if-reachable ] && exit 0
	exit 3
fi
exit "$status"
