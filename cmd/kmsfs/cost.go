package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kmsfs/keys"
)

// A costReport is what a live mount has asked of its key service so far, and how much
// of the waiting for it was hidden. Times are in seconds.
type costReport struct {
	Calls       map[string]int64 `json:"calls"` // by operation, retries not counted
	Failures    map[string]int64 `json:"failures"`
	CallSeconds float64          `json:"call_seconds"`

	Cache struct {
		Hits      int64 `json:"hits"`
		Misses    int64 `json:"misses"`
		Coalesced int64 `json:"coalesced"` // opens that joined another's call
		Keys      int   `json:"keys"`
	} `json:"cache"`
	Pool struct {
		Hits  int64 `json:"hits"`
		Waits int64 `json:"waits"`
		Ready int   `json:"ready"`
	} `json:"pool"`
	Prefetch struct {
		Issued int64 `json:"issued"`
		Used   int64 `json:"used"`
		Wasted int64 `json:"wasted"` // wiped, and nobody had asked for it
		Failed int64 `json:"failed"`
		Unused int   `json:"unused"` // remembered, and nobody has asked for it yet
	} `json:"prefetch"`
	OpenWait   waitReport `json:"open_wait"`
	CreateWait waitReport `json:"create_wait"`
}

// A waitReport is what requests waited for the key service.
type waitReport struct {
	Count   int64   `json:"count"`
	Seconds float64 `json:"seconds"`
	Longest float64 `json:"longest_seconds"`
}

func newCostReport(s keys.Stats) *costReport {
	r := &costReport{Calls: s.Calls, Failures: s.Failures, CallSeconds: s.CallTime.Seconds()}
	r.Cache.Hits, r.Cache.Misses, r.Cache.Coalesced, r.Cache.Keys = s.CacheHits, s.CacheMisses, s.Coalesced, s.CacheKeys
	r.Pool.Hits, r.Pool.Waits, r.Pool.Ready = s.PoolHits, s.PoolWaits, s.PoolReady
	p := &r.Prefetch
	p.Issued, p.Used, p.Wasted, p.Failed, p.Unused = s.Ahead, s.AheadUsed, s.AheadWasted, s.AheadFailed, s.AheadUnused
	r.OpenWait = waitReport{s.OpenWaits, s.OpenWaited.Seconds(), s.LongestOpenWait.Seconds()}
	r.CreateWait = waitReport{s.PoolWaits, s.PoolWaited.Seconds(), s.LongestPoolWait.Seconds()}
	return r
}

// lines is what a person reads of it.
func (r *costReport) lines() []string {
	if r == nil {
		return nil
	}
	calls := make([]string, 0, len(r.Calls))
	for _, op := range slices.Sorted(maps.Keys(r.Calls)) {
		calls = append(calls, fmt.Sprintf("%s %d", op, r.Calls[op]))
	}
	if len(calls) == 0 {
		calls = []string{"none"}
	}
	p := r.Prefetch
	return []string{
		"calls of key services: " + strings.Join(calls, ", "),
		fmt.Sprintf("opens: %d keys at hand, %d asked for; %d waited %s", r.Cache.Hits, r.Cache.Misses, r.OpenWait.Count, r.OpenWait),
		fmt.Sprintf("creates: %d keys at hand; %d waited %s", r.Pool.Hits, r.Pool.Waits, r.CreateWait),
		fmt.Sprintf("decrypted ahead: %d, of which used %d, not yet %d, wasted %d, failed %d", p.Issued, p.Used, p.Unused, p.Wasted, p.Failed),
	}
}

func (w waitReport) String() string {
	second := func(s float64) time.Duration {
		return time.Duration(s * float64(time.Second)).Round(time.Millisecond)
	}
	return fmt.Sprintf("%v in all, %v at most", second(w.Seconds), second(w.Longest))
}
