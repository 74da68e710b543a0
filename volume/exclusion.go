package volume

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A JobError says that a job which doesn't go together with ours is under way.
type JobError struct{ Other string }

func (e *JobError) Error() string {
	return fmt.Sprintf("another run is under way on this volume (%s); let it end first", e.Other)
}

// JobFile is where jobs that change headers meet.
const JobFile = "kmsfs.job"

// Join lets jobs of the same kind work on the volume together, on one host or, where
// the file system has locks between hosts, on many; and keeps out those of another
// kind: two that move headers to different keys would undo each other. kind is one
// line. A *JobError tells who is there. leave ends it; the last one takes the file away.
func (v *Volume) Join(kind string) (leave func(), err error) {
	for deadline := time.Now().Add(settingsWait); ; time.Sleep(5 * time.Millisecond) {
		f, err := v.openJob()
		if err != nil {
			return nil, err
		}
		in, err := v.join(f, kind)
		if in {
			return func() { v.leave(f) }, nil
		}
		f.Close()
		if err == nil && time.Now().After(deadline) {
			err = fmt.Errorf("locking %s: %w", JobFile, ErrBusy)
		}
		if err != nil {
			return nil, err
		}
	}
}

func (v *Volume) openJob() (*os.File, error) {
	fd, err := unix.Openat(v.root, JobFile, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening %s in %s: %w", JobFile, v.path, err)
	}
	f := os.NewFile(uintptr(fd), JobFile)
	var st, root unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1 {
		f.Close() // a link planted here would have us write into somebody's file
		return nil, fmt.Errorf("%s in %s is not ours: remove it and try again", JobFile, v.path)
	}
	if unix.Fstat(v.root, &root) == nil {
		_ = f.Chown(int(root.Uid), int(root.Gid)) // made by root, and in the way of the tree's owner
	}
	return f, nil
}

// join takes the lock alone to write the kind down, and shared to stay. Neither an
// error nor in: to be tried again.
func (v *Volume) join(f *os.File, kind string) (in bool, err error) {
	fd := int(f.Fd())
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case err == nil:
		if err := write(f, kind); err != nil {
			return false, fmt.Errorf("writing %s: %w", JobFile, err)
		}
	case err != unix.EWOULDBLOCK && err != unix.EINTR:
		return false, fmt.Errorf("locking %s: %w", JobFile, err)
	}
	// Changing a flock gives it up for a moment (flock(2)): look what is there.
	if unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) != nil || !v.isJob(fd) {
		return false, nil
	}
	there, err := read(f)
	if err != nil || there == kind {
		return err == nil, err
	}
	_ = unix.Flock(fd, unix.LOCK_UN)
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil && there != "" {
		return false, &JobError{there}
	}
	return false, nil // what stands there is nobody's
}

// isJob reports whether the file is still the one that others find.
func (v *Volume) isJob(fd int) bool {
	var st, at unix.Stat_t
	return unix.Fstat(fd, &st) == nil && unix.Fstatat(v.root, JobFile, &at, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Ino == at.Ino && st.Dev == at.Dev
}

// leave gives up the lock. Who is alone then removes the file: whoever has it open
// already will see that it is no longer the one.
func (v *Volume) leave(f *os.File) {
	fd := int(f.Fd())
	if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil && v.isJob(fd) {
		_ = unix.Unlinkat(v.root, JobFile, 0)
	}
	f.Close()
}

func write(f *os.File, kind string) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(kind+"\n"), 0)
	return err
}

func read(f *os.File) (string, error) {
	buf := make([]byte, 4096)
	n, err := f.ReadAt(buf, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return strings.TrimSpace(string(buf[:n])), nil
}
