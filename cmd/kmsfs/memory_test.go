package main

import (
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var pooled sync.Pool

// What a busy mount took is the system's again when it rests.
func TestMemoryGoesBackAtRest(t *testing.T) {
	const taken = 64 << 20
	func() {
		for range taken >> 20 {
			p := make([]byte, 1<<20)
			for i := range p {
				p[i] = 1
			}
			defer pooled.Put(&p) // all are in use at once
		}
	}()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan struct{})
	defer close(done)
	go keepMemorySmall(done, 50*time.Millisecond)
	require.Eventually(t, func() bool {
		runtime.ReadMemStats(&after)
		return after.HeapReleased >= before.HeapReleased+taken*3/4
	}, 30*time.Second, 100*time.Millisecond)
}
