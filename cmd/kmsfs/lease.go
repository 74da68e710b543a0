package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"kmsfs/keys"
	"kmsfs/volume"
)

// controlLock is how long a lock may take: dirty pages are written out first.
const controlLock = 30 * time.Second

func (p *program) lockCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "lock MOUNTPOINT",
		Short: "Wipe all data keys of a mount and refuse its files",
		Long: `Close all files of the volume mounted on MOUNTPOINT, open ones and what the kernel
has cached of them too, and wipe their data keys from memory. What programs have
written is written out first. Until "kmsfs unlock" every open, read and write fails
with "Key has been revoked" (EKEYREVOKED), whatever KMS would say; names and
attributes can still be seen. The command returns when no data key is left.` + statuses(0, 1, 6),
		Args: exactly(1, "MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error { return p.tellMount(cmd.Context(), args[0], "lock") },
	}
}

func (p *program) unlockCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unlock MOUNTPOINT",
		Short: "Undo \"kmsfs lock\"",
		Long: `Let the files of the volume mounted on MOUNTPOINT be used again. Open files get
their keys back as KMS allows it, a moment later.` + statuses(0, 1, 6),
		Args: exactly(1, "MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.tellMount(cmd.Context(), args[0], "unlock")
		},
	}
}

// tellMount makes a request of the mount on a mountpoint.
func (p *program) tellMount(ctx context.Context, arg, op string) error {
	point, err := pointPath(arg)
	if err != nil {
		return &failure{status: exitMount, err: err}
	}
	at, err := mountedAt(point)
	if err != nil {
		return err
	}
	if at == nil || !at.isKmsfs() {
		return fail(exitMount, "", "%s is not a kmsfs mountpoint", point)
	}
	v, err := volume.Open(at.source)
	if err != nil {
		return err
	}
	defer v.Close()
	told := false
	err = askMount(ctx, func() (*volume.Holder, error) { return holderOf(at.source) }, func(h *volume.Holder) error {
		c, err := callMount(ctx, v.ID().String(), h, controlRequest{Op: op}, controlLock)
		if err == nil {
			told = true
			err = c.Close()
		}
		return err
	})
	if err == nil && !told {
		err = fmt.Errorf("nobody serves it any more")
	}
	if err != nil {
		return fail(exitMount, "unmount it to wipe its keys (kmsfs umount, or umount -l as root)", "asking the mount on %s to %s: %w", point, op, err)
	}
	return nil
}

// lock answers "kmsfs lock" and "kmsfs unlock".
func (m *mounting) lock(ctx context.Context, locked bool) controlReply {
	if !locked {
		m.ring.Unlock()
		m.log.Info("unlocked on request")
		return controlReply{OK: true}
	}
	m.ring.Lock()
	if err := m.server.Drained(ctx); err != nil {
		return controlReply{Error: sentence(err)}
	}
	m.log.Info("locked on request: no data key is left")
	return controlReply{OK: true}
}

// leaseStatus is what a live mount tells of its leases.
type leaseStatus struct {
	Locked bool          `json:"locked,omitempty"`
	Lease  float64       `json:"lease_seconds,omitempty"`
	Grace  float64       `json:"grace_seconds,omitempty"`
	Leases []leaseReport `json:"leases,omitempty"`
	// Of open files: how many there are, how often one lost its keys, and was allowed
	// to go on.
	OpenFiles int64 `json:"open_files,omitempty"`
	Wiped     int64 `json:"wiped,omitempty"`
	Healed    int64 `json:"healed,omitempty"`

	Cost     *costReport     `json:"key_service,omitempty"`
	Recovery *recoveryStatus `json:"recovery,omitempty"`
}

type leaseReport struct {
	Key       string    `json:"key"`
	State     string    `json:"state"`
	Idle      bool      `json:"idle,omitempty"` // nothing depends on it
	Confirmed time.Time `json:"confirmed"`
	Until     time.Time `json:"until,omitzero"`
	Checks    int64     `json:"checks"`
	Error     string    `json:"error,omitempty"`
}

// leases is the status of this mount.
func (m *mounting) leases() leaseStatus {
	stats := m.server.Stats()
	s := leaseStatus{Locked: m.ring.Locked(),
		Lease: time.Duration(m.cfg.Mount.Lease).Seconds(), Grace: time.Duration(m.cfg.Mount.Grace).Seconds(),
		OpenFiles: stats.OpenFiles, Wiped: stats.Wiped, Healed: stats.Healed, Recovery: m.recoveryStatus()}
	for _, l := range m.ring.Leases() {
		r := leaseReport{Key: l.Key, State: l.State.String(), Idle: l.Idle, Confirmed: l.Confirmed.UTC(), Checks: l.Checks}
		if !l.Until.IsZero() {
			r.Until = l.Until.UTC()
		}
		if l.Err != nil {
			r.Error = sentence(l.Err)
		}
		s.Leases = append(s.Leases, r)
	}
	s.Cost = newCostReport(m.ring.Stats())
	return s
}

// liveLeases asks the mount; nil if there is none, or none that answers this user.
func liveLeases(ctx context.Context, id string, h *volume.Holder) *leaseStatus {
	if h == nil || !here(h) {
		return nil
	}
	c, _, err := dialControl(id, h.PID)
	if err != nil {
		return nil
	}
	defer c.Close()
	r, err := request(ctx, c, controlRequest{Op: "status"}, controlIdle)
	if err != nil || r.Lease == 0 { // what holds the volume is no mount
		return nil
	}
	return &r.leaseStatus
}

// notes is what a person reads of a key's lease.
func (s *leaseStatus) notes(key string) string {
	if s == nil {
		return ""
	}
	for _, l := range s.Leases {
		switch {
		case l.Key != key:
		case l.Idle:
			return "; no file depends on it now"
		case l.Error != "":
			return "; lease " + l.State + ": " + l.Error
		default:
			return fmt.Sprintf("; lease %s, confirmed %s", l.State, l.Confirmed.Format(time.RFC3339))
		}
	}
	return ""
}

// leaseChanged logs what becomes of a lease. The throttle adds the key, its region and
// what to do.
func (m *mounting) leaseChanged(l keys.Lease) {
	switch l.State {
	case keys.LeaseValid:
		m.log.Info("the lease of a key is valid again", "key", l.Key)
	case keys.LeaseGrace:
		m.log.Warn("the lease of a key can't be renewed; files under it go on for the grace period", "lease", "grace", "until", l.Until.Format(time.RFC3339), "err", l.Err)
	case keys.LeaseRevoked:
		m.log.Error("files under a key are closed until its lease is granted again", "lease", "revoked", "err", l.Err)
	}
}

// unmountIdle unmounts when nothing was open or used for as long as limit.
func (m *mounting) unmountIdle(limit time.Duration, done <-chan struct{}) {
	tick := time.NewTicker(min(max(limit/10, 10*time.Millisecond), 10*time.Second))
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		if m.server.IdleFor() < limit {
			continue
		}
		// A path names the topmost mount only: it must not be somebody else's.
		if at, err := mountedAt(m.point); err != nil || at == nil || at.device != m.device {
			continue
		}
		m.log.Info("unmounting: nothing was used for a while", "idle", limit)
		if err := m.server.Unmount(); err != nil {
			m.log.Info("the mount is in use after all", "err", err) // a working directory, say
			m.server.Touch()
		}
	}
}
