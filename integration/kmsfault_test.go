package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// deadline is how long an open may wait for KMS here; slack is for a machine with
// other things to do.
const (
	deadline = 4 * time.Second
	slack    = 5 * time.Second
)

// faulty is a mounted volume on kmstest whose caches hold nothing, with files to
// open and one that is open.
type faulty struct {
	*harness.Volume
	kms  *harness.KMS
	key  string
	open *os.File // read before the fault
}

func newFaulty(t *testing.T, mountArgs ...string) *faulty {
	t.Helper()
	e := harness.New(t)
	kms := e.KMS()
	key := kms.NewKey()
	v := e.Init("volume", "--key", key)
	v.Options(mountArgs...)
	v.Mount()
	for _, name := range []string{"open", "a", "b", "c", "d"} {
		require.NoError(t, os.WriteFile(v.Path(name), harness.Noise(20000), 0o600))
	}
	v.Remount()
	f, err := os.OpenFile(v.Path("open"), os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	kms.Quiet()
	return &faulty{v, kms, key, f}
}

// goesOn is what a failure of KMS doesn't touch: names, attributes, deletion,
// and files that are open.
func (f *faulty) goesOn(t *testing.T) {
	t.Helper()
	f.namesGoOn(t)
	start := time.Now()
	f.openGoesOn(t)
	require.Less(t, time.Since(start), slack, "what needs no KMS waited for it")
}

// namesGoOn is what even a denial doesn't touch.
func (f *faulty) namesGoOn(t *testing.T) {
	t.Helper()
	start := time.Now()
	f.Env.Shell(`ls -lR "$1" >/dev/null; stat "$1"/*; mv "$1/d" "$1/e"; mv "$1/e" "$1/d"; chmod 640 "$1/d"; mkdir "$1/sub"; ln "$1/d" "$1/sub/link"; rm "$1/sub/link"; rmdir "$1/sub"`, f.Mnt)
	require.Less(t, time.Since(start), slack, "what needs no KMS waited for it")
}

func (f *faulty) openGoesOn(t *testing.T) {
	t.Helper()
	p := make([]byte, 5000)
	_, err := f.open.ReadAt(p, 7000)
	require.NoError(t, err)
	require.Equal(t, harness.Noise(20000)[7000:12000], p)
	_, err = f.open.WriteAt(p, 7000)
	require.NoError(t, err)
	require.NoError(t, f.open.Sync())
}

// TestKMSRefusalIsAnErrno: each way in which KMS says no or nothing is the errno
// of DESIGN section 5, in time; nothing else is disturbed; and it heals without a
// remount.
func TestKMSRefusalIsAnErrno(t *testing.T) {
	t.Parallel()
	inject := func(fault kmstest.Fault) func(*testing.T, *faulty) func() {
		return func(_ *testing.T, f *faulty) func() { return f.kms.Inject(fault) }
	}
	state := func(state string) func(*testing.T, *faulty) func() {
		return func(_ *testing.T, f *faulty) func() {
			f.kms.SetState(f.key, state)
			return func() { f.kms.SetState(f.key, kmstest.Enabled) }
		}
	}
	rows := []struct {
		name  string
		start func(t *testing.T, f *faulty) (lift func())
		errno []error
		waits bool // it may use the whole deadline
	}{
		{"denied", func(_ *testing.T, f *faulty) func() {
			f.kms.SetRules(f.kms.Admin(), kmstest.Rule{Actions: []string{"DescribeKey"}})
			return func() { f.kms.SetRules(f.kms.Admin(), kmstest.Rule{}) }
		}, []error{unix.EACCES}, false},
		{"credentials expired", func(_ *testing.T, f *faulty) func() {
			f.kms.Expire(f.kms.Admin(), true)
			return func() { f.kms.Expire(f.kms.Admin(), false) }
		}, []error{unix.EACCES}, false},
		{"disabled", state(kmstest.Disabled), []error{unix.EKEYREVOKED}, false},
		{"pending deletion", state(kmstest.PendingDeletion), []error{unix.EKEYREVOKED}, false},
		{"pending import", state(kmstest.PendingImport), []error{unix.EKEYREVOKED}, false},
		{"not found", inject(kmstest.Fault{Code: "NotFoundException"}), []error{unix.ENOKEY}, false},
		{"incorrect key", inject(kmstest.Fault{Op: "Decrypt", Code: "IncorrectKeyException"}), []error{unix.EKEYREJECTED}, false},
		{"bad blob", inject(kmstest.Fault{Op: "Decrypt", Code: "InvalidCiphertextException"}), []error{unix.EBADMSG}, false},
		{"limit exceeded", inject(kmstest.Fault{Code: "LimitExceededException"}), []error{unix.EAGAIN}, false},
		{"throttled", inject(kmstest.Fault{Code: "ThrottlingException"}), []error{unix.EAGAIN}, true},
		{"internal", inject(kmstest.Fault{Code: "KMSInternalException"}), []error{unix.EAGAIN}, true},
		{"creating", state(kmstest.Creating), []error{unix.EAGAIN}, true},
		{"proxy says 503", inject(kmstest.Fault{Status: 503}), []error{unix.EAGAIN}, true},
		{"reset", inject(kmstest.Fault{Reset: true}), []error{unix.EAGAIN, unix.ETIMEDOUT}, true},
		{"hang", inject(kmstest.Fault{Hang: true}), []error{unix.ETIMEDOUT}, true},
	}
	denies := map[string]bool{"disabled": true, "pending deletion": true, "pending import": true, "not found": true}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			f := newFaulty(t, "-o", "kms_deadline="+deadline.String())
			lift := r.start(t, f)
			opened := make(chan error, 1)
			start := time.Now()
			go func() { opened <- harness.Try(f.Path("a"), unix.O_RDONLY, 0) }()
			goesOn := f.goesOn
			if denies[r.name] {
				goesOn = f.namesGoOn
			}
			goesOn(t)
			err := <-opened
			took := time.Since(start)
			require.True(t, oneOf(err, r.errno), "open says %v, not one of %v", err, r.errno)
			require.Less(t, took, deadline+slack)
			if !r.waits {
				require.Less(t, took, slack, "a clear answer needs no waiting")
			}
			if denies[r.name] { // the open had it checked, long before the lease's time
				require.True(t, harness.Eventually(slack, func() bool { _, err := f.open.ReadAt(make([]byte, 1), 0); return err != nil }), "the open file is not closed")
			}
			goesOn(t)
			require.NoError(t, os.Remove(f.Path("c")))
			lift()
			require.True(t, harness.Eventually(slack, func() bool { return harness.Try(f.Path("a"), unix.O_RDWR, 0) == nil }), "it does not heal")
			require.Equal(t, harness.Noise(20000), harness.ReadAt(t, f.Path("a"), 0, 20000))
			require.NoError(t, os.WriteFile(f.Path("new"), []byte("new"), 0o600))
			require.True(t, harness.Eventually(slack, func() bool { _, err := f.open.ReadAt(make([]byte, 1), 0); return err == nil }), "the open file does not heal")
			f.openGoesOn(t)
		})
	}
}

