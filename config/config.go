// Package config reads what belongs to the client and never to a volume: the
// configuration files, and the pins (pins.go), which are what this client
// remembers of the volumes it knows.
//
// A newcomer starts at example.toml, which names every key with its default; a
// test holds it to the structs below. Load reads /etc/kmsfs/config.toml, then
// $XDG_CONFIG_HOME/kmsfs/config.toml, then the file named by --config; a later
// file overrides what it mentions. A flag of the command line overrides them
// all. Nothing here reaches for a network or a volume.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// Example is a configuration file that mentions every key, with its default.
//
//go:embed example.toml
var Example []byte

// maxFile bounds what is read as configuration or pins, in bytes.
const maxFile = 1 << 20

// Config is the client's configuration.
type Config struct {
	RequireKMS bool              `toml:"require_kms"` // refuse local keys
	Keyring    string            `toml:"keyring"`     // directory of local keys; "" = $KMSFS_KEYRING or the default
	Init       Init              `toml:"init"`
	Mount      Mount             `toml:"mount"`
	KMS        KMS               `toml:"kms"`
	Rekey      Rekey             `toml:"rekey"`
	Volume     map[string]Volume `toml:"volume"` // by volume id
}

// Init are defaults for new volumes.
type Init struct {
	Keys      []string `toml:"keys"`
	Names     string   `toml:"names"`
	Envelope  string   `toml:"envelope"`
	BlockSize int      `toml:"block_size"`
}

// Mount are defaults for mounts.
type Mount struct {
	Foreground   bool     `toml:"foreground"`
	ReadOnly     bool     `toml:"read_only"`
	AllowOther   bool     `toml:"allow_other"`
	Suid         bool     `toml:"suid"`
	Dev          bool     `toml:"dev"`
	NonEmpty     bool     `toml:"nonempty"`
	Writeback    bool     `toml:"writeback"`
	AttrTimeout  Duration `toml:"attr_timeout"`  // 0 = the built-in choice
	EntryTimeout Duration `toml:"entry_timeout"` // 0 = the built-in choice
	Lease        Duration `toml:"lease"`         // data keys are used no longer without asking
	Grace        Duration `toml:"grace"`         // and so much longer while the key service does not answer
	IdleUnmount  Duration `toml:"idle_unmount"`  // unmount after so long without use; 0 = never
	Options      []string `toml:"options"`       // handed to the kernel: noexec, noatime
	TailSave     bool     `toml:"tail_save"`     // keep the synced end of a file while it is written over
	NoRecover    bool     `toml:"no_recover"`    // leave bad ends of files alone after an unclean end
	RecoverLimit Duration `toml:"recover_limit"` // how long a mount may look for keys after an unclean end
	AcceptNew    bool     `toml:"accept_new"`
	LogFile      string   `toml:"log_file"` // "" = syslog
	Metrics      string   `toml:"metrics"`  // HOST:PORT, :PORT on loopback, or unix:PATH; "" = none
	Debug        bool     `toml:"debug"`
}

// KMS bounds the use of key services.
type KMS struct {
	Deadline   Duration `toml:"deadline"`    // one open waits no longer
	CreateWait Duration `toml:"create_wait"` // one create waits no longer for a fresh key
	CacheAge   Duration `toml:"cache_age"`   // an opened data key is kept no longer; 0 = the built-in choice
	CacheKeys  int      `toml:"cache_keys"`  // so many opened data keys are kept; 0 = the built-in choice
	Pool       int      `toml:"pool"`        // so many fresh data keys are fetched ahead; 0 = the built-in choice
	Prefetch   int      `toml:"prefetch"`    // so many data keys are decrypted at once ahead of a program that walks a tree; 0 = none
	// Profiles of the shared AWS configuration, by the account or the partition
	// whose keys they are for; the account goes first.
	Profiles map[string]string `toml:"profiles"`
}

