// Package lint holds the rules of the house as ordinary Go tests: which room may
// import which, what a room must never reach even through others, how two
// imports are named, that the sources are formatted, and that every fuzz target
// has seeds. It exports nothing. When a test here fails, the code moves; the
// table changes only together with ARCHITECTURE.md.
package lint
