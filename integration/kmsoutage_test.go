package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// otherAccount owns the second key of twoKeys.
const otherAccount = "444455556666"

// twoKeys is a mounted volume with files a* under one key and b* under another, of
// which the first rules; nothing is cached.
func twoKeys(t *testing.T, kms *harness.KMS, e *harness.Env, args ...string) (v *harness.Volume, one, other string) {
	t.Helper()
	one, other = kms.NewKey(), kms.Create(kmstest.KeySpec{Account: otherAccount})
	v = e.Init("volume", "--key", one, "--key", other)
	for _, c := range []struct{ name, first, second string }{{"b", other, one}, {"a", one, other}} {
		v.Mount("--key", c.first, "--key", c.second)
		for i := range 4 {
			require.NoError(t, os.WriteFile(v.Path(fmt.Sprint(c.name, i)), harness.Noise(9000), 0o600))
		}
		v.Umount()
	}
	v.Options(append([]string{"--key", one, "--key", other, "--prefetch", "0"}, args...)...)
	return v, one, other
}

// opening opens a file in a goroutine.
func opening(path string) <-chan error {
	opened := make(chan error, 1)
	go func() { opened <- harness.Try(path, unix.O_RDONLY, 0) }()
	return opened
}

// heals waits until a file opens, and reads it.
func heals(t *testing.T, path string) {
	t.Helper()
	require.True(t, harness.Eventually(time.Minute, func() bool { return harness.Try(path, unix.O_RDONLY, 0) == nil }), "%s does not heal", path)
	require.Equal(t, harness.Noise(9000), harness.ReadAt(t, path, 0, 9001))
}

// TestHangBlocksOneKey: while KMS does not answer for one key, names and attributes,
// files that are open, and files under another key go on; only then the open ends.
func TestHangBlocksOneKey(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	v, _, other := twoKeys(t, kms, e, "-o", "kms_deadline=8s")
	v.Mount()
	kms.Quiet()
	f, err := os.Open(v.Path("a0"))
	require.NoError(t, err)
	defer f.Close()
	lift := kms.Inject(kmstest.Fault{Key: other, Hang: true})
	opened := opening(v.Path("b0"))
	for i := range 4 {
		name := v.Path(fmt.Sprint("a", i))
		require.Equal(t, harness.Noise(9000), harness.ReadAt(t, name, 0, 9001))
		require.NoError(t, os.WriteFile(v.Path(fmt.Sprint("new", i)), []byte("new"), 0o600))
	}
	e.Shell(`ls -lR "$1" >/dev/null; stat "$1"/b*; chmod 640 "$1"/b0; mv "$1"/b1 "$1"/c; mv "$1"/c "$1"/b1; mkdir "$1"/d; ln "$1"/b2 "$1"/d; rm -r "$1"/d "$1"/b3`, v.Mnt)
	_, err = f.ReadAt(make([]byte, 100), 5000)
	require.NoError(t, err)
	require.Empty(t, opened, "the open has ended while KMS hung, and what was to go on meanwhile only came after it")
	require.ErrorIs(t, <-opened, unix.ETIMEDOUT)
	lift()
	heals(t, v.Path("b0"))
}

// TestNameThatDoesNotResolve: an endpoint whose name the DNS does not know is an
// outage of the keys that live there, and of no other; without any key that answers
// the mount says so.
func TestNameThatDoesNotResolve(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	v, one, other := twoKeys(t, kms, e, "-o", "kms_deadline=2s")
	aws := filepath.Join(e.Root, "aws")
	profile := fmt.Sprintf("[profile other]\naws_access_key_id = %s\naws_secret_access_key = %s\nendpoint_url = http://kms.example.invalid:8080\n",
		kms.Admin().AccessKey, kms.Admin().SecretKey)
	require.NoError(t, os.WriteFile(aws, []byte(profile), 0o600))
	e.Set("AWS_CONFIG_FILE", aws)
	configure(t, e, "[kms.profiles]\n"+otherAccount+" = 'other'\n")
	v.Mount()
	for range 2 {
		err := harness.Try(v.Path("b0"), unix.O_RDONLY, 0)
		require.True(t, oneOf(err, []error{unix.EAGAIN, unix.ETIMEDOUT}), "open says %v", err)
		require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path("a0"), 0, 9001))
		e.Shell(`ls -l "$1"; mv "$1"/b1 "$1"/b4; mv "$1"/b4 "$1"/b1`, v.Mnt)
	}
	v.Umount()
	e.Set("AWS_ENDPOINT_URL_KMS", "http://kms.example.invalid:8080")
	configure(t, e, "[kms]\ndeadline = '1s'\n")
	e.Refused(statusUnavailable, []string{one, harness.Region}, "mount", v.Dir, v.Mnt, "--key", one, "--key", other)
	e.ActAs(kms, kms.Admin())
	v.Mount()
	heals(t, v.Path("b0"))
}

