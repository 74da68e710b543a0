package posix

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// An actor is a process of its own that does what a scene tells it, call by call: what
// processes do to one another can't be seen in one.
type actor struct {
	s    *stage
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	said chan string // one answer a command; closed when the actor is gone
}

func init() { harness.Helper("actor", act) }

// actor starts one; it leaves with the scene at the latest.
func (s *stage) actor(name string) *actor {
	s.t.Helper()
	a := &actor{s: s, name: name, cmd: s.env.Helper("actor", s.dir), said: make(chan string)}
	in, err := a.cmd.StdinPipe()
	require.NoError(s.t, err)
	out, err := a.cmd.StdoutPipe()
	require.NoError(s.t, err)
	a.in, a.cmd.Stderr = in, os.Stderr
	require.NoError(s.t, a.cmd.Start())
	go func() {
		defer close(a.said)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			a.said <- lines.Text()
		}
	}()
	s.t.Cleanup(func() { a.kill() })
	return a
}

// does has the actor do something and writes down how that ended.
func (a *actor) does(command string, args ...any) {
	a.s.t.Helper()
	a.begins(command, args...)
	a.ends(command, args...)
}

func (a *actor) begins(command string, args ...any) {
	a.s.t.Helper()
	_, err := fmt.Fprintf(a.in, command+"\n", args...)
	require.NoError(a.s.t, err)
}

// ends waits for the answer to what the actor began.
func (a *actor) ends(command string, args ...any) {
	a.s.t.Helper()
	select {
	case answer := <-a.said:
		a.s.say("%s: %s: %s", a.name, fmt.Sprintf(command, args...), answer)
	case <-time.After(time.Minute):
		a.s.t.Fatalf("%s never ends: %s", a.name, fmt.Sprintf(command, args...))
	}
}

// waits has the actor begin what must wait for another one, until the call was seen
// to sleep in the kernel for a while.
func (a *actor) waits(command string, args ...any) {
	a.s.t.Helper()
	a.begins(command, args...)
	what, seen := fmt.Sprintf(command, args...), 0
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		select {
		case answer := <-a.said:
			a.s.t.Fatalf("%s does not wait: %s: %s", a.name, what, answer)
		default:
		}
		if !a.blocked() {
			seen = 0
		} else if seen++; seen == 20 { // a request to a daemon sleeps, too, but not for long
			a.s.say("%s: %s: waits", a.name, what)
			return
		}
	}
	a.s.t.Fatalf("%s neither waits nor ends: %s", a.name, what)
}

// blocked reports whether a thread sleeps in a call that may wait for a lock or lease.
func (a *actor) blocked() bool {
	calls, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", a.cmd.Process.Pid))
	for _, path := range calls {
		state, _ := os.ReadFile(path)
		number, _, _ := strings.Cut(string(state), " ")
		switch n, err := strconv.Atoi(number); {
		case err != nil: // it runs
		case n == unix.SYS_FCNTL, n == unix.SYS_FLOCK, n == unix.SYS_OPENAT:
			return true
		}
	}
	return false
}

// leaves ends the actor as exit(2) does.
func (a *actor) leaves() {
	a.s.t.Helper()
	require.NoError(a.s.t, a.in.Close())
	for range a.said {
	}
	require.NoError(a.s.t, a.cmd.Wait())
	a.s.say("%s has left", a.name)
}

// kill ends the actor in whatever it does.
func (a *actor) kill() {
	if a.cmd.ProcessState != nil {
		return
	}
	_ = a.cmd.Process.Kill()
	for range a.said {
	}
	_ = a.cmd.Wait()
}

// act reads commands and answers each with how its call ended.
func act(args []string) error {
	p := performer{dir: args[0], fds: map[string]int{}}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := strings.Fields(lines.Text())
		do := p.repertoire()[words[0]]
		if do == nil {
			return fmt.Errorf("an actor can't %q", words[0])
		}
		fmt.Println(strings.TrimSpace(do(words[1:])))
	}
	return nil
}

// A performer is the actor's own side: its descriptors by name, and its mapping.
type performer struct {
	dir string
	fds map[string]int
	mem []byte
}

func (p *performer) repertoire() map[string]func(w []string) string {
	return map[string]func(w []string) string{
		"open": p.open, "close": p.close, "dup": p.dup, "lock": p.lock, "ask": p.ask, "flock": p.flock, "lease": p.lease,
		"write": p.write, "map": p.mmap, "load": p.load, "store": p.store, "sync": p.msync, "leased": p.leased,
	}
}

