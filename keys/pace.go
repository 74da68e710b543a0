package keys

import (
	"context"
	"math"
	"sync"
	"time"
)

// KMS throttles an account by a quota that nobody can ask for, that differs from
// region to region, and that the account's other programs draw on too. So the
// rate is found by trying: it doubles each second until the first refusal, falls
// to just under what was accepted, and from there creeps up until it is refused
// again. What was accepted is measured, so that one step follows a quota that
// fell to a tenth.
const (
	firstRate = 500 // requests a second; a tenth of the smallest quota that AWS gives by default
	floorRate = 1

	// paceWindow is how long the rate is measured before it is judged, and the
	// least time between two reductions. A slow rate is measured for longer, up
	// to longestWindow: two answers more or less must not decide.
	paceWindow    = 500 * time.Millisecond
	longestWindow = 2 * time.Second
	enoughSent    = 20

	keptShare   = 0.95 // of the accepted rate, after a refusal
	creep       = 0.01 // of the rate after the last reduction, added each second
	leastCreep  = 0.2  // requests a second, each second
	usedShare   = 0.75 // of the rate must be in use for it to rise
	deepestFall = 20   // times in one reduction: a moment without any answer is no measurement
	// After liftAfter without a refusal, several times what creeping takes to meet
	// an unchanged quota, the quota has risen, and the rate rises by liftFactor
	// each second.
	liftAfter  = 20 * time.Second
	liftFactor = 1.25

	// burstTime is what of the rate may be saved up, so that a caller that the
	// operating system wakes late does not lower the rate.
	burstTime = 20 * time.Millisecond
	// longestNap bounds how late a waiting caller sees that the rate has risen.
	longestNap = 100 * time.Millisecond

	// starvation is how long a region may throttle every request before calls fail.
	starvation = time.Minute
)

// A Pacer decides when requests may be sent to KMS: in each region as fast as
// KMS accepts them, and never faster in all than a ceiling. Callers get their
// turn in the order in which they asked. Accounts have quotas of their own; calls
// with several profiles in one region share a pace all the same, that of the
// slowest. It is safe for concurrent use.
type Pacer struct {
	maxRPS  float64 // 0 = no ceiling
	ceiling *bucket // nil if there is none

	mu      sync.Mutex
	regions map[string]*pace // guarded by mu
}

// NewPacer makes a Pacer that sends at most maxRPS requests a second, those that
// KMS throttles included; 0 sets no limit but KMS's own.
func NewPacer(maxRPS float64) *Pacer {
	p := &Pacer{maxRPS: max(maxRPS, 0), regions: map[string]*pace{}}
	if maxRPS > 0 {
		p.ceiling = newBucket(maxRPS)
	}
	return p
}

// PacerStats is what a Pacer is doing now and has done so far.
type PacerStats struct {
	MaxRPS  float64 // the ceiling; 0 = none
	Regions map[string]RegionPace
}

// A RegionPace is the pace of requests to one region.
type RegionPace struct {
	Rate      float64 // requests a second that may be sent now
	Sent      int64
	Throttled int64 // of those, refused for their rate
}

// Stats reads the counters.
func (p *Pacer) Stats() PacerStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := PacerStats{MaxRPS: p.maxRPS, Regions: map[string]RegionPace{}}
	for name, r := range p.regions {
		now := r.stats()
		if p.maxRPS > 0 {
			now.Rate = min(now.Rate, p.maxRPS)
		}
		s.Regions[name] = now
	}
	return s
}

func (p *Pacer) region(name string) *pace {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.regions[name]
	if r == nil {
		r = newPace(time.Now())
		p.regions[name] = r
	}
	return r
}

// A turn is the permission to send one request. Its holder says what came of it.
type turn struct {
	pace *pace // nil without a Pacer
	at   time.Time
}

// wait returns when a request may be sent to a region, or when ctx ends. A nil
// Pacer lets every request pass.
func (p *Pacer) wait(ctx context.Context, region string) (turn, error) {
	if p == nil {
		return turn{}, nil
	}
	r := p.region(region)
	if err := r.bucket.wait(ctx); err != nil {
		return turn{}, err
	}
	// The ceiling comes last: what it let pass is sent at once, so that it holds
	// in every second.
	if p.ceiling != nil {
		if err := p.ceiling.wait(ctx); err != nil {
			return turn{}, err
		}
	}
	now := time.Now()
	r.noteSent(now)
	return turn{r, now}, nil
}

// done tells the pacer how the request ended: nil is success.
func (t turn) done(e *Error) {
	switch {
	case t.pace == nil:
	case throttled(e):
		t.pace.noteThrottled(time.Now(), t.at)
	case e == nil || e.Code != "":
		t.pace.noteAccepted(time.Now())
	}
}

// starved reports whether the region has throttled every request for so long, as
// seen by a call that began at since, that there is no hope for this one.
func (p *Pacer) starved(region string, since time.Time) bool {
	r := p.region(region)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.acceptedAt.After(since) {
		since = r.acceptedAt
	}
	return time.Since(since) > starvation
}

// throttled reports whether KMS refused a request for its rate.
func throttled(e *Error) bool {
	if e == nil {
		return false
	}
	switch e.Code {
	case "ThrottlingException", "Throttling", "RequestLimitExceeded", "TooManyRequestsException":
		return true
	}
	return false
}

