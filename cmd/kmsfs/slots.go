package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// lockAndReplay takes the volume's lock for what owner says, and finishes the writes
// that a daemon was killed in. Whoever takes the lock must do so: the slots count for
// the next session only.
func lockAndReplay(ctx context.Context, v *volume.Volume, owner string) (volume.Replay, error) {
	err := lockAfterUnmount(v, owner)
	if err == nil {
		err = v.CheckUnused(volume.SlotDir)
	}
	if err != nil {
		return volume.Replay{}, err
	}
	return v.ReplaySlots(ctx, volume.SlotDir), nil
}

// lockAfterUnmount waits for a daemon whose mount is gone and that still writes what
// it has: umount(8) does not, and "umount M && mount M" is what people write.
func lockAfterUnmount(v *volume.Volume, owner string) error {
	for deadline := time.Now().Add(controlDial); ; time.Sleep(controlAgain) {
		err := v.Lock(owner)
		var locked *volume.LockedError
		if !errors.As(err, &locked) || !ending(locked) || time.Now().After(deadline) {
			return err
		}
	}
}

// ending says whether the holder is a mount that is not mounted any more, or not yet.
func ending(l *volume.LockedError) bool {
	h := l.Holder
	if h == nil || !here(h) || !strings.HasPrefix(h.Owner, mountOwner) {
		return false
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", h.PID)) // it may have a mount namespace of its own
	if err != nil {
		// A process that is gone has no such file, and one that has ended and was not
		// waited for yet has no mounts to tell of.
		return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ESRCH)
	}
	return !slices.ContainsFunc(parseMountinfo(string(text)), func(m mountEntry) bool {
		return m.isKmsfs() && mountOwner+m.point == h.Owner
	})
}

// mountOwner begins what a mount says that it holds the lock for; its mountpoint
// follows.
const mountOwner = "mount on "

// logReplay says what became of the writes of a mount that was killed.
func (m *mounting) logReplay() {
	r := m.replay
	for _, err := range r.Errs {
		m.warn("a write that the last mount was killed in is not finished: %v", err)
		m.log.Warn("a write that the last mount was killed in is not finished", "err", err)
	}
	if r.Found > 0 {
		m.log.Warn("the last mount was killed; the writes it had under way were looked at",
			"found", r.Found, "finished", r.Finished, "file_gone", r.Gone)
	}
}

// openSlots makes the memory that writes go through. A mount can do without.
func (m *mounting) openSlots() {
	if m.cfg.Mount.ReadOnly {
		return
	}
	s, err := m.v.OpenSlots(volume.SlotDir)
	if err != nil {
		m.warn("a block that is being written when this mount is killed will be unreadable: %v", err)
		m.log.Warn("no shared memory for writes under way: kill -9 may tear blocks", "err", err)
		return
	}
	m.slots = s
}