// A gate is what a KMS endpoint is reached through: it can be closed, so that
// connections break and new ones are refused, and opened again on the same port.
type gate struct {
	addr, to string

	mu    sync.Mutex
	l     net.Listener
	conns []net.Conn
}

func newGate(t *testing.T, to string) *gate {
	t.Helper()
	g := &gate{addr: "127.0.0.1:0", to: strings.TrimPrefix(to, "http://")}
	g.open(t)
	t.Cleanup(g.close)
	return g
}

func (g *gate) open(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", g.addr)
	require.NoError(t, err)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.l, g.addr = l, l.Addr().String()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go g.pass(conn)
		}
	}()
}

func (g *gate) pass(conn net.Conn) {
	out, err := net.Dial("tcp", g.to)
	if err != nil {
		conn.Close()
		return
	}
	g.mu.Lock()
	g.conns = append(g.conns, conn, out)
	g.mu.Unlock()
	go func() { _, _ = io.Copy(out, conn); out.Close() }()
	_, _ = io.Copy(conn, out)
	conn.Close()
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.l.Close()
	for _, conn := range g.conns {
		conn.Close()
	}
	g.conns = nil
}

// TestEndpointComesBack: KMS goes away and comes back, several times; files open
// again, whether or not they were tried meanwhile.
func TestEndpointComesBack(t *testing.T) {
	t.Parallel()
	f := func(e *harness.Env) (*harness.KMS, *gate) {
		kms := e.KMS()
		g := newGate(t, kms.URL())
		e.Set("AWS_ENDPOINT_URL_KMS", "http://"+g.addr)
		return kms, g
	}
	e := harness.New(t)
	kms, g := f(e)
	v, _, _ := twoKeys(t, kms, e, "-o", "kms_deadline=1s")
	v.Mount()
	for i := range 3 {
		g.close()
		name := v.Path(fmt.Sprint("a", i))
		err := harness.Try(name, unix.O_RDONLY, 0)
		require.True(t, oneOf(err, []error{unix.EAGAIN, unix.ETIMEDOUT}), "open says %v", err)
		e.Shell(`ls -l "$1"`, v.Mnt)
		g.open(t)
		heals(t, name)
		heals(t, v.Path(fmt.Sprint("b", i)))
	}
	require.NoError(t, os.WriteFile(v.Path("new"), []byte("new"), 0o600))
}

// TestSlowKMS: an answer takes five seconds. Opens wait for it, together and not one
// after the other; what needs no key does not.
func TestSlowKMS(t *testing.T) {
	t.Parallel()
	heavy(t)
	e := harness.New(t)
	kms := e.KMS()
	v, _, _ := twoKeys(t, kms, e, "-o", "kms_deadline=30s")
	v.Mount()
	kms.Quiet()
	defer kms.SetLatency(5 * time.Second)()
	var all []<-chan error
	for _, name := range []string{"a0", "a1", "a2", "b0", "b1", "b2"} {
		all = append(all, opening(v.Path(name)))
	}
	e.Shell(`ls -lR "$1" >/dev/null; mv "$1"/a3 "$1"/a4; rm "$1"/a4`, v.Mnt)
	for _, opened := range all {
		require.NoError(t, <-opened)
	}
	require.NotZero(t, kms.Count("Decrypt"))
	for _, name := range []string{"a0", "b2"} {
		require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path(name), 0, 9001))
	}
}

// TestClockSkew: KMS's clock runs ahead of ours, or behind, while the volume is mounted
// and when it is; the SDK learns of it from the refusal.
func TestClockSkew(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	v, _, _ := twoKeys(t, kms, e)
	v.Mount()
	for i, skew := range []time.Duration{20 * time.Minute, -20 * time.Minute, 0} {
		kms.SetSkew(skew)
		require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path(fmt.Sprint("a", i)), 0, 9001), "%v ahead", skew)
		require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path(fmt.Sprint("b", i)), 0, 9001), "%v ahead", skew)
	}
	kms.SetSkew(3 * time.Hour)
	v.Remount()
	require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path("a3"), 0, 9001))
	require.NoError(t, os.WriteFile(v.Path("new"), []byte("new"), 0o600))
}

