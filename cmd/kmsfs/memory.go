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
