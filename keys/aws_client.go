package keys

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"

	"kmsfs/crypt"
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
	Profile string // of the shared AWS configuration
	// Profiles names profiles of the shared AWS configuration by whose keys they
	// are for: a 12-digit account, else a partition ("aws-cn"). One set of
	// credentials is valid in one partition only. A ReEncrypt is the request of
	// the profile of its source key.
	Profiles    map[string]string
	Endpoint    string                  // URL for every region, in place of AWS_ENDPOINT_URL_KMS
	Credentials aws.CredentialsProvider // in place of the SDK's chain; not for Profiles
	Deadline    time.Duration           // of one call with its retries; 10 s
	Pacer       *Pacer                  // asked before every request; nil = none
}

// clients holds one SDK client per profile and region. Nothing is loaded before
// the first call: a volume with local keys needs no AWS configuration.
type clients struct {
	opts AWSOptions
	http *awshttp.BuildableClient

	mu       sync.Mutex
	profiles map[string]*profile // guarded by mu; by name; those that were loaded
}

// A profile is what one profile of the shared configuration, or the SDK's default
// chain, makes of a client.
type profile struct {
	cfg      aws.Config
	creds    *signingCredentials
	endpoint string                    // in place of the SDK's choice; "" = none
	byRegion map[string]*awskms.Client // guarded by clients.mu
}

func newClients(opts AWSOptions) *clients {
	return &clients{opts: opts, profiles: map[string]*profile{}, http: awshttp.NewBuildableClient().
		WithDialerOptions(func(d *net.Dialer) { d.Timeout = dialTimeout }).
		WithTransportOptions(func(t *http.Transport) {
			t.MaxIdleConns, t.MaxIdleConnsPerHost = 4*idlePerHost, idlePerHost
		})}
}

// profileOf is the name of the profile that a key is used with; "" is the SDK's
// own choice.
func (c *clients) profileOf(key string) string {
	a, err := crypt.ParseARN(key)
	if err != nil {
		return c.opts.Profile
	}
	for _, whose := range []string{a.Account, a.Partition} {
		if name := c.opts.Profiles[whose]; name != "" {
			return name
		}
	}
	return c.opts.Profile
}

// of returns the client for a key: of its region, with its profile.
func (c *clients) of(ctx context.Context, key string) (*awskms.Client, error) {
	name, region := c.profileOf(key), regionOf(key)
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.profiles[name]
	if p == nil {
		var err error
		if p, err = c.load(ctx, name, region); err != nil {
			return nil, err
		}
		c.profiles[name] = p
	}
	if p.byRegion[region] == nil {
		p.byRegion[region] = p.client(region)
	}
	return p.byRegion[region], nil
}

func (p *profile) client(region string) *awskms.Client {
	cfg := p.cfg.Copy()
	cfg.Region = region
	return awskms.NewFromConfig(cfg, func(o *awskms.Options) {
		// Retries are ours (AWS.call): the SDK's have a token bucket that runs
		// dry after some fifty throttled calls and then fails everything, and
		// change with AWS_NEW_RETRIES_2026 in the environment.
		o.Retryer, o.RetryMaxAttempts = aws.NopRetryer{}, 0
		if p.endpoint != "" {
			o.BaseEndpoint = aws.String(p.endpoint)
		}
		o.HTTPClient = boundedClient{o.HTTPClient}
	})
}

// maxAnswer is more than KMS ever says.
const maxAnswer = 1 << 20

var errLongAnswer = errors.New("the answer has no end: whatever listens there is not KMS")

// A boundedClient reads no more of an answer than that. The SDK would keep all of it in
// memory, as much as comes within the deadline.
type boundedClient struct{ awskms.HTTPClient }

func (c boundedClient) Do(r *http.Request) (*http.Response, error) {
	resp, err := c.HTTPClient.Do(r)
	if err == nil && resp.Body != nil {
		resp.Body = &boundedBody{resp.Body, maxAnswer}
	}
	return resp, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, errLongAnswer
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// load reads the configuration of a profile. region is for what the profile does
// not say, such as where to assume a role.
func (c *clients) load(ctx context.Context, name, region string) (*profile, error) {
	load := []func(*config.LoadOptions) error{config.WithHTTPClient(c.http), config.WithDefaultRegion(region)}
	if name != "" {
		load = append(load, config.WithSharedConfigProfile(name))
	}
	own := name == c.opts.Profile
	if own && c.opts.Credentials != nil {
		load = append(load, config.WithCredentialsProvider(c.opts.Credentials))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return nil, &credentialsError{fmt.Errorf("loading the AWS configuration: %w", err)}
	}
	cache, ok := cfg.Credentials.(*aws.CredentialsCache)
	if !ok {
		cache = aws.NewCredentialsCache(cfg.Credentials)
	}
	p := &profile{cfg: cfg, creds: &signingCredentials{cache}, endpoint: c.opts.Endpoint, byRegion: map[string]*awskms.Client{}}
	p.cfg.Credentials = p.creds
	if e := endpointIn(ctx, cfg.ConfigSources); !own && e != "" {
		p.endpoint = e
	}
	return p, nil
}

// endpointIn is the KMS endpoint that a profile of the shared configuration
// names. The SDK would let the environment's go first, which was set for the
// default credentials and is wrong for a partition with a profile of its own.
func endpointIn(ctx context.Context, sources []any) (endpoint string) {
	for _, s := range sources {
		if i, ok := s.(interface {
			GetIgnoreConfiguredEndpoints(context.Context) (bool, bool, error)
		}); ok {
			if ignore, _, err := i.GetIgnoreConfiguredEndpoints(ctx); err == nil && ignore {
				return ""
			}
		}
		if shared, ok := s.(config.SharedConfig); ok {
			endpoint = shared.BaseEndpoint
			if e, found, err := shared.GetServiceBaseEndpoint(ctx, awskms.ServiceID); err == nil && found {
				endpoint = e
			}
		}
	}
	return endpoint
}

// refresh drops the credentials in memory that a key is used with, and the profile
// they came from, so that the next call fetches new ones: what the SDK has read from a
// shared file it never reads again. After a bad signature (code) the profile stays: its
// clients have just learned how wrong our clock is.
func (c *clients) refresh(key, code string) {
	name := c.profileOf(key)
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.profiles[name]; p != nil {
		p.creds.cache.Invalidate()
		if code != codeBadSignature {
			delete(c.profiles, name)
		}
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
// jittered backoff, credentials refreshed once for each way to refuse them.
func (a *AWS) call(ctx context.Context, op, key string, f request) error {
	c := &awsCall{AWS: a, op: op, key: key, started: time.Now(), left: a.deadline, backoff: firstBackoff}
	var refreshed []string // for which codes
	for {
		e := c.attempt(ctx, op, key, f)
		noteThrottling(ctx, e)
		if e != nil && isAhead(ctx) {
			return e
		}
		if e != nil && e.Code == codeInvalidState {
			c.settleState(ctx, e)
		}
		switch {
		case e == nil:
			return nil
		case ctx.Err() != nil || c.left <= 0:
			return concluded(e, c.last)
		case e.Kind == KindCredentials && e.Code != "" && !slices.Contains(refreshed, e.Code):
			refreshed = append(refreshed, e.Code)
			a.clients.refresh(key, e.Code)
		case e.Kind == KindCredentials && e.Code == "": // there are none, yet
			a.clients.refresh(key, "")
			return e
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
	client, err := a.clients.of(ctx, key)
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
