// Package rekey changes under which keys the headers of a volume stand, without
// touching contents: the data keys stay, only what wraps them is replaced, added to,
// or dropped. It is a job over a volume: no FUSE, and no key service but the
// Rewrapper it is given.
//
// What a newcomer must know: a header lists copies of one data key, each under one
// KMS key. Run asks the Rewrapper for another wrapping of the same data key, which
// needs the network if the key is in KMS; with ReEncrypt no plaintext key is ever in
// this process. Survey only counts, and needs no key at all.
//
// The order is what makes it safe to stop anywhere and to run again (run.go):
//
//  1. the new key's copy of the volume key, and the new key in first place, go
//     into kmsfs.toml in one rename (prepare.go);
//  2. a live mount adopts that list, drops the fresh keys it holds, and takes along
//     the files that have no name;
//  3. the tree is swept until a full pass finds nothing under the old key, with
//     nothing having moved past it unheard (sweep.go);
//  4. the backing store is synced;
//  5. only then the old key leaves kmsfs.toml.
//
// A header is judged by itself, and by what it says alone (edit.go): nothing to do,
// or an edit. One that needs nothing is passed over, so a second run goes on where
// the first was killed; there is no journal. With a Shard, Run does a part of step 3
// only.
//
// A pass can't meet what is moved from a place before it to one behind it. If a mount
// is watched (Watch), what it moves is swept where it went. If nobody has the volume
// mounted, whatever vanishes under a pass may have moved past it, and that pass does
// not count; a tree that never rests then keeps its old key.
//
// What rekey does not do: it never changes a data key. If a data key itself leaked,
// copy the file on the mount and rename it over the old one.
package rekey
