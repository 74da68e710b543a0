package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
)

// soon is far above what anything here takes once its time has come: these tests wait
// for conditions, on machines that have other things to do.
const soon = 40 * time.Second

// leased is a mounted volume with short leases, and files to lose.
type leased struct {
	*harness.Volume
	t    *testing.T
	kms  *harness.KMS
	data []byte
	open *os.File
}

func newLeased(t *testing.T, grace string, keys ...string) *leased {
	t.Helper()
	return newLeasedIn(t, "per-file", grace, keys...)
}

// envelopes are what volumes may have. What hangs on the keys of open files is tested
// with each.
var envelopes = []string{"per-file", "shared"}

func newLeasedIn(t *testing.T, envelope, grace string, keys ...string) *leased {
	t.Helper()
	e := harness.New(t)
	kms := e.KMS()
	args := []string{"--envelope", envelope, "--key", kms.NewKey()}
	for _, region := range keys {
		args = append(args, "--key", kms.CreateKey(region))
	}
	v := e.Init("volume", args...)
	v.Options("--lease", "1s", "--grace", grace, "-o", "kms_deadline=2s")
	v.Mount()
	l := &leased{Volume: v, t: t, kms: kms, data: harness.Noise(200_000)}
	for _, name := range []string{"open", "closed"} {
		require.NoError(t, os.WriteFile(v.Path(name), l.data, 0o600))
	}
	l.open = l.opened("open")
	require.NoError(t, l.read(), "it is in the page cache now")
	return l
}

func (l *leased) opened(name string) *os.File {
	l.t.Helper()
	f, err := os.OpenFile(l.Path(name), os.O_RDWR, 0)
	require.NoError(l.t, err)
	l.t.Cleanup(func() { f.Close() })
	return f
}

// read reads the open file; what it gets must be right.
func (l *leased) read() error {
	l.t.Helper()
	p := make([]byte, len(l.data))
	_, err := l.open.ReadAt(p, 0)
	if err == nil {
		require.True(l.t, bytes.Equal(l.data, p), "wrong bytes")
	}
	return err
}

// live is what the mount tells about its leases.
func (l *leased) live() (live struct {
	Leases []struct {
		Key, State string
		Checks     int
	}
	Wiped, Healed int
}) {
	l.t.Helper()
	var status struct{ Live json.RawMessage }
	require.NoError(l.t, json.Unmarshal([]byte(l.Env.Must("status", "--json", l.Dir)), &status))
	require.NoError(l.t, json.Unmarshal(status.Live, &live))
	return live
}

func (l *leased) key(i int) string { return l.live().Leases[i].Key }

// closes waits until the open file, all of it, and the other are refused.
func (l *leased) closes() {
	l.t.Helper()
	require.True(l.t, harness.Eventually(soon, func() bool { return l.read() != nil }), "access goes on")
	for off := int64(0); off < int64(len(l.data)); off += 4096 {
		require.True(l.t, harness.Eventually(soon, func() bool {
			_, err := l.open.ReadAt(make([]byte, 1), off)
			return err != nil
		}), "the page at %d is still in the kernel's cache", off)
	}
	require.ErrorIs(l.t, l.read(), unix.EKEYREVOKED)
	require.Error(l.t, harness.Try(l.Path("closed"), unix.O_RDONLY, 0))
}

// heals waits until all goes on, without a remount.
func (l *leased) heals() {
	l.t.Helper()
	require.True(l.t, harness.Eventually(soon, func() bool { return l.read() == nil }), "it does not heal")
	got, err := os.ReadFile(l.Path("closed"))
	require.NoError(l.t, err)
	require.True(l.t, bytes.Equal(l.data, got))
	_, err = l.open.WriteAt(l.data[:1000], 0)
	require.NoError(l.t, err)
	require.NoError(l.t, l.open.Sync())
}

