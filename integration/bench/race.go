package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/integration/peers"
)

// An entrant is a file system that takes part in a run.
type entrant struct {
	peer    peers.Peer
	version string
	rounds  int // in which it takes part, from the first on
	m       *peers.Mount
	dead    error // it takes part no more
	idle    int64 // KiB resident after the run
	peak    int64 // KiB resident at most
}

func (e *entrant) short() string { return e.peer.Short }

// A sample is one measurement.
type sample struct{ wall, cpu time.Duration }

// results are the samples by step and entrant, one a round, and what went wrong.
type results struct {
	samples map[string]map[string][]sample
	failed  map[string]map[string]error
}

func newResults() *results {
	return &results{make(map[string]map[string][]sample), make(map[string]map[string]error)}
}

func put[V any](m map[string]map[string]V, step, short string, v V) {
	if m[step] == nil {
		m[step] = make(map[string]V)
	}
	m[step][short] = v
}

// A race measures steps on several file systems, interleaved.
type race struct {
	w        *peers.World
	entrants []*entrant
	rounds   int
	limit    time.Duration // of one step
	job      job           // Dir is set for each
	wanted   func(name string) bool
	cold     coldness
	*results
}

// coldness is what is empty when a step begins.
type coldness string

const (
	// coldMount: nothing is cached by the mount, nor by the kernel for it, for it has
	// just been made. The backing store's cache is as warm as it happens to be, so
	// that it is the file systems that are compared, not the disk.
	coldMount coldness = "mount"
	// coldInodes: the kernel has forgotten all inodes. The process that serves the
	// mount goes on, which is needed where its memory counts.
	coldInodes coldness = "inodes"
	// coldAll: all caches of the machine are empty.
	coldAll coldness = "all"
)

// mount mounts everybody beneath a directory of the world.
func (r *race) mount(under string) error {
	for _, e := range r.entrants {
		m, err := e.peer.Mount(r.w, r.w.Path(under, e.short()), peers.Options{Daemon: true})
		if err != nil && e.essential() {
			return err
		}
		e.m, e.dead = m, err
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s takes no part: %v\n", e.peer.Name, err)
		}
	}
	return nil
}

// end unmounts everybody.
func (r *race) end() (err error) {
	for _, e := range r.entrants {
		if e.m == nil {
			continue
		}
		if e.dead != nil {
			_ = e.m.Kill()
		}
		if eerr := e.m.End(); eerr != nil {
			err = errors.Join(err, eerr, e.m.Kill())
		}
	}
	return err
}

// essential file systems must not fail: without them there is nothing to say.
func (e *entrant) essential() bool {
	switch e.short() {
	case peers.Backing.Short, peers.Loopback.Short, peers.Kmsfs.Short:
		return true
	}
	return false
}

