package keys

import (
	"context"
	"crypto/fips140"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

func newShortAWS(t testing.TB, srv *kmstest.Server, deadline time.Duration) *AWS {
	t.Helper()
	a := newTestAWS(t, srv)
	a.deadline = deadline
	return a
}

// TestEveryRow goes through the table of DESIGN section 5 with a real server:
// what KMS says, what it means, whether it is tried again.
func TestEveryRow(t *testing.T) {
	srv := kmstest.New(t, nil)
	a := newTestAWS(t, srv)
	for _, row := range []struct {
		code     string
		kind     Kind
		sentinel error
		requests int
	}{
		{"AccessDeniedException", KindDenied, crypt.ErrKeyDenied, 1},
		{"InvalidGrantTokenException", KindDenied, crypt.ErrKeyDenied, 1},
		{"ExpiredTokenException", KindCredentials, crypt.ErrKeyDenied, 2}, // credentials are refreshed once
		{"UnrecognizedClientException", KindCredentials, crypt.ErrKeyDenied, 2},
		{"InvalidSignatureException", KindCredentials, crypt.ErrKeyDenied, 2},
		{"DisabledException", KindDisabled, crypt.ErrKeyDisabled, 1},
		{"NotFoundException", KindNotFound, crypt.ErrKeyNotFound, 1},
		{"IncorrectKeyException", KindIncorrectKey, crypt.ErrKeyRejected, 1},
		{"InvalidKeyUsageException", KindRejected, crypt.ErrKeyRejected, 1},
		{"ValidationException", KindRejected, crypt.ErrKeyRejected, 1},
		{"InvalidArnException", KindRejected, crypt.ErrKeyRejected, 1},
		{"UnsupportedOperationException", KindRejected, crypt.ErrKeyRejected, 1},
		{"SomethingNewException", KindRejected, crypt.ErrKeyRejected, 1}, // a 400 that we don't know
		{"InvalidCiphertextException", KindBadBlob, crypt.ErrDamaged, 1},
		{"LimitExceededException", KindLimit, crypt.ErrKeyUnavailable, 1},
	} {
		t.Run(row.code, func(t *testing.T) {
			key := srv.CreateKey("us-east-1")
			srv.Inject(kmstest.Fault{Key: key, Code: row.code})
			srv.Reset()
			_, err := a.Decrypt(context.Background(), key, testContext, []byte("blob"))
			requireRow(t, err, row.kind, row.sentinel, key, row.code)
			require.Equal(t, row.requests, srv.Count())
		})
	}
}

func requireRow(t *testing.T, err error, kind Kind, sentinel error, key, code string) {
	t.Helper()
	requireKind(t, err, kind, opDecrypt, key)
	require.ErrorIs(t, err, sentinel)
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, code, e.Code)
	require.Equal(t, "kms:Decrypt", e.Action)
}

// TestRetriedRows are the rows of the table that are tried again: they succeed
// once KMS does, and end as unavailable if it never does.
func TestRetriedRows(t *testing.T) {
	srv := kmstest.New(t, nil)
	patient, hasty := newTestAWS(t, srv), newShortAWS(t, srv, 2*time.Second)
	var wg sync.WaitGroup
	for _, code := range []string{"ThrottlingException", "KeyUnavailableException", "DependencyTimeoutException", "KMSInternalException", "ServiceUnavailable"} {
		key, dead := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
		k, blob, err := patient.GenerateDataKey(context.Background(), key, nil)
		require.NoError(t, err)
		k.Wipe()
		srv.Inject(kmstest.Fault{Key: key, Code: code, Times: 2})
		k, err = patient.Decrypt(context.Background(), key, nil, blob)
		require.NoError(t, err, code)
		k.Wipe()
		srv.Inject(kmstest.Fault{Key: dead, Code: code})
		wg.Go(func() {
			_, err := hasty.Decrypt(context.Background(), dead, nil, blob)
			requireRow(t, err, KindUnavailable, crypt.ErrKeyUnavailable, dead, code)
		})
	}
	wg.Wait()
}

