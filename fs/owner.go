package fs

import (
	"context"
	"encoding/binary"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

const (
	accessACL  = "system.posix_acl_access"
	defaultACL = "system.posix_acl_default"
)

// umaskShift is where the raw wrapper puts the caller's umask into a mode: with
// POSIX ACLs the kernel leaves masking to us (FUSE_DONT_MASK).
const umaskShift = 16

// creationMode applies the caller's umask unless the directory has a default ACL,
// which takes its place (acl(5)); the backing file system applies that one.
func (n *node) creationMode(d *volume.Dir, mode uint32) uint32 {
	umask := mode >> umaskShift & 0o777
	mode &= 1<<umaskShift - 1
	if umask == 0 || n.hasDefaultACL(d) {
		return mode
	}
	return mode &^ umask
}

func (n *node) hasDefaultACL(d *volume.Dir) bool {
	size, err := unix.Getxattr(procPath(d.Fd()), defaultACL, nil)
	return err == nil && size >= binary.Size(uint32(0))
}

// own gives what was just made to the caller, where several users share the mount
// and we may: the group too, unless a setgid directory gave its own. The daemon
// never acts under another identity, which in Go would be the whole process's.
func (n *node) own(ctx context.Context, d *volume.Dir, fd int) error {
	caller, is := ctx.(*fuse.Context)
	if !is || !n.fs.opts.AllowOther || !n.fs.priv || caller.Uid == 0 && caller.Gid == 0 {
		return nil
	}
	var st, dir unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if err := d.Stat(&dir); err != nil {
		return err
	}
	gid := int(caller.Gid)
	if dir.Mode&unix.S_ISGID != 0 {
		gid = -1
	}
	if err := volume.Chown(fd, int(caller.Uid), gid); err != nil {
		return err
	}
	// chown(2) cleared what the caller asked for, and was granted, at creation.
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		return volume.Chmod(fd, st.Mode&0o7777)
	}
	return nil
}

// ownName is own for what has a name and no descriptor yet; it returns the
// attributes.
func (n *node) ownName(ctx context.Context, d *volume.Dir, name string, st *unix.Statx_t) error {
	fd, err := d.OpenPath(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := n.own(ctx, d, fd); err != nil {
		return err
	}
	return n.fs.statFd(fd, st)
}
