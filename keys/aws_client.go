package keys

import (
	"context"
	"crypto/fips140"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
)

const (
	// defaultDeadline bounds one call with all its retries.
	defaultDeadline = 10 * time.Second
	// dialTimeout is how long one connection attempt may take: well under the
	// deadline, so that a lost SYN costs a retry and not the call.
	dialTimeout = 3 * time.Second
	// idlePerHost keeps the connections of a burst; the SDK keeps 10, and a
	// parallel rekey would open a TLS connection for nearly every call.
	idlePerHost = 256

	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
	pacedBackoff = 10 * time.Millisecond

	// minFIPSSecret: SigV4 keys an HMAC with "AWS4" and the secret; under
	// GODEBUG=fips140=only, HMAC panics with a key below 112 bits.
	minFIPSSecret = 10
)

// AWSOptions say how to reach KMS. The zero value takes everything from the
// SDK's usual places (environment, shared configuration, instance role).
type AWSOptions struct {
	Profile     string                  // of the shared AWS configuration
	Endpoint    string                  // URL for every region, in place of AWS_ENDPOINT_URL_KMS
	Credentials aws.CredentialsProvider // in place of the SDK's chain
	Deadline    time.Duration           // of one call with its retries; 10 s
	Pacer       *Pacer                  // asked before every request; nil = none
}

// clients holds one SDK client per region. Nothing is loaded before the first
// call: a volume with local keys needs no AWS configuration.
type clients struct {
	opts AWSOptions
	http *awshttp.BuildableClient

	mu       sync.Mutex
	cfg      *aws.Config               // guarded by mu; nil until it loaded once
	creds    *signingCredentials       // guarded by mu; set with cfg
	byRegion map[string]*awskms.Client // guarded by mu
}

func newClients(opts AWSOptions) *clients {
	return &clients{opts: opts, byRegion: map[string]*awskms.Client{}, http: awshttp.NewBuildableClient().
		WithDialerOptions(func(d *net.Dialer) { d.Timeout = dialTimeout }).
		WithTransportOptions(func(t *http.Transport) {
			t.MaxIdleConns, t.MaxIdleConnsPerHost = 4*idlePerHost, idlePerHost
		})}
}

// in returns the client of a region.
func (c *clients) in(ctx context.Context, region string) (*awskms.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := c.byRegion[region]; k != nil {
		return k, nil
	}
	if err := c.loadLocked(ctx, region); err != nil {
		return nil, err
	}
	cfg := c.cfg.Copy()
	cfg.Region = region
	k := awskms.NewFromConfig(cfg, func(o *awskms.Options) {
		// Retries are ours (AWS.call): the SDK's have a token bucket that runs
		// dry after some fifty throttled calls and then fails everything, and
		// change with AWS_NEW_RETRIES_2026 in the environment.
		o.Retryer, o.RetryMaxAttempts = aws.NopRetryer{}, 0
		if c.opts.Endpoint != "" {
			o.BaseEndpoint = aws.String(c.opts.Endpoint)
		}
	})
	c.byRegion[region] = k
	return k, nil
}

func (c *clients) loadLocked(ctx context.Context, region string) error {
	if c.cfg != nil {
		return nil
	}
	load := []func(*config.LoadOptions) error{config.WithHTTPClient(c.http), config.WithDefaultRegion(region)}
	if c.opts.Profile != "" {
		load = append(load, config.WithSharedConfigProfile(c.opts.Profile))
	}
	if c.opts.Credentials != nil {
		load = append(load, config.WithCredentialsProvider(c.opts.Credentials))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return &credentialsError{fmt.Errorf("loading the AWS configuration: %w", err)}
	}
	cache, ok := cfg.Credentials.(*aws.CredentialsCache)
	if !ok {
		cache = aws.NewCredentialsCache(cfg.Credentials)
	}
	c.creds = &signingCredentials{cache}
	cfg.Credentials = c.creds
	c.cfg = &cfg
	return nil
}

// refresh drops the credentials in memory, so that the next call fetches new ones.
func (c *clients) refresh() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.creds != nil {
		c.creds.cache.Invalidate()
	}
}

// A credentialsError is a failure to get credentials; KMS was never asked.
type credentialsError struct{ err error }

func (e *credentialsError) Error() string { return e.err.Error() }
func (e *credentialsError) Unwrap() error { return e.err }

// signingCredentials tells missing credentials from a failing KMS, and refuses
// the secrets that the signer would panic on.
type signingCredentials struct{ cache *aws.CredentialsCache }

