// Package apps runs whole programs on a mount: a database that is killed, a build, a
// mirror of a system's tree, and a program that stresses file systems for its living.
// Programs with a shorter errand (git, SQLite under load, tar, sed, cp) have their
// tests one directory up; "make apps" runs both.
//
// The tests are short for CI's sake; -apps.time makes those longer that go on for
// as long as they are let.
package apps
