package main

import (
	"context"

	"kmsfs/volume"
)

// lockAndReplay takes the volume's lock for what owner says, and finishes the writes
// that a daemon was killed in. Whoever takes the lock must do so: the slots count for
// the next session only.
func lockAndReplay(ctx context.Context, v *volume.Volume, owner string) (volume.Replay, error) {
	if err := v.Lock(owner); err != nil {
		return volume.Replay{}, err
	}
	return v.ReplaySlots(ctx, volume.SlotDir), nil
}

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
