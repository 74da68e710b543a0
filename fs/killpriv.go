package fs

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// rawFS wraps go-fuse's node file system, to see what its node API doesn't show:
// with FUSE_HANDLE_KILLPRIV_V2 the kernel leaves it to us to clear setuid and
// setgid bits when somebody without CAP_FSETID writes, and says so by flags in
// WRITE, OPEN and SETXATTR (SETATTR reaches the node whole). Each becomes a
// SETATTR that clears them. A CREATE never meets old contents here.
//
// It also carries the caller's umask to the nodes, and which WRITEs come from the
// kernel's cache, and has listings go by their offsets alone.
type rawFS struct {
	fuse.RawFileSystem
	used  *usage
	umask bool // the kernel leaves umasks to us (FUSE_DONT_MASK)
}

// kill clears bits, as a SETATTR of the same request.
func (r *rawFS) kill(cancel <-chan struct{}, header *fuse.InHeader, what uint32, fh uint64) fuse.Status {
	in := fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{InHeader: *header, Valid: what}}
	if fh != 0 {
		in.Valid |= fuse.FATTR_FH
		in.Fh = fh
	}
	var out fuse.AttrOut
	return r.RawFileSystem.SetAttr(cancel, &in, &out)
}

// SetAttr clears the bits on a request that changes nothing but ctime. The kernel sends it
// where it would have cleared them itself, before a write and fallocate, and takes
// the mode from the answer: it looks at no later one for as long as it may keep
// attributes, and would execute by the old mode what somebody else has just written.
// Before root's writes it means that only security.capability goes.
func (r *rawFS) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Valid&^(fuse.FATTR_FH|fuse.FATTR_LOCKOWNER|fuse.FATTR_CTIME) == 0 && in.Caller.Uid != 0 {
		in.Valid |= fuse.FATTR_KILL_SUIDGID
	}
	return r.RawFileSystem.SetAttr(cancel, in, out)
}

// Write clears the bits before the bytes change, as the kernel would.
func (r *rawFS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		if code := r.kill(cancel, &in.InHeader, fuse.FATTR_KILL_SUIDGID, in.Fh); !code.Ok() {
			return 0, code
		}
	}
	return r.RawFileSystem.Write(cancel, in, data)
}

// Writev is what the server calls for every WRITE.
func (r *rawFS) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	if len(data) == 1 {
		return r.Write(cancel, in, data[0])
	}
	return 0, fuse.ENOSYS // the server joins the pieces and calls Write
}

// Open clears the bits of a file that it emptied.
func (r *rawFS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	code := r.RawFileSystem.Open(cancel, in, out)
	if code.Ok() && in.Mode&fuse.OPEN_KILL_SUIDGID != 0 {
		r.kill(cancel, &in.InHeader, fuse.FATTR_KILL_SUIDGID, out.Fh)
	}
	return code
}

// killSetgid asks in a SETATTR for what the kernel asks for in a SETXATTR: setgid
// goes, setuid stays.
const killSetgid = 1 << 31

// SetXAttr clears setgid when an access ACL is set by somebody outside the file's
// group. The kernel asks for it with default ACLs too, which clear nothing.
func (r *rawFS) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	code := r.RawFileSystem.SetXAttr(cancel, in, attr, data)
	if code.Ok() && attr == accessACL && in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 {
		r.kill(cancel, &in.InHeader, killSetgid, 0)
	}
	return code
}

// Create hands the umask on.
func (r *rawFS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	in.Mode |= r.shifted(in.Umask)
	return r.RawFileSystem.Create(cancel, in, name, out)
}

// Tmpfile hands the umask on.
func (r *rawFS) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	in.Mode |= r.shifted(in.Umask)
	return r.RawFileSystem.Tmpfile(cancel, in, out)
}

// Mkdir hands the umask on.
func (r *rawFS) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	in.Mode |= r.shifted(in.Umask)
	return r.RawFileSystem.Mkdir(cancel, in, name, out)
}

// Mknod hands the umask on.
func (r *rawFS) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	in.Mode |= r.shifted(in.Umask)
	return r.RawFileSystem.Mknod(cancel, in, name, out)
}

func (r *rawFS) shifted(umask uint32) uint32 {
	if !r.umask {
		return 0
	}
	return (umask & 0o777) << umaskShift
}

// killPriv clears setuid, and setgid of what a group may execute, as write(2) by
// an unprivileged process does; the rest of setgid only if the caller is not in the
// group. security.capability goes by itself: the backing kernel removes it when we
// write.
func killPriv(fd int, caller *fuse.Caller) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	mode := st.Mode & 0o7777 &^ unix.S_ISUID
	if mode&unix.S_ISGID != 0 && (mode&unix.S_IXGRP != 0 || !inGroup(caller, st.Gid)) {
		mode &^= unix.S_ISGID
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || mode == st.Mode&0o7777 {
		return nil
	}
	return volume.Chmod(fd, mode)
}

// inGroup reports whether the process that waits for its request is in a group, or
// root, who needn't be. Requests name one group of its; what it can't be asked for, because it is in
// another pid namespace, it is not in.
func inGroup(caller *fuse.Caller, gid uint32) bool {
	if caller.Uid == 0 || caller.Gid == gid {
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", caller.Pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(status), "\nGroups:")
	line, _, _ := strings.Cut(rest, "\n")
	return slices.Contains(strings.Fields(line), fmt.Sprint(gid))
}

// clearSetgid clears setgid and nothing else.
func clearSetgid(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_ISGID == 0 {
		return err
	}
	return volume.Chmod(fd, st.Mode&0o7777&^unix.S_ISGID)
}

// anyOffset marks the offset of a READDIR, which is positive: go-fuse then takes it for
// a seek. Left to itself it reads on in what it has handed out last if the offset is
// there, and where that has more entries than this request has room for, it goes on
// behind them.
const anyOffset = 1 << 63

// ReadDir lists from where the offset says.
func (r *rawFS) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	in.Offset |= anyOffset
	return r.RawFileSystem.ReadDir(cancel, in, out)
}

// ReadDirPlus does the same.
func (r *rawFS) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	in.Offset |= anyOffset
	return r.RawFileSystem.ReadDirPlus(cancel, in, out)
}
