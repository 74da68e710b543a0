package headers

import (
	"errors"
	"fmt"
	"io"
	"os"

	"kmsfs/internal/durable"
	"kmsfs/volume"
)

// Saves keep what Force replaces, in a stream of the same form: durable before the
// first header is replaced, and fit to be imported again. They are written while
// planning, in the order of the source, and read in that order while replacing:
// what is replaced must be exactly what was saved.

// newSave starts the stream; nothing has its name before the commit.
func (j *job) newSave() error {
	settings, err := j.v.EncodeSettings()
	if err != nil {
		return err
	}
	f, err := durable.NewFile(j.o.SaveTo, 0o600)
	if err != nil {
		return err
	}
	w, err := NewWriter(f, j.v.ID(), settings)
	if err != nil {
		f.Discard()
		return err
	}
	j.saveFile, j.saves = f, w
	return nil
}

// save keeps a standing header or id.
func (j *job) save(rec *Record) error {
	if j.saves == nil {
		if err := j.newSave(); err != nil {
			return fmt.Errorf("saving what is to be replaced: %w", err)
		}
	}
	if err := j.saves.Write(rec); err != nil {
		return fmt.Errorf("saving what is to be replaced: %w", err)
	}
	return nil
}

// commitSave makes the saves durable under their name.
func (j *job) commitSave() error {
	if j.saves == nil {
		return nil
	}
	err := j.saves.Close()
	f := j.saveFile
	j.saveFile = nil
	if err != nil {
		f.Discard()
	} else {
		err = f.Commit(false)
	}
	if err != nil {
		return fmt.Errorf("saving what is to be replaced: %w", err)
	}
	j.report.Saved = j.o.SaveTo
	return nil
}

// dropSave forgets saves that were not committed.
func (j *job) dropSave() {
	if j.saveFile != nil {
		j.saveFile.Discard()
		j.saveFile = nil
	}
}

// A savedReader hands out saves in their order.
type savedReader struct {
	file *os.File
	r    *Reader
	next *Record // nil at the end
}

// openSaves reads what commitSave made; with nothing saved there is nothing.
func (j *job) openSaves() (*savedReader, error) {
	s := &savedReader{}
	if j.report.Saved == "" {
		return s, nil
	}
	var err error
	if s.file, err = os.Open(j.report.Saved); err != nil {
		return nil, err
	}
	if s.r, err = NewReader(s.file); err == nil {
		err = s.advance()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *savedReader) advance() (err error) {
	s.next, err = s.r.Next()
	if errors.Is(err, io.EOF) {
		s.next, err = nil, nil
	}
	return err
}

// of is what was saved for a record; nil if nothing was.
func (s *savedReader) of(rec *Record) (*Record, error) {
	if s.next == nil || s.next.Kind != rec.Kind || s.next.Path != rec.Path {
		return nil, nil
	}
	saved := s.next
	return saved, s.advance()
}

func (s *savedReader) close() {
	if s.file != nil {
		s.file.Close()
	}
}

// savedSame reports whether what stands is what was saved.
func savedSame(saved *Record, standing []byte) bool {
	return saved != nil && string(saved.Value) == string(standing)
}

var errNotSaved = fmt.Errorf("what stands there is not what was saved: %w", volume.ErrHeaderChanged)
