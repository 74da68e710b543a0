package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// TestRekeyLive rekeys a mounted volume while a program creates, changes, renames
// and deletes files. Nothing it wrote is lost, and after one more run nothing is
// under the old key.
func TestRekeyLive(t *testing.T) {
	for _, envelope := range envelopes {
		t.Run(envelope, func(t *testing.T) { rekeyLive(t, envelope) })
	}
}

func rekeyLive(t *testing.T, envelope string) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first, "--envelope", envelope)
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	e.Do("cp", "-a", tree, v.Path("tree"))

	var stop atomic.Bool
	written := make(chan map[string][]byte)
	go func() { written <- churn(t, v, &stop) }()
	time.Sleep(200 * time.Millisecond)
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	time.Sleep(200 * time.Millisecond)
	stop.Store(true)
	files := <-written
	require.NotEmpty(t, files)
	check := func() {
		t.Helper()
		harness.Same(t, tree, v.Path("tree"))
		for name, content := range files {
			got, err := os.ReadFile(v.Path(name))
			require.NoError(t, err)
			require.Equal(t, content, got, name)
		}
	}
	check()
	v.Remount()
	check()
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	counts := v.KeysOf()
	require.Zero(t, counts[first], "%v", counts)
	require.NotZero(t, counts[second])
	v.Umount()
	kms.SetState(first, kmstest.Disabled)
	v.Mount()
	check()
	kms.SetState(first, kmstest.Enabled)
}

// churn works on the mount until it is told to stop, and returns what must be
// there.
func churn(t *testing.T, v *harness.Volume, stop *atomic.Bool) map[string][]byte {
	files := map[string][]byte{}
	for i := 0; !stop.Load() && i < 5000; i++ {
		name := fmt.Sprintf("churn%d", i)
		content := harness.Noise(100 + i*31%9000)
		if err := os.WriteFile(v.Path(name), content, 0o600); err != nil {
			t.Errorf("writing during the rekey: %v", err)
			return files
		}
		switch i % 4 {
		case 1:
			if err := os.Rename(v.Path(name), v.Path(name+"x")); err != nil {
				t.Errorf("renaming during the rekey: %v", err)
			}
			files[name+"x"] = content
		case 2:
			if err := os.Remove(v.Path(name)); err != nil {
				t.Errorf("deleting during the rekey: %v", err)
			}
		default:
			files[name] = content
		}
	}
	return files
}

// TestRekeyRoutes: local to local, local to AWS, AWS to AWS, AWS to local, one
// after the other over the same files.
func TestRekeyRoutes(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	a, b := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Mount()
	tree := filepath.Join(harness.GOROOT(t), "src", "encoding")
	e.Do("cp", "-a", tree, v.Path("tree"))
	v.Umount()
	files := v.KeysOf()["local:one"]
	require.NotZero(t, files)
	steps := []struct {
		to   string
		call string // the one operation that the route asks KMS for, per file
	}{{localKey(e, "two"), ""}, {a, "Encrypt"}, {b, "ReEncrypt"}, {"local:one", "Decrypt"}}
	for _, s := range steps {
		calls := kms.During(func() { e.Must("rekey", v.Dir, "--to", s.to, "--yes") })
		require.Equal(t, map[string]int{s.to: files}, v.KeysOf())
		n := 0
		for _, op := range calls {
			if op == s.call {
				n++
			}
		}
		if s.call != "" {
			require.GreaterOrEqual(t, n, files, "%s", s.to)
			require.LessOrEqual(t, len(calls), files+20, "calls per file to %s: %v", s.to, calls)
		} else {
			require.Empty(t, calls)
		}
		v.Mount()
		harness.Same(t, tree, v.Path("tree"))
		v.Umount()
	}
	v.Mount()
}

// TestRekeyWithoutTerminal: what changes a volume needs --yes where nobody can be
// asked; --dry-run changes nothing.
func TestRekeyWithoutTerminal(t *testing.T) {
	v := local(t)
	require.NoError(t, os.WriteFile(v.Path("file"), []byte("x"), 0o600))
	v.Umount()
	second := localKey(v.Env, "two")
	same := harness.Unchanged(t, v.Dir)
	v.Env.Refused(statusUsage, []string{"--yes"}, "rekey", v.Dir, "--to", second)
	same()
	v.Env.Refused(statusRefused, []string{"local:absent"}, "rekey", v.Dir, "--to", "local:absent", "--yes")
	same()
	v.Mount()
}

// TestRekeyByOperatorWhoCannotRead: ReEncryptFrom and ReEncryptTo are enough.
func TestRekeyByOperatorWhoCannotRead(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first)
	v.Mount()
	content := harness.Noise(10000)
	for i := range 20 {
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(i)), content, 0o600))
	}
	v.Umount()
	operator := kms.AddPrincipal("operator", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo", "DescribeKey"}})
	e.ActAs(kms, operator)
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	require.Equal(t, map[string]int{second: 20}, v.KeysOf())
	e.Refused(statusRefused, []string{"kms:Decrypt"}, "mount", v.Dir, v.Mnt)
	e.ActAs(kms, kms.Admin())
	v.Mount()
	got, err := os.ReadFile(v.Path("7"))
	require.NoError(t, err)
	require.Equal(t, content, got)
}

// TestRekeyReportsDamage: a bad file stops nothing, is named, and makes the exit
// status 5; the rest is done.
func TestRekeyReportsDamage(t *testing.T) {
	e := harness.New(t)
	v := attacked(t, e)
	v.Damaged()
	setHeader(t, filepath.Join(v.Dir, "file"), []byte("KMSF rubbish"))
	second := localKey(e, "two")
	r := e.Refused(statusPartial, []string{"file"}, "rekey", v.Dir, "--to", second, "--yes")
	require.NotContains(t, r.Stdout+r.Stderr, "other")
	h, err := harness.HeaderOf(filepath.Join(v.Dir, "other"))
	require.NoError(t, err)
	require.Equal(t, second, h.Copies[0].Key)
	require.Equal(t, []byte("KMSF rubbish"), header(t, filepath.Join(v.Dir, "file")))
}
