package keys

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// A sharedProfile is one profile of a shared AWS configuration.
type sharedProfile struct {
	name     string
	endpoint string // "" = none of its own
	creds    kmstest.Principal
	process  string // a program that prints credentials, in place of creds
}

// shareProfiles makes the shared AWS configuration of this process consist of the
// profiles given.
func shareProfiles(t *testing.T, profiles ...sharedProfile) {
	t.Helper()
	var conf, creds strings.Builder
	for _, p := range profiles {
		fmt.Fprintf(&conf, "[profile %s]\nregion = us-east-1\n", p.name)
		if p.process != "" {
			fmt.Fprintf(&conf, "credential_process = %s\n", p.process)
		} else {
			fmt.Fprintf(&creds, "[%s]\naws_access_key_id = %s\naws_secret_access_key = %s\n", p.name, p.creds.AccessKey, p.creds.SecretKey)
		}
		if p.endpoint != "" {
			fmt.Fprintf(&conf, "services = %s-services\n[services %s-services]\nkms =\n  endpoint_url = %s\n", p.name, p.name, p.endpoint)
		}
	}
	for name, text := range map[string]string{"AWS_CONFIG_FILE": conf.String(), "AWS_SHARED_CREDENTIALS_FILE": creds.String()} {
		file := filepath.Join(t.TempDir(), "aws")
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		t.Setenv(name, file)
	}
}

// TestTwoPartitions moves a data key to another partition: each is asked with its
// own credentials at its own endpoint, although the environment names one of them
// for everything.
func TestTwoPartitions(t *testing.T) {
	noLeaks(t)
	here, china := kmstest.New(t, nil), kmstest.New(t, &kmstest.Options{Partition: "aws-cn"})
	here.Setenv(t)
	operator := china.AddPrincipal("operator", kmstest.Rule{})
	shareProfiles(t, sharedProfile{name: "china", endpoint: china.URL(), creds: operator})
	from, to := here.CreateKey("us-east-1"), china.CreateKey("cn-north-1")
	a, err := NewAWS(AWSOptions{Profiles: map[string]string{"aws-cn": "china"}})
	require.NoError(t, err)
	h := newHeader(t, a, from)
	here.Reset()
	moved, err := NewRewrapper(a, testVolume).Rewrap(context.Background(), h, from, to)
	require.NoError(t, err)
	require.Equal(t, []sent{{opDecrypt, "us-east-1", from, ""}}, sentTo(here))
	require.Equal(t, []sent{{opEncrypt, "cn-north-1", to, ""}}, sentTo(china))
	require.Equal(t, here.Admin().ARN, here.Calls()[0].Principal)
	require.Equal(t, operator.ARN, china.Calls()[0].Principal)
	for _, calls := range [][]kmstest.Call{here.Calls(), china.Calls()} {
		require.Equal(t, h.EncryptionContext(testVolume), calls[0].Context)
	}
	h.Copies = []crypt.Copy{moved}
	require.NoError(t, open(t, newTestRing(t, a, nil, to), h))

	// Without the profile, one partition's credentials are nobody's in the other.
	alone, err := NewAWS(AWSOptions{Endpoint: china.URL()})
	require.NoError(t, err)
	_, err = alone.Describe(context.Background(), to)
	requireKind(t, err, KindCredentials, opDescribe, to)
}

// TestWhoseProfile: the account goes before the partition, and what is named by
// neither is called with the default credentials.
func TestWhoseProfile(t *testing.T) {
	srv := kmstest.New(t, nil)
	srv.Setenv(t)
	partition, account := srv.AddPrincipal("partition", kmstest.Rule{}), srv.AddPrincipal("account", kmstest.Rule{})
	// A profile without an endpoint of its own keeps the environment's.
	shareProfiles(t, sharedProfile{name: "p", creds: partition}, sharedProfile{name: "a", creds: account})
	own, other := srv.CreateKey("us-east-1"), srv.Create(kmstest.KeySpec{Account: "444455556666"})
	for _, c := range []struct {
		profiles   map[string]string
		own, other kmstest.Principal
	}{
		{nil, srv.Admin(), srv.Admin()},
		{map[string]string{"aws-cn": "p", "999999999999": "a"}, srv.Admin(), srv.Admin()},
		{map[string]string{"444455556666": "a"}, srv.Admin(), account},
		{map[string]string{"aws": "p", "444455556666": "a"}, partition, account},
		{map[string]string{"aws": "p"}, partition, partition},
	} {
		a, err := NewAWS(AWSOptions{Profiles: c.profiles})
		require.NoError(t, err)
		for key, want := range map[string]kmstest.Principal{own: c.own, other: c.other} {
			srv.Reset()
			_, err = a.Describe(context.Background(), key)
			require.NoError(t, err)
			require.Equal(t, want.ARN, srv.Calls()[0].Principal, "%v %s", c.profiles, key)
		}
	}
	a, err := NewAWS(AWSOptions{Profiles: map[string]string{"aws": "none-such"}})
	require.NoError(t, err)
	srv.Reset()
	_, err = a.Describe(context.Background(), own)
	requireKind(t, err, KindCredentials, opDescribe, own)
	require.ErrorContains(t, err, "none-such")
	require.Zero(t, srv.Count())
}

// TestRefreshTouchesOneProfile: credentials that expired are fetched again, and
// those of the other profile are left alone.
func TestRefreshTouchesOneProfile(t *testing.T) {
	isolateAWS(t)
	srv := kmstest.New(t, nil)
	own, other := srv.CreateKey("us-east-1"), srv.Create(kmstest.KeySpec{Account: "444455556666"})
	old, fresh := srv.AddPrincipal("old", kmstest.Rule{}), srv.AddPrincipal("fresh", kmstest.Rule{})
	dir := t.TempDir()
	show := func(p kmstest.Principal) {
		text := fmt.Sprintf(`{"Version": 1, "AccessKeyId": %q, "SecretAccessKey": %q}`, p.AccessKey, p.SecretKey)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "creds"), []byte(text), 0o600))
	}
	runs := func() int {
		log, err := os.ReadFile(filepath.Join(dir, "log"))
		require.NoError(t, err)
		return len(log)
	}
	script := filepath.Join(dir, "script")
	require.NoError(t, os.WriteFile(script, []byte("printf x >> "+dir+"/log; cat "+dir+"/creds\n"), 0o600))
	shareProfiles(t, sharedProfile{name: "other", endpoint: srv.URL(), process: "/bin/sh " + script})
	var fetched atomic.Int32
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Profiles: map[string]string{"444455556666": "other"},
		Credentials: aws.CredentialsProviderFunc(func(ctx context.Context) (aws.Credentials, error) {
			fetched.Add(1)
			return srv.Admin().Credentials().Retrieve(ctx)
		})})
	require.NoError(t, err)
	describe := func(key string) {
		t.Helper()
		_, err := a.Describe(context.Background(), key)
		require.NoError(t, err)
	}
	show(old)
	describe(own)
	describe(other)
	require.Equal(t, 1, runs())

	srv.Expire(old, true)
	show(fresh)
	describe(other)
	describe(own)
	require.Equal(t, 2, runs())
	require.EqualValues(t, 1, fetched.Load())

	lift := srv.Inject(kmstest.Fault{Key: own, Code: "ExpiredTokenException", Times: 1})
	defer lift()
	describe(own)
	describe(other)
	require.EqualValues(t, 2, fetched.Load())
	require.Equal(t, 2, runs())
}
