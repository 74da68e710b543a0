// Package headers keeps what a copy of a backing directory may lose: the headers
// of its files, its directory ids, sparse marks and kmsfs.toml. They stand in
// extended attributes, which many tools drop, and a file without its header is
// lost. Export writes them to a stream, Import puts them back. It is a job over a
// volume: no FUSE, and no key service but the Keys that Import may be given.
//
// The stream (stream.go, docs/FORMAT.md) holds stored paths and wrapped keys only,
// so neither needs a key. It is checksummed, not authenticated: whoever can write
// it can put any header into it. So Import believes nothing of it:
//
//   - a valid header that stands is never replaced by another one, unless Force is
//     set, and then it is saved first (save.go);
//   - with Keys, a header is only put on a file whose contents open under its data
//     key (verify.go);
//   - whatever is written, a mount opens nothing but what a trusted key unwraps and
//     the commitment confirms.
//
// Import reads the file three times: the whole of it to check it (source.go),
// then to plan and to save, then to write (import.go). What is to become of one
// file or directory is decided in apply.go. Running it again resumes.
package headers
