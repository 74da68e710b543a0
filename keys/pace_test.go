package keys

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// A quota is a KMS that throttles, in fake time. Its answers take latency.
type quota struct {
	latency time.Duration
	saved   float64 // seconds' worth that can be saved up

	mu       sync.Mutex
	rate     float64 // guarded by mu; accepted a second
	tokens   float64
	filled   time.Time
	arrived  []time.Time // guarded by mu
	accepted int
	refused  int
}

// newQuota saves up a second's worth, as kmstest does.
func newQuota(rate float64) *quota {
	return &quota{latency: 10 * time.Millisecond, saved: 1, rate: rate, tokens: rate, filled: time.Now()}
}

// set changes the quota.
func (q *quota) set(rate float64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.rate, q.tokens, q.filled = rate, q.saved*rate, time.Now()
}

func (q *quota) counts() (accepted, refused int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.accepted, q.refused
}

func (q *quota) admit() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	q.arrived = append(q.arrived, now)
	q.tokens = min(q.tokens+q.rate*now.Sub(q.filled).Seconds(), max(q.saved*q.rate, 1))
	q.filled = now
	if q.tokens < 1 {
		q.refused++
		return false
	}
	q.tokens--
	q.accepted++
	return true
}

func apiFailure(code string) error {
	return &smithy.GenericAPIError{Code: code, Message: "by the test"}
}

// answer is a request that the quota answers.
func (q *quota) answer(ctx context.Context, _ *awskms.Client) error {
	time.Sleep(q.latency / 2)
	ok := q.admit()
	time.Sleep(q.latency / 2)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !ok {
		return apiFailure("ThrottlingException")
	}
	return nil
}

// busiest is the largest number of requests that arrived within any one second.
func (q *quota) busiest() (most int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	first := 0
	for i, at := range q.arrived {
		for at.Sub(q.arrived[first]) >= time.Second {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// newPacedAWS is a provider whose requests a test answers itself.
func newPacedAWS(t testing.TB, p *Pacer) *AWS {
	t.Helper()
	a, err := NewAWS(AWSOptions{Endpoint: "http://127.0.0.1:1", Pacer: p,
		Credentials: kmstest.Principal{AccessKey: "AKIA", SecretKey: "a-secret-of-some-length"}.Credentials()})
	require.NoError(t, err)
	return a
}

// keepCalling has n callers call a for as long as told; nothing may fail.
func keepCalling(t *testing.T, a *AWS, n int, d time.Duration, f request) {
	t.Helper()
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for range n {
		wg.Go(func() {
			for time.Now().Before(end) {
				if !assert.NoError(t, a.call(context.Background(), opReEncrypt, arnA, f)) {
					return
				}
			}
		})
	}
	wg.Wait()
}

// inPacedTime runs a test in fake time, away from the machine's AWS configuration.
func inPacedTime(t *testing.T, test func(*testing.T)) {
	isolateAWS(t)
	inFakeTime(t, test)
}

// measure is what the quota accepted, as a share of what it would have, and what
// it refused, as a share of all, while f ran.
func (q *quota) measure(f func()) (used, throttled float64) {
	a, r := q.counts()
	start := time.Now()
	f()
	accepted, refused := q.counts()
	accepted, refused = accepted-a, refused-r
	return float64(accepted) / (q.rate * time.Since(start).Seconds()), float64(refused) / float64(accepted+refused)
}

// TestPacerConverges: whatever the quota and however many callers, nearly all of
// the quota is used, little is refused, and nothing fails.
func TestPacerConverges(t *testing.T) {
	for _, c := range []struct {
		rate, saved   float64
		callers       int
		used, refused float64
	}{
		{1000, 1, 16, 0.95, 0.02}, {1000, 1, 64, 0.95, 0.02}, {5000, 1, 64, 0.95, 0.02}, {100, 1, 64, 0.9, 0.05},
		{1000, 0.01, 16, 0.92, 0.02}, {1000, 0.01, 64, 0.92, 0.02}, {5000, 0.01, 64, 0.92, 0.02},
		// The fewer answers tell the rate, the rougher it is.
		{10, 1, 16, 0.85, 0.15}, {2, 1, 16, 0.7, 0.6},
	} {
		t.Run(fmt.Sprintf("%v saving %vs by %d", c.rate, c.saved, c.callers), func(t *testing.T) {
			inPacedTime(t, func(t *testing.T) {
				q, p := newQuota(c.rate), NewPacer(0)
				q.saved = c.saved
				a := newPacedAWS(t, p)
				keepCalling(t, a, c.callers, 15*time.Second, q.answer)
				used, refused := q.measure(func() { keepCalling(t, a, c.callers, 30*time.Second, q.answer) })
				t.Logf("used %.3f, refused %.3f", used, refused)
				require.Greater(t, used, c.used)
				require.Less(t, refused, c.refused)
				s := p.Stats().Regions["us-east-1"]
				accepted, throttled := q.counts()
				require.EqualValues(t, accepted+throttled, s.Sent)
				require.EqualValues(t, throttled, s.Throttled)
				require.InDelta(t, c.rate, s.Rate, max(c.rate/3, 2))
			})
		})
	}
}

// TestPacerFollowsTheQuota: a quota that falls to a tenth is followed within two
// seconds, one that comes back within a minute; nothing fails meanwhile.
func TestPacerFollowsTheQuota(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		q, p := newQuota(1000), NewPacer(0)
		a := newPacedAWS(t, p)
		rate := func() float64 { return p.Stats().Regions["us-east-1"].Rate }
		keepCalling(t, a, 64, 10*time.Second, q.answer)
		require.InDelta(t, 1000, rate(), 150)
		q.set(100)
		keepCalling(t, a, 64, 2*time.Second, q.answer)
		require.InDelta(t, 100, rate(), 15)
		used, refused := q.measure(func() { keepCalling(t, a, 64, 20*time.Second, q.answer) })
		require.Greater(t, used, 0.85)
		require.Less(t, refused, 0.05)
		q.set(1000)
		keepCalling(t, a, 64, time.Minute, q.answer)
		used, _ = q.measure(func() { keepCalling(t, a, 64, 10*time.Second, q.answer) })
		require.Greater(t, used, 0.9)
	})
}

// TestRegionsArePacedApart: a small quota in one region does not slow another.
func TestRegionsArePacedApart(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		small, large := newQuota(50), newQuota(2000)
		p := NewPacer(0)
		a := newPacedAWS(t, p)
		var wg sync.WaitGroup
		end := time.Now().Add(15 * time.Second)
		for i := range 64 {
			key, q := arnA, small
			if i%2 == 0 {
				key, q = arnB, large
			}
			wg.Go(func() {
				for time.Now().Before(end) {
					assert.NoError(t, a.call(context.Background(), opReEncrypt, key, q.answer))
				}
			})
		}
		wg.Wait()
		require.InDelta(t, 50, p.Stats().Regions["us-east-1"].Rate, 15)
		require.InDelta(t, 2000, p.Stats().Regions["eu-west-1"].Rate, 300)
	})
}

