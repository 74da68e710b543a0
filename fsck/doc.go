// Package fsck checks a volume in its backing directory: it never mounts, and
// changes nothing unless it is told to.
//
// Run goes over the tree once, with several goroutines. Without Keys, and without the
// volume's key, it finds what can be told from the outside: malformed or foreign
// headers, sizes against the end rule, names that can't be ours, sidecars without
// entry, ids that stand twice. With the volume unlocked it decrypts names, symlink
// targets and the users' attributes; with Keys it has each file's data key opened (one
// request to the key service a file) and its end authenticated, and with Data set it
// reads every block.
//
// Beside a live mount a file can be caught half-written. So what is found is looked
// for again when the volume is mounted, or when the file changed meanwhile, and only
// what both looks agree on is told; what was written in the last minute is marked as
// Busy even then.
//
// Memory does not grow with the tree. Ids go through a sort in a temporary file
// without a name (25 bytes a file or directory), and the paths of those that stand
// twice are found by going over the tree again. Of what grows with the damage, ids
// that stand twice are kept up to maxTwins, ranges up to maxSpans a file, and a
// quarantine keeps 16 bytes or so for each file that is to go there.
package fsck