// measure runs all groups in all rounds. Steps are interleaved: each is done on one
// file system after the other, beginning with another one each round.
func (r *race) measure(list []group) error {
	for round := range r.rounds {
		for _, g := range list {
			if !r.wants(g) {
				continue
			}
			if err := r.group(g, round); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *race) wants(g group) bool {
	for _, s := range g.steps {
		if r.wanted(s.name) {
			return true
		}
	}
	return r.wanted(g.name)
}

// taking are those that take part in a round, rotated.
func (r *race) taking(round int) (list []*entrant) {
	for i := range r.entrants {
		e := r.entrants[(i+round)%len(r.entrants)]
		if e.dead == nil && round < e.rounds {
			list = append(list, e)
		}
	}
	return list
}

func (r *race) group(g group, round int) error {
	out := make(map[string]bool) // who failed in this group
	for _, s := range g.steps {
		fmt.Fprintf(os.Stderr, "bench: round %d of %d: %s\n", round+1, r.rounds, s.name)
		for _, e := range r.taking(round) {
			if out[e.short()] || s.slow && !e.fast() {
				continue
			}
			sm, err := r.one(g, s, e)
			if err == nil {
				if r.samples[s.name] == nil {
					r.samples[s.name] = make(map[string][]sample)
				}
				r.samples[s.name][e.short()] = append(r.samples[s.name][e.short()], sm)
				continue
			}
			if e.essential() {
				return fmt.Errorf("%s on %s: %w", s.name, e.peer.Name, err)
			}
			fmt.Fprintf(os.Stderr, "bench: %s on %s: %v\n", s.name, e.peer.Name, err)
			out[e.short()] = true
			put(r.failed, s.name, e.short(), err)
		}
	}
	if g.keeps {
		return nil
	}
	for _, e := range r.taking(round) {
		if err := os.RemoveAll(r.place(g, e)); err != nil && e.essential() {
			return err
		}
	}
	return nil
}

// fast are those that are measured at everything.
func (e *entrant) fast() bool { return e.essential() || strings.HasPrefix(e.short(), "gocryptfs") }

func (r *race) place(g group, e *entrant) string {
	return filepath.Join(e.m.Dir, strings.ReplaceAll(g.name, " ", "-"))
}

// one measures a step on a file system.
func (r *race) one(g group, s step, e *entrant) (sm sample, err error) {
	j := r.job
	j.Dir = r.place(g, e)
	if err := os.MkdirAll(j.Dir, 0o755); err != nil {
		return sm, err
	}
	if s.before != nil {
		if _, err := r.process("before", s, j, e); err != nil {
			return sm, err
		}
	}
	if s.after != nil {
		defer func() {
			_, aerr := r.process("after", s, j, e)
			err = errors.Join(err, aerr)
		}()
	}
	if err := r.cool(s, e); err != nil {
		return sm, err
	}
	if err := s.warm(j); err != nil {
		return sm, err
	}
	before := cpuOf(e.m.PID())
	sm.wall, err = r.process("run", s, j, e)
	sm.cpu = cpuOf(e.m.PID()) - before
	return sm, err
}

// cool writes out what is dirty and makes everything as cold as is wanted.
func (r *race) cool(s step, e *entrant) error {
	if err := syncfs(e.m.Backing); err != nil {
		return err
	}
	switch {
	case s.after != nil:
		return nil // something that has files open is running on it
	case r.cold == coldAll:
		return dropCaches("3")
	case r.cold == coldInodes || !e.fast():
		return dropCaches("2")
	}
	e.remember()
	if err := e.m.Stop(); err != nil {
		return err
	}
	return e.m.Start()
}

// remember notes the memory of the process that serves the mount.
func (e *entrant) remember() {
	now, peak := memoryOf(e.m.PID())
	e.idle, e.peak = now, max(e.peak, peak)
}

// process runs a phase of a step in a process of its own. If it takes too long the
// file system is taken out of the race: it might answer never.
func (r *race) process(phase string, s step, j job, e *entrant) (time.Duration, error) {
	spec, err := json.Marshal(j)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), r.limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "step", phase, s.name, string(spec))
	cmd.Env = r.w.Env
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		e.dead = fmt.Errorf("over %v", r.limit)
		_ = e.m.Kill()
		return unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	if e.dead != nil {
		return 0, e.dead
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	var ns int64
	if phase == "run" {
		if _, err := fmt.Sscan(out.String(), &ns); err != nil {
			return 0, fmt.Errorf("the time of %s: %w", s.name, err)
		}
	}
	return time.Duration(ns), nil
}

// dropCaches empties caches of the kernel; proc_sys_vm(5) says which.
func dropCaches(which string) error {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte(which), 0); err != nil {
		return fmt.Errorf("dropping caches: %w; bench runs as root", err)
	}
	return nil
}

// rest waits until daemons have nothing left to do, and reads their memory.
func (r *race) rest() {
	time.Sleep(restFor)
	for _, e := range r.entrants {
		if e.m != nil && e.dead == nil {
			e.remember()
		}
	}
}
