package keys

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// A subject is an implementation of Provider under the suite.
type subject struct {
	Provider
	key, other string // two enabled keys of one region
	missing    string // a key that does not exist
	disable    func(t *testing.T, key string)
	loose      bool // moto: does not enforce disabled keys, source key ids and the form of contexts
}

// TestProviders runs one suite over every implementation.
func TestProviders(t *testing.T) {
	for name, start := range map[string]func(*testing.T) subject{
		"local": localSubject, "aws-on-kmstest": kmstestSubject, "aws-on-moto": motoSubject,
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			noLeaks(t)
			for name, test := range suite {
				t.Run(name, func(t *testing.T) { test(t, s) })
			}
		})
	}
}

func localSubject(t *testing.T) subject {
	l := NewLocal(filepath.Join(t.TempDir(), "keys"))
	require.NoError(t, l.Create("local:one"))
	require.NoError(t, l.Create("local:two"))
	return subject{Provider: l, key: "local:one", other: "local:two", missing: "local:none",
		disable: func(t *testing.T, key string) {
			require.NoError(t, l.Disable(key))
			t.Cleanup(func() { require.NoError(t, l.Enable(key)) })
		}}
}

func kmstestSubject(t *testing.T) subject {
	srv := kmstest.New(t, nil)
	return subject{Provider: newTestAWS(t, srv), key: srv.CreateKey("us-east-1"), other: srv.CreateKey("us-east-1"), missing: arnA,
		disable: func(t *testing.T, key string) {
			srv.SetState(key, kmstest.Disabled)
			t.Cleanup(func() { srv.SetState(key, kmstest.Enabled) })
		}}
}

func motoSubject(t *testing.T) subject {
	m := startMoto(t)
	a, err := NewAWS(AWSOptions{Endpoint: m.url, Credentials: motoCredentials})
	require.NoError(t, err)
	return subject{Provider: a, key: m.createKey(t), other: m.createKey(t), missing: arnA, loose: true}
}

// newTestAWS is a provider on a kmstest server, as its administrator.
func newTestAWS(t testing.TB, srv *kmstest.Server) *AWS {
	t.Helper()
	isolateAWS(t)
	a, err := NewAWS(AWSOptions{Endpoint: srv.URL(), Credentials: srv.Admin().Credentials()})
	require.NoError(t, err)
	return a
}

// isolateAWS keeps the machine's own AWS configuration out of a test.
func isolateAWS(t testing.TB) {
	t.Helper()
	for name, value := range map[string]string{
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_PROFILE": "", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SESSION_TOKEN": "",
		"AWS_REGION": "", "AWS_ENDPOINT_URL": "", "AWS_ENDPOINT_URL_KMS": "",
	} {
		t.Setenv(name, value) // restored after the test
		if value == "" {
			require.NoError(t, os.Unsetenv(name))
		}
	}
}

var testContext = EncryptionContext{"kmsfs:vol": "00ff", "kmsfs:file": "aa11"}