// TestPacerStartsWhereNothingIsLeft: a quota that others have used up when a run
// begins, and that comes back later.
func TestPacerStartsWhereNothingIsLeft(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		q, p := newQuota(0), NewPacer(0)
		a := newPacedAWS(t, p)
		time.AfterFunc(20*time.Second, func() { q.set(1000) })
		keepCalling(t, a, 16, 40*time.Second, q.answer)
		_, refused := q.counts()
		require.Less(t, refused, 1500, "it does not hammer a closed door")
		used, _ := q.measure(func() { keepCalling(t, a, 16, 10*time.Second, q.answer) })
		require.Greater(t, used, 0.9)
	})
}

// TestCeiling: no second holds more requests than the ceiling and its small
// burst, retries, DescribeKey and other regions included; and it is used.
func TestCeiling(t *testing.T) {
	for _, rps := range []float64{0.5, 1, 7.5, 100, 1000} {
		t.Run(fmt.Sprint(rps), func(t *testing.T) {
			inPacedTime(t, func(t *testing.T) {
				const seconds = 30
				q, p := newQuota(1e6), NewPacer(rps)
				a := newPacedAWS(t, p)
				var n atomic.Int32
				f := func(ctx context.Context, c *awskms.Client) error {
					if err := q.answer(ctx, c); err != nil {
						return err
					}
					if n.Add(1)%5 == 0 {
						return apiFailure("KMSInternalException")
					}
					return nil
				}
				ctx, cancel := context.WithCancel(context.Background())
				time.AfterFunc(seconds*time.Second, cancel)
				var wg sync.WaitGroup
				for i := range 32 {
					wg.Go(func() {
						for ctx.Err() == nil {
							err := a.call(ctx, opReEncrypt, []string{arnA, arnB}[i%2], f)
							assert.True(t, err == nil || ctx.Err() != nil, "%v", err)
						}
					})
				}
				wg.Wait()
				most := rps + max(1, rps*burstTime.Seconds())
				require.LessOrEqual(t, float64(q.busiest()), most)
				require.GreaterOrEqual(t, float64(len(q.arrived)), 0.95*rps*seconds)
				require.LessOrEqual(t, p.Stats().Regions["eu-west-1"].Rate, rps)
				require.Equal(t, rps, p.Stats().MaxRPS)
			})
		})
	}
}

