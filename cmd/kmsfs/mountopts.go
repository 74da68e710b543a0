package main

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsfs/config"
)

// mountFlags are the flags of kmsfs mount; fill lays them over the configuration.
type mountFlags struct {
	foreground, readOnly, allowOther, acceptNew, noRecover bool
	keys, accept, options                                  []string
	logFile, metrics                                       string
	lease, grace, idleUnmount                              time.Duration
	prefetch                                               int
}

func (f *mountFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.BoolVarP(&f.foreground, "foreground", "f", false, "stay in the foreground and log to stderr")
	fl.BoolVar(&f.readOnly, "read-only", false, "mount read-only")
	fl.BoolVar(&f.allowOther, "allow-other", false, "let other users in; the kernel checks permissions")
	fl.StringArrayVar(&f.keys, "key", nil, "trust `KEY` and only those named so, the first for new files; may be repeated")
	fl.BoolVar(&f.acceptNew, "accept-new", false, "trust the keys of a volume that is new to this client, without asking")
	fl.StringArrayVar(&f.accept, "accept-key", nil, "trust `KEY` although it is new in the volume's list; may be repeated")
	fl.StringArrayVarP(&f.options, "options", "o", nil, "mount `OPTS`, separated by commas (see above)")
	fl.DurationVar(&f.lease, "lease", 0, "ask KMS every `DURATION` whether data keys may still be used (default 1m)")
	fl.DurationVar(&f.grace, "grace", 0, "go on for `DURATION` while KMS does not answer (default 15m; 0: not at all)")
	fl.DurationVar(&f.idleUnmount, "idle-unmount", 0, "unmount when nothing was open or used for `DURATION`")
	fl.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics on `ADDR`: :PORT on loopback, HOST:PORT, or unix:/PATH")
	fl.IntVar(&f.prefetch, "prefetch", 0, "when a program walks a tree, have KMS decrypt up to `N` data keys at once before it opens the files (default 64; 0: none)")
	fl.BoolVar(&f.noRecover, "no-recover", false, "after a power cut, leave bad ends of files as they are")
	fl.StringVar(&f.logFile, "log-file", "", "log of a mount in the background, in place of syslog: `FILE`")
}

// fill lays the flags that were given over the configuration.
func (f *mountFlags) fill(cmd *cobra.Command, c *config.Config) error {
	set := func(name string, to *bool, value bool) {
		if cmd.Flags().Changed(name) {
			*to = value
		}
	}
	set("foreground", &c.Mount.Foreground, f.foreground)
	set("read-only", &c.Mount.ReadOnly, f.readOnly)
	set("allow-other", &c.Mount.AllowOther, f.allowOther)
	set("no-recover", &c.Mount.NoRecover, f.noRecover)
	set("accept-new", &c.Mount.AcceptNew, f.acceptNew)
	for name, d := range map[string]struct {
		to    *config.Duration
		value time.Duration
	}{"lease": {&c.Mount.Lease, f.lease}, "grace": {&c.Mount.Grace, f.grace}, "idle-unmount": {&c.Mount.IdleUnmount, f.idleUnmount}} {
		if !cmd.Flags().Changed(name) {
			continue
		}
		if d.value < 0 || d.value == 0 && name == "lease" {
			return usage("--%s wants a duration such as 60s, not %v", name, d.value)
		}
		*d.to = config.Duration(d.value)
	}
	if cmd.Flags().Changed("prefetch") {
		if err := valueOption(c, "prefetch", strconv.Itoa(f.prefetch)); err != nil {
			return err
		}
	}
	if cmd.Flags().Changed("log-file") {
		c.Mount.LogFile = f.logFile
	}
	if cmd.Flags().Changed("metrics") {
		c.Mount.Metrics = f.metrics
	}
	for _, list := range f.options {
		for _, o := range strings.Split(list, ",") {
			if err := mountOption(c, strings.TrimSpace(o)); err != nil {
				return err
			}
		}
	}
	if c.Mount.Metrics != "" {
		if _, _, err := config.MetricsAddress(c.Mount.Metrics); err != nil {
			return &failure{status: exitUsage, err: err}
		}
	}
	if (c.Mount.Suid || c.Mount.Dev) && os.Geteuid() != 0 {
		return usage("-o suid and -o dev are for root: modes and device numbers in the backing directory are not authenticated")
	}
	return nil
}

