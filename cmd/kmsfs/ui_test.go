package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/volume"
)

func TestStatusAndAdvice(t *testing.T) {
	kms := func(kind keys.Kind) error {
		return fmt.Errorf("opening a data key: %w", &keys.Error{Kind: kind, Op: "Decrypt", Key: keyA, Region: "us-east-1", Action: "kms:Decrypt", Err: errors.New("no")})
	}
	for name, tc := range map[string]struct {
		err    error
		status int
		says   []string
	}{
		"denied":      {kms(keys.KindDenied), exitRefused, []string{keyA, "Decrypt with", "kms:Decrypt", "us-east-1"}},
		"credentials": {kms(keys.KindCredentials), exitRefused, []string{keyA, "credentials", "us-east-1"}},
		"disabled":    {kms(keys.KindDisabled), exitRefused, []string{keyA, "enable the key", "us-east-1"}},
		"not found":   {kms(keys.KindNotFound), exitRefused, []string{keyA, "us-east-1"}},
		"rejected":    {kms(keys.KindRejected), exitUsage, []string{keyA}},
		"throttled":   {kms(keys.KindUnavailable), exitUnavailable, []string{keyA, "us-east-1"}},
		"timeout":     {kms(keys.KindTimeout), exitUnavailable, []string{keyA}},
		"limit":       {kms(keys.KindLimit), exitUnavailable, []string{keyA}},
		"bad blob":    {kms(keys.KindBadBlob), exitDamaged, []string{keyA}},
		"local file":  {&keys.Error{Kind: keys.KindNotFound, Op: "Decrypt", Key: "local:x"}, exitRefused, []string{"local:x", "KMSFS_KEYRING"}},
		"damaged":     {fmt.Errorf("x: %w", crypt.ErrDamaged), exitDamaged, []string{"backup"}},
		"foreign":     {crypt.ErrForeign, exitDamaged, nil},
		"not empty":   {volume.ErrNotEmpty, exitUsage, nil},
		"in use":      {&volume.LockedError{Path: "/v", Holder: &volume.Holder{PID: 7, Host: "h"}}, exitMount, []string{"process 7 on h"}},
		"stale":       {unix.ENOTCONN, exitMount, []string{"kmsfs umount"}},
		"interrupted": {context.Canceled, exitPartial, []string{"again"}},
		"two lines":   {errors.Join(errors.New("a"), errors.New("b")), exitUsage, []string{"a; b"}},
		"told":        {reported{fail(exitMount, "", "x")}, exitMount, nil},
		"anything":    {errors.New("x"), exitUsage, nil},
	} {
		t.Run(name, func(t *testing.T) {
			status, _ := diagnose(tc.err)
			require.Equal(t, tc.status, status)
			text := sentence(tc.err)
			require.NotContains(t, text, "\n")
			for _, s := range tc.says {
				require.Contains(t, text, s)
			}
		})
	}
}

// Every kind of failure of a key service has a status and a next step.
func TestEveryKindHasAdvice(t *testing.T) {
	for kind := keys.Kind(0); kind <= keys.KindInterrupted; kind++ {
		for _, e := range []*keys.Error{{Kind: kind, Key: keyA, Region: "us-east-1", Action: "kms:Decrypt"}, {Kind: kind, Key: "local:x"}} {
			status, next := keyAdvice(e)
			require.NotZero(t, status, kind)
			require.NotEmpty(t, next, kind)
		}
	}
}

func TestQuote(t *testing.T) {
	require.Equal(t, `kmsfs mount '/a b' '/it'\''s' '' x=1,y`, commandLine("kmsfs", "mount", "/a b", "/it's", "", "x=1,y"))
}

func allCommands(t *testing.T) (list []*cobra.Command) {
	t.Helper()
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		list = append(list, c)
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&program{console: &console{}}).rootCommand())
	require.Greater(t, len(list), 8)
	return list
}

func TestHelpNamesExitStatuses(t *testing.T) {
	for _, c := range allCommands(t) {
		if c.HasSubCommands() && (c.Name() == "key" || c.Name() == "headers") {
			continue // it only has commands
		}
		require.Contains(t, c.Long, "\n\nExit status:\n  0  done", c.CommandPath())
	}
}

// Every flag has its key in the configuration; what names the subject of one run
// has none.
func TestEveryFlagHasItsKey(t *testing.T) {
	keyOf := map[string]string{
		"init --key": "keys", "init --names": "names", "init --envelope": "envelope", "init --block-size": "block_size",
		"mount --foreground": "foreground", "mount --read-only": "read_only", "mount --allow-other": "allow_other",
		"mount --key": "keys", "mount --accept-new": "accept_new", "mount --accept-key": "accept_keys", "mount --log-file": "log_file",
		"mount --lease": "lease", "mount --grace": "grace", "mount --idle-unmount": "idle_unmount", "mount --prefetch": "prefetch", "mount --no-recover": "no_recover",
		"mount --metrics": "metrics", "mount --options": "", // each option has its own
		"rekey --jobs": "jobs", "rekey --max-rps": "max_rps", "rekey --accept-key": "accept_keys", "rekey --verify": "verify",
		"import --jobs": "jobs", "import --max-rps": "max_rps", // of rekey
		"fsck --jobs": "jobs", "fsck --max-rps": "max_rps", // of rekey
		"fsck --key": "keys", "fsck --accept-new": "accept_new", "fsck --accept-key": "accept_keys",
		"import --key": "keys", "import --accept-new": "accept_new", "import --accept-key": "accept_keys",
	}
	thisRun := map[string]bool{}
	for command, flags := range map[string]string{
		"rekey":  "to add remove refresh from via prepare shard dry-run json yes",
		"export": "force json", "import": "verify no-verify force dry-run json yes",
		"fsck":    "data repair cut-ends quarantine no-keys json",
		"inspect": "json", "status": "json", "umount": "lazy",
	} {
		for flag := range strings.FieldsSeq(flags) {
			thisRun[command+" --"+flag] = true
		}
	}
	for _, c := range allCommands(t) {
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			name := c.Name() + " --" + f.Name
			key, ok := keyOf[name]
			require.True(t, ok || thisRun[name] || f.Name == "help", "%s has no key in the configuration", name)
			require.Contains(t, string(config.Example), "\n"+key)
		})
	}
}

