package kmstest

import (
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// A Fault makes calls go wrong. The first four fields say which calls; an empty
// one matches all.
type Fault struct {
	Op        string
	Region    string
	Key       string // ARN, as the call names it
	AccessKey string

	Times int // how many calls it hits; 0 = all, until it is lifted

	Delay  time.Duration // before anything else; alone it is latency
	Code   string        // answer with this exception, at its usual status
	Status int           // answer with this HTTP status and a body that is not KMS's (as a proxy would)
	Reset  bool          // reset the connection without an answer
	Hang   bool          // never answer
	// Late makes Code, Status, Reset and Hang strike after the operation was
	// carried out, so that it happened and the caller does not know.
	Late bool
}

type activeFault struct {
	Fault
	left int // -1: no limit
}

// Inject adds a fault. The function returned lifts it.
func (s *Server) Inject(f Fault) (lift func()) {
	a := &activeFault{Fault: f, left: f.Times}
	if f.Times == 0 {
		a.left = -1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, a)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.faults = slices.DeleteFunc(s.faults, func(x *activeFault) bool { return x == a })
	}
}

// SetLatency delays every call. It replaces nothing: faults add up.
func (s *Server) SetLatency(d time.Duration) (lift func()) { return s.Inject(Fault{Delay: d}) }

// Throttle limits each region to rps calls a second, with a second's worth saved
// up at most; 0 lifts it. It replaces what ThrottleRegion set.
func (s *Server) Throttle(rps float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rps = rps
	clear(s.regionRPS)
	clear(s.limits)
}

// ThrottleRegion gives one region a limit of its own, as AWS's quotas differ
// from region to region; 0 is none.
func (s *Server) ThrottleRegion(region string, rps float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.regionRPS[region] = rps
	delete(s.limits, region)
}

// admit takes one call from the region's quota.
func (s *Server) admit(region string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	rps, own := s.regionRPS[region]
	if !own {
		rps = s.rps
	}
	if rps == 0 {
		return true
	}
	if s.limits[region] == nil {
		s.limits[region] = rate.NewLimiter(rate.Limit(rps), max(int(rps), 1))
	}
	return s.limits[region].Allow()
}

// SetDown makes a region's endpoint reset every connection, also of calls that are
// waiting for their answer.
func (s *Server) SetDown(region string, down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down[region] = down
}

// suffer lets faults strike. It reports whether the call goes on.
func (s *Server) suffer(w http.ResponseWriter, r *http.Request, q *request) bool {
	if s.isDown(w, q) {
		return false
	}
	for _, f := range s.hitsOf(q) {
		if f.Delay > 0 && !s.wait(r, f.Delay) {
			q.cut(w, "gone") // an empty answer would read as success
			return false
		}
		if f.Late && (f.Code != "" || f.Status != 0 || f.Reset || f.Hang) {
			_, _ = s.answer(r, parseAuthorization(r.Header.Get("Authorization")), q)
		}
		if s.strike(w, r, q, f) {
			return false
		}
	}
	return !s.isDown(w, q)
}

// isDown resets the connection if the call's region is down.
func (s *Server) isDown(w http.ResponseWriter, q *request) bool {
	s.mu.Lock()
	down := s.down[q.region]
	s.mu.Unlock()
	if down {
		q.cut(w, "reset")
	}
	return down
}

// hitsOf takes the faults that hit a call.
func (s *Server) hitsOf(q *request) (hits []Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.left == 0 || !f.matches(q) {
			continue
		}
		if f.left > 0 {
			f.left--
		}
		hits = append(hits, f.Fault)
	}
	return hits
}

func (f *Fault) matches(q *request) bool {
	return (f.Op == "" || f.Op == q.op) && (f.Region == "" || f.Region == q.region) &&
		(f.AccessKey == "" || f.AccessKey == q.call.AccessKey) &&
		(f.Key == "" || strings.Contains(string(q.body), `"`+f.Key+`"`))
}

// strike ends a call as the fault says, and reports whether it did.
func (s *Server) strike(w http.ResponseWriter, r *http.Request, q *request, f Fault) bool {
	switch {
	case f.Hang:
		s.wait(r, 0)
		q.cut(w, "hang") // an empty answer would read as success
	case f.Reset:
		q.cut(w, "reset")
	case f.Status != 0:
		q.call.Error = http.StatusText(f.Status)
		w.WriteHeader(f.Status)
		_, _ = w.Write([]byte("<html>" + http.StatusText(f.Status) + "</html>"))
	case f.Code != "":
		q.call.Error = f.Code
		s.writeFailure(w, failure(f.Code, "injected by the test"))
	default:
		return false
	}
	q.call.Took = time.Since(q.call.Time)
	return true
}

// wait sleeps (d = 0: for ever) and reports whether the caller is still there.
func (s *Server) wait(r *http.Request, d time.Duration) bool {
	var timer <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
		return true
	case <-r.Context().Done():
	case <-s.quit:
	}
	return false
}

// cut ends a call without an answer. It is logged first: the caller learns of the
// reset at once, and may look at the log.
func (q *request) cut(w http.ResponseWriter, why string) {
	q.call.Error, q.call.Took = why, time.Since(q.call.Time)
	q.end()
	reset(w)
}

// reset closes the connection so that the peer gets ECONNRESET, not EOF.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
