package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/fs"
	"kmsfs/volume"
)

// A live mount listens on a unix socket in the runtime directory, named after its
// volume. Each line that a client sends is a request in JSON, each is answered by
// one line:
//
//	{"op":"status"}   who serves what
//	{"op":"reload"}   read kmsfs.toml again and adopt its keys, if they may be trusted;
//	                  "leaving" are keys under which no new files may be made
//	{"op":"lock"}     wipe every data key and refuse all until unlock; answered when done
//	{"op":"unlock"}   undo that
//	{"op":"moves"}    the first on a connection: note what is renamed and linked from
//	                  now on, until the connection ends; each further one: tell it
//
// The directory and the socket belong to the user alone, and the kernel says who
// is at the other end (SO_PEERCRED): only the user himself and root are answered,
// and only an answer of the process that holds the volume's lock counts.
type controlRequest struct {
	Op      string   `json:"op"`
	Leaving []string `json:"leaving,omitempty"`

	talk *conversation // that it is part of; only who answers has one
}

type controlReply struct {
	OK         bool     `json:"ok"`
	Error      string   `json:"error,omitempty"`
	PID        int      `json:"pid,omitempty"`
	Volume     string   `json:"volume,omitempty"`
	Dir        string   `json:"dir,omitempty"`
	Mountpoint string   `json:"mountpoint,omitempty"`
	ReadOnly   bool     `json:"read_only,omitempty"`
	Keys       []string `json:"keys,omitempty"`
	leaseStatus

	// Of moves; whether some are missing; whether more are to be asked for.
	Moves []controlMove `json:"moves,omitempty"`
	Lost  bool          `json:"lost,omitempty"`
	More  bool          `json:"more,omitempty"`
}

// A controlMove is where something was moved to: a stored path below the backing
// directory, which is any bytes, so base64 in JSON; and its inode number there.
type controlMove struct {
	Path []byte `json:"path"`
	Ino  uint64 `json:"ino"`
}

const (
	controlIdle    = 10 * time.Second // for a request to arrive, or a status to be answered
	controlReload  = time.Minute      // for a reload, which may ask KMS
	controlDial    = 15 * time.Second // for a mount that starts or ends to listen, or to be gone
	controlAgain   = 50 * time.Millisecond
	controlMaxLine = 64 << 10
	controlMaxMove = 44 << 10 // of a line: paths as they are encoded
)

// controlServer answers on one socket until Close.
type controlServer struct {
	listener *net.UnixListener
	dir      *os.File // holds the socket
	name     string

	answer  func(context.Context, controlRequest) controlReply
	cancel  context.CancelFunc
	clients sync.WaitGroup
}

// listen serves the mount's control socket.
func (m *mounting) listen() (*controlServer, error) {
	dir, err := config.RuntimeDir()
	if err != nil {
		return nil, err
	}
	s, err := listenControl(dir, m.v.ID().String()+".sock", m.answer)
	if err != nil {
		return nil, fmt.Errorf("opening the control socket in %s (set XDG_RUNTIME_DIR to move it): %w", dir, err)
	}
	return s, nil
}

// answer is what a live mount has to say.
func (m *mounting) answer(ctx context.Context, r controlRequest) controlReply {
	reply := controlReply{OK: true, PID: os.Getpid(), Volume: m.v.ID().String(), Dir: m.dir, Mountpoint: m.point, ReadOnly: m.cfg.Mount.ReadOnly, Keys: m.ring.Trusted()}
	switch r.Op {
	case "status":
		reply.leaseStatus = m.leases()
	case "lock", "unlock":
		return m.lock(ctx, r.Op == "lock")
	case "moves":
		return r.talk.moves(m.server)
	case "reload":
		m.reloading.Lock()
		defer m.reloading.Unlock()
		trusted, err := m.reload(ctx)
		if err == nil {
			err = m.stays(trusted[0], r.Leaving)
		}
		if err != nil {
			m.log.Error("the changed key list was refused", "err", err)
			return controlReply{Error: sentence(err)}
		}
		m.log.Info("key list adopted", "keys", trusted)
		reply.Keys = trusted
	default:
		return controlReply{Error: fmt.Sprintf("unknown request %q", r.Op)}
	}
	return reply
}

