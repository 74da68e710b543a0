package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/fs"
	"kmsfs/keys"
	"kmsfs/volume"
)

func (p *program) mountCommand() *cobra.Command {
	var f mountFlags
	cmd := &cobra.Command{
		Use:   "mount DIR MOUNTPOINT",
		Short: "Show a volume in plaintext",
		Long: `Mount the volume in the backing directory DIR on MOUNTPOINT. The command returns
when the file system is ready; a daemon goes on in the background until "kmsfs
umount MOUNTPOINT". With -f it stays in the foreground; SIGTERM and SIGINT unmount.

A volume may be mounted once at a time. Its keys are those that this client
remembers (from "kmsfs init", "kmsfs rekey" or an earlier mount). For a volume that
is new to this client kmsfs shows the keys and asks; without a terminal it wants
--key, the configuration, or --accept-new. A key that appears in the volume's list
is taken silently only if it is in the account of a known one and opens the same
volume key; --accept-key trusts any other.

Disabling a KMS key closes the files under it, open ones and what the kernel has
cached of them too. That is noticed within --lease while KMS answers, and within
--lease and --grace together while it does not; enabling the key opens them again,
without a new mount. A program's writes after that moment are lost, and fsync or close
tell it so. "kmsfs lock" closes all files at once.

When a program opens the files of a directory one after another (tar, grep -r, cp -r,
git), KMS is asked for the keys of the next ones in advance, so that it need not wait at
each; CloudTrail then shows Decrypt of some files that nobody has opened. --prefetch 0
asks for none.

After a power cut, or if the daemon was killed, the next mount puts right what it can:
writes that were under way are finished, and the synced end of a file that was torn
while the file grew is put back. Files that were changed shortly before, and still end
in bytes that do not authenticate, are cut back to their last good record, which loses
only what was never synced; with --no-recover they are left alone (reading their last
block fails) until a mount without it, or "kmsfs fsck --cut-ends". Each file is logged,
and "kmsfs status DIR" counts them. Files whose keys can't be had within a minute
(recover_limit) are left as they are, and the next mount looks at them.

Mount options (-o): ro, rw, allow_other, suid, dev (root only), nonempty, debug,
writeback=on|off, tail_save=on|off, lease=DURATION, grace=DURATION, idle_unmount=DURATION,
attr_timeout=DURATION, entry_timeout=DURATION, recover_limit=DURATION, kms_deadline=DURATION,
create_wait=DURATION, cache_age=DURATION, cache_keys=N,
pool=N, prefetch=N, metrics=ADDR, noexec, noatime. Each stands in the configuration
file too. With remount the options ro, rw, noexec, noatime and the like of a mount are
changed, and what is not named (rw or ro, exec or noexec, and so on) stays.

A link of the name /sbin/mount.fuse.kmsfs to kmsfs, and one of /sbin/umount.fuse.kmsfs,
let mount(8), umount(8), /etc/fstab and systemd handle volumes:

  DIR MOUNTPOINT fuse.kmsfs noauto,x-systemd.automount,_netdev,allow_other 0 0

There the options key=KEY, accept_key=KEY, accept_new, config=FILE and log_file=FILE
stand for the flags of these names, and allow_suid and allow_dev for suid and dev,
which mount(8) keeps to itself.` + statuses(0, 1, 2, 3, 4, 6),
		Args: exactly(2, "DIR and MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.remounts() {
				return p.remount(cmd.Context(), &f, args[1])
			}
			if err := f.fill(cmd, p.cfg); err != nil {
				return err
			}
			ready, daemon := readyPipe()
			if !daemon && !p.cfg.Mount.Foreground {
				return p.background()
			}
			if !daemon && !confined() && os.Getenv(againEnv) == "" {
				return p.inForeground()
			}
			os.Unsetenv(againEnv)
			m := &mounting{program: p, keys: f.keys, accept: f.accept, ready: ready}
			return m.serve(cmd.Context(), args[0], args[1])
		},
	}
	f.register(cmd)
	return cmd
}

// A mounting is one mount in the process that serves it.
type mounting struct {
	*program
	keys, accept []string // --key and --accept-key; unlock resolves aliases
	ready        *os.File // tells the parent that we are ready; nil in the foreground

	dir, point string // real paths
	v          *volume.Volume
	provider   keys.Provider
	ring       *keys.Ring
	log        *slog.Logger
	server     *fs.Server
	replay     volume.Replay // what was found of a mount that was killed
	slots      *volume.Slots // nil if there are none
	tails      *volume.Tails // nil if there are none
	recovery   recovery
	reloading  sync.Mutex // one reload at a time
	standing   *standing  // guarded by reloading; nil until the list was read under the lock
	device     string     // of the mount, as mountinfo names it
	detached   bool       // of unmountOn: the mount is out of the tree and served to its last users
}