// TestDefaultDeadline: nobody waits for ever for a KMS that never answers.
func TestDefaultDeadline(t *testing.T) {
	t.Parallel()
	heavy(t)
	f := newFaulty(t)
	defer f.kms.Inject(kmstest.Fault{Hang: true})()
	start := time.Now()
	require.ErrorIs(t, harness.Try(f.Path("a"), unix.O_RDONLY, 0), unix.ETIMEDOUT)
	require.InDelta(t, 10, time.Since(start).Seconds(), 3)
}

func oneOf(err error, list []error) bool {
	for _, e := range list {
		if err == e {
			return true
		}
	}
	return false
}

// TestCreateWithoutKMS: a create with an empty pool fails in time, with an errno,
// and leaves no file behind; O_TRUNC of an existing file cuts nothing.
func TestCreateWithoutKMS(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault kmstest.Fault
		errno []error
	}{
		"disabled": {kmstest.Fault{Code: "DisabledException"}, []error{unix.EKEYREVOKED}},
		"hang":     {kmstest.Fault{Hang: true}, []error{unix.EAGAIN, unix.ETIMEDOUT}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFaulty(t)
			defer f.kms.Inject(c.fault)()
			var err error
			for i := range 2000 { // the pool runs dry
				start := time.Now()
				path := f.Path("new" + string(rune('a'+i%26)) + string(rune('a'+i/26%26)) + string(rune('a'+i/676)))
				err = harness.Try(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
				require.Less(t, time.Since(start), 2*time.Second+slack, "a create holds its directory")
				if err != nil {
					require.NoFileExists(t, path)
					break
				}
				harness.WriteAt(t, path, 0, []byte("x"))
			}
			require.True(t, oneOf(err, c.errno), "create says %v, not one of %v", err, c.errno)
			err = harness.Try(f.Path("b"), unix.O_WRONLY|unix.O_TRUNC, 0)
			require.Error(t, err)
			info, err := os.Stat(f.Path("b"))
			require.NoError(t, err)
			require.EqualValues(t, 20000, info.Size(), "a refused O_TRUNC has cut the file")
			if name == "disabled" { // which closes what is open, too
				f.namesGoOn(t)
			} else {
				f.goesOn(t)
			}
		})
	}
}