// stays refuses that new files are made under a key that leaves, behind the sweep of
// who asks.
func (m *mounting) stays(first string, leaving []string) error {
	if !has(leaving, first) {
		return nil
	}
	return refuse("mount it again with another key named first, or without --key", "%s is mounted with --key %s as the key of new files, and that is to leave", m.dir, first)
}

// A conversation is what a connection keeps from one request to the next. Requests
// come one after another.
type conversation struct {
	watch *fs.Watch // nil until moves are asked for
	left  []fs.Move // drained, and had no room in a reply
}

func (t *conversation) end() {
	if t.watch != nil {
		t.watch.Close()
	}
}

// moves starts the watch, or tells what it has noted, as much as a reply holds.
// Whoever asks again while there is more has then heard of everything that had moved
// when he asked first.
func (t *conversation) moves(server *fs.Server) controlReply {
	reply := controlReply{OK: true}
	if t.watch == nil {
		t.watch = server.Watch()
		return reply
	}
	if len(t.left) == 0 {
		t.left, reply.Lost = t.watch.Moved()
	}
	for size := 0; len(t.left) > 0; t.left = t.left[1:] {
		next := controlMove{[]byte(t.left[0].Path), t.left[0].Ino}
		size += base64.StdEncoding.EncodedLen(len(next.Path)) + len(`{"path":"","ino":18446744073709551615},`)
		if size > controlMaxMove {
			break
		}
		reply.Moves = append(reply.Moves, next)
	}
	reply.More = len(t.left) > 0
	return reply
}

func listenControl(dir, name string, answer func(context.Context, controlRequest) controlReply) (*controlServer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	d, err := openPrivate(dir)
	if err != nil {
		return nil, err
	}
	// The volume's lock is ours, so a socket that is there is a dead one's.
	_ = unix.Unlinkat(int(d.Fd()), name, 0)
	listener, err := net.ListenUnix("unix", socketAddr(d, name))
	if err != nil {
		d.Close()
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	ctx, cancel := context.WithCancel(context.Background())
	s := &controlServer{listener: listener, dir: d, name: name, answer: answer, cancel: cancel}
	if err := unix.Fchmodat(int(d.Fd()), name, 0o600, 0); err != nil {
		s.Close()
		return nil, err
	}
	s.clients.Go(func() { s.accept(ctx) })
	return s, nil
}

// openPrivate opens a directory that nobody else can write to.
func openPrivate(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(d.Fd()), &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mode&0o022 != 0 || int(st.Uid) != os.Geteuid() && st.Uid != 0 && os.Geteuid() != 0) {
		err = fmt.Errorf("%s is not a directory that belongs to this user alone", dir)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// socketAddr goes through the directory's descriptor: an address has at most 107
// bytes, a path any number.
func socketAddr(dir *os.File, name string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)}
}

func (s *controlServer) accept(ctx context.Context) {
	for {
		c, err := s.listener.AcceptUnix()
		if err != nil {
			return
		}
		s.clients.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			s.serve(ctx, c)
		})
	}
}

func (s *controlServer) serve(ctx context.Context, c *net.UnixConn) {
	peer, err := peerOf(c)
	if err != nil || int(peer.Uid) != os.Geteuid() && peer.Uid != 0 {
		return
	}
	in := bufio.NewScanner(c)
	in.Buffer(nil, controlMaxLine)
	out := json.NewEncoder(c)
	var talk conversation
	defer talk.end()
	for {
		_ = c.SetDeadline(time.Now().Add(controlIdle))
		if !in.Scan() {
			return
		}
		_ = c.SetDeadline(time.Time{})
		r := controlRequest{talk: &talk}
		reply := controlReply{Error: "the request is not a line of JSON"}
		if json.Unmarshal(in.Bytes(), &r) == nil {
			reply = s.answer(ctx, r)
		}
		if ctx.Err() != nil { // the mount ends: its hanging up says so, a half-done answer does not
			return
		}
		_ = c.SetWriteDeadline(time.Now().Add(controlIdle))
		if out.Encode(reply) != nil {
			return
		}
	}
}

// Close ends every conversation and removes the socket.
func (s *controlServer) Close() {
	_ = unix.Unlinkat(int(s.dir.Fd()), s.name, 0)
	s.cancel()
	s.listener.Close()
	s.clients.Wait()
	s.dir.Close()
}

func peerOf(c *net.UnixConn) (peer *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	errCall := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return peer, errors.Join(err, errCall)
}

