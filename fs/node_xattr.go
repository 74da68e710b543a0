package fs

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	capsXattr    = "security.capability"
	selinuxXattr = "security.selinux"
	aclPrefix    = "system.posix_acl_"

	trustedPrefix = "trusted."
)

// absent reports whether attributes of this name don't exist on this mount at
// all. Programs remember EOPNOTSUPP for the whole device: "ls -l" asks for two of
// them a file.
func (fs *fileSystem) absent(attr string) bool {
	return attr == selinuxXattr || !fs.acl && strings.HasPrefix(attr, aclPrefix)
}

var _ = (fusefs.NodeGetxattrer)((*node)(nil))

// Getxattr reads an attribute.
func (n *node) Getxattr(_ context.Context, attr string, dest []byte) (uint32, syscall.Errno) {
	if n.fs.absent(attr) {
		return 0, syscall.EOPNOTSUPP
	}
	caps := attr == capsXattr
	if caps && n.noCaps.Load() {
		return 0, syscall.ENODATA
	}
	var size int
	err := n.with(func(fd int) (err error) {
		size, err = n.fs.vol.Getxattr(fd, attr, dest)
		return err
	})
	if err == syscall.ENODATA {
		if caps {
			n.noCaps.Store(true)
		}
		return 0, syscall.ENODATA
	}
	return uint32(size), n.errno("getxattr", err)
}

var _ = (fusefs.NodeSetxattrer)((*node)(nil))

// Setxattr sets an attribute.
func (n *node) Setxattr(_ context.Context, attr string, data []byte, flags uint32) syscall.Errno {
	if n.fs.absent(attr) {
		return syscall.EOPNOTSUPP
	}
	if attr == capsXattr {
		n.noCaps.Store(false)
	}
	n.fs.tend.changed()
	return n.errno("setxattr", n.with(func(fd int) error {
		return n.fs.vol.Setxattr(fd, attr, data, int(flags))
	}))
}

var _ = (fusefs.NodeRemovexattrer)((*node)(nil))

// Removexattr removes an attribute.
func (n *node) Removexattr(_ context.Context, attr string) syscall.Errno {
	if n.fs.absent(attr) {
		return syscall.EOPNOTSUPP
	}
	n.fs.tend.changed()
	err := n.with(func(fd int) error { return n.fs.vol.Removexattr(fd, attr) })
	if errors.Is(err, unix.ENODATA) {
		return syscall.ENODATA
	}
	return n.errno("removexattr", err)
}

var _ = (fusefs.NodeListxattrer)((*node)(nil))

// Listxattr lists the attributes that a user may see: not those that Getxattr
// says don't exist, or cp -a and rsync -X would complain. trusted.* are root's: the
// kernel keeps others from reading them, but leaves the list to us.
func (n *node) Listxattr(ctx context.Context, dest []byte) (uint32, syscall.Errno) {
	caller, is := ctx.(*fuse.Context)
	hideTrusted := is && caller.Uid != 0
	var size int
	err := n.with(func(fd int) (err error) {
		if size, err = n.fs.vol.Listxattr(fd, dest); err == nil && len(dest) >= size {
			size = n.fs.dropHidden(dest[:size], hideTrusted)
		}
		return err
	})
	return uint32(size), n.errno("listxattr", err)
}

// dropHidden takes names out of a list of NUL-terminated ones, in place.
func (fs *fileSystem) dropHidden(list []byte, trustedToo bool) int {
	kept := 0
	for len(list[kept:]) > 0 {
		end := bytes.IndexByte(list[kept:], 0) + 1
		if end == 0 {
			break
		}
		name := string(list[kept : kept+end-1])
		if !fs.absent(name) && !(trustedToo && strings.HasPrefix(name, trustedPrefix)) {
			kept += end
			continue
		}
		list = append(list[:kept], list[kept+end:]...)
	}
	return len(list)
}
