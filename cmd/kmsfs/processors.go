package main

import (
	"os"
	"runtime"
)

// spareProcessors lets more goroutines run than there are cores, once the FUSE server
// has taken its number of readers from GOMAXPROCS: at most one more than that, and
// three at least, wait in read(2), and each keeps a processor of the scheduler's (a P)
// there. While another is idle they keep it for up to 10 ms; else the scheduler takes it
// away after 20 us and wakes a thread to try it, again and again, and whoever gets a
// request waits for one (retake in Go's runtime/proc.go). GOMAXPROCS in the environment
// is somebody's own choice.
func spareProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		cores := runtime.GOMAXPROCS(0)
		readers := max(cores, 2) + 1
		runtime.GOMAXPROCS(cores + readers + 1)
	}
}
