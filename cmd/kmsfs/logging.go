package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"log/syslog"
	"os"
	"strings"
	"sync"
	"time"

	"kmsfs/keys"
)

func openLogFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log: %w", err)
	}
	return f, nil
}

// backgroundLog is the log of a daemon: file, or syslog (which the journal reads
// too), or, where there is none, a file beside the pins.
func backgroundLog(file string, level slog.Level) (slog.Handler, func(), error) {
	if file == "" {
		if w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, "kmsfs"); err == nil {
			return newSyslogHandler(w, level), func() { w.Close() }, nil
		}
		var err error
		if file, err = stateLog(); err != nil {
			return nil, nil, fmt.Errorf("finding a place for the log: %w", err)
		}
	}
	f, err := openLogFile(file)
	if err != nil {
		return nil, nil, err
	}
	return slog.NewTextHandler(f, &slog.HandlerOptions{Level: level}), func() { f.Close() }, nil
}

// A syslogHandler writes each record with its own priority.
type syslogHandler struct {
	slog.Handler
	shared *syslogSink
}

type syslogSink struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu; the text handler below writes here
	out syslogWriter
}

// syslogWriter is what is used of *syslog.Writer.
type syslogWriter interface {
	Debug(string) error
	Info(string) error
	Warning(string) error
	Err(string) error
}

func newSyslogHandler(out syslogWriter, level slog.Level) *syslogHandler {
	s := &syslogSink{out: out}
	noTime := func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{} // syslog has its own
		}
		return a
	}
	return &syslogHandler{slog.NewTextHandler(&s.buf, &slog.HandlerOptions{Level: level, ReplaceAttr: noTime}), s}
}

// Handle implements slog.Handler.
func (h *syslogHandler) Handle(ctx context.Context, r slog.Record) error {
	s := h.shared
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buf.Reset()
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	line := strings.TrimSpace(s.buf.String())
	switch {
	case r.Level >= slog.LevelError:
		return s.out.Err(line)
	case r.Level >= slog.LevelWarn:
		return s.out.Warning(line)
	case r.Level >= slog.LevelInfo:
		return s.out.Info(line)
	}
	return s.out.Debug(line)
}

// WithAttrs implements slog.Handler.
func (h *syslogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &syslogHandler{h.Handler.WithAttrs(attrs), h.shared}
}

// WithGroup implements slog.Handler.
func (h *syslogHandler) WithGroup(name string) slog.Handler {
	return &syslogHandler{h.Handler.WithGroup(name), h.shared}
}

// A throttle lets at most one line a minute through for each KMS key and cause: a
// disabled key would otherwise fill the disk, one line a file. It adds to the
// line what a person can do about it.
type throttle struct {
	slog.Handler
	seen *throttleState
}

type throttleState struct {
	mu   sync.Mutex
	last map[throttleKey]*throttleEntry // guarded by mu
	now  func() time.Time
}

type throttleKey struct {
	key  string
	kind keys.Kind
	// lease: it is about all files under the key, not about one request.
	lease bool
}

type throttleEntry struct {
	at      time.Time
	skipped int
}

const throttlePeriod = time.Minute

func newThrottle(h slog.Handler) *throttle {
	return &throttle{h, &throttleState{last: map[throttleKey]*throttleEntry{}, now: time.Now}}
}

// Handle implements slog.Handler.
func (t *throttle) Handle(ctx context.Context, r slog.Record) error {
	e := keyErrorOf(r)
	if e == nil {
		return t.Handler.Handle(ctx, r)
	}
	skipped, show := t.seen.admit(throttleKey{e.Key, e.Kind, aboutLease(r)})
	if !show {
		return nil
	}
	r = r.Clone()
	r.AddAttrs(slog.String("key", e.Key), slog.String("region", e.Region), slog.String("operation", e.Op))
	if e.Action != "" {
		r.AddAttrs(slog.String("action", e.Action))
	}
	if _, next := keyAdvice(e); next != "" {
		r.AddAttrs(slog.String("next", next))
	}
	if skipped > 0 {
		r.AddAttrs(slog.Int("lines_left_out", skipped))
	}
	return t.Handler.Handle(ctx, r)
}

// admit says whether a line may be shown, and how many were not since the last.
func (s *throttleState) admit(k throttleKey) (skipped int, show bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.last[k]
	if e == nil {
		e = &throttleEntry{}
		s.last[k] = e
	} else if s.now().Sub(e.at) < throttlePeriod {
		e.skipped++
		return 0, false
	}
	skipped, e.at, e.skipped = e.skipped, s.now(), 0
	return skipped, true
}

// keyErrorOf finds a key service's failure among the record's attributes.
func keyErrorOf(r slog.Record) (found *keys.Error) {
	r.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok {
			errors.As(err, &found)
		}
		return found == nil
	})
	return found
}

// aboutLease reports whether a record tells that a lease has ended, or may.
func aboutLease(r slog.Record) (is bool) {
	r.Attrs(func(a slog.Attr) bool {
		var ended *keys.LeaseError
		err, isError := a.Value.Any().(error)
		is = is || a.Key == "lease" || isError && errors.As(err, &ended)
		return !is
	})
	return is
}

// WithAttrs implements slog.Handler.
func (t *throttle) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &throttle{t.Handler.WithAttrs(attrs), t.seen}
}

// WithGroup implements slog.Handler.
func (t *throttle) WithGroup(name string) slog.Handler {
	return &throttle{t.Handler.WithGroup(name), t.seen}
}
