package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kmsfs/integration/peers"
	"kmsfs/keys/kmstest"
)

// A kmsCase is a kind of key and how long a call takes; no server for a local key.
type kmsCase struct {
	name  string
	delay time.Duration
	init  []string // further arguments of kmsfs init
	once  bool     // in the first round only
}

// A kmsRow is what was measured in one case.
type kmsRow struct {
	kmsCase
	create, read           []time.Duration
	createCalls, readCalls int // of KMS, in the last round
	live                   [2]map[string]float64
}

const (
	kmsCreate = "create"
	kmsRead   = "tar"
)

// kmsCases are the cases; more are further arguments of kmsfs init to try with
// latency.
func kmsCases(more string) []kmsCase {
	list := []kmsCase{{name: "local key"}, {name: "KMS, 10 ms a call", delay: 10 * time.Millisecond}, {name: "KMS, 25 ms a call", delay: 25 * time.Millisecond, once: true}}
	if more != "" {
		list = append(list, kmsCase{name: "KMS, 10 ms a call, " + more, delay: 10 * time.Millisecond, init: strings.Fields(more)})
	}
	return list
}

// benchKMSLatency creates small files and reads them all cold, in tar's order, with
// keys that are at hand and with keys that are some milliseconds away.
func (b *bench) benchKMSLatency() error {
	srv, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		return err
	}
	defer srv.Close()
	b.w.Env = append(b.w.Env, srv.Env(srv.Admin())...)
	key := srv.CreateKey("us-east-1")
	var rows []*kmsRow
	for _, c := range kmsCases(b.kmsInit) {
		c.init = append(c.init, "--key", b.w.Key)
		if c.delay > 0 {
			c.init[len(c.init)-1] = key
		}
		rows = append(rows, &kmsRow{kmsCase: c})
	}
	for round := range b.rounds {
		for _, row := range rows {
			if row.once && round > 0 {
				continue
			}
			fmt.Fprintf(b.progress, "bench: round %d of %d: small files, %s\n", round+1, b.rounds, row.name)
			if err := b.kmsRound(srv, row); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
		}
	}
	b.report.kms = rows
	return nil
}

func (b *bench) kmsRound(srv *kmstest.Server, row *kmsRow) (err error) {
	defer srv.SetLatency(row.delay)()
	m, err := peers.Kmsfs.Mount(b.w, b.w.Path("kms"), peers.Options{Init: row.init})
	if err != nil {
		return err
	}
	e := &entrant{peer: peers.Kmsfs, m: m, rounds: 1}
	r := b.race([]*entrant{e}, 1)
	r.limit = 20 * time.Minute
	defer func() {
		if eerr := r.end(); err == nil {
			err = eerr
		}
	}()
	g := group{name: "small", steps: kmsSteps}
	one := func(i int, times *[]time.Duration, calls *int) error {
		srv.Reset()
		s, err := r.one(g, g.steps[i], e)
		*times = append(*times, s.wall)
		*calls = srv.Count()
		row.live[i] = liveNumbers(b.w, m.PID())
		return err
	}
	if err := one(0, &row.create, &row.createCalls); err != nil {
		return err
	}
	// A new process knows no key.
	if err := m.Stop(); err != nil {
		return err
	}
	if err := m.Start(); err != nil {
		return err
	}
	return one(1, &row.read, &row.readCalls)
}

var kmsSteps = []step{
	{name: "create", timed: text("create %d files of 2 KiB as above", filesArg), run: create},
	{name: "tar", timed: text("a new mount, cold: tar c of the %d files into a pipe", filesArg),
		run: func(j job) error { return program(j, "sh", "-c", `tar -cf - -C "$0" . | cat >/dev/null`, j.Dir) }},
}

// liveNumbers asks a mount for its status on its control socket, and returns what is
// a number there, by its path in the answer. Without an answer there is none.
func liveNumbers(w *peers.World, pid int) map[string]float64 {
	found, _ := filepath.Glob(w.Path("run", "kmsfs", "*.sock"))
	for _, path := range found {
		c, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			continue // of a mount that has ended
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		var reply map[string]any
		_, err = fmt.Fprintln(c, `{"op":"status"}`)
		if err == nil {
			var line []byte
			if line, err = bufio.NewReader(c).ReadBytes('\n'); err == nil {
				err = json.Unmarshal(line, &reply)
			}
		}
		c.Close()
		if err != nil || reply["pid"] != float64(pid) {
			continue
		}
		for _, no := range []string{"pid", "lease_seconds", "grace_seconds"} { // no counters
			delete(reply, no)
		}
		numbers := make(map[string]float64)
		flatten("", reply, numbers)
		return numbers
	}
	return nil
}

func flatten(path string, v any, into map[string]float64) {
	switch v := v.(type) {
	case float64:
		into[path] = v
	case map[string]any:
		for name, sub := range v {
			flatten(strings.TrimPrefix(path+"."+name, "."), sub, into)
		}
	}
}

// lines are numbers as text, sorted.
func lines(numbers map[string]float64) (list []string) {
	for _, name := range slices.Sorted(maps.Keys(numbers)) {
		list = append(list, fmt.Sprintf("%s %.6g", name, numbers[name]))
	}
	return list
}