// serve returns when the file system was unmounted.
func (m *mounting) serve(ctx context.Context, dir, point string) (err error) {
	warnings := harden()
	if err := m.places(dir, point); err != nil {
		return err
	}
	if m.provider, err = m.program.provider(); err != nil {
		return err
	}
	if m.v, err = volume.Open(m.dir); err != nil {
		return err
	}
	defer m.v.Close()
	if err := m.unlock(ctx); err != nil {
		return err
	}
	defer m.ring.Close()
	closeLog, err := m.openLog()
	if err != nil {
		return err
	}
	defer closeLog()
	if text, bad := keysUnlocked(); bad {
		warnings = append(warnings, text)
	}
	if text := m.v.Warning(); text != "" {
		m.warn("%s", text)
		warnings = append(warnings, text)
	}
	for _, w := range warnings {
		m.log.Warn(w)
	}
	m.logReplay()
	if err := m.recover(ctx); err != nil {
		return err
	}
	m.openSlots()
	defer m.slots.Close()
	listener, err := m.listenMetrics()
	if err != nil {
		return err
	}
	m.begin()
	err = m.mounted(listener)
	return errors.Join(err, m.end())
}

// places makes both paths real and refuses a mountpoint that can't be.
func (m *mounting) places(dir, point string) (err error) {
	if m.dir, err = realPath(dir); err != nil {
		return err
	}
	if m.point, err = pointPath(point); err != nil {
		return &failure{status: exitMount, err: err}
	}
	return checkMountpoint(m.dir, m.point, m.cfg.Mount.NonEmpty)
}

// unlock opens the volume key and takes the volume's lock. Nothing is written
// into the volume before it is trusted.
func (m *mounting) unlock(ctx context.Context) (err error) {
	if m.keys, err = m.resolve(ctx, m.provider, m.keys); err != nil {
		return err
	}
	if m.accept, err = m.resolve(ctx, m.provider, m.accept); err != nil {
		return err
	}
	ask := trustRequest{Named: m.keys, Accept: m.accept, AcceptNew: m.cfg.Mount.AcceptNew, Command: m.again}
	if m.ring, err = m.openTrusted(ctx, m.v, m.provider, ask); err != nil {
		return err
	}
	if m.replay, err = lockAndReplay(ctx, m.v, mountOwner+m.point); err == nil {
		// A rekey between reading kmsfs.toml and taking the lock found no mount to
		// tell: read it again, and judge as before.
		_, err = m.reload(ctx)
	}
	if err != nil {
		m.ring.Close()
	}
	return err
}

// again is the command that a person would run to go on.
func (m *mounting) again(more ...string) string {
	return commandLine(append([]string{"kmsfs", "mount", m.dir, m.point}, more...)...)
}

// reload adopts the key list on disk if the rule of trust allows it.
func (m *mounting) reload(ctx context.Context) ([]string, error) {
	if _, err := m.v.Reload(); err != nil {
		return nil, err
	}
	// What was answered or accepted at the start is in the pin by now.
	ask := trustRequest{Named: m.keys, Live: m.standing, Accept: m.accept, Command: m.again}
	d, err := m.decide(m.v, ask)
	if err != nil {
		return nil, err
	}
	if err := m.prove(ctx, m.v, m.provider, d); err != nil {
		return nil, err
	}
	m.ring.SetVolumeKey(m.v.Header())
	m.ring.SetTrusted(d.Trusted)
	if m.server != nil {
		m.server.Regovern()
		// Files opened empty hold keys under what was first before.
		if err := m.server.Reprime(ctx); err != nil {
			return nil, fmt.Errorf("exchanging the fresh keys of open files: %w", err)
		}
		// Whoever may not wrap keys can adopt the list all the same.
		if err := m.server.Renew(ctx); err != nil {
			m.log.Warn("files without a name can be given none until this is mended", "err", sentence(err))
		}
	}
	if err := remember(m.v.ID().String(), d.Pin); err != nil {
		return nil, err
	}
	m.standing = &d.Standing
	return d.Trusted, nil
}