var suite = map[string]func(*testing.T, subject){
	"generate and decrypt": func(t *testing.T, s subject) {
		k, blob, err := s.GenerateDataKey(context.Background(), s.key, testContext)
		require.NoError(t, err)
		defer k.Wipe()
		again, err := s.Decrypt(context.Background(), s.key, testContext, blob)
		require.NoError(t, err)
		defer again.Wipe()
		require.True(t, k.Equal(again))
		require.LessOrEqual(t, len(blob), crypt.MaxBlob)
	},
	"encrypt and decrypt": func(t *testing.T, s subject) {
		k, err := crypt.RandomKey()
		require.NoError(t, err)
		defer k.Wipe()
		one, err := s.Encrypt(context.Background(), s.key, testContext, k)
		require.NoError(t, err)
		two, err := s.Encrypt(context.Background(), s.key, testContext, k)
		require.NoError(t, err)
		require.NotEqual(t, one, two, "wrapping is randomized")
		again, err := s.Decrypt(context.Background(), s.key, testContext, one)
		require.NoError(t, err)
		defer again.Wipe()
		require.True(t, k.Equal(again))
	},
	"re-encrypt": func(t *testing.T, s subject) {
		k, blob, err := s.GenerateDataKey(context.Background(), s.key, testContext)
		require.NoError(t, err)
		defer k.Wipe()
		for _, to := range []string{s.other, s.key} {
			moved, err := s.ReEncrypt(context.Background(), s.key, to, testContext, blob)
			require.NoError(t, err)
			require.NotEqual(t, blob, moved)
			again, err := s.Decrypt(context.Background(), to, testContext, moved)
			require.NoError(t, err)
			require.True(t, k.Equal(again))
			again.Wipe()
		}
	},
	"another context": func(t *testing.T, s subject) {
		k, blob, err := s.GenerateDataKey(context.Background(), s.key, testContext)
		require.NoError(t, err)
		k.Wipe()
		more, less := maps.Clone(testContext), EncryptionContext{"kmsfs:vol": "00ff"}
		more["x"] = "y"
		others := []EncryptionContext{nil, more, less, {"kmsfs:vol": "00ff", "kmsfs:file": "AA11"}}
		if !s.loose { // moto joins names and values without a mark between them
			others = append(others, EncryptionContext{"kmsfs:vo": "l00ff", "kmsfs:file": "aa11"})
		}
		for _, ec := range others {
			_, err = s.Decrypt(context.Background(), s.key, ec, blob)
			requireKind(t, err, KindBadBlob, opDecrypt, s.key)
			require.ErrorIs(t, err, crypt.ErrDamaged)
		}
	},
	"a damaged blob": func(t *testing.T, s subject) {
		k, blob, err := s.GenerateDataKey(context.Background(), s.key, testContext)
		require.NoError(t, err)
		k.Wipe()
		blob[len(blob)-1] ^= 1
		_, err = s.Decrypt(context.Background(), s.key, testContext, blob)
		requireKind(t, err, KindBadBlob, opDecrypt, s.key)
		_, err = s.ReEncrypt(context.Background(), s.key, s.other, testContext, blob)
		requireKind(t, err, KindBadBlob, opReEncrypt, s.key)
	},
	"another key's blob": func(t *testing.T, s subject) {
		k, blob, err := s.GenerateDataKey(context.Background(), s.key, testContext)
		require.NoError(t, err)
		k.Wipe()
		if s.loose {
			_, err = s.Decrypt(context.Background(), s.other, testContext, blob)
			require.Error(t, err)
			return
		}
		_, err = s.Decrypt(context.Background(), s.other, testContext, blob)
		requireKind(t, err, KindIncorrectKey, opDecrypt, s.other)
		require.ErrorIs(t, err, crypt.ErrKeyRejected)
		_, err = s.ReEncrypt(context.Background(), s.other, s.key, testContext, blob)
		requireKind(t, err, KindIncorrectKey, opReEncrypt, s.other)
	},
	"a key that does not exist": func(t *testing.T, s subject) {
		_, _, err := s.GenerateDataKey(context.Background(), s.missing, testContext)
		requireKind(t, err, KindNotFound, opGenerate, s.missing)
		require.ErrorIs(t, err, crypt.ErrKeyNotFound)
		_, err = s.Describe(context.Background(), s.missing)
		requireKind(t, err, KindNotFound, opDescribe, s.missing)
	},
	"a disabled key": func(t *testing.T, s subject) {
		if s.disable == nil {
			return // moto goes on using disabled keys; the table test covers AWS's answer
		}
		k, blob, err := s.GenerateDataKey(context.Background(), s.key, testContext)
		require.NoError(t, err)
		defer k.Wipe()
		s.disable(t, s.key)
		_, err = s.Decrypt(context.Background(), s.key, testContext, blob)
		requireKind(t, err, KindDisabled, opDecrypt, s.key)
		require.ErrorIs(t, err, crypt.ErrKeyDisabled)
		_, err = s.Encrypt(context.Background(), s.key, testContext, k)
		requireKind(t, err, KindDisabled, opEncrypt, s.key)
		_, err = s.ReEncrypt(context.Background(), s.other, s.key, testContext, blob)
		require.Error(t, err)
		d, err := s.Describe(context.Background(), s.key)
		require.NoError(t, err)
		require.False(t, d.Enabled())
	},
	"describe": func(t *testing.T, s subject) {
		d, err := s.Describe(context.Background(), s.key)
		require.NoError(t, err)
		require.Equal(t, Description{Key: s.key, State: "Enabled"}, d)
	},
	"names of no key": func(t *testing.T, s subject) {
		for _, name := range []string{"", "local:", "local:../x", "local:a/b", "arn:aws:kms:us-east-1:111122223333:alias/x", "key", "arn:aws:s3:::b"} {
			_, _, err := s.GenerateDataKey(context.Background(), name, nil)
			requireKind(t, err, KindRejected, opGenerate, name)
			_, err = s.Decrypt(context.Background(), name, nil, []byte("blob"))
			requireKind(t, err, KindRejected, opDecrypt, name)
		}
	},
	"an ended context": func(t *testing.T, s subject) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, _, err := s.GenerateDataKey(ctx, s.key, nil)
		requireKind(t, err, KindInterrupted, opGenerate, s.key)
		require.ErrorIs(t, err, crypt.ErrInterrupted)
	},
	"a wiped key": func(t *testing.T, s subject) {
		k, err := crypt.RandomKey()
		require.NoError(t, err)
		k.Wipe()
		_, err = s.Encrypt(context.Background(), s.key, nil, k)
		require.ErrorIs(t, err, crypt.ErrWiped)
	},
}

// requireKind checks what an error says, and that it says it to errors.Is too.
func requireKind(t testing.TB, err error, kind Kind, op, key string) {
	t.Helper()
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, kind.String(), e.Kind.String(), "%v", err)
	require.Equal(t, op, e.Op)
	require.Equal(t, key, e.Key)
	require.ErrorIs(t, err, kind.Sentinel())
	require.Equal(t, regionOf(key), e.Region)
	if key != "" {
		require.Contains(t, err.Error(), key)
	}
}
