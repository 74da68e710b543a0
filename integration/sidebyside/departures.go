package main

// departures are the tests of xfstests that fail on kmsfs, each for a reason that
// stands in POSIX.md.
var departures = []departure{
	{test: "generic/003", reason: "atime moves only when the daemon reads; ctime is that of the store, once it has the kernel's times"},
	{test: "generic/020", reason: "fewer and shorter user attributes fit"},
	{test: "generic/103", backing: "xfs", reason: "each block takes 32 bytes more than statfs(2) lets expect", maybe: true},
	{test: "generic/360", backing: "xfs", reason: "a symlink's target grows when it is encrypted, and xfs holds 1,023 bytes", maybe: true},
	{test: "generic/426", reason: handles},
	{test: "generic/467", reason: handles},
	{test: "generic/477", reason: handles},
	{test: "generic/732", reason: "it mounts one volume twice"},
	{test: "generic/756", reason: handles},
	{test: "generic/777", reason: handles},
	{test: "generic/604", reason: "it mounts 10 ms after it began an umount, and on a busy machine that may come first: then it is refused, as on ext4", maybe: true},
	{test: "generic/394", reason: limits, maybe: true},
	{test: "generic/531", reason: limits, maybe: true},
	{test: "generic/564", reason: limits, maybe: true},
}

const (
	handles = "not all handles of name_to_handle_at(2) can be opened"
	limits  = "it raises a limit, which takes CAP_SYS_RESOURCE"
)
