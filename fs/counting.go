package fs

import (
	"runtime"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A request is a kind of request of the kernel's.
type request int

// The requests, in the order of requestNames.
const (
	reqLookup request = iota
	reqGetAttr
	reqSetAttr
	reqMknod
	reqMkdir
	reqUnlink
	reqRmdir
	reqRename
	reqLink
	reqSymlink
	reqAccess
	reqSetXAttr
	reqRemoveXAttr
	reqCreate
	reqTmpfile
	reqOpen
	reqLseek
	reqGetLk
	reqSetLk
	reqSetLkw
	reqIoctl
	reqFlush
	reqFsync
	reqFallocate
	reqOpenDir
	reqReadDir
	reqReadDirPlus
	reqFsyncDir
	reqStatFs
	reqStatx
	reqReadlink
	reqGetXAttr
	reqListXAttr
	reqRead
	reqWrite
	reqCopyFileRange
	reqRelease
	reqReleaseDir
	reqForget
	requestKinds
)

// requestNames are FUSE's own (fuse(4)), as metrics show them.
var requestNames = [requestKinds]string{
	reqLookup:        "LOOKUP",
	reqGetAttr:       "GETATTR",
	reqSetAttr:       "SETATTR",
	reqMknod:         "MKNOD",
	reqMkdir:         "MKDIR",
	reqUnlink:        "UNLINK",
	reqRmdir:         "RMDIR",
	reqRename:        "RENAME",
	reqLink:          "LINK",
	reqSymlink:       "SYMLINK",
	reqAccess:        "ACCESS",
	reqSetXAttr:      "SETXATTR",
	reqRemoveXAttr:   "REMOVEXATTR",
	reqCreate:        "CREATE",
	reqTmpfile:       "TMPFILE",
	reqOpen:          "OPEN",
	reqLseek:         "LSEEK",
	reqGetLk:         "GETLK",
	reqSetLk:         "SETLK",
	reqSetLkw:        "SETLKW",
	reqIoctl:         "IOCTL",
	reqFlush:         "FLUSH",
	reqFsync:         "FSYNC",
	reqFallocate:     "FALLOCATE",
	reqOpenDir:       "OPENDIR",
	reqReadDir:       "READDIR",
	reqReadDirPlus:   "READDIRPLUS",
	reqFsyncDir:      "FSYNCDIR",
	reqStatFs:        "STATFS",
	reqStatx:         "STATX",
	reqReadlink:      "READLINK",
	reqGetXAttr:      "GETXATTR",
	reqListXAttr:     "LISTXATTR",
	reqRead:          "READ",
	reqWrite:         "WRITE",
	reqCopyFileRange: "COPY_FILE_RANGE",
	reqRelease:       "RELEASE",
	reqReleaseDir:    "RELEASEDIR",
	reqForget:        "FORGET",
}

// lastErrno is above every errno of Linux (errno-base.h, errno.h: 133 is the last).
const lastErrno = 160

// answers counts requests by kind and answer. It is a table, so that counting is one
// addition: every READ passes here.
type answers struct {
	n             [requestKinds][lastErrno + 1]atomic.Int64
	read, written atomic.Int64 // bytes
	panics        atomic.Int64
	turn          atomic.Uint64
}

// turnEvery is after how many requests one calls the scheduler of Go's. A goroutine that
// reads requests and answers them never does so by itself, and 10 ms later the runtime
// takes it for one that keeps others from running: it takes its processor away in every
// system call, looking again every 20 us, as long as there is something to do (retake in
// Go's runtime/proc.go).
const turnEvery = 64

// note counts an answer and hands it on.
func (a *answers) note(r request, code fuse.Status) fuse.Status {
	a.n[r][max(0, min(int(code), lastErrno))].Add(1)
	if a.turn.Add(1)%turnEvery == 0 {
		runtime.Gosched()
	}
	return code
}

// A RequestCount is how often the kernel got one answer to one kind of request.
type RequestCount struct {
	Op    string // FUSE's name: "READ"
	Errno string // "OK", or the errno's name: "EBADMSG"
	N     int64
}

func (a *answers) addTo(s *Stats) {
	for r := range a.n {
		for errno := range a.n[r] {
			n := a.n[r][errno].Load()
			if n == 0 {
				continue
			}
			s.Requests = append(s.Requests, RequestCount{requestNames[r], errnoName(errno), n})
			if syscall.Errno(errno) == syscall.EBADMSG {
				s.Damaged += n
			}
		}
	}
	s.BytesRead, s.BytesWritten, s.Panics = a.read.Load(), a.written.Load(), a.panics.Load()
}

func errnoName(errno int) string {
	if errno == 0 {
		return "OK"
	}
	if name := unix.ErrnoName(syscall.Errno(errno)); name != "" {
		return name
	}
	return "other"
}

// countingFS counts every answer of the file system beneath it. One whose handler
// panicked is counted by fileSystem.panicked.
type countingFS struct {
	fuse.RawFileSystem
	answers *answers
}

// Lookup counts.
func (c *countingFS) Lookup(cancel <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	return c.answers.note(reqLookup, c.RawFileSystem.Lookup(cancel, header, name, out))
}

// GetAttr counts.
func (c *countingFS) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return c.answers.note(reqGetAttr, c.RawFileSystem.GetAttr(cancel, in, out))
}

