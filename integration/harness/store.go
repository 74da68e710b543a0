package harness

import (
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
)

// A Store is a file system that passes everything on to a directory and fails where it
// is told to: a backing store with bad blocks, a quota, a cable pulled. Nothing in it is
// cached, so that each call of the daemon that concerns the disk reaches it.
type Store struct {
	Dir string // where it is mounted

	fuse.RawFileSystem
	mu    sync.Mutex
	at    int // the call to fail, counted from now on; 0: none
	short bool
	dies  bool // after the call to fail every other fails too
	errno syscall.Errno
	calls int
	hit   string
	total map[string]int // faults, by the call they hit
}

// Store mounts a store, until the test ends.
func (e *Env) Store() *Store {
	e.T.Helper()
	s := &Store{Dir: e.Mkdir("store"), total: map[string]int{}}
	root, err := fusefs.NewLoopbackRoot(e.Mkdir("disk"))
	require.NoError(e.T, err)
	s.RawFileSystem = fusefs.NewNodeFS(root, &fusefs.Options{})
	server, err := fuse.NewServer(s, s.Dir, &fuse.MountOptions{Name: "faulty", FsName: "faulty", AllowOther: true,
		DirectMount: true, DisableReadDirPlus: true, // which would go around Lookup
		Options: []string{"default_permissions"}})
	require.NoError(e.T, err)
	go server.Serve()
	require.NoError(e.T, server.WaitMount())
	e.T.Cleanup(func() {
		s.Lift()
		unmounted := make(chan error, 1)
		go func() { unmounted <- server.Unmount() }() // which waits for the kernel's last word
		select {
		case err := <-unmounted:
			if err != nil {
				e.T.Errorf("unmounting the store: %v", err)
				release(s.Dir)
			}
		case <-time.After(20 * time.Second):
			e.T.Errorf("the store %s does not end; is it mounted in another namespace too?", s.Dir)
		}
	})
	return s
}

// InitOn is Init with the backing directory on a store.
func (e *Env) InitOn(s *Store, name string, args ...string) *Volume {
	e.T.Helper()
	return e.initIn(filepath.Join("store", name), name, args...)
}

// Fail makes the n-th call from now on fail, counted from 1. With short set it is, if a
// write, half done, and what comes next fails.
func (s *Store) Fail(n int, errno syscall.Errno, short bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.errno, s.short, s.dies, s.calls, s.hit = n, errno, short, false, 0, ""
}

// Die makes the n-th call from now on fail, counted from 1, and every later one: what is
// stored then is what a power cut leaves of a store that keeps the order of all calls.
func (s *Store) Die(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.errno, s.short, s.dies, s.calls, s.hit = n, syscall.EIO, false, true, 0, ""
}

// Lift ends that, and says which call was hit, "" if none.
func (s *Store) Lift() (hit string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = 0
	return s.hit
}

// Hits are the faults so far, by the call that they hit.
func (s *Store) Hits() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

// readers are the calls that a full disk does not fail: EIO is what they say.
var readers = []string{"lookup", "getattr", "open", "read", "readdir", "getxattr", "listxattr", "readlink", "opendir", "statfs", "lseek"}

func (s *Store) strike(call string) fuse.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at == 0 {
		return fuse.OK
	}
	s.calls++
	if s.dies && s.calls > s.at {
		return fuse.EIO
	}
	if s.calls != s.at {
		return fuse.OK
	}
	s.hit = call
	s.total[call]++
	if slices.Contains(readers, call) {
		s.errno = syscall.EIO
	}
	return fuse.Status(s.errno)
}

// Struck is the errno that the last fault said.
func (s *Store) Struck() syscall.Errno {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.errno
}

// halve reports whether the write at hand is the one to be half done; the next call
// is hit then.
func (s *Store) halve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.short || s.at == 0 || s.calls+1 != s.at {
		return false
	}
	s.calls++
	s.at++
	s.short = false
	return true
}

