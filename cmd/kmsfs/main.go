// Command kmsfs mounts directories whose files are encrypted under KMS keys.
//
// main.go alone ends the process, wire.go alone builds clients of key services,
// ui.go is the program's voice; every other file is one command or one helper
// that commands share (trust.go, control.go, daemon.go).
package main

import "os"

func main() { os.Exit(start(os.Args, os.Stdin, os.Stdout, os.Stderr)) }
