package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"time"
)

// userHZ is the unit of times in /proc/PID/stat: 100 a second on Linux, whatever the
// kernel's own clock does (proc(5)).
const userHZ = 100

// cpuOf is the CPU time of all threads of a process so far.
func cpuOf(pid int) time.Duration {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name of the program, in parentheses, may hold anything.
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	var user, system int64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		return 0
	}
	return time.Duration(user+system) * time.Second / userHZ
}

// memoryOf is what a process has resident now, and what it had at most, in KiB. (The
// kernel's ru_maxrss won't do: a child's begins with its parent's.)
func memoryOf(pid int) (now, peak int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	field := func(name string) (n int64) {
		if _, rest, ok := strings.Cut(string(status), name); ok {
			_, _ = fmt.Sscan(rest, &n)
		}
		return n
	}
	return field("VmRSS:"), field("VmHWM:")
}