// mounted mounts, serves and cleans up. metrics is where they are to be had, or nil.
func (m *mounting) mounted(metrics net.Listener) (err error) {
	if metrics != nil {
		defer metrics.Close()
	}
	// Before there is a mount: a signal between mounting and listening for it
	// would leave a dead mountpoint.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	signal.Ignore(syscall.SIGHUP) // a closed terminal is no reason to unmount
	defer signal.Stop(signals)
	m.ring.KeepLeases(keys.LeaseOptions{Interval: time.Duration(m.cfg.Mount.Lease), Grace: time.Duration(m.cfg.Mount.Grace), Changed: m.leaseChanged}, m.v.Header())
	if m.server, err = fs.Mount(m.options()); err != nil {
		return &failure{status: exitMount, err: err, next: mountAdvice(err)}
	}
	spareProcessors()
	defer runtime.KeepAlive(raiseHeap())
	m.tty = false // from here on nobody can be asked
	// Somebody may have covered it already: the topmost mount need not be ours.
	if m.device, err = deviceOf(m.point); err != nil {
		return &failure{status: exitMount, err: err}
	}
	defer m.serveMetrics(metrics)()
	control, err := m.listen()
	if err == nil {
		defer control.Close()
		err = m.announce()
	}
	if err != nil {
		return errors.Join(err, m.server.Unmount())
	}
	m.log.Info("mounted", "volume", m.v.ID().String(), "dir", m.dir, "mountpoint", m.point, "keys", m.ring.Trusted())
	done := make(chan struct{})
	go m.unmountOn(signals, done)
	go keepMemorySmall(done, trimEvery)
	if limit := time.Duration(m.cfg.Mount.IdleUnmount); limit > 0 {
		go m.unmountIdle(limit, done)
	}
	m.server.Wait()
	close(done)
	m.log.Info("unmounted", "mountpoint", m.point)
	return nil
}

func (m *mounting) options() fs.Options {
	c := m.cfg
	return fs.Options{
		Volume: m.v, Keys: m.ring, Slots: m.slots, Tails: m.tails, Synced: m.synced, Mountpoint: m.point, FsName: m.dir,
		AllowOther: c.Mount.AllowOther, ReadOnly: c.Mount.ReadOnly, Suid: c.Mount.Suid, Dev: c.Mount.Dev,
		Writeback: c.Mount.Writeback, AttrTimeout: time.Duration(c.Mount.AttrTimeout), EntryTimeout: time.Duration(c.Mount.EntryTimeout), Extra: c.Mount.Options,
		Logger: m.log, Deadline: time.Duration(c.KMS.Deadline), CreateWait: time.Duration(c.KMS.CreateWait), Prefetch: c.KMS.Prefetch, Debug: c.Mount.Debug,
	}
}

func mountAdvice(err error) string {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "load the fuse module and install fusermount3 (package fuse3)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "check the permissions of /dev/fuse, and user_allow_other in /etc/fuse.conf for --allow-other"
	case strings.Contains(err.Error(), "fusermount"):
		return "mend what fusermount3 said above (permissions of /dev/fuse, user_allow_other in /etc/fuse.conf for --allow-other)"
	}
	return ""
}

// announce tells the waiting parent, and lets go of its terminal.
func (m *mounting) announce() error {
	if m.ready == nil {
		return notifyReady()
	}
	defer m.ready.Close()
	if err := detach(m.cfg.Mount.LogFile); err != nil {
		return err
	}
	if _, err := m.ready.WriteString(readyWord); err != nil {
		return fmt.Errorf("the process that started the mount is gone: %w", err)
	}
	return nil
}

// unmountOn makes SIGTERM and SIGINT unmount. A mount that is busy is taken out of
// the tree at once and goes on to serve who has it open.
func (m *mounting) unmountOn(signals <-chan os.Signal, done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case s := <-signals:
			m.log.Info("unmounting", "signal", s.String())
			m.unmount()
		}
	}
}

func (m *mounting) unmount() {
	if m.detached {
		m.log.Info("the mount is detached already and served until its last user is gone")
		return
	}
	// A path names the topmost mount only: it must not be somebody else's.
	at, err := mountedAt(m.point)
	if err == nil && at == nil {
		if pid, point := holderElsewhere(m.device); pid > 0 {
			m.log.Warn("it is unmounted here, and served until it is unmounted in the mount namespace of another process", "pid", pid, "mountpoint", point)
			return
		}
	}
	if err != nil || at == nil || at.device != m.device {
		m.log.Error("not unmounting: the topmost mount at the mountpoint is not this one", "mountpoint", m.point, "err", err)
		return
	}
	err = m.server.Unmount()
	if err == nil {
		return
	}
	m.log.Warn("the mountpoint is busy; it is detached and served until its last user is gone", "err", err)
	if err := unmountPoint(m.point, true); err != nil {
		m.log.Error("unmounting failed", "err", sentence(err))
		return
	}
	m.detached = true
}

// openLog decides where the log goes: stderr in the foreground, else the file
// that was asked for, syslog, or a file beside the pins.
func (m *mounting) openLog() (closeLog func(), err error) {
	level := slog.LevelInfo
	if m.cfg.Mount.Debug {
		level = slog.LevelDebug
	}
	if m.ready == nil {
		m.log = slog.New(newThrottle(slog.NewTextHandler(m.err, &slog.HandlerOptions{Level: level})))
		return func() {}, nil
	}
	handler, closeLog, err := backgroundLog(m.cfg.Mount.LogFile, level)
	if err != nil {
		return nil, err
	}
	m.log = slog.New(newThrottle(handler))
	return closeLog, nil
}

// stateLog is the log of last resort.
func stateLog() (string, error) {
	dir, err := config.StateDir()
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	return dir + "/kmsfs.log", err
}
