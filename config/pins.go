package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"kmsfs/internal/durable"
)

// A Pin is what this client remembers of a volume, so that whoever writes the
// backing directory can't change its keys behind the client's back.
type Pin struct {
	Path       string   `toml:"path"`                   // absolute, where it was last seen
	Commitment string   `toml:"commitment"`             // of the volume key, hexadecimal
	Settings   string   `toml:"settings"`               // digest of the settings that never change
	Keys       []string `toml:"keys"`                   // trusted, in order
	Retired    []string `toml:"retired_keys,omitempty"` // never trusted again unless asked for
}

// Pins are the volumes that this client knows, by volume id.
type Pins map[string]Pin

type pinsFile struct {
	Volume Pins `toml:"volume"`
}

const pinsComment = `# Volumes that kmsfs knows on this machine (see "kmsfs help mount"). kmsfs writes
# this file. To forget a volume, delete its section.
`

// ByPath returns the id of the volume that was last seen at path, or "".
func (p Pins) ByPath(path string) string {
	for _, id := range slices.Sorted(maps.Keys(p)) {
		if p[id].Path == path {
			return id
		}
	}
	return ""
}

// PinsFile is the path of known_volumes.toml.
func PinsFile() (string, error) {
	dir, err := StateDir()
	return filepath.Join(dir, "known_volumes.toml"), err
}

// LoadPins reads the pins; there are none if the file does not exist. A damaged
// file is an error and never "no pins": that would trust everything anew.
func LoadPins(file string) (Pins, error) {
	data, err := readFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Pins{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the known volumes: %w", err)
	}
	f := pinsFile{Volume: Pins{}}
	if err := decodeStrict(file, data, &f); err != nil {
		return nil, err
	}
	for id, p := range f.Volume {
		if !isVolumeID(id) || len(p.Keys) == 0 || p.Commitment == "" || p.Settings == "" {
			return nil, fmt.Errorf("%s: the section volume.%q is incomplete; mend it or delete it", file, id)
		}
	}
	return f.Volume, nil
}

// UpdatePins changes the pins under a lock and writes them so that a power cut
// leaves the old file or the new one. It makes the directory, mode 0700.
func UpdatePins(file string, change func(Pins) error) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("remembering the volume: %w", err)
	}
	lock, err := os.OpenFile(file+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("remembering the volume: %w", err)
	}
	defer lock.Close() // and with it goes the lock
	if err := flock(lock); err != nil {
		return fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	pins, err := LoadPins(file)
	if err != nil {
		return err
	}
	if err := change(pins); err != nil {
		return err
	}
	text := bytes.NewBufferString(pinsComment)
	if err := toml.NewEncoder(text).SetArraysMultiline(true).Encode(pinsFile{Volume: pins}); err != nil {
		return fmt.Errorf("remembering the volume: %w", err)
	}
	return durable.Replace(file, text.Bytes(), 0o600)
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
}
