package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/internal/durable"
	"kmsfs/volume"
)

// A recovery is what a mount found of one that had ended uncleanly.
type recovery struct {
	marker *volume.Marker // nil if it had ended well, and nothing is left from before
	tails  volume.TailRecovery
	ends   volume.EndRecovery
	asked  bool // bad ends were to be left alone
	marked bool // the volume says that it is mounted
}

// recoverPatience is how much time a mount spends in all on keys that it does not get:
// thousands of files may have been changed, and each may cost a whole KMS deadline. What
// it spends on those that it does get is bounded by mount.recover_limit.
const recoverPatience = 30 * time.Second

// A patientOpener opens keys for as long as there is time, and until it has waited for
// too long in vain.
type patientOpener struct {
	open   volume.KeyOpener
	until  time.Time
	each   time.Duration // one call waits no longer
	limit  time.Duration // of what is spent in vain
	mu     sync.Mutex
	vain   time.Duration // guarded by mu; spent on what failed
	gaveUp bool          // guarded by mu
}

func (o *patientOpener) Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	if o.tired() {
		return nil, volume.ErrLater
	}
	start := time.Now()
	call, cancel := context.WithTimeout(ctx, min(o.each, o.until.Sub(start)))
	defer cancel()
	s, err := o.open(call, h)
	if err == nil {
		return s, nil
	}
	if !time.Now().Before(o.until) { // it is not the file's fault
		return nil, volume.ErrLater
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.vain += time.Since(start)
	return nil, err
}

func (o *patientOpener) tired() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.gaveUp = o.gaveUp || o.vain > o.limit || !time.Now().Before(o.until)
	return o.gaveUp
}

// recover puts right what an unclean end left, before the kernel learns any size.
func (m *mounting) recover(ctx context.Context) (err error) {
	m.v.MarkAfter(m.firstMarker())
	m.recovery.marker, err = m.v.Unclean()
	if err != nil { // what it might have led us to cut, fsck can cut
		m.warn("%v; files with bad ends are left alone (kmsfs fsck --data --cut-ends finds them)", err)
		m.log.Warn("files with bad ends are left alone", "err", err)
	}
	limit := time.Duration(m.cfg.Mount.RecoverLimit)
	opener := &patientOpener{open: m.ring.Open, limit: recoverPatience, until: time.Now().Add(limit), each: time.Duration(m.cfg.KMS.Deadline)}
	m.recovery.tails = m.v.RecoverTails(ctx, opener.Open)
	m.logTails(m.recovery.tails)
	defer m.logLeft()
	if m.recovery.marker == nil || m.cfg.Mount.ReadOnly {
		return nil
	}
	m.logUnclean(m.recovery.marker)
	if m.cfg.Mount.NoRecover {
		m.recovery.asked = true
		m.log.Warn("bad ends of files are left alone, as it was asked for")
		return nil
	}
	m.recovery.ends = m.v.RecoverEnds(ctx, m.recovery.marker, opener.Open)
	m.logEnds(m.recovery.ends)
	// What the last mount wrote last may be in memory only: after this nobody looks.
	s, err := m.v.OpenSync()
	if err != nil {
		return err
	}
	defer s.Close()
	return s.Sync()
}

func (m *mounting) logUnclean(u *volume.Marker) {
	if u.Ended {
		m.log.Warn("files that an earlier mount could not look at after an unclean end are looked at", "files", len(u.Left))
		return
	}
	how := "a power cut, or a restart"
	if u.SameBoot() {
		how = "it was killed"
	}
	m.log.Warn("the last mount ended uncleanly", "how", how, "synced", u.Since.Format(time.RFC3339), "left_before", len(u.Left))
}

// logLeft says what is yet to be done, if anything is, and by whom.
func (m *mounting) logLeft() {
	ends, tails := &m.recovery.ends, &m.recovery.tails
	if len(ends.Later) == 0 && tails.Held == 0 {
		return
	}
	next := "unmount and mount again when all keys can be had, or unmount and run kmsfs fsck --data --cut-ends " + quote(m.dir)
	m.warn("%d files were looked at after the unclean end, %d are left: nothing of them is lost, but reading their last block may fail until the next mount looks at them; %s", ends.Looked-ends.Left, len(ends.Later), next)
	m.log.Warn("not all keys could be had to recover from the unclean end; nothing is lost, but reading the last block of the files that are left may fail",
		"recovered", ends.Looked-ends.Left+len(tails.Put), "files_left", len(ends.Later), "tails_left", tails.Held, "limit", time.Duration(m.cfg.Mount.RecoverLimit).String(), "next", next)
}

func (m *mounting) logTails(r volume.TailRecovery) {
	for _, ino := range r.Put {
		m.log.Warn("the synced end of a file was torn and is put back", "inode", ino)
	}
	for _, err := range r.Errs {
		m.warn("%v", err)
		m.log.Warn("an end that was kept is not put back", "err", err)
	}
	if r.Found > 0 {
		m.log.Warn("ends of files were kept when the last mount ended", "found", r.Found, "put_back", len(r.Put), "file_gone", r.Gone, "kept_on", r.Held)
	}
}

