package fs

import (
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// Options say what is mounted where, and how. Zero durations mean the defaults.
type Options struct {
	Volume     *volume.Volume // unlocked; the caller closes it after the mount has ended
	Keys       Keys
	Mountpoint string
	Slots      *volume.Slots // nil: kill -9 may tear a block that is being written
	Tails      *volume.Tails // nil: a power cut may tear the synced end of a file that grows
	// Synced is told, from a goroutine of ours, that all that was written before since
	// is durable. It may be nil.
	Synced func(since time.Time)
	Logger *slog.Logger // nil: nothing is logged

	AllowOther bool // other users too; the kernel enforces permissions and POSIX ACLs
	ReadOnly   bool
	Suid       bool // honour setuid bits: modes are not authenticated
	Dev        bool // honour device files: neither are they
	// Writeback lets the kernel cache writes, listings and attributes. It is for
	// a volume that this mount alone changes (volume.Lock).
	Writeback bool

	// AttrTimeout and EntryTimeout are how long the kernel may trust attributes
	// and names; by default 60 s with Writeback, else 1 s. Negative means not at
	// all.
	AttrTimeout, EntryTimeout time.Duration
	// Deadline is how long an open or truncate waits for a key, by default 10 s.
	Deadline time.Duration
	// CreateWait is how long a create does, by default 2 s: it holds its
	// directory in the kernel.
	CreateWait time.Duration

	// Prefetch is how many data keys may be opened at once that are yet to be asked for,
	// when a program walks through directories, if Keys can do that; 0 = none.
	Prefetch int

	FsName string   // what df(1) shows as the source; by default the backing directory
	Extra  []string // further mount options: noexec, noatime, max_read=...
	Debug  bool     // log every FUSE request

	openSync func() (syncer, error) // a descriptor that syncs the backing store
	// storePages puts the contents of a small file into the kernel's page cache.
	storePages func(n *node, data []byte) syscall.Errno
}

const (
	defaultDeadline   = 10 * time.Second
	defaultCreateWait = 2 * time.Second
	timeoutAlone      = 60 * time.Second
	timeoutShared     = time.Second
)

func (o *Options) setDefaults() {
	timeout := timeoutShared
	if o.Writeback {
		timeout = timeoutAlone
	}
	for _, d := range []struct {
		field *time.Duration
		def   time.Duration
	}{{&o.AttrTimeout, timeout}, {&o.EntryTimeout, timeout}, {&o.Deadline, defaultDeadline}, {&o.CreateWait, defaultCreateWait}} {
		if *d.field == 0 {
			*d.field = d.def
		}
		*d.field = max(*d.field, 0)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if o.storePages == nil {
		o.storePages = func(n *node, data []byte) syscall.Errno { return n.WriteCache(0, data) }
	}
	if o.openSync == nil {
		o.openSync = func() (syncer, error) {
			s, err := o.Volume.OpenSync()
			if err != nil {
				return nil, err // not a syncer that holds a nil
			}
			return s, nil
		}
	}
	if o.FsName == "" {
		o.FsName = o.Volume.Path()
		if abs, err := filepath.Abs(o.FsName); err == nil {
			o.FsName = abs
		}
	}
}

// A Server is a mounted volume.
type Server struct {
	fs   *fileSystem
	fuse *fuse.Server
	done chan struct{} // closed when all is settled and wiped

	mu sync.Mutex // one Unmount at a time
}

// What Mount refuses.
var (
	// ErrStale: a daemon died and left its mount.
	ErrStale = errors.New("the mountpoint is a dead FUSE mount (its daemon is gone); unmount it first: fusermount3 -u -z, or umount -l as root")
	// ErrNested: we would serve requests about our own backing directory.
	ErrNested = errors.New("the mountpoint and the backing directory must not lie inside each other")
)

// Mount mounts the volume; when it returns without error the file system is ready.
// It sets the process's umask to 0: modes come from the callers, masked already.
func Mount(o Options) (*Server, error) {
	o.setDefaults()
	if err := checkMountpoint(o.Mountpoint, o.Volume); err != nil {
		return nil, fmt.Errorf("mounting on %s: %w", o.Mountpoint, err)
	}
	fs, err := newFileSystem(o)
	if err != nil {
		return nil, fmt.Errorf("mounting %s: %w", o.Volume.Path(), err)
	}
	unix.Umask(0)
	s := &Server{fs: fs, done: make(chan struct{})}
	if err := s.mount(); err != nil {
		fs.dirs.closeAll()
		return nil, fmt.Errorf("mounting %s on %s: %w", o.Volume.Path(), o.Mountpoint, err)
	}
	return s, nil
}

func newFileSystem(o Options) (*fileSystem, error) {
	dir, err := o.Volume.Root()
	if err != nil {
		return nil, err
	}
	fs := &fileSystem{
		vol: o.Volume, keys: o.Keys, opts: o, dev: dir.Dev(), priv: unix.Geteuid() == 0, acl: o.AllowOther,
		log: newLimiter(o.Logger), files: fileTable{byID: make(map[fileID]*file)},
	}
	dirs, files := share()
	fs.dirs.init(dir, dirs)
	fs.files.max = files
	fs.tend.fs = fs
	var st unix.Statx_t
	if err := fs.statFd(dir.Fd(), &st); err != nil {
		dir.Close()
		return nil, fmt.Errorf("reading the root's attributes: %w", err)
	}
	fs.root = &node{fs: fs, id: idOf(&st)}
	return fs, nil
}

func (s *Server) mount() error {
	fs := s.fs
	fuseOpts := fs.fuseOptions()
	id := fs.root.id
	raw := fusefs.NewNodeFS(fs.root, &fusefs.Options{
		MountOptions:    fuseOpts,
		NegativeTimeout: fs.negativeTimeout(),
		NullPermissions: true,
		Logger:          fuseOpts.Logger,
		RootStableAttr:  &fusefs.StableAttr{Ino: fs.inoOf(id), Gen: uint64(id.born)},
	})
	seen := &rawFS{RawFileSystem: raw, used: &fs.used, umask: fs.acl}
	server, err := fuse.NewServer(&countingFS{seen, &fs.stats.answers}, fs.opts.Mountpoint, &fuseOpts)
	if err != nil {
		return err
	}
	s.fuse = server
	fs.used.touch()
	fs.tend.start()
	fs.followLeases()
	fs.startAhead()
	go s.serve()
	if err := server.WaitMount(); err != nil {
		_ = s.Unmount()
		return err
	}
	setReadAhead(fs.opts.Mountpoint)
	return nil
}

// serve runs until the file system is unmounted, by whomever.
func (s *Server) serve() {
	s.fuse.Serve()
	s.fs.ahead.end()
	s.fs.tend.end()
	s.fs.tenure.end()
	s.fs.tend.finish()
	s.fs.dirs.closeAll()
	close(s.done)
}

// Wait returns when the file system is unmounted, everything is settled and
// synced, and the keys of open files are wiped.
func (s *Server) Wait() { <-s.done }

// SyncErr is, after Wait, why not all that was written is known to be durable, or nil. A
// sync that failed once counts to the end.
func (s *Server) SyncErr() error { return s.fs.tend.err }

// Unmount unmounts and waits. While files are open on the mount it fails (EBUSY)
// and the mount goes on.
func (s *Server) Unmount() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.done:
		return nil
	default:
	}
	if err := s.fuse.Unmount(); err != nil {
		return fmt.Errorf("unmounting %s: %w", s.fs.opts.Mountpoint, err)
	}
	<-s.done
	return nil
}

