package crypt

import "sync"

// A rangeLock locks ranges of block numbers, shared or exclusively. Every
// operation takes exactly one contiguous range, so no order can deadlock.
type rangeLock struct {
	mu   sync.Mutex
	free sync.Cond // signalled when a range is released
	held []blockRange
}

type blockRange struct {
	lo, hi int64 // inclusive
	shared bool
}

func newRangeLock() *rangeLock {
	l := new(rangeLock)
	l.free.L = &l.mu
	return l
}

// lock waits until no conflicting range is held, and takes it.
func (l *rangeLock) lock(lo, hi int64, shared bool) blockRange {
	r := blockRange{lo, hi, shared}
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.conflictsLocked(r) {
		l.free.Wait()
	}
	l.held = append(l.held, r)
	return r
}

func (l *rangeLock) conflictsLocked(r blockRange) bool {
	for _, h := range l.held {
		if h.lo <= r.hi && r.lo <= h.hi && !(h.shared && r.shared) {
			return true
		}
	}
	return false
}

func (l *rangeLock) unlock(r blockRange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, h := range l.held {
		if h == r {
			l.held[i] = l.held[len(l.held)-1]
			l.held = l.held[:len(l.held)-1]
			break
		}
	}
	l.free.Broadcast()
}

// A blockSet is a set of block numbers as sorted, disjoint, non-adjacent
// half-open intervals: the gaps of a file that are neither sealed nor declared.
type blockSet struct {
	mu   sync.Mutex
	runs [][2]int64 // guarded by mu
}

func (s *blockSet) add(lo, hi int64) {
	if lo >= hi {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out [][2]int64
	for _, r := range s.runs {
		if r[1] < lo || r[0] > hi {
			out = append(out, r)
			continue
		}
		lo, hi = min(lo, r[0]), max(hi, r[1])
	}
	i := 0
	for i < len(out) && out[i][0] < lo {
		i++
	}
	out = append(out, [2]int64{})
	copy(out[i+1:], out[i:])
	out[i] = [2]int64{lo, hi}
	s.runs = out
}

func (s *blockSet) remove(lo, hi int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.runs) == 0 || lo >= hi {
		return
	}
	var out [][2]int64
	for _, r := range s.runs {
		if r[0] < min(lo, r[1]) {
			out = append(out, [2]int64{r[0], min(lo, r[1])})
		}
		if max(hi, r[0]) < r[1] {
			out = append(out, [2]int64{max(hi, r[0]), r[1]})
		}
	}
	s.runs = out
}

func (s *blockSet) has(block int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.runs {
		if r[0] <= block && block < r[1] {
			return true
		}
	}
	return false
}

// list copies the intervals and counts their blocks.
func (s *blockSet) list() (runs [][2]int64, blocks int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.runs {
		blocks += r[1] - r[0]
	}
	return append(runs, s.runs...), blocks
}
