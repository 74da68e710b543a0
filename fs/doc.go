// Package fs knows the kernel: it serves a volume's plaintext through FUSE.
//
// Mount mounts an unlocked volume.Volume and returns a Server, which lives until
// somebody unmounts. A newcomer starts at mount.go, goes on to node.go (one node
// for each inode the kernel knows), file.go (what is shared by all handles of a
// regular file) and open.go (where keys come from).
//
// The network is needed in one place only: Keys. It is asked when a file with
// contents is first opened (Open) or is about to be (Prefetch), and when an empty
// file is opened for writing, created or emptied while a writer has it open
// (Fresh): before anything is cut or created, so that a refusal is that call's
// errno. Everything else is local. A
// key that a rekey overtakes on its way to a file is not used (reprime.go). A file
// that a rekey can't meet, having no name, has its header renewed when a new list of
// keys is adopted (renew.go), or at the latest when it is to get a name, which it
// does not get otherwise.
//
// # Objects
//
//   - node: go-fuse's idea of an inode, found by StableAttr (backing inode number
//     and birth time). It remembers no path; the go-fuse tree knows its parent.
//   - cachedDir: the volume.Dir (an O_PATH descriptor) of a directory node, in an
//     LRU bounded by RLIMIT_NOFILE and reopened through the parent. Every call is
//     one *at call on one component.
//   - file: one for each backing regular file that is open, found by (device,
//     inode, birth time), shared by all its links and handles: the descriptor
//     (read-write from the first writable open on), the crypt.File with keys and
//     authoritative size, the number of writers. Gone with its last handle.
//   - handle: one open(2).
//   - orphan: the descriptor of a node whose last name went. It is known to other
//     requests only after the removal, and open until the last of them is done.
//   - bar: why a file may not be used, though it is open: the lease that its keys
//     depend on has ended (lease.go). Reads and opens fail from that moment; then a
//     goroutine that holds no lock has the kernel drop its pages, so that it writes
//     out what it held back; then the keys are wiped and writes fail too. The view
//     stays, for what it knows is nowhere else. When the lease is there again files
//     get their keys back without being asked: reads and writes never wait for Keys.
//   - ahead: which files a program is about to open, foretold from those that it opened
//     (foretell.go), so that Keys is asked for theirs before (ahead.go). One goroutine
//     owns all of it and takes no lock but leaves.
//   - Watch: what was renamed and linked, for a sweep over the backing tree that
//     goes on meanwhile and would miss it (watch.go).
//
// # Locks, in this order; none is held while Keys is asked
//
//  1. file.mu: descriptor, who writes, installing a view, giving it a fresh key.
//     Local I/O may happen under it. A panic ends one request (EIO), so it is
//     released by defer.
//  2. file.timesMu: the times, while gaps are settled and the times kept.
//  3. the locks inside crypt.File.
//  4. file.modeMu: mode bits, while a header is set on a file that forbids
//     writing (DESIGN 4.7).
//  5. moves.mu: shared while an entry is renamed or linked and that is noted, with
//     none of the above held; exclusively, for a moment, by Watch and Moved. The
//     volume's own locks, and Watch.mu of each watcher, are taken under it.
//  6. fileTable.mu, dirCache.mu, orphanage.mu, limiter.mu, Watch.mu, tenure.mu: leaves,
//     no call is made under them but close(2). KeyLeases.Ended is a leaf, too. The
//     locks inside volume.Tails come after those of crypt.File, and after
//     fileTable.mu, where nothing of it waits (BeginRest).
//
// The kernel holds locks of its own around requests: a directory's while it
// creates, renames and unlinks in it, an inode's while it truncates or seeks. So
// nothing here touches the mount itself. A notification to the kernel is sent
// from a goroutine that holds no lock, and no handler waits for one, with two
// exceptions: LSEEK, whose request pins no page (see node.flushBeyond), and an OPEN that
// hands over a small file with file.mu held (whole.go), which no READ asks for.
//
// # What the kernel owns
//
// With the writeback cache, size, mtime and ctime of regular files are the
// kernel's: dirty pages arrive later, in any order, through any handle that may
// write. Hence reads through write-only handles are served, O_APPEND is stripped,
// and gaps between writes are pending zeros until Settle.
package fs