// Rekey are defaults for kmsfs rekey.
type Rekey struct {
	Jobs   int     `toml:"jobs"`
	MaxRPS float64 `toml:"max_rps"` // KMS requests a second; 0 = no limit of our own
	Verify bool    `toml:"verify"`  // as --verify
}

// Volume is what this client has decided about one volume.
type Volume struct {
	Keys       []string `toml:"keys"`        // the complete trusted list, first = for new files
	AcceptKeys []string `toml:"accept_keys"` // as --accept-key
}

// Default is the configuration without any file.
func Default() *Config {
	return &Config{
		Init:  Init{Names: "encrypted", Envelope: "per-file", BlockSize: 4096},
		Mount: Mount{Writeback: true, TailSave: true, Lease: Duration(time.Minute), Grace: Duration(15 * time.Minute), RecoverLimit: Duration(time.Minute)},
		KMS:   KMS{Deadline: Duration(10 * time.Second), CreateWait: Duration(2 * time.Second), Prefetch: 64},
		Rekey: Rekey{Jobs: 16},
	}
}

// A Duration is written as "10s" or "1h30m".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a duration such as \"10s\" or \"1h30m\"", text)
	}
	*d = Duration(v)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Files are the configuration files in the order of reading. explicit is what
// --config names; it alone must exist.
func Files(explicit string) []string {
	files := []string{"/etc/kmsfs/config.toml"}
	if dir := home("XDG_CONFIG_HOME", ".config"); dir != "" {
		files = append(files, filepath.Join(dir, "kmsfs", "config.toml"))
	}
	if explicit != "" {
		files = append(files, explicit)
	}
	return files
}