// checkMountpoint refuses what can't work, and names a dead mount.
func checkMountpoint(path string, v *volume.Volume) error {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case err == syscall.ENOTCONN:
		return ErrStale
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return syscall.ENOTDIR
	}
	backing := procPath(v.Fd())
	for _, pair := range [][2]string{{path, backing}, {backing, path}} {
		inside, err := isInside(pair[0], pair[1])
		if err != nil {
			return err
		}
		if inside {
			return ErrNested
		}
	}
	return nil
}

// isInside reports whether directory a is b or lies beneath it, by walking up from
// a: names may lie, inodes don't.
func isInside(a, b string) (bool, error) {
	var want, at unix.Stat_t
	if err := unix.Stat(b, &want); err != nil {
		return false, err
	}
	fd, err := unix.Open(a, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer func() { unix.Close(fd) }()
	if err := unix.Fstat(fd, &at); err != nil {
		return false, err
	}
	for {
		if at.Dev == want.Dev && at.Ino == want.Ino {
			return true, nil
		}
		up, err := unix.Openat(fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return false, err
		}
		unix.Close(fd)
		fd = up
		before := at
		if err := unix.Fstat(fd, &at); err != nil {
			return false, err
		}
		if at.Dev == before.Dev && at.Ino == before.Ino {
			return false, nil // the root of all
		}
	}
}

// slogWriter lets go-fuse's logger speak through ours. What it has to say is for
// debugging: requests, and replies that nobody waited for any more.
type slogWriter struct{ log *slog.Logger }

func (w slogWriter) Write(p []byte) (int, error) {
	w.log.Debug("fuse: " + strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

func (fs *fileSystem) fuseLogger() *log.Logger { return log.New(slogWriter{fs.opts.Logger}, "", 0) }

// panicked turns a bug in a handler into one failed request.
func (fs *fileSystem) panicked(reason any) fuse.Status {
	fs.stats.answers.panics.Add(1)
	fs.opts.Logger.Error("a request failed by a bug in kmsfs; please report it", "panic", reason, "stack", string(debug.Stack()))
	return fuse.EIO
}

// readAheadKB makes READs as large as requests can be, and lets two be under way, so that
// one is opened while the other is copied; the kernel's default is 128.
const readAheadKB = "2048"

// setReadAhead raises the mount's read-ahead. Only root may; it is no error not
// to. The mount table tells the device: we never touch our own mount.
func setReadAhead(mountpoint string) {
	if abs, err := filepath.Abs(mountpoint); err == nil {
		mountpoint = abs
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(mountpoint)); err == nil {
		mountpoint = filepath.Join(real, filepath.Base(mountpoint))
	}
	if dev := deviceOf(mountpoint); dev != "" {
		_ = os.WriteFile("/sys/class/bdi/"+dev+"/read_ahead_kb", []byte(readAheadKB), 0)
	}
}