// switches are options without a value; each has its opposite.
func switches(m *config.Mount) map[string]func() {
	on := func(b *bool, v bool) func() { return func() { *b = v } }
	return map[string]func(){
		"ro": on(&m.ReadOnly, true), "rw": on(&m.ReadOnly, false),
		"allow_other": on(&m.AllowOther, true),
		"suid":        on(&m.Suid, true), "nosuid": on(&m.Suid, false),
		"dev": on(&m.Dev, true), "nodev": on(&m.Dev, false),
		// mount(8) doesn't hand on suid and dev, its own defaults: these are for fstab.
		"allow_suid": on(&m.Suid, true), "allow_dev": on(&m.Dev, true),
		"nonempty": on(&m.NonEmpty, true),
		"debug":    on(&m.Debug, true),
	}
}

// kernelOptions are handed to the kernel as they are.
var kernelOptions = map[string]bool{"noexec": true, "noatime": true, "nodiratime": true, "relatime": true, "strictatime": true, "sync": true, "dirsync": true}

// ignoredOptions are for mount(8) and systemd, which pass them on from fstab.
var ignoredOptions = map[string]bool{"": true, "defaults": true, "auto": true, "noauto": true, "user": true, "nouser": true, "users": true, "nofail": true, "_netdev": true, "owner": true, "group": true, "exec": true, "async": true, "atime": true, "diratime": true}

func mountOption(c *config.Config, option string) error {
	name, value, hasValue := strings.Cut(option, "=")
	if set := switches(&c.Mount)[name]; set != nil && !hasValue {
		set()
		return nil
	}
	if !hasValue && (ignoredOptions[name] || strings.HasPrefix(name, "x-")) || hasValue && strings.HasPrefix(name, "x-") {
		return nil
	}
	if !hasValue && kernelOptions[name] {
		c.Mount.Options = append(slices.Clone(c.Mount.Options), name)
		return nil
	}
	if !hasValue {
		return usage("unknown mount option %q", option)
	}
	return valueOption(c, name, value)
}

func valueOption(c *config.Config, name, value string) error {
	durations := map[string]*config.Duration{
		"attr_timeout": &c.Mount.AttrTimeout, "entry_timeout": &c.Mount.EntryTimeout,
		"lease": &c.Mount.Lease, "grace": &c.Mount.Grace, "idle_unmount": &c.Mount.IdleUnmount, "recover_limit": &c.Mount.RecoverLimit,
		"kms_deadline": &c.KMS.Deadline, "create_wait": &c.KMS.CreateWait, "cache_age": &c.KMS.CacheAge,
	}
	counts := map[string]*int{"cache_keys": &c.KMS.CacheKeys, "pool": &c.KMS.Pool, "prefetch": &c.KMS.Prefetch}
	onOff := map[string]*bool{"writeback": &c.Mount.Writeback, "tail_save": &c.Mount.TailSave}
	switch {
	case durations[name] != nil:
		d, err := time.ParseDuration(value)
		if err != nil || d < 0 || d == 0 && name != "grace" && name != "idle_unmount" {
			return usage("mount option %s wants a duration such as 10s, not %q", name, value)
		}
		*durations[name] = config.Duration(d)
	case counts[name] != nil:
		n, err := strconv.Atoi(value)
		if err != nil || n < 0 || name == "prefetch" && n > 1024 {
			return usage("mount option %s wants a number, not %q", name, value)
		}
		*counts[name] = n
	case name == "metrics":
		c.Mount.Metrics = value
	case onOff[name] != nil && (value == "on" || value == "off"):
		*onOff[name] = value == "on"
	case onOff[name] != nil:
		return usage("mount option %s is on or off, not %q", name, value)
	default:
		return usage("unknown mount option %q", name+"="+value)
	}
	return nil
}
