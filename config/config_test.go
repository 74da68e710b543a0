package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func write(t *testing.T, path, text string) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// The shipped example names every key with its default: parsing it strictly
// changes nothing but the sample volume.
func TestExampleIsTheDefault(t *testing.T) {
	c := Default()
	c.Init.Names, c.KMS.Deadline, c.Rekey.Jobs = "plain", 1, 1 // must be overridden
	require.NoError(t, c.merge("example.toml", Example))
	want := Default()
	want.Init.Keys, want.Mount.Options = []string{}, []string{}
	want.Volume = map[string]Volume{strings.Repeat("0", 32): {Keys: []string{}, AcceptKeys: []string{}}}
	require.Equal(t, want, c)
}

// Every key of the structs stands in the example.
func TestExampleIsComplete(t *testing.T) {
	for _, key := range keysOf(t) {
		require.Contains(t, string(Example), "\n"+key+" = ", "example.toml does not show %s", key)
	}
	// The profiles have no default: those it shows, in comments, are valid.
	shown := strings.NewReplacer("#   aws-cn", "aws-cn", "#   1111", "1111", "[kms.profiles]\n", "").Replace(string(Example))
	c, rest := Default(), shown[strings.Index(shown, "aws-cn = "):]
	require.NoError(t, c.merge("example.toml", []byte("[kms.profiles]\n"+rest)))
	require.Equal(t, map[string]string{"aws-cn": "china", "111122223333": "archive"}, c.KMS.Profiles)
	require.Contains(t, string(Example), "\n[kms.profiles]\n")
}

func keysOf(t *testing.T) (keys []string) {
	t.Helper()
	for _, f := range []string{"config.go"} {
		src, err := os.ReadFile(f)
		require.NoError(t, err)
		for _, line := range strings.Split(string(src), "\n") {
			_, tag, ok := strings.Cut(line, "`toml:\"")
			if !ok {
				continue
			}
			key, _, _ := strings.Cut(tag, "\"")
			switch key {
			case "init", "mount", "kms", "rekey", "volume", "profiles":
				continue // sections
			}
			keys = append(keys, key)
		}
	}
	require.Greater(t, len(keys), 20)
	return keys
}

func TestLaterFilesOverrideEarlier(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	write(t, filepath.Join(dir, "kmsfs/config.toml"), "require_kms = true\n[kms]\ndeadline = '3s'\n[rekey]\njobs = 4\n")
	extra := write(t, filepath.Join(dir, "extra.toml"), "[kms]\ndeadline = '5s'\n")

	c, err := Load(extra)
	require.NoError(t, err)
	require.True(t, c.RequireKMS)
	require.Equal(t, Duration(5*time.Second), c.KMS.Deadline)
	require.Equal(t, 4, c.Rekey.Jobs)
	require.Equal(t, "encrypted", c.Init.Names)
}

// Without a host metrics are for this machine only.
func TestMetricsAddress(t *testing.T) {
	for in, want := range map[string][2]string{
		":9100":                {"tcp", "127.0.0.1:9100"},
		"localhost:0":          {"tcp", "localhost:0"},
		"[::1]:9100":           {"tcp", "[::1]:9100"},
		"0.0.0.0:9100":         {"tcp", "0.0.0.0:9100"},
		"unix:/run/kmsfs/m":    {"unix", "/run/kmsfs/m"},
		"unix:/run/with:colon": {"unix", "/run/with:colon"},
	} {
		network, address, err := MetricsAddress(in)
		require.NoError(t, err, in)
		require.Equal(t, want, [2]string{network, address})
	}
	for _, bad := range []string{"", "9100", "localhost", ":", ":http", ":99999", "::1:9100", "unix:", "unix:relative", "/run/m"} {
		_, _, err := MetricsAddress(bad)
		require.Error(t, err, bad)
	}
}

