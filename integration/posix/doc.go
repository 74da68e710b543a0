// Package posix holds the mount to the yardstick of DESIGN 4.7: the backing file
// system itself.
//
// Most of it is scenes. A scene does something in a directory that it is given and
// writes down all that a program could notice: results, errnos, attributes,
// contents. It is played in a plain directory first and then on mounts of volumes
// that lie on the same file system, with encrypted and with plain names; the
// transcripts must be the same, line by line. So nobody has to say what is right,
// and a kernel that changes its mind changes both. A departure that has a reason
// stands in integration/POSIX.md and in the scene's exceptions.
//
// Beside scenes there are random operations on one file against a plain one
// (exercise_test.go), on the file systems a volume may lie on, and what is built on
// top of a mount: overlays, bind mounts, containers (stacked_test.go).
package posix
