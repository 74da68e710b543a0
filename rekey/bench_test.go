package rekey

import (
	"context"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkSurvey looks at headers in a tree that is in memory, so what is measured is
// the walk, not the disk.
func BenchmarkSurvey(b *testing.B) {
	const files = 20000
	s := newStage(b, oldKey)
	for i := range files {
		s.file(fmt.Sprintf("d%d/f%d", i/100, i), oldKey)
	}
	v := s.open()
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		c, _, err := Survey(context.Background(), v, 16, nil)
		if err != nil || c.Files != files {
			b.Fatal(c, err)
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N)/files, "cpu-ns/file")
}

// cpu is the processor time of this process in nanoseconds: what it costs, whatever
// else the machine is doing.
func cpu() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}