// TestStates: the same exception means different things in different states,
// also to a principal who may not ask for the state.
func TestStates(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	for _, p := range []kmstest.Principal{srv.Admin(), srv.AddPrincipal("creator", kmstest.Rule{Actions: []string{"GenerateDataKey"}})} {
		a := newTestAWS(t, srv)
		a.clients.opts.Credentials = p.Credentials()
		for _, state := range []string{kmstest.Disabled, kmstest.PendingDeletion, kmstest.PendingReplicaDeletion, kmstest.PendingImport} {
			srv.SetState(key, state)
			_, _, err := a.GenerateDataKey(context.Background(), key, nil)
			requireKind(t, err, KindDisabled, opGenerate, key)
		}
		var wg sync.WaitGroup
		a.deadline = 2 * time.Second
		for _, state := range []string{kmstest.Creating, kmstest.Updating, kmstest.Unavailable} {
			passing := srv.Create(kmstest.KeySpec{State: state})
			wg.Go(func() {
				_, _, err := a.GenerateDataKey(context.Background(), passing, nil)
				requireKind(t, err, KindUnavailable, opGenerate, passing)
			})
		}
		wg.Wait()
	}
}

// TestReplicaBecomesReady: a replica just made says KMSInvalidState for a
// moment, which the SDK does not retry.
func TestReplicaBecomesReady(t *testing.T) {
	srv := kmstest.New(t, nil)
	replica := srv.Replicate(srv.Create(kmstest.KeySpec{MultiRegion: true}), "eu-west-1")
	srv.SetState(replica, kmstest.Creating)
	go func() {
		time.Sleep(200 * time.Millisecond)
		srv.SetState(replica, kmstest.Enabled)
	}()
	k, _, err := newTestAWS(t, srv).GenerateDataKey(context.Background(), replica, nil)
	require.NoError(t, err)
	k.Wipe()
}

// TestTransportFailures: what is retried, and what is left when time is up.
func TestTransportFailures(t *testing.T) {
	srv := kmstest.New(t, nil)
	patient, hasty := newTestAWS(t, srv), newShortAWS(t, srv, 2*time.Second)
	var wg sync.WaitGroup
	for name, f := range map[string]kmstest.Fault{
		"502": {Status: 502}, "503": {Status: 503}, "429": {Status: 429}, "reset": {Reset: true}, "late": {Reset: true, Late: true},
		"403": {Status: 403}, // a proxy's, not KMS's: says nothing of the key
	} {
		f.Key, f.Times = srv.CreateKey("us-east-1"), 2
		srv.Inject(f)
		k, _, err := patient.GenerateDataKey(context.Background(), f.Key, nil)
		require.NoError(t, err, name)
		k.Wipe()
		f.Key, f.Times = srv.CreateKey("us-east-1"), 0
		srv.Inject(f)
		wg.Go(func() {
			_, _, err := hasty.GenerateDataKey(context.Background(), f.Key, nil)
			requireKind(t, err, KindUnavailable, opGenerate, f.Key)
		})
	}
	wg.Wait()
}

// TestSilence: no answer at all is a timeout; silence after an answer is not.
func TestSilence(t *testing.T) {
	srv := kmstest.New(t, nil)
	a := newShortAWS(t, srv, time.Second)
	key, other := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	srv.Inject(kmstest.Fault{Key: key, Hang: true})
	start := time.Now()
	_, _, err := a.GenerateDataKey(context.Background(), key, nil)
	requireKind(t, err, KindTimeout, opGenerate, key)
	require.ErrorIs(t, err, crypt.ErrKeyTimeout)
	require.Less(t, time.Since(start), 5*time.Second)

	a.deadline = 3 * time.Second
	srv.Inject(kmstest.Fault{Key: other, Code: "ThrottlingException", Times: 1})
	time.AfterFunc(10*time.Millisecond, func() { srv.Inject(kmstest.Fault{Key: other, Hang: true}) })
	_, _, err = a.GenerateDataKey(context.Background(), other, nil)
	requireKind(t, err, KindUnavailable, opGenerate, other)
}