func (m *mounting) logEnds(r volume.EndRecovery) {
	for _, c := range r.Cut {
		m.log.Warn("the end of a file did not authenticate and is cut off: what was never synced", "inode", c.Ino, "from", c.From, "to", c.To)
	}
	for _, err := range r.Errs {
		m.log.Warn("a file that was changed before the unclean end could not be put right; kmsfs fsck tells more", "err", err)
	}
	m.log.Warn("files that were changed before the unclean end were looked at", "files", r.Looked, "cut", len(r.Cut), "not_put_right", r.Left)
}

// begin prepares for the next unclean end. A mount can do without.
func (m *mounting) begin() {
	if m.cfg.Mount.ReadOnly {
		return
	}
	var err error
	if m.tails, err = m.v.OpenTails(!m.cfg.Mount.TailSave); err != nil {
		m.warn("a power cut may tear the synced end of a file that grows: %v", err)
		m.log.Warn("the ends of files are not kept", "err", err)
	}
	if m.tails != nil && m.cfg.Mount.TailSave && !m.tails.Keeping() {
		m.warn("a power cut may tear the synced end of a file that grows: too many ends are kept that could not be looked at")
		m.log.Warn("the ends of files are not kept: too many are kept already that could not be looked at", "kept", m.recovery.tails.Held)
	}
	if m.recovery.asked {
		return // the marker that stands is the one to go by
	}
	err = m.v.MarkLeft(time.Now(), m.recovery.ends.Later)
	switch {
	case errors.Is(err, volume.ErrTooManyLeft):
		m.log.Warn("the next mount looks at the same files again", "err", err)
	case err != nil:
		m.log.Warn("after a power cut bad ends of files will be left alone", "err", err)
	}
	m.recovery.marked = err == nil
	if m.recovery.marked {
		m.rememberMarker(m.v.Marked())
	}
}

// markerMemory is where this client remembers the first number of a marker of this volume
// that still counts. A copy of the volume, which has the same id, has markers of its own.
func (m *mounting) markerMemory() (string, error) {
	dir, err := config.StateDir()
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	err = unix.Fstat(m.v.Fd(), &st)
	return filepath.Join(dir, fmt.Sprintf("%v-%x.marker", m.v.ID(), st.Ino)), err
}

// firstMarker is 0 on a client that has not mounted the volume yet.
func (m *mounting) firstMarker() uint64 {
	path, err := m.markerMemory()
	if err != nil {
		return 0
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	first, _ := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return first
}

func (m *mounting) rememberMarker(first uint64) {
	path, err := m.markerMemory()
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = durable.Replace(path, []byte(strconv.FormatUint(first, 10)+"\n"), 0o600)
	}
	if err != nil {
		m.log.Warn("a mark of this mount that somebody puts back later will be believed", "err", err)
	}
}

// synced moves the marker on.
func (m *mounting) synced(since time.Time) {
	if !m.recovery.marked {
		return
	}
	if err := m.v.MarkMounted(since); err != nil {
		m.log.Warn("after a power cut more files than necessary will be looked at", "err", err)
	}
}

// end leaves a clean volume, if all is durable.
func (m *mounting) end() error {
	err := m.tails.Close()
	if err == nil && m.server != nil && m.recovery.marked {
		if bad := m.server.SyncErr(); bad != nil {
			m.log.Warn("the volume is not marked as clean: the next mount looks at what was changed since the last sync that ended well", "err", bad)
			return nil
		}
		if err = m.v.Unmark(); err == nil {
			m.rememberMarker(m.v.Marked())
		}
	}
	if err != nil {
		err = fmt.Errorf("ending the mount: %w", err)
		m.log.Error("the volume is not marked as clean", "err", err)
	}
	return err
}

// recoveryStatus is what status tells of it.
type recoveryStatus struct {
	Unclean *time.Time      `json:"unclean_since,omitempty"` // the last mount ended uncleanly, after this
	PutBack []uint64        `json:"put_back,omitempty"`      // inodes whose synced end was put back
	Cut     []volume.EndCut `json:"cut,omitempty"`           // files whose bad end was cut off
	NotCut  int             `json:"not_put_right,omitempty"` // files that are to be put right yet
	Kept    int64           `json:"tails_kept,omitempty"`    // by this mount so far
}

// recoveryMost bounds the lists, since a reply is one line.
const recoveryMost = 200

func (m *mounting) recoveryStatus() *recoveryStatus {
	r := &m.recovery
	s := &recoveryStatus{Kept: m.tails.Stats().Kept, NotCut: r.ends.Left + r.tails.Held,
		PutBack: r.tails.Put[:min(len(r.tails.Put), recoveryMost)], Cut: r.ends.Cut[:min(len(r.ends.Cut), recoveryMost)]}
	if r.marker != nil && !r.marker.Ended {
		s.Unclean = &r.marker.Since
	}
	return s
}

// show tells a person.
func (s *recoveryStatus) show(p *program) {
	if s == nil || s.Unclean == nil && len(s.PutBack)+len(s.Cut)+s.NotCut == 0 {
		return
	}
	what := "the mount before this one ended uncleanly"
	if s.Unclean == nil {
		what = "an earlier mount ended uncleanly"
	}
	p.say("  %s: %d synced ends put back, %d bad ends cut off, %d files not put right", what, len(s.PutBack), len(s.Cut), s.NotCut)
	for _, ino := range s.PutBack {
		p.say("    inode %d: its synced end was put back", ino)
	}
	for _, c := range s.Cut {
		p.say("    inode %d: cut from %d to %d bytes", c.Ino, c.From, c.To)
	}
}