// SetAttr counts.
func (c *countingFS) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	return c.answers.note(reqSetAttr, c.RawFileSystem.SetAttr(cancel, in, out))
}

// Mknod counts.
func (c *countingFS) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return c.answers.note(reqMknod, c.RawFileSystem.Mknod(cancel, in, name, out))
}

// Mkdir counts.
func (c *countingFS) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return c.answers.note(reqMkdir, c.RawFileSystem.Mkdir(cancel, in, name, out))
}

// Unlink counts.
func (c *countingFS) Unlink(cancel <-chan struct{}, header *fuse.InHeader, name string) fuse.Status {
	return c.answers.note(reqUnlink, c.RawFileSystem.Unlink(cancel, header, name))
}

// Rmdir counts.
func (c *countingFS) Rmdir(cancel <-chan struct{}, header *fuse.InHeader, name string) fuse.Status {
	return c.answers.note(reqRmdir, c.RawFileSystem.Rmdir(cancel, header, name))
}

// Rename counts.
func (c *countingFS) Rename(cancel <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	return c.answers.note(reqRename, c.RawFileSystem.Rename(cancel, in, from, to))
}

// Link counts.
func (c *countingFS) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return c.answers.note(reqLink, c.RawFileSystem.Link(cancel, in, name, out))
}

// Symlink counts.
func (c *countingFS) Symlink(cancel <-chan struct{}, header *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return c.answers.note(reqSymlink, c.RawFileSystem.Symlink(cancel, header, target, name, out))
}

// Access counts.
func (c *countingFS) Access(cancel <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	return c.answers.note(reqAccess, c.RawFileSystem.Access(cancel, in))
}

// SetXAttr counts.
func (c *countingFS) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	return c.answers.note(reqSetXAttr, c.RawFileSystem.SetXAttr(cancel, in, attr, data))
}

// RemoveXAttr counts.
func (c *countingFS) RemoveXAttr(cancel <-chan struct{}, header *fuse.InHeader, attr string) fuse.Status {
	return c.answers.note(reqRemoveXAttr, c.RawFileSystem.RemoveXAttr(cancel, header, attr))
}

// Create counts.
func (c *countingFS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	return c.answers.note(reqCreate, c.RawFileSystem.Create(cancel, in, name, out))
}

// Tmpfile counts.
func (c *countingFS) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	return c.answers.note(reqTmpfile, c.RawFileSystem.Tmpfile(cancel, in, out))
}

// Open counts.
func (c *countingFS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return c.answers.note(reqOpen, c.RawFileSystem.Open(cancel, in, out))
}

// Lseek counts.
func (c *countingFS) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	return c.answers.note(reqLseek, c.RawFileSystem.Lseek(cancel, in, out))
}

// GetLk counts.
func (c *countingFS) GetLk(cancel <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	return c.answers.note(reqGetLk, c.RawFileSystem.GetLk(cancel, in, out))
}

// SetLk counts.
func (c *countingFS) SetLk(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return c.answers.note(reqSetLk, c.RawFileSystem.SetLk(cancel, in))
}

// SetLkw counts.
func (c *countingFS) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return c.answers.note(reqSetLkw, c.RawFileSystem.SetLkw(cancel, in))
}

