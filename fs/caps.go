package fs

import (
	"bufio"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	maxRequest     = 1 << 20 // bytes of a READ or WRITE; the kernel's own limit by default
	maxBackground  = 64
	maxInflight    = 256 << 20 // bytes of request buffers; FORGET storms would take more
	fuseSubtype    = "kmsfs"
	permissionsOpt = "default_permissions"
)

// fuseOptions chooses how the kernel talks to us; FUSE.md has the measurements.
func (fs *fileSystem) fuseOptions() fuse.MountOptions {
	o := &fs.opts
	m := fuse.MountOptions{
		AllowOther:              o.AllowOther,
		FsName:                  o.FsName,
		Name:                    fuseSubtype,
		MaxWrite:                maxRequest,
		MaxBackground:           maxBackground,
		MaxInflightRequestBytes: maxInflight,
		DisableSplice:           true, // plaintext is in user memory: splice can't help
		EnableAcl:               fs.acl,
		Debug:                   o.Debug,
		Logger:                  fs.fuseLogger(),
		PanicHandler:            fs.panicked,
		// Root mounts by itself; others need the setuid helper fusermount3.
		DirectMountStrict: fs.priv,
		ExtraCapabilities: fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_READDIRPLUS_AUTO |
			fuse.CAP_SETXATTR_EXT,
		// Only we and the kernel change contents: an own write must not drop
		// what is cached.
		ExplicitDataCacheControl: o.Writeback,
	}
	if o.Writeback {
		m.ExtraCapabilities |= fuse.CAP_WRITEBACK_CACHE
	}
	if fs.acl {
		// A default ACL takes the umask's place: so we mask.
		m.ExtraCapabilities |= fuse.CAP_DONT_MASK
		m.Options = append(m.Options, permissionsOpt)
	}
	fs.mountFlags(&m)
	return m
}

// flagOptions are the mount options that the kernel wants as flags when root
// mounts directly; fusermount3 takes them by name.
var flagOptions = map[string]uintptr{
	"ro": syscall.MS_RDONLY, "noexec": syscall.MS_NOEXEC, "noatime": syscall.MS_NOATIME,
	"nodiratime": syscall.MS_NODIRATIME, "relatime": syscall.MS_RELATIME, "strictatime": syscall.MS_STRICTATIME,
	"sync": syscall.MS_SYNCHRONOUS, "dirsync": syscall.MS_DIRSYNC,
	"nosuid": syscall.MS_NOSUID, "nodev": syscall.MS_NODEV,
}

// noOptions need no flag: they are the default, or the Options' own business.
var noOptions = map[string]bool{"rw": true, "exec": true, "async": true, "atime": true, "suid": true, "dev": true}

func (fs *fileSystem) mountFlags(m *fuse.MountOptions) {
	o := &fs.opts
	list := append([]string{}, o.Extra...)
	if o.ReadOnly {
		list = append(list, "ro")
	}
	// Modes and device numbers are not authenticated (DESIGN 3.4).
	if !o.Suid {
		list = append(list, "nosuid")
	}
	if !o.Dev {
		list = append(list, "nodev")
	}
	if !fs.priv {
		m.Options = append(m.Options, list...)
		return
	}
	// Never zero, which would mean go-fuse's default (nosuid, nodev); relatime is the
	// kernel's own, and others prevail over it.
	m.DirectMountFlags = syscall.MS_RELATIME
	for _, opt := range list {
		if flag, is := flagOptions[opt]; is {
			m.DirectMountFlags |= flag
		} else if !noOptions[opt] {
			m.Options = append(m.Options, opt)
		}
	}
}

// negativeTimeout lets the kernel remember that a name does not exist, on a volume
// that nobody else changes.
func (fs *fileSystem) negativeTimeout() *time.Duration {
	if !fs.opts.Writeback {
		return nil
	}
	return &fs.opts.EntryTimeout
}

// deviceOf finds the device number of a mount in the mount table.
func deviceOf(mountpoint string) (dev string) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// 36 35 0:45 / /mnt rw,nosuid - fuse.kmsfs /data rw, proc(5)
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && unescape.Replace(fields[4]) == mountpoint {
			dev = fields[2] // the last one is on top
		}
	}
	return dev
}