// TestWaitingForATurnIsFree: sixteen callers share one request a second, each
// waits longer than the deadline of a call, and none fails. They are served in
// the order in which they came.
func TestWaitingForATurnIsFree(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		q, p := newQuota(1000), NewPacer(1)
		a := newPacedAWS(t, p)
		var order []int
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range 16 {
			time.Sleep(time.Millisecond)
			wg.Go(func() {
				assert.NoError(t, a.call(context.Background(), opReEncrypt, arnA, q.answer))
				mu.Lock()
				defer mu.Unlock()
				order = append(order, i)
			})
		}
		start := time.Now()
		wg.Wait()
		require.Greater(t, time.Since(start), defaultDeadline)
		require.IsIncreasing(t, order)
		require.Len(t, order, 16)
	})
}

// TestWaitingEndsWithTheCaller: who leaves the line does so at once, loses no
// turn of those behind, and never sends anything.
func TestWaitingEndsWithTheCaller(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		q, p := newQuota(1000), NewPacer(0.1)
		a := newPacedAWS(t, p)
		require.NoError(t, a.call(context.Background(), opReEncrypt, arnA, q.answer))
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		start := time.Now()
		for range 8 { // one at the head of the line, the rest behind it
			wg.Go(func() {
				err := a.call(ctx, opReEncrypt, arnA, q.answer)
				requireKind(t, err, KindInterrupted, opReEncrypt, arnA)
				assert.Equal(t, time.Second, time.Since(start))
			})
		}
		wg.Go(func() {
			time.Sleep(2 * time.Millisecond)
			assert.NoError(t, a.call(context.Background(), opReEncrypt, arnA, q.answer))
			assert.Less(t, time.Since(start), 11*time.Second)
		})
		time.Sleep(time.Second)
		cancel()
		wg.Wait()
		require.Len(t, q.arrived, 2)

		late, stop := context.WithTimeout(context.Background(), time.Second)
		defer stop()
		requireKind(t, a.call(late, opReEncrypt, arnA, q.answer), KindTimeout, opReEncrypt, arnA)
		requireKind(t, a.call(ctx, opReEncrypt, arnA, q.answer), KindInterrupted, opReEncrypt, arnA)
		require.Len(t, q.arrived, 2)
	})
}

// TestThrottledOftenIsNoFailure: calls that lose most races for a tiny quota go
// on, for longer than the deadline of a call, while others get through.
func TestThrottledOftenIsNoFailure(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		a := newPacedAWS(t, NewPacer(0))
		unlucky, n := 0, 0
		err := a.call(context.Background(), opReEncrypt, arnA, func(context.Context, *awskms.Client) error {
			time.Sleep(time.Second)
			if n++; n < 100 {
				unlucky++
				return apiFailure("ThrottlingException")
			}
			return nil
		})
		require.Error(t, err, "nobody gets through for a minute")
		require.ErrorIs(t, err, crypt.ErrKeyUnavailable)
		require.Greater(t, unlucky, 30)

		stop := make(chan struct{})
		var others sync.WaitGroup
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					assert.NoError(t, a.call(context.Background(), opDecrypt, arnA, func(context.Context, *awskms.Client) error {
						time.Sleep(time.Second)
						return nil
					}))
				}
			}
		})
		unlucky, n = 0, 0
		require.NoError(t, a.call(context.Background(), opReEncrypt, arnA, func(context.Context, *awskms.Client) error {
			time.Sleep(time.Second)
			if n++; n < 100 {
				unlucky++
				return apiFailure("ThrottlingException")
			}
			return nil
		}))
		close(stop)
		others.Wait()
		require.Equal(t, 99, unlucky)
	})
}

// TestSilenceEndsAPacedCall: the pacer excuses throttling and nothing else.
func TestSilenceEndsAPacedCall(t *testing.T) {
	inPacedTime(t, func(t *testing.T) {
		a := newPacedAWS(t, NewPacer(10))
		start := time.Now()
		err := a.call(context.Background(), opDecrypt, arnA, func(ctx context.Context, _ *awskms.Client) error {
			<-ctx.Done()
			return ctx.Err()
		})
		requireKind(t, err, KindTimeout, opDecrypt, arnA)
		require.Equal(t, defaultDeadline, time.Since(start))

		start = time.Now()
		err = a.call(context.Background(), opDecrypt, arnA, func(context.Context, *awskms.Client) error {
			return apiFailure("KMSInternalException")
		})
		requireKind(t, err, KindUnavailable, opDecrypt, arnA)
		require.Greater(t, time.Since(start), defaultDeadline/2)
		require.LessOrEqual(t, time.Since(start), defaultDeadline+time.Second) // and a few turns

		start = time.Now()
		err = a.call(context.Background(), opDecrypt, arnA, func(context.Context, *awskms.Client) error {
			return apiFailure("AccessDeniedException")
		})
		requireKind(t, err, KindDenied, opDecrypt, arnA)
		require.Less(t, time.Since(start), time.Second)
	})
}