func TestNothingListens(t *testing.T) {
	isolateAWS(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	srv := kmstest.New(t, nil)
	a, err := NewAWS(AWSOptions{Endpoint: "http://" + l.Addr().String(), Credentials: srv.Admin().Credentials(), Deadline: 2 * time.Second})
	require.NoError(t, err)
	_, _, err = a.GenerateDataKey(context.Background(), arnA, nil)
	requireKind(t, err, KindUnavailable, opGenerate, arnA)
}

// TestInterrupt: a caller who gives up does not wait for KMS.
func TestInterrupt(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	srv.Inject(kmstest.Fault{Hang: true})
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(100*time.Millisecond, cancel)
	start := time.Now()
	_, _, err := newTestAWS(t, srv).GenerateDataKey(ctx, key, nil)
	requireKind(t, err, KindInterrupted, opGenerate, key)
	require.Less(t, time.Since(start), 8*time.Second)
}

// TestManyThrottledCalls: more failures than the SDK's token bucket holds (500
// tokens, 5 to 10 a retry) don't make later calls fail.
func TestManyThrottledCalls(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	a := newTestAWS(t, srv)
	srv.Inject(kmstest.Fault{Code: "ThrottlingException", Times: 120})
	var wg sync.WaitGroup
	for range 120 {
		wg.Go(func() {
			k, _, err := a.GenerateDataKey(context.Background(), key, nil)
			assert.NoError(t, err)
			k.Wipe()
		})
	}
	wg.Wait()
	require.EqualValues(t, 240, a.Requests()[opGenerate])
}

// TestEnvironmentDoesNotChangeRetries: one call, one request, whatever the
// SDK's own retry settings are.
func TestEnvironmentDoesNotChangeRetries(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	a := newTestAWS(t, srv)
	t.Setenv("AWS_NEW_RETRIES_2026", "true")
	t.Setenv("AWS_MAX_ATTEMPTS", "7")
	t.Setenv("AWS_RETRY_MODE", "adaptive")
	srv.Inject(kmstest.Fault{Code: "LimitExceededException"})
	_, _, err := a.GenerateDataKey(context.Background(), key, nil)
	requireKind(t, err, KindLimit, opGenerate, key)
	require.Equal(t, 1, srv.Count())
}

func TestEndpointOfTheEnvironment(t *testing.T) {
	srv := kmstest.New(t, nil)
	srv.Setenv(t)
	a, err := NewAWS(AWSOptions{})
	require.NoError(t, err)
	for _, region := range []string{"us-east-1", "ap-southeast-2"} {
		k, _, err := a.GenerateDataKey(context.Background(), srv.CreateKey(region), nil)
		require.NoError(t, err)
		k.Wipe()
	}
	calls := srv.Calls()
	require.Equal(t, "us-east-1", calls[0].Region)
	require.Equal(t, "ap-southeast-2", calls[1].Region, "the region of a call is the one in the ARN")
}

func TestCredentials(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")

	t.Run("refreshed once when expired", func(t *testing.T) {
		old, fresh := srv.AddPrincipal("old", kmstest.Rule{}), srv.AddPrincipal("new", kmstest.Rule{})
		var fetched atomic.Int32
		a := newTestAWS(t, srv)
		a.clients.opts.Credentials = aws.CredentialsProviderFunc(func(ctx context.Context) (aws.Credentials, error) {
			if fetched.Add(1) == 1 {
				return old.Credentials().Retrieve(ctx)
			}
			return fresh.Credentials().Retrieve(ctx)
		})
		srv.Expire(old, true)
		k, _, err := a.GenerateDataKey(context.Background(), key, nil)
		require.NoError(t, err)
		k.Wipe()
		require.EqualValues(t, 2, fetched.Load())
	})
	t.Run("none", func(t *testing.T) {
		isolateAWS(t)
		a, err := NewAWS(AWSOptions{Endpoint: srv.URL()})
		require.NoError(t, err)
		srv.Reset()
		_, _, err = a.GenerateDataKey(context.Background(), key, nil)
		requireKind(t, err, KindCredentials, opGenerate, key)
		require.ErrorIs(t, err, crypt.ErrKeyDenied)
		require.Zero(t, srv.Count())
	})
	t.Run("an unknown profile", func(t *testing.T) {
		isolateAWS(t)
		a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Profile: "no-such-profile"})
		require.NoError(t, err)
		_, _, err = a.GenerateDataKey(context.Background(), key, nil)
		requireKind(t, err, KindCredentials, opGenerate, key)
		require.ErrorContains(t, err, "no-such-profile")
	})
	t.Run("a wrong secret", func(t *testing.T) {
		p := srv.AddPrincipal("typo", kmstest.Rule{})
		p.SecretKey = "another-secret-of-some-length"
		a := newTestAWS(t, srv)
		a.clients.opts.Credentials = p.Credentials()
		_, _, err := a.GenerateDataKey(context.Background(), key, nil)
		requireKind(t, err, KindCredentials, opGenerate, key)
	})
	t.Run("a skewed clock", func(t *testing.T) {
		srv.SetSkew(20 * time.Minute)
		defer srv.SetSkew(0)
		k, _, err := newTestAWS(t, srv).GenerateDataKey(context.Background(), key, nil)
		require.NoError(t, err, "the SDK learns the skew from the refusal")
		k.Wipe()
	})
}

