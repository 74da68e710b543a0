package volume

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestJobsOfOneKindGoTogether(t *testing.T) {
	made, _ := newVolume(t, NamesPlain)
	open := func() *Volume {
		v, err := Open(made.Path())
		require.NoError(t, err)
		t.Cleanup(func() { v.Close() })
		return v
	}
	a, b := open(), open()
	leaveA, err := a.Join("to X")
	require.NoError(t, err)
	leaveB, err := b.Join("to X")
	require.NoError(t, err)
	var other *JobError
	_, err = open().Join("to Y")
	require.ErrorAs(t, err, &other)
	require.Equal(t, "to X", other.Other)
	leaveA()
	_, err = open().Join("to Y")
	require.ErrorAs(t, err, &other, "one of them is still there")
	leaveB()
	require.NoFileExists(t, filepath.Join(made.Path(), JobFile))
	require.NoError(t, os.WriteFile(filepath.Join(made.Path(), JobFile), []byte("to X"), 0o600)) // as a kill leaves it
	leave, err := open().Join("to Y")
	require.NoError(t, err, "what was left in the file is nobody's")
	leave()

	// Many at once: all who are in at a time are of one kind.
	var mu sync.Mutex
	in := map[string]int{}
	var wg sync.WaitGroup
	for i := range 12 {
		kind := []string{"to X", "to Y", "add Z"}[i%3]
		v := open()
		wg.Go(func() {
			for range 50 {
				leave, err := v.Join(kind)
				if errors.As(err, new(*JobError)) || errors.Is(err, ErrBusy) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				in[kind]++
				if in["to X"]+in["to Y"]+in["add Z"] != in[kind] {
					t.Errorf("together: %v", in)
				}
				in[kind]--
				mu.Unlock()
				leave()
			}
		})
	}
	wg.Wait()
}

func TestPlantedJobFile(t *testing.T) {
	v, _ := newVolume(t, NamesPlain)
	victim := filepath.Join(t.TempDir(), "victim")
	require.NoError(t, os.WriteFile(victim, []byte("precious"), 0o600))
	if err := os.Link(victim, filepath.Join(v.Path(), JobFile)); err != nil {
		require.NoError(t, os.Symlink(victim, filepath.Join(v.Path(), JobFile)))
	}
	_, err := v.Join("to X")
	require.Error(t, err)
	kept, err := os.ReadFile(victim)
	require.NoError(t, err)
	require.Equal(t, "precious", string(kept))
}