// TestCredentialsExpireMidRun: credentials of a process (credential_process) or of a
// shared file end while the volume is mounted. New ones are taken without a word; none,
// and opens are refused while all else goes on; and it heals.
func TestCredentialsExpireMidRun(t *testing.T) {
	for _, kind := range []string{"process", "file"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			e := harness.New(t)
			kms := e.KMS()
			v, _, _ := twoKeys(t, kms, e, "-o", "kms_deadline=2s")
			give := credentials(t, e, kind)
			first, second, third := kms.AddPrincipal("first", kmstest.Rule{}), kms.AddPrincipal("second", kmstest.Rule{}), kms.AddPrincipal("third", kmstest.Rule{})
			give(first)
			v.Mount()
			f, err := os.OpenFile(v.Path("a0"), os.O_RDWR, 0)
			require.NoError(t, err)
			defer f.Close()

			give(second)
			kms.Expire(first, true)
			require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path("a1"), 0, 9001), "there were new ones")
			give(kmstest.Principal{})
			kms.Expire(second, true)
			require.ErrorIs(t, harness.Try(v.Path("b1"), unix.O_RDONLY, 0), unix.EACCES)
			e.Shell(`ls -l "$1"; mv "$1"/a3 "$1"/a4`, v.Mnt)
			_, err = f.WriteAt([]byte("goes on"), 100)
			require.NoError(t, err)
			require.NoError(t, f.Sync())
			give(third)
			heals(t, v.Path("b1"))
			require.NoError(t, os.WriteFile(v.Path("new"), []byte("new"), 0o600))
		})
	}
}

// credentials are given by a program that is run for them, or by a file; nobody's are
// none.
func credentials(t *testing.T, e *harness.Env, kind string) (give func(p kmstest.Principal)) {
	t.Helper()
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} {
		e.Set(name, "")
	}
	given, config := filepath.Join(e.Root, "credentials"), filepath.Join(e.Root, "aws")
	variable, text := "AWS_SHARED_CREDENTIALS_FILE", "[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n"
	if kind == "process" {
		variable, text = "AWS_CONFIG_FILE", `{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "%s", "SessionToken": ""}`
		require.NoError(t, os.WriteFile(config, []byte("[default]\ncredential_process = cat "+given+"\n"), 0o600))
		e.Set(variable, config)
	} else {
		e.Set(variable, given)
	}
	return func(p kmstest.Principal) {
		if p.AccessKey == "" {
			require.NoError(t, os.Remove(given))
			return
		}
		require.NoError(t, os.WriteFile(given, fmt.Appendf(nil, text, p.AccessKey, p.SecretKey), 0o600))
	}
}

func init() { harness.Helper("open", openHelper) }

// openHelper opens a file and says how that ended; a signal has a handler.
func openHelper(args []string) error {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGUSR1)
	runtime.LockOSThread()
	fmt.Println(unix.Gettid())
	fd, err := unix.Open(args[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
	fmt.Println(fd, err)
	return nil
}

// TestSignalInterruptsOpen: a signal that a program handles ends its open with EINTR
// while KMS hangs, long before the deadline, and no other open of the same file.
func TestSignalInterruptsOpen(t *testing.T) {
	t.Parallel()
	e := harness.New(t)
	kms := e.KMS()
	v, _, _ := twoKeys(t, kms, e, "-o", "kms_deadline=30s")
	v.Mount()
	kms.Quiet()
	lift := kms.Inject(kmstest.Fault{Delay: 3 * time.Second})
	defer lift()
	helper := e.Helper("open", v.Path("a0"))
	helper.Env = append(helper.Env, "GODEBUG=asyncpreemptoff=1") // no signals but ours
	out, err := helper.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, helper.Start())
	lines := bufio.NewScanner(out)
	require.True(t, lines.Scan())
	thread, err := strconv.Atoi(lines.Text())
	require.NoError(t, err)
	opened := opening(v.Path("a0"))
	ended := make(chan struct{})
	go func() { // it may not be in the open yet, so one signal is not enough
		for {
			select {
			case <-ended:
				return
			case <-time.After(20 * time.Millisecond):
				_ = unix.Tgkill(helper.Process.Pid, thread, syscall.SIGUSR1)
			}
		}
	}()
	require.True(t, lines.Scan())
	close(ended)
	require.Equal(t, "-1 interrupted system call", lines.Text())
	require.Empty(t, opened, "the other open ended first")
	require.NoError(t, helper.Wait())
	require.NoError(t, <-opened, "the signal has ended the open of another program")
}
