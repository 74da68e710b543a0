package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Go program can't fork. So a mount in the background is this program started
// once more, as the leader of a session of its own, with the write end of a pipe:
// it says one word there when the file system is ready. Until then it has our
// stdin and stderr, so its questions and errors reach the person.
const (
	readyEnv  = "KMSFS_READY_FD"
	readyFD   = 3
	readyWord = "ready"
)

// readyPipe is the pipe to the parent, in a process that was started so.
func readyPipe() (pipe *os.File, daemon bool) {
	if os.Getenv(readyEnv) == "" {
		return nil, false
	}
	os.Unsetenv(readyEnv)
	unix.CloseOnExec(readyFD)
	return os.NewFile(readyFD, "ready"), true
}

// background starts the daemon and waits until it is ready or has failed; its
// message has then been read, and its status becomes ours.
func (p *program) background() error {
	exe, err := self()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("making a pipe to the daemon: %w", err)
	}
	defer r.Close()
	child := exec.Command(exe)
	child.Args = p.argv(exe)
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.ExtraFiles = []*os.File{w}
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d", readyEnv, readyFD))
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = onConfinedThread(child.Start)
	w.Close()
	if err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	defer forwardSignals(child.Process)()
	if word, _ := io.ReadAll(io.LimitReader(r, int64(len(readyWord)))); string(word) == readyWord {
		return nil
	}
	return childStatus(child.Wait())
}

// argv starts this program, the file exe, once more for the same job.
func (p *program) argv(exe string) []string {
	name := os.Args[0]
	if isHelper(name) { // under such a name the arguments would mean something else
		name = exe
	}
	return append([]string{name}, p.args...)
}

// forwardSignals: the daemon is in another session, where Ctrl-C does not reach it.
func forwardSignals(child *os.Process) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		for s := range signals {
			_ = child.Signal(s)
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
	}
}

func childStatus(err error) error {
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() <= 0 {
		return fail(exitMount, "see the log", "the daemon ended before the file system was ready (%v)", err)
	}
	return reported{&failure{status: exit.ExitCode(), err: err}}
}

// detach gives up the terminal and the working directory. What the runtime
// prints when it crashes goes to the log file, if there is one.
func detach(logFile string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("detaching from the terminal: %w", err)
	}
	defer null.Close()
	last := null
	if logFile != "" {
		if last, err = openLogFile(logFile); err != nil {
			return err
		}
		defer last.Close()
	}
	for fd, f := range []*os.File{null, null, last} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("detaching from the terminal: %w", err)
		}
	}
	return os.Chdir("/")
}

// notifyReady tells systemd, if that has started us and asked for it (sd_notify(3)).
func notifyReady() error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	os.Unsetenv("NOTIFY_SOCKET") // what we execute has nothing to say
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err == nil {
		_, err = c.Write([]byte("READY=1"))
		c.Close()
	}
	if err != nil {
		return fmt.Errorf("telling systemd that the mount is ready: %w", err)
	}
	return nil
}
