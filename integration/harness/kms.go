package harness

import (
	"strings"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/keys/kmstest"
)

// A KMS is a kmstest server of one test: everything that kmstest can do, and
// what tests of a mount ask all the time.
type KMS struct {
	*kmstest.Server
	env *Env
}

// KMS starts a kmstest server and points this world's AWS client at it, with the
// credentials of the one who may do everything. It stops after the volumes are
// unmounted.
func (e *Env) KMS() *KMS {
	e.T.Helper()
	k := &KMS{kmstest.New(e.T, nil), e}
	e.ActAs(k, k.Admin())
	return k
}

// ActAs gives this world the credentials of a principal.
func (e *Env) ActAs(k *KMS, p kmstest.Principal) {
	for _, kv := range k.Env(p) {
		name, value, _ := strings.Cut(kv, "=")
		e.Set(name, value)
	}
}

// NewKey makes a key in the usual region and returns its ARN.
func (k *KMS) NewKey() string { return k.CreateKey(Region) }

// Quiet waits until nobody calls any more: a pool of data keys fills itself in
// the background.
func (k *KMS) Quiet() {
	k.env.T.Helper()
	const calm = 300 * time.Millisecond
	last, since := k.Count(), time.Now()
	require.True(k.env.T, Eventually(30*time.Second, func() bool {
		if n := k.Count(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > calm
	}), "KMS is called again and again: %v", k.operations())
}

// During lists the operations that KMS was asked for while f ran, and those that
// f set off.
func (k *KMS) During(f func()) []string {
	k.env.T.Helper()
	k.Quiet()
	k.Reset()
	f()
	k.Quiet()
	return k.operations()
}

func (k *KMS) operations() (ops []string) {
	for _, c := range k.Calls() {
		ops = append(ops, c.Op)
	}
	return ops
}
