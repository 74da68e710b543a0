// Package peers mounts kmsfs and what it can be compared to, on one machine, side by
// side: the backing store itself, go-fuse's loopback (what a FUSE file system that
// changes nothing reaches) and other encrypting file systems. Programs that come as
// source are built; those that are not installed are told apart from those that fail
// (Absent). Each file system is served by one process in the foreground, so that its
// memory and CPU time can be read.
package peers
