// Package volume knows the disk: the backing directory as it lies there.
//
// A Volume is opened without any key (Open): that is enough to read its
// settings, every header (ReadHeader, ReplaceHeader) and to walk it (Walk), so a
// rekey works for somebody who can't read a byte. Unlock hands it the secrets of
// the volume key, which the caller fetched (over the network, if the key is in
// KMS); from then on names can be translated. This package itself never talks to
// a key service.
//
// The one door from a plain name to the disk is Dir. Each of its methods takes
// one component and makes one *at call relative to a descriptor, never following
// a symlink: who can rename or plant things in the backing directory can't lead
// the program outside it, and no path is ever rebuilt.
//
// What stands where (docs/FORMAT.md has the bytes):
//
//	kmsfs.toml, kmsfs.toml.bak   the settings, settings.go
//	kmsfs.lock                   who has the volume mounted, lock.go
//	kmsfs.tails                  ends of files while they are written over, tails.go
//	kmsfs.unclean                stands while it is mounted for writing, unclean.go
//	kmsfs.job                    what changes its headers just now, exclusion.go
//	user.kmsfs                   a file's header, header.go
//	user.kmsfs.sparse            permits holes, stored.go
//	user.kmsfs.dir               a directory's id, dirid.go
//	user.kmsfs.u.*               the user's own attributes, xattr.go
//	kmsfs.long.<hash>, *.n       a long name and the symlink that holds it, names.go
//
// Errors of system calls come back as syscall.Errno, bare or wrapped; bytes that
// don't authenticate are crypt.ErrDamaged.
package volume
