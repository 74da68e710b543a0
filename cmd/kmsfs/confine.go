package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// A capability that the daemon of root keeps, and what for: what callers of the mount
// may do by their own rights, the daemon does in the backing directory (DESIGN 4.7).
// SECURITY.md has the same list; TestDaemonKeepsFewCapabilities needs each of them.
type capability struct {
	bit  uint
	name string
	why  string
}

var keptCapabilities = []capability{
	{unix.CAP_CHOWN, "CAP_CHOWN", "chown, and giving new files to who made them"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "files of every user, whatever their modes"},
	{unix.CAP_FOWNER, "CAP_FOWNER", "modes, times, ACLs and attributes of every user's files"},
	{unix.CAP_FSETID, "CAP_FSETID", "setgid bits for groups that root is no member of"},
	{unix.CAP_MKNOD, "CAP_MKNOD", "device files"},
	{unix.CAP_SETFCAP, "CAP_SETFCAP", "security.capability"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "mounting, unmounting at a signal, and trusted.* attributes"},
	{unix.CAP_IPC_LOCK, "CAP_IPC_LOCK", "keys in locked memory, beyond RLIMIT_MEMLOCK"},
}

// A capSet is a set of capabilities; bit n is capability n.
type capSet uint64

// capsFor is what a daemon of a user may keep: nothing but for root.
func capsFor(euid int) (set capSet) {
	if euid == 0 {
		for _, c := range keptCapabilities {
			set |= 1 << c.bit
		}
	}
	return set
}

// permitted is what this thread may use.
func permitted() (capSet, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, err
	}
	return capSet(data[0].Permitted) | capSet(data[1].Permitted)<<32, nil
}

func setCaps(set capSet) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		part := uint32(set >> (32 * i))
		data[i] = unix.CapUserData{Effective: part, Permitted: part}
	}
	return unix.Capset(&header, &data[0])
}

// confined reports whether this process has given up what it need not have.
func confined() bool {
	has, err := permitted()
	if err != nil || has&^capsFor(os.Geteuid()) != 0 {
		return false
	}
	if os.Geteuid() != 0 {
		return true
	}
	set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	return err == nil && set == 1
}

// confine takes from this thread, and from what it starts, what a daemon need not have.
// Whatever the thread executes next can't get it back: for root by no_new_privs. Other
// users need fusermount3 to unmount, which is setuid.
func confine() error {
	has, err := permitted()
	if err != nil {
		return err
	}
	keep := capsFor(os.Geteuid()) & has
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if keep&(1<<c) == 0 && os.Geteuid() == 0 {
			// Refused without CAP_SETPCAP; no_new_privs holds all the same.
			_ = unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		}
	}
	if os.Geteuid() == 0 {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
	}
	// A kernel without ambient capabilities (before 4.3) has none to clear.
	_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	return setCaps(keep)
}

// onConfinedThread runs f on a thread that is confined, and that ends with f. A Go
// program can't confine threads that it has already (with cgo, not at all), so f starts
// a program, of which every thread is then confined.
func onConfinedThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		err := confine()
		if err != nil {
			err = fmt.Errorf("giving up privileges: %w", err)
		} else {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// againEnv keeps a program that can't be confined from starting itself for ever: its
// file may give it capabilities (setcap).
const againEnv = "KMSFS_STARTED_AGAIN"

// inForeground makes this process the daemon, confined.
func (p *program) inForeground() error {
	exe, err := self()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	return onConfinedThread(func() error {
		return fmt.Errorf("starting %s again with fewer privileges: %w", exe, syscall.Exec(exe, p.argv(exe), append(os.Environ(), againEnv+"=1")))
	})
}
