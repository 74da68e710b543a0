package headers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// A Source is an export that was read to its end once and found whole.
type Source struct {
	file *os.File
	sum  [sha256.Size]byte

	Volume   crypt.VolumeID
	Settings *volume.Settings // of its kmsfs.toml; nothing in them is trusted yet
	Dirs     int              // records
	Files    int
}

// OpenSource opens an export and checks the whole of it: a file that is cut or
// altered is ErrStream. It must be a regular file, because it is read again.
func OpenSource(ctx context.Context, path string) (*Source, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	s := &Source{file: os.NewFile(uintptr(fd), path)}
	if err := s.check(ctx); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

var errNotRegular = errors.New("it is read more than once, so it must be a regular file")

func (s *Source) check(ctx context.Context) error {
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errNotRegular
	}
	r, err := s.read(ctx, func(*Record) error { return nil })
	if err != nil {
		return err
	}
	settings, err := volume.ParseSettings(r.Settings)
	if err != nil {
		return fmt.Errorf("its kmsfs.toml: %w: %w", err, ErrStream)
	}
	if settings.ID != r.Volume {
		return fmt.Errorf("its kmsfs.toml is of another volume: %w", ErrStream)
	}
	s.sum, s.Volume, s.Settings, s.Dirs, s.Files = r.Sum, r.Volume, settings, int(r.Dirs), int(r.Files)
	return nil
}

// read calls f for every record but the volume's.
func (s *Source) read(ctx context.Context, f func(*Record) error) (*Reader, error) {
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	r, err := NewReader(s.file)
	if err != nil {
		return nil, err
	}
	for {
		rec, err := r.Next()
		if err == io.EOF {
			return r, nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = f(rec)
		}
		if err != nil {
			return nil, err
		}
	}
}

// each is read of the same stream as before.
func (s *Source) each(ctx context.Context, f func(*Record) error) error {
	r, err := s.read(ctx, f)
	if err == nil && r.Sum != s.sum {
		err = fmt.Errorf("%s was changed while it was read: %w", s.file.Name(), ErrStream)
	}
	return err
}

// Close closes the file.
func (s *Source) Close() error { return s.file.Close() }