// TestShortSecretUnderFIPS runs itself with GODEBUG=fips140=only, where signing
// with a short secret panics inside HMAC.
func TestShortSecretUnderFIPS(t *testing.T) {
	if !fips140.Enforced() {
		cmd := exec.Command(os.Args[0], "-test.run=^TestShortSecretUnderFIPS$", "-test.v")
		cmd.Env = append(os.Environ(), "GODEBUG=fips140=only")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "--- PASS: TestShortSecretUnderFIPS")
		return
	}
	srv := kmstest.New(t, nil)
	a := newTestAWS(t, srv)
	a.clients.opts.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: "AKIA", SecretAccessKey: "test"}, nil
	})
	_, _, err := a.GenerateDataKey(context.Background(), srv.CreateKey("us-east-1"), nil)
	require.ErrorIs(t, err, crypt.ErrKeyDenied)
	require.ErrorContains(t, err, "fips140=only")
}

// TestAnswersAboutOtherKeys: an endpoint that answers for another key than the
// one asked for is not believed (the class of CVE-2020-8897).
func TestAnswersAboutOtherKeys(t *testing.T) {
	isolateAWS(t)
	bodies := map[string]string{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		_, _ = w.Write([]byte(bodies[strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")]))
	}))
	defer srv.Close()
	const key32 = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	bodies[opDecrypt] = `{"KeyId":"` + arnC + `","Plaintext":"` + key32 + `"}`
	bodies[opGenerate] = `{"KeyId":"` + arnC + `","Plaintext":"` + key32 + `","CiphertextBlob":"AAAA"}`
	bodies[opEncrypt] = `{"KeyId":"` + arnC + `","CiphertextBlob":"AAAA"}`
	bodies[opReEncrypt] = `{"KeyId":"` + arnA + `","SourceKeyId":"` + arnC + `","CiphertextBlob":"AAAA"}`
	bodies[opDescribe] = `{"KeyMetadata":{"Arn":"` + arnC + `","KeyState":"Enabled"}}`
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL, Credentials: motoCredentials, Deadline: 3 * time.Second})
	require.NoError(t, err)
	ctx := context.Background()
	k, err := crypt.RandomKey()
	require.NoError(t, err)
	defer k.Wipe()
	check := func() {
		t.Helper()
		_, _, err := a.GenerateDataKey(ctx, arnA, nil)
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
		_, err = a.Decrypt(ctx, arnA, nil, []byte("x"))
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
		_, err = a.Encrypt(ctx, arnA, nil, k)
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
		_, err = a.ReEncrypt(ctx, arnA, arnA, nil, []byte("x"))
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
		_, err = a.Describe(ctx, arnA)
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
	}
	check()
	for op := range bodies {
		bodies[op] = "{}"
	}
	bodies[opDescribe] = `{"KeyMetadata":{}}`
	check()
	// Right key, wrong size: neither a plaintext nor a blob that fits.
	bodies[opDecrypt] = `{"KeyId":"` + arnA + `","Plaintext":"AAAA"}`
	_, err = a.Decrypt(ctx, arnA, nil, []byte("x"))
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
	bodies[opGenerate] = `{"KeyId":"` + arnA + `","Plaintext":"` + key32 + `","CiphertextBlob":"` + strings.Repeat("AAAA", 200) + `"}`
	_, _, err = a.GenerateDataKey(ctx, arnA, nil)
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
	// An answer cut in the middle of the key: its bytes stay out of the error.
	bodies[opDecrypt] = `{"KeyId":"` + arnA + `","Plaintext":"` + key32
	_, err = a.Decrypt(ctx, arnA, nil, []byte("x"))
	require.ErrorIs(t, err, crypt.ErrKeyUnavailable)
	requireNoSecret(t, err, []byte(key32), []byte("\x00\x01\x02\x03\x04\x05"))
}

