package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"

	"kmsfs/fsck"
	"kmsfs/keys"
	"kmsfs/volume"
)

// fsckShow tells a person, or a program, how a check goes.
type fsckShow struct {
	*program
	flags   fsckFlags
	dir     string
	pacer   *keys.Pacer
	keyless error // why the volume's key can't be had; nil if it can, or was not wanted

	mu    sync.Mutex
	bar   *progressbar.ProgressBar // guarded by mu; nil without a terminal
	told  time.Time                // guarded by mu; the last progress event
	named int                      // guarded by mu; problems so far
}

func (s *fsckShow) json(v any) { _ = json.NewEncoder(s.out).Encode(v) }

// begin makes the bar, for which the tree is counted first.
func (s *fsckShow) begin(ctx context.Context, v *volume.Volume) error {
	if !isTerminal(s.err) || s.flags.asJSON {
		return nil
	}
	total, err := countFiles(ctx, v, s.flags.data)
	if err != nil {
		return fmt.Errorf("counting the files of %s: %w", s.dir, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	options := []progressbar.Option{progressbar.OptionSetWriter(s.err), progressbar.OptionSetDescription("fsck"),
		progressbar.OptionThrottle(100 * time.Millisecond), progressbar.OptionClearOnFinish()}
	if s.flags.data {
		options = append(options, progressbar.OptionShowBytes(true))
	} else {
		options = append(options, progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("files"))
	}
	s.bar = progressbar.NewOptions64(total, options...)
	return nil
}

// progress moves the bar. A tree that grows must not take it beyond its end.
func (s *fsckShow) progress(files, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bar != nil {
		n := files
		if s.flags.data {
			n = bytes
		}
		_ = s.bar.Set64(min(n, s.bar.GetMax64()))
		return
	}
	if s.flags.asJSON && time.Since(s.told) > progressEvery {
		s.told = time.Now()
		s.json(struct {
			Event     string `json:"event"`
			Files     int64  `json:"files"`
			Bytes     int64  `json:"bytes"`
			Throttled int64  `json:"throttled"`
		}{"progress", files, bytes, s.throttled()})
	}
}

func (s *fsckShow) throttled() (n int64) {
	for _, r := range s.pacer.Stats().Regions {
		n += r.Throttled
	}
	return n
}

// A fsckEvent is one finding, for programs. Paths are text for people: bytes that are
// not UTF-8 don't survive JSON.
type fsckEvent struct {
	Event  string     `json:"event"`
	Kind   fsck.Kind  `json:"kind"`
	Level  fsck.Level `json:"level"`
	Path   string     `json:"path"`
	Stored string     `json:"stored,omitempty"`
	From   *int64     `json:"from,omitempty"`
	To     *int64     `json:"to,omitempty"`
	Error  string     `json:"error"`
	Busy   bool       `json:"busy,omitempty"`
	Did    string     `json:"did,omitempty"`
}

func (s *fsckShow) finding(f fsck.Finding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flags.asJSON {
		e := fsckEvent{Event: "finding", Kind: f.Kind, Level: f.Level, Path: f.Path, Stored: f.Stored, Error: fsckWhy(f), Busy: f.Busy, Did: f.Did}
		if f.Range != nil {
			e.From, e.To = &f.Range.From, &f.Range.To
		}
		s.json(e)
		return
	}
	// What was done is always told, so that nothing is done in silence.
	if s.named++; s.named > maxNamed && f.Did == "" {
		return
	}
	if s.bar != nil {
		_ = s.bar.Clear()
	}
	fmt.Fprintln(s.err, "kmsfs: "+fsckLine(f))
}

// fsckLine is a finding on one line.
func fsckLine(f fsck.Finding) string {
	text := printable(f.Path) + ": " + string(f.Kind)
	if f.Range != nil {
		text += fmt.Sprintf(", bytes %d to %d", f.Range.From, f.Range.To)
	}
	if f.Level != fsck.Damage {
		text += " (" + string(f.Level) + ")"
	}
	text += ": " + fsckWhy(f)
	if f.Busy {
		text += "; it was just being written, so look again later"
	}
	if f.Did != "" {
		text += "; " + f.Did
	}
	return text
}

// fsckWhy says what is wrong, and what to do where that is about a key and not about
// the volume.
func fsckWhy(f fsck.Finding) string {
	if f.Level == fsck.Refused || f.Level == fsck.Unavailable {
		return sentence(f.Err)
	}
	return oneLine(f.Err.Error())
}

func (s *fsckShow) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bar != nil {
		_ = s.bar.Finish()
		s.bar = nil
	}
}

// finish says what was found and done, and decides the status.
func (s *fsckShow) finish(r fsck.Report, err error) error {
	status := s.status(r, err)
	if s.flags.asJSON {
		s.jsonReport(r, err)
	} else if err == nil {
		s.report(r)
	}
	var known *failure
	switch {
	case errors.As(err, &known):
		return err
	case err != nil && r.Damage > 0:
		return fail(exitDamaged, "run it again", "%s has damage (findings so far: %d), and the check did not come to its end: %w", s.dir, r.Damage, err)
	case err != nil:
		return fmt.Errorf("checking %s: %w", s.dir, err)
	case status == nil:
		return nil
	}
	return status
}

// status is the failure that the findings amount to: damage above all, since that is
// what a check is run for.
func (s *fsckShow) status(r fsck.Report, err error) error {
	refused, unavailable := r.Refused, r.Unavailable
	why := r.KeyErr
	if s.keyless != nil {
		why = s.keyless
	}
	switch code, _ := diagnose(why); {
	case err != nil:
		return nil
	case r.Damage > 0:
		return fail(exitDamaged, "\"kmsfs help fsck\" says what can be done about it", "%s has damage that was not repaired (findings: %d)%s", s.dir, r.Damage, s.besides(r))
	case s.keyless != nil:
		return fail(code, "run it again when the keys can be had, or with --no-keys", "the contents of %s were not checked: %w", s.dir, why)
	case refused > 0:
		return fail(exitRefused, "", "the contents of %d files of %s were not checked, since KMS refused%s: %w", refused, s.dir, alsoUnavailable(unavailable), why)
	case unavailable > 0:
		return fail(exitUnavailable, "run it again", "the contents of %d files of %s were not checked, since KMS was unavailable: %w", unavailable, s.dir, why)
	case r.Unread > 0:
		return fail(exitPartial, "run it as root, or as an owner who may read them", "%d places of %s could not be read and were not checked", r.Unread, s.dir)
	}
	return nil
}

func alsoUnavailable(n int64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(", and %d more, since it was unavailable", n)
}

// besides is what was not checked, beside damage.
func (s *fsckShow) besides(r fsck.Report) (text string) {
	if s.keyless != nil {
		text += "; contents were not checked"
	}
	if n := r.Refused + r.Unavailable + r.Unread; n > 0 {
		text += fmt.Sprintf("; %d files were not checked", n)
	}
	return text
}

func (s *fsckShow) report(r fsck.Report) {
	if n := s.named - maxNamed; n > 0 {
		fmt.Fprintf(s.err, "kmsfs: and %d more; --json names all\n", n)
	}
	s.say("checked %s: %d files, %d of them with their key, %d empty; %d directories, %d symlinks, %d others", s.dir, r.Files, r.Opened, r.Empty, r.Dirs, r.Symlinks, r.Others)
	if s.flags.data {
		s.say("  %d bytes of contents are authentic", r.Bytes)
	}
	s.say("  damage: %d, untidy: %d, not checked: %d (%d refused by KMS, %d with KMS unavailable, %d unreadable)", r.Damage, r.Untidy, r.Refused+r.Unavailable+r.Unread, r.Refused, r.Unavailable, r.Unread)
	if r.Repaired+r.Quarantined > 0 {
		s.say("  repaired: %d, moved into quarantine: %d", r.Repaired, r.Quarantined)
	}
	if r.Vanished > 0 {
		s.say("  %d entries were removed or renamed meanwhile, and may not have been checked", r.Vanished)
	}
}

func (s *fsckShow) jsonReport(r fsck.Report, err error) {
	out := struct {
		Event string `json:"event"`
		Done  bool   `json:"done"`
		Keys  bool   `json:"keys"` // contents were checked with keys, as far as they could be had
		fsck.Report
		Error string `json:"error,omitempty"`
	}{"done", err == nil, s.keyless == nil && !s.flags.noKeys, r, ""}
	if err == nil {
		err = s.keyless
	}
	if err != nil {
		out.Error = sentence(err)
	}
	s.json(out)
}
