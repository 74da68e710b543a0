package fs

import (
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// usage is when the mount was last used. What is seen of it is that somebody looked up
// a name, asked for attributes, or opened something; the kernel answers for itself
// within the timeouts that it was given.
type usage struct{ last atomic.Int64 } // ns since the epoch

func (u *usage) touch() { u.last.Store(time.Now().UnixNano()) }

// Touch counts as a use.
func (s *Server) Touch() { s.fs.used.touch() }

// IdleFor is how long nothing was open or used. A directory that is open, or that a
// process works in, is not seen: then Unmount fails.
func (s *Server) IdleFor() time.Duration {
	if s.fs.files.len() > 0 {
		s.fs.used.touch()
	}
	return time.Since(time.Unix(0, s.fs.used.last.Load()))
}

// Lookup counts as a use.
func (r *rawFS) Lookup(cancel <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	r.used.touch()
	return r.RawFileSystem.Lookup(cancel, header, name, out)
}

// GetAttr counts as a use.
func (r *rawFS) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	r.used.touch()
	return r.RawFileSystem.GetAttr(cancel, in, out)
}

// OpenDir counts as a use.
func (r *rawFS) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	r.used.touch()
	return r.RawFileSystem.OpenDir(cancel, in, out)
}
