package keys

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/stretchr/testify/require"
)

// hostOf is a client of HTTP that goes nowhere: it notes whom a request is for.
type hostOf struct{ scheme, host string }

var errNowhere = errors.New("nothing is sent")

func (h *hostOf) Do(r *http.Request) (*http.Response, error) {
	h.scheme, h.host = r.URL.Scheme, r.URL.Host
	return nil, errNowhere
}

// TestFIPSEndpoints: the SDK's own setting makes every region's call go to its FIPS 140
// endpoint, and without it none does (docs.aws.amazon.com/general/latest/gr/kms.html).
func TestFIPSEndpoints(t *testing.T) {
	for _, name := range []string{"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS", "AWS_PROFILE", "AWS_USE_DUALSTACK_ENDPOINT"} {
		t.Setenv(name, "")
	}
	shareProfiles(t)
	for _, tc := range []struct{ fips, key, host string }{
		{"true", "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "kms-fips.us-east-1.amazonaws.com"},
		{"true", "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "kms-fips.eu-west-1.amazonaws.com"},
		{"true", "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "kms-fips.us-gov-west-1.amazonaws.com"},
		{"false", "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "kms.us-east-1.amazonaws.com"},
	} {
		t.Setenv("AWS_USE_FIPS_ENDPOINT", tc.fips)
		a, err := NewAWS(AWSOptions{Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "AKIATEST", SecretAccessKey: "a-secret-of-this-test"}, nil
		})})
		require.NoError(t, err)
		c, err := a.clients.of(t.Context(), tc.key)
		require.NoError(t, err)
		var asked hostOf
		_, err = c.DescribeKey(t.Context(), &awskms.DescribeKeyInput{KeyId: &tc.key}, func(o *awskms.Options) { o.HTTPClient = &asked })
		require.ErrorIs(t, err, errNowhere)
		require.Equal(t, hostOf{"https", tc.host}, asked)
	}
}