// TestDisablingAKeyClosesItsFiles is the kill switch: open handles, the kernel's cache
// and uncached files are closed within seconds, names are not, and enabling the key
// heals it all.
func TestDisablingAKeyClosesItsFiles(t *testing.T) {
	for _, c := range [][]string{{kmstest.Disabled, "per-file"}, {kmstest.PendingDeletion, "per-file"}, {kmstest.Disabled, "shared"}} {
		state, envelope := c[0], c[1]
		t.Run(state+"/"+envelope, func(t *testing.T) {
			t.Parallel()
			l := newLeasedIn(t, envelope, "15m")
			key := l.key(0)
			l.kms.SetState(key, state)
			start := time.Now()
			l.closes()
			t.Logf("closed after %v with a lease of 1s", time.Since(start))
			require.ErrorIs(t, harness.Try(l.Path("closed"), unix.O_RDONLY, 0), unix.EKEYREVOKED)
			require.ErrorIs(t, harness.Try(l.Path("new"), unix.O_WRONLY|unix.O_CREAT, 0o600), unix.EKEYREVOKED)
			l.Env.Shell(`ls -lR "$1" >/dev/null; mv "$1/closed" "$1/c"; mv "$1/c" "$1/closed"; chmod 640 "$1/open"`, l.Mnt)
			require.Equal(t, "revoked", l.live().Leases[0].State)
			l.kms.SetState(key, kmstest.Enabled)
			l.heals()
			require.Equal(t, "valid", l.live().Leases[0].State)
		})
	}
}

// TestWithdrawnPermissionCloses: a principal that may no longer decrypt loses what it
// has open; one refusal alone changes nothing.
func TestWithdrawnPermissionCloses(t *testing.T) {
	t.Parallel()
	l := newLeased(t, "15m")
	for range 3 {
		before := l.live().Leases[0].Checks
		l.kms.Inject(kmstest.Fault{Op: "Decrypt", Code: "AccessDeniedException", Times: 1})
		require.True(t, harness.Eventually(soon, func() bool {
			require.NoError(t, l.read())
			return l.live().Leases[0].Checks > before+2
		}))
	}
	require.Zero(t, l.live().Wiped)
	l.kms.SetRules(l.kms.Admin(), kmstest.Rule{Actions: []string{"DescribeKey", "GenerateDataKey"}})
	l.closes()
	l.kms.SetRules(l.kms.Admin(), kmstest.Rule{})
	l.heals()
}

// TestDatabaseOutlivesCredentials: a database that has its file open commits and syncs
// through a lapse of credentials, a KMS that fails and one that hangs, within the grace
// period. (A journal beside it would be a new file, which needs a new key.)
func TestDatabaseOutlivesCredentials(t *testing.T) {
	t.Parallel()
	l := newLeased(t, "15m")
	for name, start := range map[string]func() (lift func()){
		"credentials": func() func() {
			l.kms.Expire(l.kms.Admin(), true)
			return func() { l.kms.Expire(l.kms.Admin(), false) }
		},
		"errors": func() func() { return l.kms.Inject(kmstest.Fault{Code: "KMSInternalException"}) },
		"hang":   func() func() { return l.kms.Inject(kmstest.Fault{Hang: true}) },
	} {
		t.Run(name, func(t *testing.T) {
			db := newDatabase(t, l, name)
			db.run("pragma journal_mode=memory; pragma synchronous=full; create table t(n integer, v blob);")
			lift := start()
			require.True(t, harness.Eventually(soon, func() bool { return l.live().Leases[0].State == "grace" }))
			for n := range 20 {
				db.run(fmt.Sprintf("insert into t values(%d, randomblob(3000));", n))
			}
			require.NoError(t, l.read())
			lift()
			require.True(t, harness.Eventually(soon, func() bool { return l.live().Leases[0].State == "valid" }))
			require.Contains(t, db.end("select 'rows', count(*) from t; pragma integrity_check;"), "rows|20\nok\n")
		})
	}
	require.Zero(t, l.live().Wiped)
}

// A database is a running sqlite3.
type database struct {
	t      *testing.T
	in     io.WriteCloser
	cmd    *exec.Cmd
	out    bytes.Buffer
	marker string
	turns  int
}