// Retrieve implements aws.CredentialsProvider.
func (s *signingCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	v, err := s.cache.Retrieve(ctx)
	if err != nil {
		return v, &credentialsError{fmt.Errorf("getting AWS credentials: %w", err)}
	}
	if fips140.Enforced() && len(v.SecretAccessKey) < minFIPSSecret {
		return aws.Credentials{}, &credentialsError{fmt.Errorf(
			"the AWS secret access key has %d characters; GODEBUG=fips140=only can't sign with less than %d",
			len(v.SecretAccessKey), minFIPSSecret)}
	}
	return v, nil
}

// An awsCall is one call of KMS with all its attempts.
type awsCall struct {
	*AWS
	op, key string
	started time.Time
	// left is what the call may still spend: on attempts, and on the pauses
	// between them. What it waits for its turn costs nothing, nor does an attempt
	// that was throttled at the pace of a Pacer: both are long when many calls
	// share a small quota, and neither says that KMS fails. So a paced call ends
	// in success, by a refusal, after the deadline of silence or failures, with
	// its context, or when the region has throttled everything for a minute.
	left    time.Duration
	backoff time.Duration // the next pause after a failure
	last    *Error        // of the attempts before this one
}

type request func(context.Context, *awskms.Client) error

// call makes one request until it succeeds, fails for good, or its time is up:
// jittered backoff, credentials refreshed once.
func (a *AWS) call(ctx context.Context, op, key string, f request) error {
	c := &awsCall{AWS: a, op: op, key: key, started: time.Now(), left: a.deadline, backoff: firstBackoff}
	refreshed := false
	for {
		e := c.attempt(ctx, op, key, f)
		if e != nil && e.Code == codeInvalidState {
			c.settleState(ctx, e)
		}
		switch {
		case e == nil:
			return nil
		case ctx.Err() != nil || c.left <= 0:
			return concluded(e, c.last)
		case e.Kind == KindCredentials && e.Code != "" && !refreshed:
			refreshed = true
			a.clients.refresh()
		case !e.Kind.retryable() || c.starved(e):
			return e
		}
		noteAttempt(ctx, e)
		c.last = worst(e, c.last)
		if !c.rest(ctx, e) {
			return concluded(contextError(ctx, op, key), c.last)
		}
	}
}

// attempt sends one request, of the call itself or on its behalf, in its turn.
func (c *awsCall) attempt(ctx context.Context, op, key string, f request) *Error {
	turn, err := c.pacer.wait(ctx, regionOf(key))
	if err != nil {
		return contextError(ctx, op, key)
	}
	start := time.Now()
	bounded, cancel := context.WithTimeout(ctx, c.left)
	defer cancel()
	e := c.try(bounded, op, key, f)
	turn.done(e)
	if !c.paced(e) {
		c.left -= time.Since(start)
	}
	return e
}

func (a *AWS) try(ctx context.Context, op, key string, f request) *Error {
	client, err := a.clients.in(ctx, regionOf(key))
	if err == nil {
		a.count(op)
		err = f(ctx, client)
	}
	if err == nil {
		return nil
	}
	return classify(ctx, op, key, err)
}

// paced reports whether a failure is the pacer's to deal with.
func (c *awsCall) paced(e *Error) bool { return c.pacer != nil && throttled(e) }

func (c *awsCall) starved(e *Error) bool {
	return c.paced(e) && c.pacer.starved(regionOf(c.key), c.started)
}

// rest pauses between two attempts, and reports whether there is time for
// another. After a throttled one the pacer decides when the next may be sent;
// the short pause only lets others go first.
func (c *awsCall) rest(ctx context.Context, e *Error) bool {
	if c.paced(e) {
		return pause(ctx, pacedBackoff, pacedBackoff+1)
	}
	start, d := time.Now(), c.backoff
	c.backoff = min(2*d, maxBackoff)
	defer func() { c.left -= time.Since(start) }()
	return pause(ctx, d, c.left)
}

// worst keeps, of two attempts' failures, the one that tells more: an answer
// beats silence.
func worst(e, last *Error) *Error {
	if last != nil && e.Kind == KindTimeout && last.Kind != KindTimeout {
		return last
	}
	return e
}

// concluded is how a call ends that ran out of time: interrupted if the caller
// gave up, else with what the last attempt that was answered said.
func concluded(end, last *Error) error {
	if end.Kind != KindInterrupted && last != nil {
		return last
	}
	return end
}

// pause sleeps between half and all of d, so that many clients don't come back
// together. It returns false at once if the time left, or the context, would end
// before.
func pause(ctx context.Context, d, left time.Duration) bool {
	d = d/2 + rand.N(d/2)
	if end, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(end))
	}
	return left > d && nap(ctx, d) == nil
}