// TestMultiRegionAnswers: replicas are the same key.
func TestMultiRegionAnswers(t *testing.T) {
	srv := kmstest.New(t, nil)
	primary := srv.Create(kmstest.KeySpec{MultiRegion: true})
	replica := srv.Replicate(primary, "eu-west-1")
	a := newTestAWS(t, srv)
	k, blob, err := a.GenerateDataKey(context.Background(), primary, testContext)
	require.NoError(t, err)
	defer k.Wipe()
	again, err := a.Decrypt(context.Background(), replica, testContext, blob)
	require.NoError(t, err)
	defer again.Wipe()
	require.True(t, k.Equal(again))
	d, err := a.Describe(context.Background(), replica)
	require.NoError(t, err)
	require.Equal(t, Description{Key: replica, State: "Enabled", MultiRegion: true, Primary: primary, Replicas: []string{replica}}, d)
	require.NoError(t, checkAnswer(opDecrypt, primary, &replica))
}

func TestAliases(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	alias := srv.CreateAlias("alias/app", key)
	a := newTestAWS(t, srv)
	d, err := a.Describe(context.Background(), alias)
	require.NoError(t, err)
	require.Equal(t, key, d.Key)
	_, _, err = a.GenerateDataKey(context.Background(), alias, nil)
	requireKind(t, err, KindRejected, opGenerate, alias)
	_, err = a.Describe(context.Background(), strings.Replace(alias, "app", "none", 1))
	require.ErrorIs(t, err, crypt.ErrKeyNotFound)
}

// TestReEncryptNamesTheKeyAtFault: its two keys need two permissions.
func TestReEncryptNamesTheKeyAtFault(t *testing.T) {
	srv := kmstest.New(t, nil)
	from, to := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	admin := newTestAWS(t, srv)
	k, blob, err := admin.GenerateDataKey(context.Background(), from, nil)
	require.NoError(t, err)
	k.Wipe()
	p := srv.AddPrincipal("migrator", kmstest.Rule{Actions: []string{"ReEncryptFrom"}})
	a := newTestAWS(t, srv)
	a.clients.opts.Credentials = p.Credentials()
	_, err = a.ReEncrypt(context.Background(), from, to, nil, blob)
	requireKind(t, err, KindDenied, opReEncrypt, to)
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, "kms:ReEncryptTo", e.Action)
	srv.SetRules(p, kmstest.Rule{Actions: []string{"ReEncryptTo"}})
	_, err = a.ReEncrypt(context.Background(), from, to, nil, blob)
	require.ErrorAs(t, err, &e)
	require.Equal(t, "kms:ReEncryptFrom", e.Action)
	require.Equal(t, from, e.Key)
	srv.SetRules(p, kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo"}})
	srv.SetState(to, kmstest.PendingDeletion)
	_, err = a.ReEncrypt(context.Background(), from, to, nil, blob)
	requireKind(t, err, KindDisabled, opReEncrypt, to)
	_, err = a.ReEncrypt(context.Background(), from, srv.CreateKey("eu-west-1"), nil, blob)
	require.ErrorIs(t, err, crypt.ErrKeyRejected)
}

