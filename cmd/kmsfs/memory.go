package main

import (
	"runtime"
	"runtime/debug"
	goruntime "runtime/metrics"
	"time"
)

const (
	trimEvery = 5 * time.Second
	trimBelow = 1 << 20 // bytes allocated since the last look: nothing is going on
)

// heapFloor is how much is allocated at least between two garbage collections, in bytes:
// a mount at work holds a few MiB, and would collect them again and again, each time
// losing go-fuse's pooled buffers of 1 MiB, which are zeroed when they are made anew.
const heapFloor = 64 << 20

// raiseHeap has the collector count memory that is never touched, and so never resident.
func raiseHeap() (ballast []byte) { return make([]byte, heapFloor) }

// keepMemorySmall gives memory back to the system when a mount is at rest. The runtime
// would do so by itself, within minutes.
func keepMemorySmall(done <-chan struct{}, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	allocs := []goruntime.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var before uint64
	trimmed := false
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		goruntime.Read(allocs)
		now := allocs[0].Value.Uint64()
		busy := now-before > trimBelow
		before = now
		if !busy && !trimmed {
			runtime.GC() // a sync.Pool keeps its buffers over one collection
			debug.FreeOSMemory()
		}
		trimmed = !busy
	}
}
