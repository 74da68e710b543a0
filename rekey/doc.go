// Package rekey moves the headers of a volume from one key to another, without
// touching contents: the data keys stay, only what wraps them is replaced. It is
// a job over a volume: no FUSE, and no key service but the Rewrapper it is given.
//
// What a newcomer must know: a header lists copies of one data key, each under
// one KMS key. Run replaces a copy by asking the Rewrapper for another wrapping
// of the same data key, which needs the network if the key is in KMS; with
// ReEncrypt no plaintext key is ever in this process.
//
// The order is what makes it safe to stop anywhere and to run again (prepare.go,
// sweep.go, run.go):
//
//  1. the new key's copy of the volume key, and the new key in first place, go
//     into kmsfs.toml in one rename;
//  2. a live mount adopts that list and drops the fresh keys it holds;
//  3. the tree is swept until a full pass finds nothing under the old key and no
//     entry vanished under it, for that may have been a rename to a place which the
//     pass had behind it; a tree that never rests keeps its old key;
//  4. the backing store is synced;
//  5. only then the old key leaves kmsfs.toml.
//
// A file that is already under the new key is skipped, so a second run goes on
// where the first was killed; there is no journal.
//
// What rekey does not do: it never changes a data key. If a data key itself
// leaked, copy the file on the mount and rename it over the old one.
package rekey
