package kmstest

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"golang.org/x/time/rate"
)

// DefaultAccount is the account that keys belong to unless told otherwise.
const DefaultAccount = "111122223333"

const maxBody = 1 << 20 // bytes of a request that are looked at

// Options of a server. The zero value is fine.
type Options struct {
	Addr      string // to listen on; "127.0.0.1:0"
	Account   string // owner of keys; DefaultAccount
	Partition string // "aws"
	AnyKey    bool   // accept any access key, unverified, as the administrator
}

// A Server is a running loopback KMS. Its methods may be called at any time,
// from any goroutine.
type Server struct {
	opts     Options
	listener net.Listener
	http     *http.Server
	quit     chan struct{} // closed by Close; ends hanging calls
	closing  sync.Once
	admin    Principal
	signer   *v4.Signer // it remembers the keys that it derives

	mu         sync.Mutex
	keys       map[string]map[string]*key // guarded by mu; by region and id
	aliases    map[string]string          // guarded by mu; alias ARN -> key ARN
	materials  map[[materialIDSize]byte]*material
	principals map[string]*Principal // guarded by mu; by access key
	faults     []*activeFault        // guarded by mu
	limits     map[string]*rate.Limiter
	rps        float64            // guarded by mu; per region; 0 = no limit
	regionRPS  map[string]float64 // guarded by mu; of regions with a limit of their own
	down       map[string]bool    // guarded by mu; by region
	skew       time.Duration      // guarded by mu; how far our clock is ahead

	log callLog
}

// New starts a server that stops with the test. opts may be nil.
func New(t testing.TB, opts *Options) *Server {
	t.Helper()
	if opts == nil {
		opts = new(Options)
	}
	s, err := Start(*opts)
	if err != nil {
		t.Fatalf("starting kmstest: %v", err)
	}
	t.Cleanup(s.Close)
	return s
}

// Start starts a server, which the caller closes.
func Start(opts Options) (*Server, error) {
	if opts.Addr == "" {
		opts.Addr = "127.0.0.1:0"
	}
	if opts.Account == "" {
		opts.Account = DefaultAccount
	}
	if opts.Partition == "" {
		opts.Partition = "aws"
	}
	l, err := net.Listen("tcp", opts.Addr)
	if err != nil {
		return nil, fmt.Errorf("listening for KMS calls: %w", err)
	}
	s := &Server{opts: opts, listener: l, quit: make(chan struct{}), signer: v4.NewSigner(),
		keys: map[string]map[string]*key{}, aliases: map[string]string{},
		materials: map[[materialIDSize]byte]*material{}, principals: map[string]*Principal{},
		limits: map[string]*rate.Limiter{}, regionRPS: map[string]float64{}, down: map[string]bool{}}
	s.admin = s.AddPrincipal("admin", Rule{})
	s.http = &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second,
		ErrorLog: log.New(io.Discard, "", 0)} // aborted connections are on purpose
	go func() { _ = s.http.Serve(l) }()
	return s, nil
}

// Close stops the server and drops all connections.
func (s *Server) Close() {
	s.closing.Do(func() {
		close(s.quit)
		_ = s.http.Close()
	})
}

// URL is the endpoint, for AWS_ENDPOINT_URL_KMS.
func (s *Server) URL() string { return "http://" + s.listener.Addr().String() }

// Admin is the principal that may do everything.
func (s *Server) Admin() Principal { return s.admin }

// Unset are the variables that must not be set beside Env: an empty AWS_PROFILE
// is an unknown profile to some SDKs.
var Unset = []string{"AWS_PROFILE", "AWS_SESSION_TOKEN"}

// Env is the environment, as NAME=value, that points an AWS SDK to this server
// with a principal's credentials and away from everything else.
func (s *Server) Env(p Principal) []string {
	return []string{
		"AWS_ENDPOINT_URL_KMS=" + s.URL(),
		"AWS_ACCESS_KEY_ID=" + p.AccessKey,
		"AWS_SECRET_ACCESS_KEY=" + p.SecretKey,
		"AWS_REGION=us-east-1",
		"AWS_EC2_METADATA_DISABLED=true",
		"AWS_CONFIG_FILE=/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE=/dev/null",
	}
}