// A pace finds the rate of one region.
type pace struct {
	bucket *bucket

	mu      sync.Mutex
	rate    float64   // guarded by mu; the bucket's
	seeking bool      // guarded by mu; no limit was met yet: double each second
	step    float64   // guarded by mu; what is added each second
	lowered time.Time // guarded by mu; when it was last reduced

	opened   time.Time // guarded by mu; when the current window began
	sent     int       // guarded by mu; in this window
	accepted int       // guarded by mu; in this window
	refused  bool      // guarded by mu; in this window
	measured float64   // guarded by mu; what KMS accepted a second in the window before; negative = unknown

	acceptedAt              time.Time // guarded by mu; the last time
	totalSent, totalRefused int64     // guarded by mu
}

func newPace(now time.Time) *pace {
	return &pace{bucket: newBucket(firstRate), rate: firstRate, seeking: true, opened: now, measured: -1, acceptedAt: now}
}

func (p *pace) stats() RegionPace {
	p.mu.Lock()
	defer p.mu.Unlock()
	return RegionPace{Rate: p.rate, Sent: p.totalSent, Throttled: p.totalRefused}
}

func (p *pace) noteSent(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rollLocked(now)
	p.sent++
	p.totalSent++
}

func (p *pace) noteAccepted(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rollLocked(now)
	p.accepted++
	p.acceptedAt = now
}

// noteThrottled lowers the rate, but once per window, and not for a request that
// was sent at a rate which has been lowered since.
func (p *pace) noteThrottled(now, sent time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rollLocked(now)
	p.totalRefused++
	if sent.Before(p.lowered) {
		return
	}
	p.refused = true
	if now.Sub(p.lowered) >= paceWindow {
		p.lowerLocked(now)
	}
}

func (p *pace) lowerLocked(now time.Time) {
	target := keptShare * p.measured
	switch {
	case p.measured < 0:
		target = p.rate / 2
	case target < p.rate/deepestFall:
		target, p.seeking = p.rate/deepestFall, true
	default:
		p.seeking = false
	}
	p.setRateLocked(now, max(min(p.rate, target), floorRate))
	p.step = max(creep*p.rate, leastCreep)
	p.lowered = now
	p.openLocked(now)
}

// rollLocked ends the window if it has lasted long enough, and judges it.
func (p *pace) rollLocked(now time.Time) {
	lasted := now.Sub(p.opened)
	if lasted < paceWindow || p.sent < enoughSent && lasted < longestWindow {
		return
	}
	if lasted > 2*longestWindow { // nobody sent anything for a while
		p.measured = -1
		p.openLocked(now)
		return
	}
	seconds := lasted.Seconds()
	used := float64(p.sent) >= usedShare*p.rate*seconds
	p.measured = -1
	if used || p.refused { // else the callers' own pace was measured
		p.measured = float64(p.accepted) / seconds
	}
	if used && !p.refused {
		p.raiseLocked(now, seconds)
	}
	p.openLocked(now)
}

func (p *pace) raiseLocked(now time.Time, seconds float64) {
	switch {
	case p.seeking:
		p.setRateLocked(now, p.rate*math.Pow(2, seconds))
	case now.Sub(p.lowered) > liftAfter:
		p.setRateLocked(now, p.rate*math.Pow(liftFactor, seconds))
	default:
		p.setRateLocked(now, p.rate+p.step*seconds)
	}
}

func (p *pace) openLocked(now time.Time) {
	p.opened, p.sent, p.accepted, p.refused = now, 0, 0, false
}

func (p *pace) setRateLocked(now time.Time, rate float64) {
	p.rate = rate
	p.bucket.setRate(now, rate)
}

// A bucket hands out turns at a rate. One caller at a time waits for the next
// token; the others stand in line for its place, in order, and whoever gives up
// just leaves the line.
type bucket struct {
	head chan struct{} // holds one value while a caller is at the head of the line

	mu     sync.Mutex
	rate   float64   // guarded by mu; tokens a second
	tokens float64   // guarded by mu
	filled time.Time // guarded by mu
}

func newBucket(rate float64) *bucket {
	b := &bucket{head: make(chan struct{}, 1), rate: rate, filled: time.Now()}
	b.tokens = b.burst()
	return b
}

// burst is how many tokens may be saved up.
func (b *bucket) burst() float64 { return max(1, b.rate*burstTime.Seconds()) }

func (b *bucket) setRate(now time.Time, rate float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fillLocked(now)
	b.rate = rate
	b.tokens = min(b.tokens, b.burst())
}

func (b *bucket) fillLocked(now time.Time) {
	if d := now.Sub(b.filled); d > 0 {
		b.tokens = min(b.tokens+b.rate*d.Seconds(), b.burst())
		b.filled = now
	}
}

// take takes a token, or says how long it will be until there is one.
func (b *bucket) take(now time.Time) (wait time.Duration, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fillLocked(now)
	if b.tokens >= 1 {
		b.tokens--
		return 0, true
	}
	return time.Duration((1-b.tokens)/b.rate*float64(time.Second)) + 1, false
}

func (b *bucket) wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case b.head <- struct{}{}: // blocked senders are served in order
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-b.head }()
	for {
		d, ok := b.take(time.Now())
		if ok {
			return nil
		}
		if err := nap(ctx, min(d, longestNap)); err != nil {
			return err
		}
	}
}

func nap(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