func newDatabase(t *testing.T, l *leased, name string) *database {
	t.Helper()
	db := &database{t: t, cmd: exec.Command("sqlite3", "-bail", l.Path(name+".db")), marker: filepath.Join(t.TempDir(), "done")}
	var err error
	db.in, err = db.cmd.StdinPipe()
	require.NoError(t, err)
	db.cmd.Stdout, db.cmd.Stderr = &db.out, &db.out
	require.NoError(t, db.cmd.Start())
	return db
}

// run has statements executed and waits until they are.
func (db *database) run(statements string) {
	db.t.Helper()
	db.turns++
	marker := fmt.Sprint(db.marker, db.turns)
	_, err := fmt.Fprintf(db.in, "%s\n.system touch %s\n", statements, marker)
	require.NoError(db.t, err)
	require.True(db.t, harness.Eventually(soon, func() bool { _, err := os.Stat(marker); return err == nil }), "%s", statements)
}

// end executes the last statements and returns all that the database said.
func (db *database) end(statements string) string {
	db.t.Helper()
	_, err := fmt.Fprintln(db.in, statements)
	require.NoError(db.t, err)
	require.NoError(db.t, db.in.Close())
	require.NoError(db.t, db.cmd.Wait(), "%s", &db.out)
	return db.out.String()
}

// TestOutageEndsTheLease: beyond the grace period all is closed, and opens again when KMS
// answers.
func TestOutageEndsTheLease(t *testing.T) {
	t.Parallel()
	l := newLeased(t, "4s")
	lift := l.kms.Inject(kmstest.Fault{Status: 503})
	start := time.Now()
	l.closes()
	require.Greater(t, time.Since(start), 4*time.Second, "the grace period was not over")
	lift()
	l.heals()
}

// TestStrictLease: with no grace, an outage of an interval is enough.
func TestStrictLease(t *testing.T) {
	t.Parallel()
	l := newLeased(t, "0")
	lift := l.kms.Inject(kmstest.Fault{Status: 503})
	l.closes()
	lift()
	l.heals()
}

// TestOtherKeysDenialChangesNothing: files have copies under two keys, and depend on the
// first.
func TestOtherKeysDenialChangesNothing(t *testing.T) {
	t.Parallel()
	l := newLeased(t, "15m")
	second, first := l.key(0), l.kms.CreateKey("eu-west-1")
	l.Env.Must("rekey", l.Dir, "--add", first, "--yes")
	require.Equal(t, first, l.key(0), "what is added is for new files, and governs")
	l.kms.SetState(second, kmstest.Disabled)
	checks := l.live().Leases[0].Checks
	require.True(t, harness.Eventually(soon, func() bool {
		require.NoError(t, l.read())
		return l.live().Leases[0].Checks > checks+3
	}))
	require.NoError(t, harness.Try(l.Path("closed"), unix.O_RDONLY, 0))
	require.Zero(t, l.live().Wiped)
	l.kms.SetState(first, kmstest.Disabled)
	l.closes()
	l.kms.SetState(first, kmstest.Enabled)
	l.kms.SetState(second, kmstest.Enabled)
	l.heals()
}

// TestRekeyMovesTheLease: after a rekey what is open depends on the new key alone.
func TestRekeyMovesTheLease(t *testing.T) {
	t.Parallel()
	for _, envelope := range envelopes {
		t.Run(envelope, func(t *testing.T) {
			t.Parallel()
			rekeyMovesTheLease(t, newLeasedIn(t, envelope, "15m"))
		})
	}
}

func rekeyMovesTheLease(t *testing.T, l *leased) {
	old, next := l.key(0), l.kms.NewKey()
	l.Env.Must("rekey", l.Dir, "--to", next, "--yes")
	l.kms.SetState(old, kmstest.Disabled)
	require.Equal(t, next, l.key(0))
	checks := l.live().Leases[0].Checks
	require.True(t, harness.Eventually(soon, func() bool {
		require.NoError(t, l.read())
		return l.live().Leases[0].Checks > checks+3
	}))
	require.Zero(t, l.live().Wiped)
	l.kms.SetState(next, kmstest.Disabled)
	l.closes()
	l.kms.SetState(next, kmstest.Enabled)
	l.heals()
}

