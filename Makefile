# Every target is one line; "make help" prints what each is for.
SHELL := /bin/bash
export CGO_ENABLED ?= 1
SIZES ?= 10000,200000

.PHONY: help setup build test whole short fips fuzz race lint staticcheck vuln sbom reproducible posix apps demo bench bench-check benchstat bench-rekey rekey-kills crashes torture clean

help: ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what tests and demo need and the machine lacks (FUSE tools, sqlite3, moto_server, ...)
	@scripts/setup.sh test

build: ## build bin/kmsfs, the program
	CGO_ENABLED=0 go build -trimpath -ldflags=-buildid= -o bin/kmsfs ./cmd/kmsfs

test: setup ## everything: unit tests, fuzz seeds, real mounts against kmstest and moto_server (as root: about 10 minutes)
	go test -timeout 30m ./...

whole: setup ## the main job on the whole Go source tree with each kind of key, moto_server too (slow)
	KMSFS_TEST_WHOLE=all go test -count=1 -timeout 60m -v -run TestMainFlowWholeTree ./integration

short: setup ## the quick part of "make test"
	go test -short ./...

fips: ## make test, with every algorithm outside FIPS 140-3 refused (GODEBUG=fips140=only)
	GODEBUG=fips140=only $(MAKE) test

fuzz: ## fuzz each target for FUZZTIME (default 20s)
	@scripts/fuzz.sh $(or $(FUZZTIME),20s)

race: ## the concurrent packages under the race detector
	go test -race -short -timeout 20m ./crypt/... ./keys/... ./volume/... ./fs/... ./rekey/... ./headers/... ./fsck/...

lint: ## go vet, gofmt, the import table, seeds of fuzz targets
	go vet ./... && go test ./internal/lint

staticcheck: ## honnef.co/go/tools, at go.mod's version
	go tool staticcheck ./...

vuln: ## known vulnerabilities in what is called (govulncheck; status 3 if its database can't be reached)
	@scripts/vuln.sh

sbom: build ## bin/kmsfs.cdx.json: every module in the program, CycloneDX
	go run ./internal/sbom bin/kmsfs >bin/kmsfs.cdx.json

reproducible: ## build in two directories and compare the programs byte by byte
	@scripts/reproducible.sh

bench: ## kmsfs beside other file systems, latency of KMS, large numbers (as root; BENCH=-quick: minutes); writes docs/BENCHMARKS.md
	scripts/setup.sh bench && go run ./integration/bench -doc docs/BENCHMARKS.md $(BENCH)

bench-check: setup ## each benchmark in miniature, to see that it works (as root; some minutes)
	KMSFS_TEST_BENCH=1 go test -count=1 -v ./integration/bench

benchstat: ## the packages' own benchmarks of this tree against those of revision OLD, interleaved; RUN=regexp COUNT=10
	scripts/benchstat.sh "$(OLD)" "$(or $(RUN),.)" "$(or $(COUNT),10)"

bench-rekey: setup ## headers a second and peak memory of a rekey, beside a minimal loop and getfattr; SIZES=10000,200000
	go run ./integration/bench rekey -files $(SIZES)

rekey-kills: setup ## kill -9 a rekey KILLS (100) times among FILES (20000) files, on KEYS (local or kmstest) keys
	KMSFS_TEST_KILLS=$(or $(KILLS),100) KMSFS_TEST_FILES=$(or $(FILES),20000) KMSFS_TEST_KEYS=$(or $(KEYS),local) go test -count=1 -timeout 180m -v -run TestRekeyKilledAnywhere ./integration

crashes: setup ## kill -9 mounts under load CRASHES (200) times, cut the power of a disk under logs CUTS (100) times
	KMSFS_TEST_CRASHES=$(or $(CRASHES),200) KMSFS_TEST_CUTS=$(or $(CUTS),100) go test -count=1 -timeout 120m -v -run 'TestKillTearsNothing|TestPowerCut' ./integration

torture: setup ## crashes, faults and mutations at length, and what was tried (CRASHES, KILLS, SCRIPTS, FAULTS, MUTATIONS, INODES: scripts/torture.sh)
	@scripts/torture.sh

posix: setup ## POSIX suites on mounts, at length, then counts side by side with other file systems (PJDFSTEST=DIR, XFSTESTS=DIR: built ones)
	scripts/setup.sh posix && go test -count=1 -timeout 180m ./integration/posix -exercise 30000 && go run ./integration/sidebyside

apps: setup ## PostgreSQL, SQLite, git, a parallel build, rsync, stress-ng on a mount, at length
	go test -count=1 -timeout 60m ./integration/apps -apps.time 60s && go test -count=1 -run 'TestGit|TestSQLite|TestRsync|TestTar|TestSed|TestSparse|TestDd' ./integration

demo: ## the whole main job on a real tree with a local key; leaves nothing behind
	@scripts/demo.sh

clean: ## remove what the targets above made in this directory
	rm -rf bin .venv
