// Package crypt knows bytes: data keys, the header that carries a file's
// wrapped data key, the keys derived from a data key, and the plaintext view
// (File) of a stored file. It never talks to a network, a kernel or a log.
//
// A newcomer starts at header.go (what stands in the xattr), goes on to
// derive.go (which key does what), layout.go (where a record lies) and file.go
// (reads and writes). docs/FORMAT.md has the byte tables.
//
// Contents use FIPS-approved algorithms of the standard library only
// (AES-256-GCM with random nonces, HKDF-SHA-256, HMAC-SHA-256); names, link
// targets and extended attributes use AES-SIV (RFC 5297), outside that claim.
package crypt