// TestRenewalsOnTheServer: one Decrypt for each interval, not for each file; none when
// nothing is open or cached.
func TestRenewalsOnTheServer(t *testing.T) {
	t.Parallel()
	l := newLeased(t, "15m")
	for i := range 30 {
		require.NoError(t, os.WriteFile(l.Path(fmt.Sprint(i)), l.data[:5000], 0o600))
	}
	require.NoError(t, l.open.Close())
	l.Options("--lease", "1s", "-o", "cache_age=3s")
	l.Remount() // nothing is fetched ahead
	var files []*os.File
	for i := range 30 {
		files = append(files, l.opened(fmt.Sprint(i)))
	}
	time.Sleep(4 * time.Second) // the opens are no longer cached
	start, before := time.Now(), l.kms.Count("Decrypt")
	time.Sleep(6 * time.Second)
	n, intervals := l.kms.Count("Decrypt")-before, int(time.Since(start).Seconds()+1)
	require.Positive(t, n)
	require.LessOrEqual(t, n, intervals*5/4+2, "30 files are open")
	for _, f := range files {
		require.NoError(t, f.Close())
	}
	require.True(t, harness.Eventually(soon, func() bool {
		before := l.kms.Count()
		time.Sleep(3 * time.Second)
		return l.kms.Count() == before
	}), "an idle mount goes on calling KMS")
}

// TestSyncedRecordsOutliveTheKillSwitch: an append-and-fsync loop is told when the key is
// disabled, and every record that was acknowledged is there afterwards.
func TestSyncedRecordsOutliveTheKillSwitch(t *testing.T) {
	l := newLeased(t, "15m")
	log, err := os.Create(l.Path("log"))
	require.NoError(t, err)
	defer log.Close()
	var acknowledged bytes.Buffer
	var done atomic.Int64
	ended := make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			line := fmt.Sprintf("record %d %x\n", i, l.data[i%1000:i%1000+40])
			_, err := log.WriteAt([]byte(line), int64(acknowledged.Len()))
			if err == nil {
				err = log.Sync()
			}
			if err != nil {
				ended <- err
				return
			}
			acknowledged.WriteString(line)
			done.Add(1)
		}
	}()
	require.True(t, harness.Eventually(soon, func() bool { return done.Load() > 100 }))
	key := l.key(0)
	l.kms.SetState(key, kmstest.Disabled)
	select {
	case err := <-ended:
		t.Logf("told after %d records: %v", done.Load(), err)
	case <-time.After(soon):
		require.Fail(t, "it writes on under a disabled key")
	}
	l.kms.SetState(key, kmstest.Enabled)
	l.heals()
	got := make([]byte, acknowledged.Len())
	require.True(t, harness.Eventually(soon, func() bool {
		_, err := log.ReadAt(got, 0)
		return err == nil
	}))
	require.True(t, bytes.Equal(acknowledged.Bytes(), got))
	require.NoError(t, log.Truncate(int64(acknowledged.Len())))
}

// TestLockOnAMount: kmsfs lock closes all without KMS having a say, and unlock asks it.
func TestLockOnAMount(t *testing.T) {
	t.Parallel()
	for _, envelope := range envelopes {
		t.Run(envelope, func(t *testing.T) {
			t.Parallel()
			lockOnAMount(t, newLeasedIn(t, envelope, "15m"))
		})
	}
}

func lockOnAMount(t *testing.T, l *leased) {
	l.Env.Must("lock", l.Mnt)
	require.ErrorIs(t, l.read(), unix.EKEYREVOKED)
	require.ErrorIs(t, harness.Try(l.Path("closed"), unix.O_RDONLY, 0), unix.EKEYREVOKED)
	calls := l.kms.During(func() { require.Error(t, harness.Try(l.Path("closed"), unix.O_RDONLY, 0)) })
	require.Empty(t, calls)
	key := l.key(0)
	l.kms.SetState(key, kmstest.Disabled)
	l.Env.Must("unlock", l.Mnt)
	l.closes()
	l.kms.SetState(key, kmstest.Enabled)
	l.heals()
}
