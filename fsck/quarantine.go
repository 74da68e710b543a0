package fsck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"kmsfs/internal/durable"
	"kmsfs/volume"
)

// What a directory can't be that is to take damaged files.
var (
	// ErrOtherStore: a rename can't lead there.
	ErrOtherStore = errors.New("the quarantine does not lie in the file system of the backing directory, so nothing can be renamed into it")
	// ErrInside: it would be a damaged part of the volume.
	ErrInside = errors.New("the quarantine lies in the backing directory; put it beside it")
	// ErrNotPrivate: somebody else would decide where files go.
	ErrNotPrivate = errors.New("the quarantine belongs to somebody else, or others may write to it: make it mode 0700")
)

// ManifestFile lists what lies in a quarantine, one JSON object a line.
const ManifestFile = "manifest.jsonl"

// A Quarantine is a directory that takes damaged files: each gets a fresh numbered
// directory of its own, so nothing there is ever overwritten, and keeps its stored
// name, its attributes and, if the name is long, the symlink that holds it.
type Quarantine struct {
	fd       int // O_PATH
	manifest *os.File
	next     int
}

// OpenQuarantine opens the directory path, or makes it.
func OpenQuarantine(v *volume.Volume, path string) (*Quarantine, error) {
	if err := checkStore(v, path); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Mkdir(path, 0o700); err != nil && err != unix.EEXIST {
		return nil, &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	// What was opened need not be what was looked at.
	if err = checkStore(v, fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil {
		err = checkPrivate(fd)
	}
	var m *os.File
	if err == nil {
		m, err = openManifest(fd)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Quarantine{fd: fd, manifest: m, next: 1}, nil
}

// checkPrivate refuses a directory that others may write to: they choose where files go.
func checkPrivate(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&0o022 != 0 || int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return ErrNotPrivate
	}
	return nil
}

// openManifest opens the list in the directory fd, which is ours by now, but may have been
// somebody's.
func openManifest(fd int) (*os.File, error) {
	m, err := unix.Openat(fd, ManifestFile, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: ManifestFile, Err: err}
	}
	var st unix.Stat_t
	err = unix.Fstat(m, &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1) {
		err = fmt.Errorf("%s is not ours: remove it and try again", ManifestFile)
	}
	if err != nil {
		unix.Close(m)
		return nil, err
	}
	return os.NewFile(uintptr(m), ManifestFile), nil
}

// checkStore refuses a place before anything is made there.
func checkStore(v *volume.Volume, path string) error {
	place := path
	if _, err := os.Stat(place); errors.Is(err, os.ErrNotExist) {
		place = filepath.Dir(filepath.Clean(path))
	}
	var root, st unix.Stat_t
	if err := unix.Fstat(v.Fd(), &root); err != nil {
		return err
	}
	if err := unix.Stat(place, &st); err != nil {
		return err
	}
	if st.Dev != root.Dev {
		return ErrOtherStore
	}
	real, err := filepath.EvalSymlinks(place)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	for err == nil {
		if err = unix.Stat(real, &st); err == nil && st.Dev == root.Dev && st.Ino == root.Ino {
			return ErrInside
		}
		if real == "/" {
			break
		}
		real = filepath.Dir(real)
	}
	return err
}

// Close closes the quarantine.
func (q *Quarantine) Close() error {
	unix.Close(q.fd)
	return q.manifest.Close()
}

// A manifestLine says what was moved, where to, and why. Plain names stay out of it:
// they are what the volume hides.
type manifestLine struct {
	Time      time.Time `json:"time"`
	Entry     string    `json:"entry"` // in the quarantine
	Stored    string    `json:"stored"`
	StoredRaw []byte    `json:"stored_base64,omitempty"` // if it is not UTF-8
	Kinds     []Kind    `json:"kinds"`
	Failed    string    `json:"failed,omitempty"` // it was not moved after all
}

// take moves an item in; the manifest knows of it before it is moved.
func (q *Quarantine) take(it *volume.Item, why []Kind) (entry string, err error) {
	dir, fd, err := q.place()
	if err != nil {
		return "", fmt.Errorf("making a place in the quarantine: %w", err)
	}
	defer unix.Close(fd)
	line := manifestLine{Time: time.Now().UTC(), Entry: dir + "/" + it.Name, Stored: it.StoredPath(), Kinds: why}
	if !utf8.ValidString(line.Stored) {
		line.StoredRaw = []byte(line.Stored)
	}
	if err := q.note(line); err != nil {
		return "", err
	}
	if err := it.MoveTo(fd); err != nil {
		line.Failed = err.Error()
		return "", errors.Join(err, q.note(line))
	}
	return line.Entry, errors.Join(durable.SyncDir(fd), durable.SyncDir(q.fd))
}

// place makes the next numbered directory.
func (q *Quarantine) place() (name string, fd int, err error) {
	for ; ; q.next++ {
		name = fmt.Sprintf("%06d", q.next)
		if err = unix.Mkdirat(q.fd, name, 0o700); err != unix.EEXIST {
			break
		}
	}
	if err == nil {
		fd, err = unix.Openat(q.fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	return name, fd, err
}

func (q *Quarantine) note(line manifestLine) error {
	raw, err := json.Marshal(line)
	if err == nil {
		_, err = q.manifest.Write(append(raw, '\n'))
	}
	if err == nil {
		err = q.manifest.Sync()
	}
	if err != nil {
		return fmt.Errorf("writing %s of the quarantine: %w", ManifestFile, err)
	}
	return nil
}

// A condemned inode is to go into quarantine under all its names.
type condemned struct {
	size  int64
	kinds []Kind
}

// condemn notes that a file's header or contents can't be used.
func (j *job) condemn(it *volume.Item, w *view) {
	if j.o.Quarantine == nil {
		return
	}
	c := condemned{size: w.st.Size}
	for _, f := range w.found {
		if f.Level != Damage || f.Did != "" {
			continue
		}
		switch f.Kind {
		case Header, Key, End, Data:
			if n := len(c.kinds); n == 0 || c.kinds[n-1] != f.Kind {
				c.kinds = append(c.kinds, f.Kind)
			}
		}
	}
	if len(c.kinds) == 0 {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.doomed[it.Ino] = c
}

// quarantine moves what was condemned, by a walk of its own: all names of an inode go.
func (j *job) quarantine(ctx context.Context) error {
	if len(j.doomed) == 0 {
		return nil
	}
	return j.v.Scan(ctx, func(it *volume.Item) error {
		c, is := j.doomed[it.Ino]
		if !is || it.Err != nil || it.Type != unix.DT_REG {
			return nil
		}
		f := j.finding(it, c.kinds[0], Damage, errors.New("its header or contents can't be used"))
		if err := j.still(it, c); err != nil {
			f.act("", err)
		} else {
			entry, err := j.o.Quarantine.take(it, c.kinds)
			f.act("moved to "+entry, err)
		}
		if f.Did != "" {
			j.count(func(r *Report) { r.Quarantined++ })
		}
		j.moved(f)
		return nil
	})
}

func (j *job) still(it *volume.Item, c condemned) error {
	fd, st, err := it.OpenPath()
	if err != nil {
		return err
	}
	unix.Close(fd)
	if st.Size != c.size {
		return volume.ErrGone
	}
	return nil
}

// moved tells of a move. What is wrong with the file was told and counted before.
func (j *job) moved(f Finding) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.o.Finding(f)
}