func TestProbe(t *testing.T) {
	srv := kmstest.New(t, nil)
	key := srv.CreateKey("us-east-1")
	p := srv.AddPrincipal("doctor", kmstest.Rule{Actions: []string{"Decrypt", "GenerateDataKey"}})
	a := newTestAWS(t, srv)
	a.clients.opts.Credentials = p.Credentials()
	r := NewRouter(a, nil).(Prober)
	ctx := context.Background()
	require.NoError(t, r.Probe(ctx, key, opDecrypt))
	require.NoError(t, r.Probe(ctx, key, opGenerate))
	for _, op := range []string{opEncrypt, opReEncrypt, opDescribe} {
		require.ErrorIs(t, r.Probe(ctx, key, op), crypt.ErrKeyDenied, op)
	}
	srv.SetRules(p, kmstest.Rule{})
	for _, op := range []string{opDecrypt, opGenerate, opEncrypt, opReEncrypt, opDescribe} {
		require.NoError(t, r.Probe(ctx, key, op), op)
	}
	require.ErrorIs(t, r.Probe(ctx, key, "Sign"), crypt.ErrKeyRejected)
	require.ErrorIs(t, r.Probe(ctx, "local:x", opDecrypt), crypt.ErrKeyRejected)
	for _, c := range srv.Calls() {
		require.True(t, c.DryRun || c.Op == opDescribe)
	}
}

// TestConnectionsAreKept: a burst's connections serve the next burst; the SDK's
// default keeps 10 of them.
func TestConnectionsAreKept(t *testing.T) {
	var opened atomic.Int32
	isolateAWS(t)
	arrived, gate := make(chan struct{}), make(chan struct{})
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		arrived <- struct{}{}
		<-gate
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write([]byte(`{"__type":"LimitExceededException"}`))
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL, Credentials: motoCredentials})
	require.NoError(t, err)
	const parallel = 60
	burst := func() {
		done := make(chan error, parallel)
		for range parallel {
			go func() {
				_, _, err := a.GenerateDataKey(context.Background(), arnA, nil)
				done <- err
			}()
		}
		for range parallel {
			<-arrived
		}
		for range parallel {
			gate <- struct{}{}
		}
		for range parallel {
			var e *Error
			require.True(t, errors.As(<-done, &e))
		}
	}
	burst()
	first := opened.Load()
	burst()
	require.LessOrEqual(t, opened.Load(), first+parallel/3)
}

// TestAnswerWithoutEnd: an endpoint that goes on and on is not listened to, whatever its
// status is: it would fill the daemon's memory.
func TestAnswerWithoutEnd(t *testing.T) {
	isolateAWS(t)
	var sent atomic.Int64
	var status atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(int(status.Load()))
		_, err := w.Write([]byte(`{"KeyId":"` + arnA + `","__type":"`))
		for chunk := []byte(strings.Repeat("A", 64<<10)); err == nil && sent.Load() < 256<<20; sent.Add(int64(len(chunk))) {
			_, err = w.Write(chunk)
		}
	}))
	defer srv.Close()
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL, Credentials: motoCredentials, Deadline: time.Second})
	require.NoError(t, err)
	for _, s := range []int32{http.StatusOK, http.StatusBadRequest, http.StatusInternalServerError} {
		status.Store(s)
		sent.Store(0)
		_, err = a.Decrypt(t.Context(), arnA, nil, []byte("x"))
		var e *Error
		require.ErrorAs(t, err, &e, "%d", s)
		require.NotErrorIs(t, err, crypt.ErrDamaged, "%d", s)
		require.Less(t, sent.Load(), int64(200<<20), "%d", s) // of several tries, and what lies in sockets
	}
}

func TestNegativeDeadline(t *testing.T) {
	_, err := NewAWS(AWSOptions{Deadline: -1})
	require.Error(t, err)
}

// TestThrottledWaiters: who waits for a call less long than it is retried hears
// that KMS did answer.
func TestThrottledWaiters(t *testing.T) {
	srv := kmstest.New(t, nil)
	throttled, silent := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	a := newTestAWS(t, srv)
	h := map[string]*crypt.Header{throttled: newHeader(t, a, throttled), silent: newHeader(t, a, silent)}
	srv.Inject(kmstest.Fault{Key: throttled, Code: "ThrottlingException"})
	srv.Inject(kmstest.Fault{Key: silent, Hang: true})
	for key, want := range map[string]error{throttled: crypt.ErrKeyUnavailable, silent: crypt.ErrKeyTimeout} {
		r := newTestRing(t, a, nil, key)
		for _, call := range []func(context.Context) error{
			func(ctx context.Context) error { _, err := r.Fresh(ctx); return err },
			func(ctx context.Context) error { _, err := r.Open(ctx, h[key]); return err },
		} {
			ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
			require.ErrorIs(t, call(ctx), want, key)
			cancel()
		}
	}
}