// runtimeDirs are where a mount's socket may be: in our own runtime directory, or,
// for root, in that of any user.
func runtimeDirs() []string {
	var dirs []string
	if dir, err := config.RuntimeDir(); err == nil {
		dirs = append(dirs, dir)
	}
	if os.Geteuid() == 0 {
		users, _ := filepath.Glob("/run/user/*/kmsfs")
		dirs = append(append(dirs, "/run/kmsfs"), users...)
	}
	return dirs
}

// dialControl connects to the mount of a volume; pid, if not 0, is the process
// that must be at the other end.
func dialControl(id string, pid int) (*net.UnixConn, *unix.Ucred, error) {
	for _, dir := range runtimeDirs() {
		d, err := openPrivate(dir)
		if err != nil {
			continue
		}
		c, err := net.DialUnix("unix", nil, socketAddr(d, id+".sock"))
		d.Close()
		if err != nil {
			continue
		}
		peer, err := peerOf(c)
		if err == nil && (pid == 0 || int(peer.Pid) == pid) {
			return c, peer, nil
		}
		c.Close()
	}
	return nil, nil, errHungUp
}

// request sends one request and waits for the answer.
func request(ctx context.Context, c *net.UnixConn, r controlRequest, wait time.Duration) (controlReply, error) {
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := ctx.Err(); err != nil {
		return controlReply{}, err
	}
	_ = c.SetDeadline(time.Now().Add(wait))
	var reply controlReply
	if err := json.NewEncoder(c).Encode(r); err != nil {
		return reply, fmt.Errorf("asking the live mount: %w", err)
	}
	if err := json.NewDecoder(io.LimitReader(c, controlMaxLine)).Decode(&reply); err != nil {
		return reply, fmt.Errorf("waiting for the live mount's answer: %w", err)
	}
	if !reply.OK {
		return reply, errors.New(reply.Error)
	}
	return reply, nil
}

// holderOf says who has the volume in dir mounted; nil if nobody.
func holderOf(dir string) (*volume.Holder, error) {
	v, err := volume.Open(dir)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	s, err := v.Look()
	return s.Holder, err
}

// here reports whether a holder is a process of this machine.
func here(h *volume.Holder) bool {
	host, _ := os.Hostname()
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return h.Host == host && h.BootID+"\n" == string(boot)
}

// errHungUp: nobody listens, or whoever did is gone; the lock says who has the
// volume now.
var errHungUp = errors.New("its control socket does not answer")

// reloadMounts returns when the live mount of a volume, if there is one, has
// adopted the key list on disk.
func reloadMounts(ctx context.Context, dir, id string, leaving []string) error {
	return askMount(ctx, func() (*volume.Holder, error) { return holderOf(dir) },
		func(h *volume.Holder) error { return reloadMount(ctx, id, h, leaving) })
}

// askMount asks whoever has a volume mounted. A mount that starts has the lock before
// it listens, one that ends stops listening before it lets go of the lock: so it
// tries again while the lock stays with the same process. If nobody has the volume
// mounted, nobody is asked.
func askMount(ctx context.Context, look func() (*volume.Holder, error), ask func(*volume.Holder) error) error {
	var pid int
	var deadline time.Time
	for {
		h, err := look()
		if err != nil || h == nil {
			return err
		}
		if !here(h) {
			return fmt.Errorf("it is mounted by process %d on %s, which can't be told from here", h.PID, h.Host)
		}
		if h.PID != pid {
			pid, deadline = h.PID, time.Now().Add(controlDial)
		}
		err = ask(h)
		if !errors.Is(err, errHungUp) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(controlAgain):
		}
	}
}

func reloadMount(ctx context.Context, id string, h *volume.Holder, leaving []string) error {
	c, err := callMount(ctx, id, h, controlRequest{Op: "reload", Leaving: leaving}, controlReload)
	if err != nil {
		return err
	}
	return c.Close()
}

// callMount connects to a mount and makes a first request.
func callMount(ctx context.Context, id string, h *volume.Holder, r controlRequest, wait time.Duration) (*net.UnixConn, error) {
	c, _, err := dialControl(id, h.PID)
	if err != nil {
		return nil, fmt.Errorf("process %d (%s): %w", h.PID, h.Owner, err)
	}
	_, err = request(ctx, c, r, wait)
	if hungUp(err) && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", errHungUp, err)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("process %d (%s) says: %w", h.PID, h.Owner, err)
	}
	return c, nil
}

func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}
