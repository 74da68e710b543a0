package kmstest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// A Principal calls KMS with an access key of its own.
type Principal struct {
	ARN       string
	AccessKey string
	SecretKey string

	rules   []Rule
	expired bool
}

// Credentials are what an AWS SDK signs with.
func (p Principal) Credentials() aws.CredentialsProvider {
	return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: p.AccessKey, SecretAccessKey: p.SecretKey, Source: "kmstest"}, nil
	})
}

// A Rule allows actions. Each empty list allows all of its kind; the actions of
// ReEncrypt are "ReEncryptFrom" and "ReEncryptTo".
type Rule struct {
	Actions []string // without the "kms:"
	Keys    []string // ARNs
	Regions []string
}

func (r Rule) allows(action, region, arn string) bool {
	in := func(list []string, s string) bool { return len(list) == 0 || slices.Contains(list, s) }
	return in(r.Actions, action) && in(r.Keys, arn) && in(r.Regions, region)
}

// AddPrincipal makes a user who may do what the rules allow, and nothing else.
func (s *Server) AddPrincipal(name string, rules ...Rule) Principal {
	secret := make([]byte, 30)
	_, _ = rand.Read(secret) // never fails (crypto/rand)
	p := Principal{
		ARN:       fmt.Sprintf("arn:%s:iam::%s:user/%s", s.opts.Partition, s.opts.Account, name),
		AccessKey: "AKIA" + base32.StdEncoding.EncodeToString(secret[:10]),
		SecretKey: base64.StdEncoding.EncodeToString(secret), // 40 characters
		rules:     rules,
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	own := p
	s.principals[p.AccessKey] = &own
	return p
}

// SetRules replaces what a principal may do, from the next call on.
func (s *Server) SetRules(p Principal, rules ...Rule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.principals[p.AccessKey].rules = rules
}

// Expire makes a principal's credentials expired, or valid again.
func (s *Server) Expire(p Principal, expired bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.principals[p.AccessKey].expired = expired
}

// SetSkew puts the server's clock ahead of ours.
func (s *Server) SetSkew(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.skew = d
}

func (s *Server) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Add(s.skew)
}

// authScope is what an Authorization header says:
// AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/kms/aws4_request, SignedHeaders=a;b, Signature=HEX
type authScope struct {
	accessKey, region, service string
	headers                    []string
	signature                  string
}

func parseAuthorization(h string) (a authScope) {
	rest, ok := strings.CutPrefix(h, "AWS4-HMAC-SHA256 ")
	if !ok {
		return a
	}
	for _, part := range strings.Split(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		switch name {
		case "Credential":
			if f := strings.Split(value, "/"); len(f) == 5 && f[4] == "aws4_request" {
				a.accessKey, a.region, a.service = f[0], f[2], f[3]
			}
		case "SignedHeaders":
			a.headers = strings.Split(value, ";")
		case "Signature":
			a.signature = value
		}
	}
	return a
}

// authenticate finds the principal and checks its signature.
func (s *Server) authenticate(r *http.Request, a authScope, body []byte) (*Principal, *apiError) {
	if r.Header.Get("Authorization") == "" {
		return nil, failure("MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	if a.accessKey == "" || a.service != "kms" || a.signature == "" {
		return nil, failure("IncompleteSignatureException", "Authorization header requires 'Credential', 'SignedHeaders' and 'Signature' parameters for service kms.")
	}
	s.mu.Lock()
	p := s.principals[a.accessKey]
	if p == nil && s.opts.AnyKey {
		s.mu.Unlock()
		admin := s.admin
		return &admin, nil
	}
	var copied Principal
	if p != nil {
		copied = *p
	}
	s.mu.Unlock()
	if p == nil {
		return nil, failure("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	if copied.expired {
		return nil, failure("ExpiredTokenException", "The security token included in the request is expired")
	}
	if fail := s.checkSignature(r, a, &copied, body); fail != nil {
		return nil, fail
	}
	return &copied, nil
}

const (
	amzDate = "20060102T150405Z"
	maxSkew = 5 * time.Minute
)

// checkSignature signs the request again, as the principal would have.
func (s *Server) checkSignature(r *http.Request, a authScope, p *Principal, body []byte) *apiError {
	signed, err := time.Parse(amzDate, r.Header.Get("X-Amz-Date"))
	if err != nil {
		return failure("IncompleteSignatureException", "Date must be in ISO-8601 'basic format'.")
	}
	now := s.now()
	if signed.Before(now.Add(-maxSkew)) {
		return failure("InvalidSignatureException", "Signature expired: %s is now earlier than %s (%s - 5 min.)",
			signed.Format(amzDate), now.Add(-maxSkew).UTC().Format(amzDate), now.UTC().Format(amzDate))
	}
	if signed.After(now.Add(maxSkew)) {
		return failure("InvalidSignatureException", "Signature not yet current: %s is still later than %s (%s + 5 min.)",
			signed.Format(amzDate), now.Add(maxSkew).UTC().Format(amzDate), now.UTC().Format(amzDate))
	}
	again := &http.Request{Method: r.Method, URL: r.URL, Host: r.Host, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body))}
	for _, h := range a.headers {
		switch h {
		case "host":
		case "content-length":
			again.ContentLength = int64(len(body))
		default:
			again.Header[http.CanonicalHeaderKey(h)] = r.Header.Values(h)
		}
	}
	sum := sha256.Sum256(body)
	creds := aws.Credentials{AccessKeyID: p.AccessKey, SecretAccessKey: p.SecretKey}
	err = s.signer.SignHTTP(r.Context(), creds, again, hex.EncodeToString(sum[:]), "kms", a.region, signed)
	if err != nil || parseAuthorization(again.Header.Get("Authorization")).signature != a.signature {
		return failure("InvalidSignatureException", "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	return nil
}

// allow checks a permission. arn is "*" for actions that have no key.
func (q *request) allow(action, arn string) *apiError {
	for _, r := range q.principal.rules {
		if r.allows(action, q.region, arn) {
			return nil
		}
	}
	return failure("AccessDeniedException",
		"User: %s is not authorized to perform: kms:%s on resource: %s because no identity-based policy allows the kms:%s action",
		q.principal.ARN, action, arn, action)
}
