package keys

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// requireNoSecret prints v in every way there is and looks for the secrets.
func requireNoSecret(t testing.TB, v any, secrets ...[]byte) {
	t.Helper()
	var out bytes.Buffer
	fmt.Fprintf(&out, "%v\n%+v\n%#v\n%s\n%q\n%x\n", v, v, v, v, v, v)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "v", v)
	slog.New(slog.NewTextHandler(&out, nil)).Info("m", "v", v)
	if j, err := json.Marshal(v); err == nil {
		out.Write(j)
	}
	for err, ok := v.(error); ok && err != nil; err = errors.Unwrap(err) {
		fmt.Fprintf(&out, "%+v %#v\n", err, err)
	}
	for _, s := range secrets {
		for _, form := range [][]byte{s, hex.AppendEncode(nil, s), base64.StdEncoding.AppendEncode(nil, s),
			base64.RawStdEncoding.AppendEncode(nil, s), []byte(fmt.Sprint(s))} {
			require.False(t, bytes.Contains(out.Bytes(), form), "a secret is printed")
			require.False(t, bytes.Contains(out.Bytes(), bytes.ToUpper(hex.AppendEncode(nil, s))), "a secret is printed")
		}
	}
}

// TestNoKeyInErrors makes calls fail in every way while a known key is in them.
func TestNoKeyInErrors(t *testing.T) {
	secret := bytes.Repeat([]byte("Squirrel"), 4)
	newKey := func() *crypt.Key {
		k, err := crypt.NewKey(append([]byte(nil), secret...))
		require.NoError(t, err)
		t.Cleanup(k.Wipe)
		return k
	}
	srv := kmstest.New(t, nil)
	a := newShortAWS(t, srv, time.Second)
	var wg sync.WaitGroup
	for _, f := range []kmstest.Fault{
		{Code: "ValidationException"}, {Code: "AccessDeniedException"}, {Code: "KMSInternalException"},
		{Status: 500}, {Status: 400}, {Reset: true}, {Hang: true}, {Reset: true, Late: true},
	} {
		f.Key = srv.CreateKey("us-east-1")
		srv.Inject(f)
		k := newKey()
		wg.Go(func() {
			_, err := a.Encrypt(context.Background(), f.Key, testContext, k)
			require.Error(t, err)
			requireNoSecret(t, err, secret, secret[:16])
		})
	}
	wg.Wait()
	l := NewLocal(t.TempDir())
	_, err := l.Encrypt(context.Background(), "local:none", testContext, newKey())
	require.Error(t, err)
	requireNoSecret(t, err, secret)
}

// TestNoKeyInTypes prints everything that holds keys.
func TestNoKeyInTypes(t *testing.T) {
	l := NewLocal(t.TempDir())
	require.NoError(t, l.Create("local:k"))
	f, err := l.load(context.Background(), opDecrypt, "local:k")
	require.NoError(t, err)
	defer f.wipe()
	var local []byte
	require.NoError(t, f.secret.Use(func(b []byte) error { local = append(local, b...); return nil }))
	requireNoSecret(t, f, local)
	list, err := l.List()
	require.NoError(t, err)
	requireNoSecret(t, list, local)

	r := newTestRing(t, l, nil, "local:k")
	fresh, err := r.Fresh(context.Background())
	require.NoError(t, err)
	var raw []byte
	require.NoError(t, fresh.Secrets.DataKey().Use(func(b []byte) error { raw = append(raw, b...); return nil }))
	r.Return(fresh)
	requireNoSecret(t, r.pool.ready[0].fresh, raw)
	requireNoSecret(t, r.Stats(), raw)

	// A damaged key file is not quoted.
	line, err := os.ReadFile(l.Path("local:k"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(l.Path("local:k"), bytes.Replace(line, []byte("enabled"), []byte("endbled"), 1), 0o600))
	_, _, err = l.GenerateDataKey(context.Background(), "local:k", nil)
	requireKind(t, err, KindRejected, opGenerate, "local:k")
	requireNoSecret(t, err, local)
}
