package posix

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

var (
	xfstests = flag.String("xfstests", os.Getenv("XFSTESTS"), "a built xfstests' `directory`, whose fsx and fsstress are run (default: $XFSTESTS)")
	fsxOps   = flag.Int("fsx", 200_000, "operations of fsx on each kind of volume, all its ways together")
)

// ltp is a program of a built xfstests, or the end of a test that can't do without.
func ltp(t *testing.T, name string) string {
	t.Helper()
	if *xfstests == "" {
		t.Skipf("%s is part of xfstests, which is not part of this repository: build it, and give its directory with -xfstests or XFSTESTS", name)
	}
	program := filepath.Join(*xfstests, "ltp", name)
	require.FileExists(t, program, "this is not a built xfstests")
	return program
}

// fsxWays are the ways to use one file: fsx writes, reads, maps, truncates, allocates,
// punches, zeroes and copies at random, and compares with what it knows. What the
// mount refuses (to collapse, insert, clone, dedupe) it finds out and leaves out.
var fsxWays = map[string][]string{
	"mixed":   {"-c", "2000"},
	"large":   {"-l", "4194304", "-o", "131072", "-e", "0"},
	"synced":  {"-f", "-c", "500"},
	"direct":  {"-Z", "-R", "-W", "-r", "4096", "-w", "4096", "-t", "4096", "-l", "1048576"},
	"aio":     {"-A", "-c", "2000"},
	"nomap":   {"-R", "-W"},
	"aligned": {"-r", "4096", "-w", "4096", "-t", "4096", "-l", "8388608", "-o", "262144"},
}

// TestFsx runs fsx on each kind of volume.
func TestFsx(t *testing.T) {
	fsx := ltp(t, "fsx")
	for _, kind := range volumeKinds {
		t.Run(kind.String(), func(t *testing.T) {
			e := harness.New(t)
			v := kind.volume(t, e, 1<<30)
			for way, args := range sorted(fsxWays) {
				args = append(args[:len(args):len(args)], "-q", "-S", "1", "-N", strconv.Itoa(*fsxOps/len(fsxWays)), "-P", e.Mkdir("log-"+way), v.Path(way))
				r := e.Run(fsx, args...)
				require.Zero(t, r.Status, "%s: %v", way, r)
			}
			v.Umount()
			e.Must("fsck", "--data", v.Dir)
		})
	}
}

// TestFsstress has many processes make, change, move and remove files at random, all
// in one tree and in every way that a mount has. The tree must be the same after a
// remount, and every block of it authentic.
func TestFsstress(t *testing.T) {
	fsstress := ltp(t, "fsstress")
	for _, kind := range volumeKinds {
		t.Run(kind.String(), func(t *testing.T) {
			e := harness.New(t)
			v := kind.volume(t, e, 4<<30)
			for round := range 3 {
				r := e.Run(fsstress, "-d", v.Mnt, "-p", "8", "-n", strconv.Itoa(*fsxOps/80), "-s", fmt.Sprint(round+1), "-m", "8")
				require.Zero(t, r.Status, "%v", r)
				before := harness.Snapshot(t, v.Mnt)
				require.Greater(t, len(before), 50, "fsstress left nothing to look at")
				v.Umount()
				e.Must("fsck", "--data", v.Dir)
				v.Mount()
				before.Holds(t, v.Mnt)
			}
		})
	}
}