func (s *Store) Lookup(c <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if st := s.strike("lookup"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Lookup(c, h, name, out)
}

func (s *Store) GetAttr(c <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if st := s.strike("getattr"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.GetAttr(c, in, out)
}

func (s *Store) SetAttr(c <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	call := "setattr"
	if in.Valid&fuse.FATTR_SIZE != 0 {
		call = "truncate"
	}
	if st := s.strike(call); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.SetAttr(c, in, out)
}

func (s *Store) Mknod(c <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if st := s.strike("mknod"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Mknod(c, in, name, out)
}

func (s *Store) Mkdir(c <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if st := s.strike("mkdir"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Mkdir(c, in, name, out)
}

func (s *Store) Unlink(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if st := s.strike("unlink"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Unlink(c, h, name)
}

func (s *Store) Rmdir(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if st := s.strike("rmdir"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Rmdir(c, h, name)
}

func (s *Store) Rename(c <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if st := s.strike("rename"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Rename(c, in, from, to)
}

func (s *Store) Link(c <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if st := s.strike("link"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Link(c, in, name, out)
}

func (s *Store) Symlink(c <-chan struct{}, h *fuse.InHeader, to, name string, out *fuse.EntryOut) fuse.Status {
	if st := s.strike("symlink"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Symlink(c, h, to, name, out)
}

func (s *Store) Readlink(c <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	if st := s.strike("readlink"); st != fuse.OK {
		return nil, st
	}
	return s.RawFileSystem.Readlink(c, h)
}

func (s *Store) GetXAttr(c <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	if st := s.strike("getxattr"); st != fuse.OK {
		return 0, st
	}
	return s.RawFileSystem.GetXAttr(c, h, name, dest)
}

func (s *Store) ListXAttr(c <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	if st := s.strike("listxattr"); st != fuse.OK {
		return 0, st
	}
	return s.RawFileSystem.ListXAttr(c, h, dest)
}

func (s *Store) SetXAttr(c <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	if st := s.strike("setxattr"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.SetXAttr(c, in, name, data)
}

func (s *Store) RemoveXAttr(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if st := s.strike("removexattr"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.RemoveXAttr(c, h, name)
}

func (s *Store) Create(c <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if st := s.strike("create"); st != fuse.OK {
		return st
	}
	st := s.RawFileSystem.Create(c, in, name, out)
	out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	return st
}

func (s *Store) Open(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if st := s.strike("open"); st != fuse.OK {
		return st
	}
	st := s.RawFileSystem.Open(c, in, out)
	out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	return st
}

func (s *Store) Read(c <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if st := s.strike("read"); st != fuse.OK {
		return nil, st
	}
	return s.RawFileSystem.Read(c, in, buf)
}

func (s *Store) Lseek(c <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if st := s.strike("lseek"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Lseek(c, in, out)
}

func (s *Store) Write(c <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if s.halve() {
		data = data[:len(data)/2]
	} else if st := s.strike("write"); st != fuse.OK {
		return 0, st
	}
	return s.RawFileSystem.Write(c, in, data)
}

// Writev would go around Write; the kernel is not told that there is one.
func (s *Store) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

// CopyFileRange would go around Write.
func (s *Store) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func (s *Store) Flush(c <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	if st := s.strike("flush"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Flush(c, in)
}

func (s *Store) Fsync(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if st := s.strike("fsync"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Fsync(c, in)
}

func (s *Store) FsyncDir(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if st := s.strike("fsyncdir"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.FsyncDir(c, in)
}

func (s *Store) Fallocate(c <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if st := s.strike("fallocate"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.Fallocate(c, in)
}

func (s *Store) OpenDir(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if st := s.strike("opendir"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.OpenDir(c, in, out)
}

func (s *Store) ReadDir(c <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if st := s.strike("readdir"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.ReadDir(c, in, out)
}

func (s *Store) StatFs(c <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if st := s.strike("statfs"); st != fuse.OK {
		return st
	}
	return s.RawFileSystem.StatFs(c, h, out)
}