// Ioctl counts.
func (c *countingFS) Ioctl(cancel <-chan struct{}, in *fuse.IoctlIn, data []byte, out *fuse.IoctlOut, dest []byte) fuse.Status {
	return c.answers.note(reqIoctl, c.RawFileSystem.Ioctl(cancel, in, data, out, dest))
}

// Flush counts.
func (c *countingFS) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return c.answers.note(reqFlush, c.RawFileSystem.Flush(cancel, in))
}

// Fsync counts.
func (c *countingFS) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return c.answers.note(reqFsync, c.RawFileSystem.Fsync(cancel, in))
}

// Fallocate counts.
func (c *countingFS) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return c.answers.note(reqFallocate, c.RawFileSystem.Fallocate(cancel, in))
}

// OpenDir counts.
func (c *countingFS) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return c.answers.note(reqOpenDir, c.RawFileSystem.OpenDir(cancel, in, out))
}

// ReadDir counts.
func (c *countingFS) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return c.answers.note(reqReadDir, c.RawFileSystem.ReadDir(cancel, in, out))
}

// ReadDirPlus counts.
func (c *countingFS) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return c.answers.note(reqReadDirPlus, c.RawFileSystem.ReadDirPlus(cancel, in, out))
}

// FsyncDir counts.
func (c *countingFS) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return c.answers.note(reqFsyncDir, c.RawFileSystem.FsyncDir(cancel, in))
}

// StatFs counts.
func (c *countingFS) StatFs(cancel <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return c.answers.note(reqStatFs, c.RawFileSystem.StatFs(cancel, in, out))
}

// Statx counts.
func (c *countingFS) Statx(cancel <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	return c.answers.note(reqStatx, c.RawFileSystem.Statx(cancel, in, out))
}

// Readlink counts.
func (c *countingFS) Readlink(cancel <-chan struct{}, header *fuse.InHeader) ([]byte, fuse.Status) {
	target, code := c.RawFileSystem.Readlink(cancel, header)
	return target, c.answers.note(reqReadlink, code)
}

// GetXAttr counts.
func (c *countingFS) GetXAttr(cancel <-chan struct{}, header *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	n, code := c.RawFileSystem.GetXAttr(cancel, header, attr, dest)
	return n, c.answers.note(reqGetXAttr, code)
}

// ListXAttr counts.
func (c *countingFS) ListXAttr(cancel <-chan struct{}, header *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n, code := c.RawFileSystem.ListXAttr(cancel, header, dest)
	return n, c.answers.note(reqListXAttr, code)
}

// Read counts bytes too.
func (c *countingFS) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	result, code := c.RawFileSystem.Read(cancel, in, buf)
	if code.Ok() && result != nil {
		c.answers.read.Add(int64(result.Size()))
	}
	return result, c.answers.note(reqRead, code)
}

// Write counts bytes too.
func (c *countingFS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, code := c.RawFileSystem.Write(cancel, in, data)
	c.answers.written.Add(int64(n))
	return n, c.answers.note(reqWrite, code)
}

// Writev counts as a WRITE. ENOSYS is no answer: the server then calls Write.
func (c *countingFS) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	n, code := c.RawFileSystem.Writev(cancel, in, data)
	if code == fuse.ENOSYS {
		return n, code
	}
	c.answers.written.Add(int64(n))
	return n, c.answers.note(reqWrite, code)
}

// CopyFileRange counts bytes read and written: they pass through here all the same.
func (c *countingFS) CopyFileRange(cancel <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	n, code := c.RawFileSystem.CopyFileRange(cancel, in)
	c.answers.read.Add(int64(n))
	c.answers.written.Add(int64(n))
	return n, c.answers.note(reqCopyFileRange, code)
}

// Release counts; it can't fail.
func (c *countingFS) Release(cancel <-chan struct{}, in *fuse.ReleaseIn) {
	c.RawFileSystem.Release(cancel, in)
	c.answers.note(reqRelease, fuse.OK)
}

// ReleaseDir counts; it can't fail.
func (c *countingFS) ReleaseDir(in *fuse.ReleaseIn) {
	c.RawFileSystem.ReleaseDir(in)
	c.answers.note(reqReleaseDir, fuse.OK)
}

// Forget counts; it can't fail.
func (c *countingFS) Forget(nodeid, nlookup uint64) {
	c.RawFileSystem.Forget(nodeid, nlookup)
	c.answers.note(reqForget, fuse.OK)
}