// Load reads the configuration; explicit is what --config names, or "".
func Load(explicit string) (*Config, error) {
	c := Default()
	for _, file := range Files(explicit) {
		data, err := readFile(file)
		if errors.Is(err, fs.ErrNotExist) && file != explicit {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the configuration: %w", err)
		}
		if err := c.merge(file, data); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// merge reads one file over c. A file with any fault changes nothing.
func (c *Config) merge(file string, data []byte) error {
	next := c.clone()
	if err := decodeStrict(file, data, next); err != nil {
		return err
	}
	// What came before was valid, so whatever is wrong now stands in this file.
	if problems := next.problems(); len(problems) > 0 {
		return fmt.Errorf("%s: %s", file, strings.Join(problems, "; "))
	}
	*c = *next
	return nil
}

// clone lets a faulty file be dropped whole. Slices are replaced by the decoder,
// never changed in place; maps are.
func (c *Config) clone() *Config {
	n := *c
	n.Volume = maps.Clone(c.Volume)
	n.KMS.Profiles = maps.Clone(c.KMS.Profiles)
	return &n
}

// decodeStrict is the one TOML reader of this package: every unknown key is an
// error with its line, all of them at once.
func decodeStrict(file string, data []byte, into any) error {
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(into)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		lines := make([]string, len(strict.Errors))
		for i := range strict.Errors {
			row, _ := strict.Errors[i].Position()
			lines[i] = fmt.Sprintf("%s:%d: unknown key %q", file, row, strings.Join(strict.Errors[i].Key(), "."))
		}
		return errors.New(strings.Join(lines, "; "))
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, col := decode.Position()
		return fmt.Errorf("%s:%d:%d: %s", file, row, col, strings.TrimPrefix(decode.Error(), "toml: "))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// problems lists everything that is wrong, so that a person mends it in one go.
func (c *Config) problems() (list []string) {
	bad := func(wrong bool, format string, args ...any) {
		if wrong {
			list = append(list, fmt.Sprintf(format, args...))
		}
	}
	bad(c.Init.Names != "encrypted" && c.Init.Names != "plain", "init.names is \"encrypted\" or \"plain\", not %q", c.Init.Names)
	bad(c.Init.Envelope != "per-file" && c.Init.Envelope != "shared", "init.envelope is \"per-file\" or \"shared\", not %q", c.Init.Envelope)
	n := c.Init.BlockSize
	bad(n < 4096 || n > 65536 || n&(n-1) != 0, "init.block_size is a power of two from 4096 to 65536, not %d", n)
	bad(c.Mount.Lease <= 0, "mount.lease must be more than 0")
	bad(c.Mount.RecoverLimit <= 0, "mount.recover_limit must be more than 0")
	bad(c.KMS.Deadline <= 0, "kms.deadline must be more than 0")
	bad(c.KMS.CreateWait <= 0, "kms.create_wait must be more than 0")
	bad(c.KMS.CacheKeys < 0, "kms.cache_keys can't be negative")
	bad(c.KMS.Pool < 0, "kms.pool can't be negative")
	bad(c.KMS.Prefetch < 0 || c.KMS.Prefetch > 1024, "kms.prefetch is 0 to 1024, not %d", c.KMS.Prefetch)
	for _, whose := range slices.Sorted(maps.Keys(c.KMS.Profiles)) {
		bad(!isAccount(whose) && !partition.MatchString(whose), "kms.profiles.%q is neither a partition (\"aws-cn\") nor a 12-digit account", whose)
		bad(c.KMS.Profiles[whose] == "", "kms.profiles.%q names no profile of the AWS configuration", whose)
	}
	bad(c.Rekey.Jobs < 1 || c.Rekey.Jobs > 1024, "rekey.jobs is 1 to 1024, not %d", c.Rekey.Jobs)
	bad(c.Rekey.MaxRPS < 0, "rekey.max_rps can't be negative")
	bad(c.Mount.LogFile != "" && !filepath.IsAbs(c.Mount.LogFile), "mount.log_file must be an absolute path, not %q", c.Mount.LogFile)
	if c.Mount.Metrics != "" {
		_, _, err := MetricsAddress(c.Mount.Metrics)
		bad(err != nil, "mount.metrics: %v", err)
	}
	bad(c.Keyring != "" && !filepath.IsAbs(c.Keyring), "keyring must be an absolute path, not %q", c.Keyring)
	for id, v := range c.Volume {
		bad(!isVolumeID(id), "volume.%q is not a volume id (32 lower-case hexadecimal digits)", id)
		for _, k := range append(append([]string{}, v.Keys...), v.AcceptKeys...) {
			bad(!strings.HasPrefix(k, "arn:") && !strings.HasPrefix(k, "local:"), "volume.%q: %q is neither a KMS key ARN nor local:NAME", id, k)
		}
	}
	return list
}

// MetricsAddress is where to listen for who wants metrics: "tcp" and HOST:PORT, or "unix"
// and an absolute path. Without a host that is loopback: nothing is shown to a network
// unless it is asked for.
func MetricsAddress(s string) (network, address string, err error) {
	if path, is := strings.CutPrefix(s, "unix:"); is && filepath.IsAbs(path) {
		return "unix", path, nil
	}
	host, port, err := net.SplitHostPort(s)
	n, errPort := strconv.ParseUint(port, 10, 16)
	if err != nil || errPort != nil {
		return "", "", fmt.Errorf("metrics are served on HOST:PORT, :PORT or unix:/PATH, not on %q", s)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return "tcp", net.JoinHostPort(host, strconv.FormatUint(n, 10)), nil
}

func isAccount(s string) bool {
	return len(s) == 12 && strings.Trim(s, "0123456789") == ""
}

var partition = regexp.MustCompile(`^aws(-[a-z]+)*$`)

func isVolumeID(s string) bool {
	return len(s) == 32 && strings.Trim(s, "0123456789abcdef") == ""
}

func readFile(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", path, maxFile)
	}
	return os.ReadFile(path)
}

// home is an XDG base directory: the variable, or the given place below $HOME.
// The specification says that relative paths are to be ignored.
func home(variable, fallback string) string {
	if dir := os.Getenv(variable); filepath.IsAbs(dir) {
		return dir
	}
	if dir, err := os.UserHomeDir(); err == nil && filepath.IsAbs(dir) {
		return filepath.Join(dir, fallback)
	}
	return ""
}
