package keys

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"

	"kmsfs/crypt"
)

// codeKinds is DESIGN section 5: what each of AWS's error codes means. What is
// not listed is judged by its HTTP status. KMSInvalidStateException stands here
// as its passing form; awsCall.settleState finds out.
var codeKinds = map[string]Kind{
	"AccessDeniedException":      KindDenied,
	"AccessDenied":               KindDenied,
	"InvalidGrantTokenException": KindDenied,
	"OptInRequired":              KindDenied,

	"ExpiredTokenException":               KindCredentials,
	"ExpiredToken":                        KindCredentials,
	"UnrecognizedClientException":         KindCredentials,
	"InvalidClientTokenId":                KindCredentials,
	codeBadSignature:                      KindCredentials, // also a skewed clock; the SDK corrects it on the second try
	"SignatureDoesNotMatch":               KindCredentials,
	"IncompleteSignatureException":        KindCredentials,
	"MissingAuthenticationTokenException": KindCredentials,
	"RequestExpired":                      KindCredentials,
	"RequestTimeTooSkewed":                KindCredentials,

	"DisabledException":        KindDisabled,
	"KMSInvalidStateException": KindUnavailable,
	"NotFoundException":        KindNotFound, // includes "Invalid arn <region>"

	"IncorrectKeyException":         KindIncorrectKey,
	"InvalidKeyUsageException":      KindRejected,
	"UnsupportedOperationException": KindRejected,
	"ValidationException":           KindRejected,
	"InvalidArnException":           KindRejected,
	"InvalidCiphertextException":    KindBadBlob,

	"ThrottlingException":        KindUnavailable,
	"Throttling":                 KindUnavailable,
	"RequestLimitExceeded":       KindUnavailable,
	"TooManyRequestsException":   KindUnavailable,
	"KeyUnavailableException":    KindUnavailable,
	"DependencyTimeoutException": KindUnavailable,
	"KMSInternalException":       KindUnavailable,
	"InternalFailure":            KindUnavailable,
	"ServiceUnavailable":         KindUnavailable,
	"LimitExceededException":     KindLimit,
}

const (
	codeInvalidState = "KMSInvalidStateException"
	codeBadSignature = "InvalidSignatureException"
	codeDryRun       = "DryRunOperationException"
)

// classify makes an Error of what the SDK returned.
func classify(ctx context.Context, op, key string, err error) *Error {
	if ctx.Err() != nil {
		return contextError(ctx, op, key)
	}
	e := newError(KindUnavailable, op, key, withoutPayload(err))
	var api smithy.APIError
	var creds *credentialsError
	var params smithy.InvalidParamsError
	var timeout net.Error
	switch {
	case errors.As(err, &creds):
		e.Kind = KindCredentials
	case errors.As(err, &api):
		e.Code = api.ErrorCode()
		e.Kind = kindOfCode(e.Code, statusOf(err))
		e.Err = errors.New(strings.TrimSuffix(fmt.Sprintf("%s: %s", e.Code, api.ErrorMessage()), ": "))
		e.aim(api.ErrorMessage())
	case errors.As(err, &params):
		e.Kind = KindRejected
	case errors.As(err, &timeout) && timeout.Timeout():
		e.Kind = KindTimeout
	}
	return e
}

func kindOfCode(code string, status int) Kind {
	if k, ok := codeKinds[code]; ok {
		return k
	}
	switch {
	case status == 403:
		return KindDenied
	case status >= 400 && status < 500 && status != 408 && status != 429:
		return KindRejected
	}
	return KindUnavailable
}

func statusOf(err error) int {
	var r *awshttp.ResponseError
	if errors.As(err, &r) {
		return r.HTTPStatusCode()
	}
	return 0
}

// withoutPayload drops the copy of the answer that the SDK keeps in a
// deserialization error: the answer to Decrypt holds a plaintext key.
func withoutPayload(err error) error {
	var d *smithy.DeserializationError
	if errors.As(err, &d) {
		return errors.New("the answer of the KMS endpoint could not be read")
	}
	return err
}

var (
	namedAction = regexp.MustCompile(`kms:[A-Za-z]+`)
	namedKey    = regexp.MustCompile(`arn:[a-z-]+:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+`)
)

// aim corrects what the error is about from KMS's own words: ReEncrypt works on
// two keys and needs two actions, and the message names the one at fault.
func (e *Error) aim(message string) {
	if e.Op != opReEncrypt {
		return
	}
	if a := namedAction.FindString(message); a != "" {
		e.Action = a
	}
	if k := namedKey.FindString(message); k != "" {
		e.Key = k
	}
}

// settleState decides what KMSInvalidStateException means, which the exception
// itself does not tell in a fixed form: it asks DescribeKey, and if that is not
// allowed it goes by KMS's words.
func (c *awsCall) settleState(ctx context.Context, e *Error) {
	var d Description
	failed := c.attempt(ctx, opDescribe, e.Key, func(ctx context.Context, k *awskms.Client) (err error) {
		d, err = describe(ctx, k, e.Key)
		return err
	})
	if failed == nil {
		e.State = d.State
	} else {
		e.State = stateInWords(e)
	}
	switch e.State {
	case statePendingDeletion, statePendingReplicaDeletion, statePendingImport, stateDisabled:
		e.Kind = KindDisabled
	}
}

func stateInWords(e *Error) string {
	for state, words := range map[string]string{
		statePendingReplicaDeletion: "pending replica deletion",
		statePendingDeletion:        "pending deletion",
		statePendingImport:          "pending import",
	} {
		if e.Err != nil && strings.Contains(e.Err.Error(), words) {
			return state
		}
	}
	return ""
}

// checkARN says whether key may be put into a request: the ARN of a key, not an
// alias (which could be pointed elsewhere between two calls).
func checkARN(op, key string) error {
	err := crypt.CheckKeyName(key)
	if err == nil && IsLocal(key) {
		err = fmt.Errorf("%q is a local key, not one of KMS", key)
	}
	if err != nil {
		return newError(KindRejected, op, key, err)
	}
	return nil
}

// checkAnswer compares the key that KMS says it used with the one it was asked
// to use. An endpoint that answers for another key is not to be believed.
func checkAnswer(op, asked string, answered *string) error {
	if answered != nil && crypt.SameKey(asked, *answered) {
		return nil
	}
	got := "no key"
	if answered != nil {
		got = *answered
	}
	return newError(KindRejected, op, asked, fmt.Errorf("the KMS endpoint answered for %s", got))
}