func TestMountOptions(t *testing.T) {
	c := config.Default()
	for _, o := range []string{"ro", "allow_other", "suid", "dev", "nonempty", "debug", "writeback=off", "attr_timeout=3s", "entry_timeout=4s",
		"kms_deadline=5s", "create_wait=1s", "cache_age=6s", "cache_keys=7", "pool=8", "noexec", "defaults", "_netdev", "x-systemd.automount", "x-a=b",
		"lease=7s", "grace=0s", "idle_unmount=8s", "recover_limit=6s", "prefetch=9", "metrics=:9100", "tail_save=off", "allow_suid", "allow_dev", "owner", "strictatime"} {
		require.NoError(t, mountOption(c, o), o)
	}
	s := config.Duration(time.Second)
	require.Equal(t, config.Mount{ReadOnly: true, AllowOther: true, Suid: true, Dev: true, NonEmpty: true, Debug: true, AttrTimeout: 3 * s, EntryTimeout: 4 * s, Lease: 7 * s, IdleUnmount: 8 * s, RecoverLimit: 6 * s, Metrics: ":9100", Options: []string{"noexec", "strictatime"}}, c.Mount)
	require.Equal(t, config.KMS{Deadline: 5 * s, CreateWait: s, CacheAge: 6 * s, CacheKeys: 7, Pool: 8, Prefetch: 9}, c.KMS)
	require.NoError(t, mountOption(c, "rw"))
	require.NoError(t, mountOption(c, "nosuid"))
	require.NoError(t, mountOption(c, "nodev"))
	require.False(t, c.Mount.ReadOnly || c.Mount.Suid || c.Mount.Dev)
	for _, o := range []string{"bogus", "bogus=1", "ro=1", "pool=x", "pool=-1", "prefetch=1025", "kms_deadline=0s", "lease=0s", "grace=-1s", "kms_deadline=soon", "writeback=maybe", "writeback", "tail_save=1"} {
		err := mountOption(c, o)
		require.Error(t, err, o)
		status, _ := diagnose(err)
		require.Equal(t, exitUsage, status)
	}
}

func TestMountinfo(t *testing.T) {
	list := parseMountinfo("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" +
		"99 22 0:50 / /mnt/with\\040space rw,nosuid shared:7 master:1 - fuse.kmsfs /back\\134slash rw,user_id=0\nnonsense\n")
	require.Equal(t, []mountEntry{{"/", "ext4", "/dev/sda1", "8:1"}, {"/mnt/with space", "fuse.kmsfs", `/back\slash`, "0:50"}}, list)
	require.True(t, list[1].isKmsfs())
	require.True(t, inside("/a/b", "/a"))
	require.True(t, inside("/a", "/a"))
	require.False(t, inside("/ab", "/a"))
	require.True(t, inside("/ab", "/"))
}

// lines keeps what a syslog is sent.
type lines struct{ got []string }

func (l *lines) Debug(s string) error   { l.got = append(l.got, "debug "+s); return nil }
func (l *lines) Info(s string) error    { l.got = append(l.got, "info "+s); return nil }
func (l *lines) Warning(s string) error { l.got = append(l.got, "warning "+s); return nil }
func (l *lines) Err(s string) error     { l.got = append(l.got, "err "+s); return nil }

func TestLogThrottlesKeyErrors(t *testing.T) {
	out := &lines{}
	h := newThrottle(newSyslogHandler(out, slog.LevelInfo))
	now := time.Unix(0, 0)
	h.seen.now = func() time.Time { return now }
	log := slog.New(h).With("volume", "v")
	failure := func(key string, kind keys.Kind) {
		log.Warn("request failed", "err", fmt.Errorf("x: %w", &keys.Error{Kind: kind, Op: "Decrypt", Key: key, Region: "us-east-1", Action: "kms:Decrypt"}))
	}
	for range 100 {
		failure(keyA, keys.KindDisabled)
	}
	failure(keyA, keys.KindDenied)
	failure(keyB, keys.KindDisabled)
	log.Info("other")
	log.Info("other")
	log.Debug("below the level")
	require.Len(t, out.got, 5)
	require.Contains(t, out.got[0], "warning msg=\"request failed\"")
	for _, want := range []string{"volume=v", "key=" + keyA, "region=us-east-1", "operation=Decrypt", "action=kms:Decrypt", "next="} {
		require.Contains(t, out.got[0], want)
	}
	require.True(t, strings.HasPrefix(out.got[3], "info "))
	now = now.Add(throttlePeriod)
	failure(keyA, keys.KindDisabled)
	require.Len(t, out.got, 6)
	require.Contains(t, out.got[5], "lines_left_out=99")
}
