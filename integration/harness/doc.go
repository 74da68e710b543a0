// Package harness runs the built program the way a user does: a binary, private
// directories for its configuration, pins, keys and sockets, volumes on a real
// file system, real FUSE mounts, and real KMS servers on loopback (kmstest of
// this repository, and moto_server, which other people wrote).
//
// A test starts with New, which gives it an Env, then Env.Init makes a Volume:
//
//	func TestMain(m *testing.M) { harness.Main(m) }
//
//	e := harness.New(t)
//	e.Must("key", "create", "one")
//	v := e.Init("volume", "--key", "local:one")
//	v.Mount()
//	... work in v.Mnt ...
//
// Nothing else is needed: when the test ends, each volume is unmounted, mounted
// again read-only and compared with what was there before, and a mount or a
// daemon that is left is a failure. A test that damages its volume says so by
// Volume.Damaged. A machine without FUSE, or without one of the programs a test
// runs, fails the test and never skips it.
package harness
