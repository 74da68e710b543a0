package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// harden keeps the memory of a process that holds keys to itself: no core, no
// ptrace by the same user, no swap where the limits allow it, no idle privileges. What could not
// be had is returned as warnings.
func harden() (warnings []string) {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		warnings = append(warnings, fmt.Sprintf("core dumps could not be turned off: %v", err))
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		warnings = append(warnings, fmt.Sprintf("other processes of this user may read this one's memory: %v", err))
	}
	if !confined() {
		warnings = append(warnings, "this process has more privileges than it needs; take capabilities off the program's file (setcap -r)")
	}
	if err := lockMemory(); err != nil {
		warnings = append(warnings, fmt.Sprintf("only the keys themselves are kept out of swap, buffers are not (%v); raise RLIMIT_MEMLOCK or encrypt the swap", err))
	}
	return warnings
}

var errMemlockLimit = errors.New("RLIMIT_MEMLOCK is limited")

// lockMemory locks pages as they are touched (MCL_ONFAULT): Go reserves far more
// address space than it uses. Under a limit, a page that can't be locked would
// make an allocation fail in mid-run, so then it is not tried.
func lockMemory() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err
	}
	if limit.Cur != unix.RLIM_INFINITY {
		return errMemlockLimit
	}
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}

// keysUnlocked is the warning that matters most, once keys exist.
func keysUnlocked() (warning string, bad bool) {
	err := crypt.MemoryLocked()
	if err == nil {
		return "", false
	}
	return fmt.Sprintf("keys in memory may reach swap or a dump: %v; raise RLIMIT_MEMLOCK", err), true
}