// TestIdleTeachesNothing: neither a pause nor callers that are slow themselves
// change the rate, and the first refusal after them only halves it.
func TestIdleTeachesNothing(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		p := newPace(time.Now())
		for range 100 {
			time.Sleep(100 * time.Millisecond)
			p.noteSent(time.Now())
			p.noteAccepted(time.Now())
		}
		require.EqualValues(t, firstRate, p.stats().Rate)
		time.Sleep(time.Hour)
		now := time.Now()
		p.noteSent(now)
		p.noteThrottled(now, now)
		require.EqualValues(t, firstRate/2, p.stats().Rate)
		p.noteThrottled(now, now.Add(-time.Millisecond))
		p.noteThrottled(now, now)
		require.EqualValues(t, firstRate/2, p.stats().Rate, "once per window")
	})
}

func TestThrottlingCodes(t *testing.T) {
	for _, code := range []string{"ThrottlingException", "Throttling", "RequestLimitExceeded", "TooManyRequestsException"} {
		require.True(t, throttled(classify(context.Background(), opDecrypt, arnA, apiFailure(code))), code)
	}
	for _, code := range []string{"LimitExceededException", "KMSInternalException", "AccessDeniedException"} {
		require.False(t, throttled(classify(context.Background(), opDecrypt, arnA, apiFailure(code))), code)
	}
	require.False(t, throttled(classify(context.Background(), opDecrypt, arnA, errors.New("connection reset"))))
	require.False(t, throttled(nil))
}

// TestPacerOnTheWire: each request that KMS sees had its turn, the DescribeKey
// that settles a state included, and the pacer hears of each refusal.
func TestPacerOnTheWire(t *testing.T) {
	isolateAWS(t)
	srv := kmstest.New(t, nil)
	east, west := srv.CreateKey("us-east-1"), srv.CreateKey("eu-west-1")
	gone := srv.Create(kmstest.KeySpec{State: kmstest.PendingDeletion})
	p := NewPacer(0)
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Credentials: srv.Admin().Credentials(), Pacer: p})
	require.NoError(t, err)
	srv.Throttle(20)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 10 {
				k, _, err := a.GenerateDataKey(context.Background(), []string{east, west}[i%2], testContext)
				if assert.NoError(t, err) {
					k.Wipe()
				}
				p.Stats()
			}
		})
	}
	wg.Wait()
	srv.Throttle(0)
	_, _, err = a.GenerateDataKey(context.Background(), gone, nil)
	requireKind(t, err, KindDisabled, opGenerate, gone)
	require.Equal(t, 1, srv.Count(opDescribe))
	refused := map[string]int64{}
	sent := map[string]int64{}
	for _, c := range srv.Calls() {
		sent[c.Region]++
		if c.Error == "ThrottlingException" {
			refused[c.Region]++
		}
	}
	require.NotZero(t, refused["us-east-1"])
	for region, r := range p.Stats().Regions {
		require.Equal(t, sent[region], r.Sent, region)
		require.Equal(t, refused[region], r.Throttled, region)
	}
	require.Len(t, p.Stats().Regions, 2)
}

// BenchmarkPacer runs parallel callers against a kmstest that throttles at 1,000
// requests a second and answers in 10 ms. One iteration is ten seconds, after
// five in which the pacer finds the rate.
func BenchmarkPacer(b *testing.B) {
	isolateAWS(b)
	const limit = 1000
	for _, callers := range []int{16, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			srv := kmstest.New(b, nil)
			from, to := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
			a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Credentials: srv.Admin().Credentials(), Pacer: NewPacer(0)})
			require.NoError(b, err)
			h := newHeader(b, a, from)
			srv.SetLatency(10 * time.Millisecond)
			srv.Throttle(limit)
			var failed atomic.Int64
			run := func(d time.Duration) {
				var wg sync.WaitGroup
				end := time.Now().Add(d)
				for range callers {
					wg.Go(func() {
						for time.Now().Before(end) {
							if _, err := NewRewrapper(a, testVolume).Rewrap(context.Background(), h, from, to); err != nil {
								failed.Add(1)
							}
						}
					})
				}
				wg.Wait()
			}
			run(5 * time.Second)
			var accepted, refused int
			var took time.Duration
			for b.Loop() {
				srv.Reset()
				start := time.Now()
				run(10 * time.Second)
				took += time.Since(start)
				for _, c := range srv.Calls() {
					if c.Error == "" {
						accepted++
					} else {
						refused++
					}
				}
			}
			b.ReportMetric(float64(accepted)/took.Seconds(), "accepted/s")
			b.ReportMetric(100*float64(accepted)/took.Seconds()/limit, "%of-limit")
			b.ReportMetric(100*float64(refused)/float64(accepted+refused), "%throttled")
			b.ReportMetric(float64(failed.Load()), "failures")
		})
	}
}