// TestInterruptedOpen: Ctrl-C ends a program at once that waits for KMS, and the
// next open gets the key.
func TestInterruptedOpen(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			f := newFaulty(t, "-o", "kms_deadline="+deadline.String())
			lift := f.kms.Inject(kmstest.Fault{Hang: true})
			cat := exec.Command("cat", f.Path("a"))
			require.NoError(t, cat.Start())
			time.Sleep(300 * time.Millisecond)
			start := time.Now()
			require.NoError(t, cat.Process.Signal(sig))
			require.Error(t, cat.Wait())
			require.Less(t, time.Since(start), time.Second, "a blocked open ignores %v", sig)
			lift()
			require.Equal(t, harness.Noise(20000), harness.ReadAt(t, f.Path("b"), 0, 20000))
			require.True(t, harness.Eventually(deadline+slack, func() bool { return harness.Try(f.Path("a"), unix.O_RDONLY, 0) == nil }))
		})
	}
}

// TestMountStatus: mount and rekey say by their status and in words what KMS
// said: the ARN, the region, the action.
func TestMountStatus(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	key := kms.NewKey()
	v := e.Init("volume", "--key", key)
	refused := func(status int, words ...string) {
		t.Helper()
		same := harness.Unchanged(t, v.Dir)
		e.Refused(status, append(words, key, harness.Region), "mount", v.Dir, v.Mnt)
		require.False(t, v.IsMounted())
		same()
	}
	reader := kms.AddPrincipal("reader", kmstest.Rule{Actions: []string{"DescribeKey"}})
	e.ActAs(kms, reader)
	refused(statusRefused, "kms:Decrypt")
	e.ActAs(kms, kms.Admin())
	kms.SetState(key, kmstest.Disabled)
	refused(statusRefused, "disabled")
	kms.SetState(key, kmstest.Enabled)
	lift := kms.Inject(kmstest.Fault{Code: "NotFoundException"})
	refused(statusRefused)
	lift()
	if !testing.Short() {
		lift = kms.Inject(kmstest.Fault{Status: 503})
		refused(statusUnavailable)
		lift()
		kms.SetDown(harness.Region, true)
		refused(statusUnavailable)
		kms.SetDown(harness.Region, false)
	}
	e.Set("AWS_ACCESS_KEY_ID", "")
	e.Set("AWS_SECRET_ACCESS_KEY", "")
	refused(statusRefused, "credentials")
	e.ActAs(kms, kms.Admin())
	dir := e.Mkdir("another")
	e.Refused(statusRefused, []string{"00000000-0000-0000-0000-000000000000"}, "init", dir, "--key",
		"arn:aws:kms:us-east-1:111122223333:key/00000000-0000-0000-0000-000000000000")
	require.NoFileExists(t, filepath.Join(dir, "kmsfs.toml"))
	v.Mount()
}

// TestForeignAccount: a volume whose key list was changed to somebody else's key
// is refused before KMS hears of it.
func TestForeignAccount(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	key := kms.NewKey()
	foreign := kms.Create(kmstest.KeySpec{Account: "999999999999"})
	v := e.Init("volume", "--key", key)
	for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
		e.Shell(`sed -i "s|$2|$3|" "$1"; grep -q "$3" "$1"`, filepath.Join(v.Dir, name), key, foreign)
	}
	calls := kms.During(func() {
		e.Refused(statusUsage, []string{foreign}, "mount", v.Dir, v.Mnt)
	})
	require.Empty(t, calls)
}