// Setenv sets Env for the administrator in this process, until the test ends.
func (s *Server) Setenv(t testing.TB) {
	t.Helper()
	for _, name := range Unset {
		t.Setenv(name, "") // restored after the test
		_ = os.Unsetenv(name)
	}
	for _, kv := range s.Env(s.admin) {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
}

// An apiError is an exception of KMS.
type apiError struct {
	status  int
	code    string
	message string
}

func failure(code, format string, args ...any) *apiError {
	return &apiError{status: statusOf(code), code: code, message: fmt.Sprintf(format, args...)}
}

func statusOf(code string) int {
	switch code {
	case "KMSInternalException", "KeyUnavailableException", "InternalFailure":
		return http.StatusInternalServerError
	case "DependencyTimeoutException", "ServiceUnavailable":
		return http.StatusServiceUnavailable
	}
	return http.StatusBadRequest
}

// A request is one call on its way through the server.
type request struct {
	*Server
	op        string
	region    string
	principal *Principal
	body      []byte
	call      *Call
	ended     bool
}

// end logs the call, once.
func (q *request) end() {
	if !q.ended {
		q.ended = true
		q.log.add(q.call)
	}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err != nil {
		return
	}
	op, _ := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	scope := parseAuthorization(r.Header.Get("Authorization"))
	call := &Call{Time: time.Now(), Op: op, Region: scope.region, AccessKey: scope.accessKey}
	q := &request{Server: s, op: op, region: scope.region, body: body, call: call}
	defer q.end()

	if !s.suffer(w, r, q) {
		return
	}
	out, fail := s.answer(r, scope, q)
	call.Took = time.Since(call.Time)
	if fail != nil {
		call.Error = fail.code
		s.writeFailure(w, fail)
		return
	}
	s.write(w, http.StatusOK, out)
}

func (s *Server) answer(r *http.Request, scope authScope, q *request) (any, *apiError) {
	p, fail := s.authenticate(r, scope, q.body)
	if fail != nil {
		return nil, fail
	}
	q.principal, q.call.Principal = p, p.ARN
	do, ok := operations[q.op]
	if !ok {
		return nil, failure("UnknownOperationException", "")
	}
	if !s.admit(q.region) {
		return nil, failure("ThrottlingException", "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return do(q)
}

// decode reads the body of a request.
func (q *request) decode(in any) *apiError {
	if err := json.Unmarshal(q.body, in); err != nil {
		return failure("SerializationException", "%s", jsonCause(err))
	}
	return nil
}

// jsonCause names a JSON error without quoting the request, which can hold keys.
func jsonCause(err error) string {
	var t *json.UnmarshalTypeError
	if errors.As(err, &t) {
		return "unexpected type for " + t.Field
	}
	return "the request is not valid JSON"
}

func (s *Server) writeFailure(w http.ResponseWriter, f *apiError) {
	body := map[string]string{"__type": f.code}
	switch {
	case f.message == "": // InvalidCiphertextException comes without a word
	case f.code == "AccessDeniedException":
		body["Message"] = f.message // AWS writes it so, for this one
	default:
		body["message"] = f.message
	}
	s.write(w, f.status, body)
}

func (s *Server) write(w http.ResponseWriter, status int, body any) {
	raw, err := json.Marshal(body)
	if err != nil {
		status, raw = http.StatusInternalServerError, []byte(`{"__type":"KMSInternalException"}`)
	}
	h := w.Header()
	h.Set("Content-Type", "application/x-amz-json-1.1")
	h.Set("X-Amzn-Requestid", newUUID())
	h.Set("Date", s.now().UTC().Format(http.TimeFormat))
	w.WriteHeader(status)
	_, _ = w.Write(raw)
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
