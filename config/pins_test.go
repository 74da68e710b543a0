package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func pin(path string) Pin {
	return Pin{Path: path, Commitment: "c0", Settings: "d0", Keys: []string{"local:b", "local:a"}}
}

func volumeID(c string) string { return strings.Repeat(c, 32) }

func TestPinsRoundTrip(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kmsfs", "known_volumes.toml")
	pins, err := LoadPins(file)
	require.NoError(t, err)
	require.Empty(t, pins)

	want := pin("/srv/a \"quoted\"")
	want.Retired = []string{"local:old"}
	require.NoError(t, UpdatePins(file, func(p Pins) error { p[volumeID("a")] = want; return nil }))
	require.NoError(t, UpdatePins(file, func(p Pins) error { p[volumeID("b")] = pin("/srv/b"); return nil }))
	pins, err = LoadPins(file)
	require.NoError(t, err)
	require.Equal(t, Pins{volumeID("a"): want, volumeID("b"): pin("/srv/b")}, pins)
	require.Equal(t, volumeID("b"), pins.ByPath("/srv/b"))
	require.Equal(t, "", pins.ByPath("/srv"))

	st, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
}

func TestPinsRefuseWhatTheyDontUnderstand(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"syntax":      {"[volume", "known_volumes.toml:1"},
		"unknown key": {"[volume.\"" + volumeID("a") + "\"]\npath='/x'\ncommitment='c'\nsettings='d'\nkeys=['local:a']\ntrust='all'\n", "unknown key"},
		"no keys":     {"[volume.\"" + volumeID("a") + "\"]\npath='/x'\ncommitment='c'\nsettings='d'\n", "incomplete"},
		"bad id":      {"[volume.zz]\npath='/x'\ncommitment='c'\nsettings='d'\nkeys=['local:a']\n", "incomplete"},
	} {
		t.Run(name, func(t *testing.T) {
			file := write(t, filepath.Join(t.TempDir(), "known_volumes.toml"), tc.text)
			_, err := LoadPins(file)
			require.ErrorContains(t, err, tc.want)
			require.Error(t, UpdatePins(file, func(Pins) error { return nil }))
			got, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, tc.text, string(got), "a damaged file must not be replaced")
		})
	}
}

func TestFailedChangeLeavesPinsAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "known_volumes.toml")
	require.NoError(t, UpdatePins(file, func(p Pins) error { p[volumeID("a")] = pin("/a"); return nil }))
	boom := errors.New("boom")
	require.ErrorIs(t, UpdatePins(file, func(p Pins) error { delete(p, volumeID("a")); return boom }), boom)
	pins, err := LoadPins(file)
	require.NoError(t, err)
	require.Len(t, pins, 1)
}

// Two processes that learn of volumes at once must not forget one another's.
func TestPinsUnderConcurrency(t *testing.T) {
	file := filepath.Join(t.TempDir(), "known_volumes.toml")
	var wg sync.WaitGroup
	for _, c := range "0123456789abcdef" {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := UpdatePins(file, func(p Pins) error { p[volumeID(string(c))] = pin("/" + string(c)); return nil }); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	pins, err := LoadPins(file)
	require.NoError(t, err)
	require.Len(t, pins, 16)
}