var openModes = map[string]int{"r": unix.O_RDONLY, "w": unix.O_WRONLY, "rw": unix.O_RDWR, "path": unix.O_PATH, "nonblock": unix.O_RDONLY | unix.O_NONBLOCK,
	"nonblock-rw": unix.O_RDWR | unix.O_NONBLOCK}

// open FD FILE MODE. It does not retry: that would hide an interruption.
func (p *performer) open(w []string) string {
	fd, err := unix.Open(filepath.Join(p.dir, w[1]), openModes[w[2]]|unix.O_CLOEXEC, 0)
	if err == nil {
		p.fds[w[0]] = fd
	}
	return errnoOf(err)
}

func (p *performer) close(w []string) string { return errnoOf(unix.Close(p.fds[w[0]])) }

// dup NEW OLD.
func (p *performer) dup(w []string) (answer string) {
	var err error
	p.fds[w[0]], err = unix.Dup(p.fds[w[1]])
	return errnoOf(err)
}

var lockTypes = map[string]int16{"r": unix.F_RDLCK, "w": unix.F_WRLCK, "un": unix.F_UNLCK}

var lockCalls = map[string]int{"posix": unix.F_SETLK, "posix-wait": unix.F_SETLKW, "ofd": unix.F_OFD_SETLK, "ofd-wait": unix.F_OFD_SETLKW}

// lock FD CALL TYPE START LENGTH.
func (p *performer) lock(w []string) string {
	l := unix.Flock_t{Type: lockTypes[w[2]], Start: number(w[3]), Len: number(w[4])}
	return errnoOf(unix.FcntlFlock(uintptr(p.fds[w[0]]), lockCalls[w[1]], &l))
}

// ask FD posix|ofd TYPE START LENGTH says what is in the way.
func (p *performer) ask(w []string) string {
	l := unix.Flock_t{Type: lockTypes[w[2]], Start: number(w[3]), Len: number(w[4])}
	call := map[string]int{"posix": unix.F_GETLK, "ofd": unix.F_OFD_GETLK}[w[1]]
	if err := unix.FcntlFlock(uintptr(p.fds[w[0]]), call, &l); err != nil {
		return errnoOf(err)
	}
	who := "by somebody"
	switch {
	case l.Type == unix.F_UNLCK:
		return "nothing"
	case l.Pid == -1:
		who = "by a description"
	case int(l.Pid) == os.Getppid():
		who = "by the scene"
	}
	return fmt.Sprintf("type %d from %d for %d %s", l.Type, l.Start, l.Len, who)
}

var flockCalls = map[string]int{"shared": unix.LOCK_SH, "exclusive": unix.LOCK_EX, "un": unix.LOCK_UN, "nonsense": 0x40}

// flock FD HOW [wait].
func (p *performer) flock(w []string) string {
	how := flockCalls[w[1]]
	if len(w) < 3 {
		how |= unix.LOCK_NB
	}
	return errnoOf(unix.Flock(p.fds[w[0]], how))
}

// lease FD TYPE. A signal says that it is broken; it must not end the process.
func (p *performer) lease(w []string) string {
	ignoreSignal(unix.SIGIO)
	_, err := unix.FcntlInt(uintptr(p.fds[w[0]]), unix.F_SETLEASE, int(lockTypes[w[1]]))
	return errnoOf(err)
}

// leased FD says what the lease is, or is to become.
func (p *performer) leased(w []string) string {
	kind, err := unix.FcntlInt(uintptr(p.fds[w[0]]), unix.F_GETLEASE, 0)
	return fmt.Sprint(kind, " ", errnoOf(err))
}

// write FD OFFSET TEXT.
func (p *performer) write(w []string) string {
	n, err := unix.Pwrite(p.fds[w[0]], []byte(w[2]), number(w[1]))
	return fmt.Sprint(n, " ", errnoOf(err))
}

// map FD LENGTH.
func (p *performer) mmap(w []string) (answer string) {
	var err error
	p.mem, err = unix.Mmap(p.fds[w[0]], 0, int(number(w[1])), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return errnoOf(err)
}

// load OFFSET LENGTH.
func (p *performer) load(w []string) string {
	return fmt.Sprintf("%q", p.mem[number(w[0]):][:number(w[1])])
}

// store OFFSET TEXT.
func (p *performer) store(w []string) string {
	return fmt.Sprint(copy(p.mem[number(w[0]):], w[1]), " bytes")
}

func (p *performer) msync([]string) string { return errnoOf(unix.Msync(p.mem, unix.MS_SYNC)) }

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		panic(err)
	}
	return n
}
