package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// mount(8) and umount(8), and so fstab and systemd, leave a file system of type
// fuse.kmsfs to programs of these names (mount(8) and umount(8), EXTERNAL HELPERS);
// a link of such a name to kmsfs makes it one. Without them mount(8) would take
// mount.fuse, which asks for suid and dev on its own, and umount(8) would return
// before the daemon has written everything.
const (
	mountHelper  = "mount.fuse.kmsfs"
	umountHelper = "umount.fuse.kmsfs"
)

func isHelper(program string) bool {
	name := filepath.Base(program)
	return name == mountHelper || name == umountHelper
}

// asked is the kmsfs command that a process was started for: its arguments, or what
// they mean under the name of a helper. It is nil when there is nothing to do.
func asked(argv []string) ([]string, error) {
	switch filepath.Base(argv[0]) {
	case mountHelper:
		return askedByMount(argv[1:])
	case umountHelper:
		return askedByUmount(argv[1:])
	}
	return argv[1:], nil
}

// helperFlags are those that both helpers are called with. Nothing follows from most:
// there is no mtab to write (-n), and no option that is worth ignoring (-s).
func helperFlags(name string) (fl *pflag.FlagSet, namespace *string) {
	fl = pflag.NewFlagSet(name, pflag.ContinueOnError)
	fl.SetOutput(io.Discard) // it would print a usage of its own
	fl.BoolP("sloppy", "s", false, "")
	fl.BoolP("no-mtab", "n", false, "")
	fl.BoolP("verbose", "v", false, "")
	fl.StringP("types", "t", "", "")
	return fl, fl.StringP("namespace", "N", "", "")
}

func askedByMount(args []string) ([]string, error) {
	fl, namespace := helperFlags(mountHelper)
	options := fl.StringArrayP("options", "o", nil, "")
	fake := fl.BoolP("fake", "f", false, "")
	if err := parseHelper(fl, args, namespace); err != nil {
		return nil, err
	}
	if fl.NArg() != 2 {
		return nil, usage("%s wants DIR and MOUNTPOINT, not %q", mountHelper, fl.Args())
	}
	if *fake {
		return nil, nil // mount --fake: all but the mount
	}
	command := []string{"mount"}
	var rest []string
	words := strings.Split(strings.Join(*options, ","), ",")
	if slices.Contains(words, "remount") && !slices.Contains(words, "noexec") {
		rest = []string{"exec"} // mount(8) gives all that stays, and never names this
	}
	for _, o := range words {
		if forbids, is := strings.CutPrefix(o, "allow_"); is && slices.Contains(words, "no"+forbids) {
			continue // mount(8) puts nosuid and nodev first, whatever came later
		}
		if flag, is := flagOption(o); is {
			command = append(command, flag)
		} else {
			rest = append(rest, o)
		}
	}
	return append(command, "-o", strings.Join(rest, ","), "--", fl.Arg(0), fl.Arg(1)), nil
}

// flagOption is the flag of kmsfs mount that an option stands for: what fstab, which
// has only options, could not say otherwise.
func flagOption(option string) (flag string, is bool) {
	name, value, hasValue := strings.Cut(option, "=")
	switch name {
	case "key", "accept_key", "config", "log_file":
		return "--" + strings.ReplaceAll(name, "_", "-") + "=" + value, hasValue
	case "accept_new":
		return "--accept-new", !hasValue
	}
	return "", false
}

func askedByUmount(args []string) ([]string, error) {
	fl, namespace := helperFlags(umountHelper)
	fl.BoolP("read-only", "r", false, "") // if unmounting fails: mount(8) does that by itself
	lazy := fl.BoolP("lazy", "l", false, "")
	force := fl.BoolP("force", "f", false, "")
	if err := parseHelper(fl, args, namespace); err != nil {
		return nil, err
	}
	switch {
	case fl.NArg() != 1:
		return nil, usage("%s wants a MOUNTPOINT, not %q", umountHelper, fl.Args())
	case *force:
		return nil, usage("what programs wrote and did not sync would be lost; if you want that, run: %s", commandLine("umount", "-i", "-f", fl.Arg(0)))
	case *lazy:
		return []string{"umount", "--lazy", "--", fl.Arg(0)}, nil
	}
	return []string{"umount", "--", fl.Arg(0)}, nil
}

func parseHelper(fl *pflag.FlagSet, args []string, namespace *string) error {
	if err := fl.Parse(args); err != nil {
		return usage("%s: %w", fl.Name(), err)
	}
	if *namespace != "" {
		return usage("%s enters no mount namespace; run the command in it: nsenter --mount=%s", fl.Name(), *namespace)
	}
	return nil
}

// remountFlags are what a remount can change. The kernel does it alone: the daemon
// keeps its own options (mount(2), MS_REMOUNT).
var remountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME,
}

// remounts says whether mount options ask for a remount.
func (f *mountFlags) remounts() bool {
	return slices.Contains(strings.Split(strings.Join(f.options, ","), ","), "remount")
}

// remount changes the kernel's flags of a mount. mount(8) gives all options again
// that mountinfo shows, the kernel's own too (user_id=0): those that are no flag are
// left as they are.
func (p *program) remount(ctx context.Context, f *mountFlags, arg string) error {
	point, err := pointPath(arg)
	if err != nil {
		return &failure{status: exitMount, err: err}
	}
	m, err := mountedAt(point)
	if err != nil {
		return err
	}
	if m == nil || !m.isKmsfs() {
		return fail(exitMount, "", "%s is not a kmsfs mountpoint", point)
	}
	flags, err := remountTo(point, strings.Split(strings.Join(f.options, ","), ","))
	if err != nil {
		return fail(exitMount, "", "remounting %s: %w", point, err)
	}
	if flags&unix.MS_RDONLY == 0 && servedReadOnly(ctx, m.source, point) {
		return fail(exitMount, "unmount it and mount it again", "%s was mounted read-only, and its daemon can't write", point)
	}
	if err := unix.Mount(m.source, point, m.kind, flags, ""); err != nil {
		return fail(exitMount, "", "remounting %s: %w", point, os.NewSyscallError("mount", err))
	}
	return nil
}

// remountTo are the flags that a mount gets: what forbids something stays until its
// opposite is named. (mount(8) names neither suid nor dev, so through it they stay as
// they are; for exec its helper speaks.) Times not named stay by themselves.
func remountTo(point string, options []string) (flags uintptr, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(point, &st); err != nil {
		return 0, os.NewSyscallError("statfs", err)
	}
	const forbidding = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	flags = unix.MS_REMOUNT | uintptr(st.Flags)&forbidding // ST_RDONLY and so on are the same bits
	for _, o := range options {
		switch o {
		case "rw":
			flags &^= unix.MS_RDONLY
		case "exec":
			flags &^= unix.MS_NOEXEC
		case "suid", "allow_suid":
			flags &^= unix.MS_NOSUID
		case "dev", "allow_dev":
			flags &^= unix.MS_NODEV
		}
		flags |= remountFlags[o]
	}
	return flags, nil
}

// servedReadOnly asks the daemon how it was mounted.
func servedReadOnly(ctx context.Context, dir, point string) bool {
	r, _, err := statusAt(ctx, dir, point)
	return err == nil && r.ReadOnly
}