func TestFaults(t *testing.T) {
	id := strings.Repeat("a", 32)
	for name, tc := range map[string]struct{ text, want string }{
		"unknown key":        {"require_kms = true\n\nrequire_kmz = true\n", `c.toml:3: unknown key "require_kmz"`},
		"unknown in section": {"[mount]\nread_only = true\nreadonly = true\n", `c.toml:3: unknown key "mount.readonly"`},
		"two unknown":        {"a = 1\nb = 2\n", `c.toml:2: unknown key "b"`},
		"wrong type":         {"\n[mount]\nread_only = 'yes'\n", "c.toml:3:"},
		"syntax":             {"[mount\n", "c.toml:1:"},
		"duration":           {"[kms]\ndeadline = 'soon'\n", "is not a duration"},
		"metrics":            {"[mount]\nmetrics = '9100'\n", "mount.metrics: metrics are served on"},
		"negative duration":  {"[kms]\ndeadline = '-1s'\n", "is not a duration"},
		"values, first":      {"[init]\nnames = 'x'\nblock_size = 5000\n", "init.names"},
		"values, envelope":   {"[init]\nenvelope = 'x'\n", "init.envelope"},
		"values, second":     {"[init]\nnames = 'x'\nblock_size = 5000\n", "init.block_size"},
		"jobs":               {"[rekey]\njobs = 0\n", "rekey.jobs"},
		"profile, word":      {"[kms.profiles]\nchina = 'x'\n", `kms.profiles."china" is neither a partition`},
		"profile, partition": {"[kms.profiles]\naws_cn = 'x'\n", "12-digit account"},
		"profile, dash":      {"[kms.profiles]\naws- = 'x'\n", "12-digit account"},
		"profile, short":     {"[kms.profiles]\n11112222333 = 'x'\n", "12-digit account"},
		"profile, none":      {"[kms.profiles]\naws-cn = ''\n", "names no profile"},
		"profile, type":      {"[kms.profiles]\naws-cn = 1\n", "c.toml:2:"},
		"volume id":          {"[volume.abc]\nkeys = []\n", "is not a volume id"},
		"key":                {"[volume.\"" + id + "\"]\nkeys = ['alias/x']\n", "neither a KMS key ARN nor local:NAME"},
		"log file":           {"[mount]\nlog_file = 'x.log'\n", "absolute"},
	} {
		t.Run(name, func(t *testing.T) {
			c := Default()
			err := c.merge("c.toml", []byte(tc.text))
			require.ErrorContains(t, err, tc.want)
			require.Equal(t, Default(), c, "a faulty file must change nothing")
		})
	}
}

// A file adds to the profiles of those before it, and replaces what it names.
func TestProfiles(t *testing.T) {
	c := Default()
	require.NoError(t, c.merge("a.toml", []byte("[kms.profiles]\naws = 'a'\naws-us-gov = 'b'\n111122223333 = 'c'\n")))
	before := *c
	require.NoError(t, c.merge("b.toml", []byte("[kms.profiles]\naws-us-gov = 'd'\n")))
	require.Equal(t, map[string]string{"aws": "a", "aws-us-gov": "d", "111122223333": "c"}, c.KMS.Profiles)
	require.Equal(t, "b", before.KMS.Profiles["aws-us-gov"])
	require.Error(t, c.merge("c.toml", []byte("[kms.profiles]\naws = 'e'\nx = 'f'\n")))
	require.Equal(t, map[string]string{"aws": "a", "aws-us-gov": "d", "111122223333": "c"}, c.KMS.Profiles)
}

func TestExplicitFileMustExist(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	_, err := Load("")
	require.NoError(t, err)
	_, err = Load(filepath.Join(t.TempDir(), "none.toml"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestPlaces(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "/s")
	t.Setenv("XDG_CONFIG_HOME", "/c")
	t.Setenv("XDG_RUNTIME_DIR", "/r")
	t.Setenv("KMSFS_KEYRING", "")
	get := func(dir string, err error) string {
		require.NoError(t, err)
		return dir
	}
	require.Equal(t, "/s/kmsfs/known_volumes.toml", get(PinsFile()))
	require.Equal(t, "/r/kmsfs", get(RuntimeDir()))
	c := Default()
	require.Equal(t, "/c/kmsfs/keys", get(c.KeyringDir()))
	c.Keyring = "/k"
	require.Equal(t, "/k", get(c.KeyringDir()))
	t.Setenv("KMSFS_KEYRING", "/e")
	require.Equal(t, "/e", get(c.KeyringDir()))

	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("HOME", "/h")
	if os.Geteuid() == 0 {
		require.Equal(t, "/var/lib/kmsfs", get(StateDir()))
		return
	}
	require.Equal(t, "/h/.local/state/kmsfs", get(StateDir()))
}
