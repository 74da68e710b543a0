package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"

	"kmsfs/keys"
	"kmsfs/rekey"
)

// rekeyShow tells a person, or a program, how a rekey goes.
type rekeyShow struct {
	*program
	flags rekeyFlags
	dir   string
	pacer *keys.Pacer

	mu    sync.Mutex
	bar   *progressbar.ProgressBar // guarded by mu; nil without a terminal
	total int                      // guarded by mu; files of a pass, by the plan
	done  int                      // guarded by mu; files of this pass
	begun time.Time                // guarded by mu; this pass
	told  time.Time                // guarded by mu; the last progress event
}

// progressEvery is how often --json reports progress.
const progressEvery = time.Second

func (s *rekeyShow) json(v any) { _ = json.NewEncoder(s.out).Encode(v) }

func (s *rekeyShow) plan(plan rekey.Plan) {
	if s.flags.asJSON {
		s.json(struct {
			Event string `json:"event"`
			rekey.Plan
		}{"plan", plan})
		return
	}
	s.say("plan for %s: %d files, %d headers to %s", s.dir, plan.Files, plan.Change, planned(plan))
	for _, key := range slices.Sorted(maps.Keys(plan.Headers)) {
		s.say("  now under %s: %d", key, plan.Headers[key])
	}
	for _, r := range plan.Routes {
		s.say("  %s: %s%s", r.From, way(r), plaintextNote(r.Plaintext))
	}
	for what, n := range map[string]int{"without a valid header": plan.Bad, "under keys that this client does not trust": plan.Strange, "that can't be read, or not be decided about": plan.Failed} {
		if n > 0 {
			s.say("  files %s: %d", what, n)
		}
	}
	if s.flags.prepare {
		s.say("  of this, --prepare does only kmsfs.toml and the volume key now")
	}
	s.say("  KMS requests: %d, about $%.2f", plan.Calls, plan.Price)
}

func way(r rekey.PlanRoute) string {
	if r.Keys == r.Files {
		return fmt.Sprintf("%d files, %s, %d KMS requests a file", r.Files, r.Name, r.Calls)
	}
	return fmt.Sprintf("%d files under %d intermediate keys, %s, %d KMS requests for each of these", r.Files, r.Keys, r.Name, r.Calls)
}

func planned(plan rekey.Plan) string {
	switch plan.Action {
	case rekey.Add:
		return "give a copy under " + plan.Key
	case rekey.Remove:
		return "take out the copy under " + plan.Key + " from"
	case rekey.Refresh:
		return "wrap again by " + plan.Key
	}
	return "move to " + plan.Key
}

func plaintextNote(plaintext bool) string {
	if plaintext {
		return ", data keys pass through this process in plaintext"
	}
	return ""
}

var errDeclined = errors.New("nothing was changed")

func (s *rekeyShow) confirm(plan rekey.Plan, yes bool) error {
	if !yes || s.flags.asJSON {
		s.plan(plan)
	}
	if !yes && !s.program.confirm("Go on?") {
		return errDeclined
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total = plan.Files + plan.Empty
	if isTerminal(s.err) && !s.flags.asJSON && !s.flags.prepare {
		s.bar = progressbar.NewOptions(s.total, progressbar.OptionSetWriter(s.err), progressbar.OptionSetDescription("rekey"),
			progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("files"),
			progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	return nil
}

func (s *rekeyShow) event(e rekey.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e.Kind {
	case "pass":
		s.done, s.begun = 0, time.Now()
		if s.bar != nil {
			s.bar.Reset()
			s.bar.Describe(fmt.Sprintf("rekey, pass %d", e.Pass))
		}
	case "file":
		s.fileLocked(e)
		return
	}
	if s.flags.asJSON {
		s.json(e)
	}
}

// A progress event of --json.
type progress struct {
	Event     string  `json:"event"`
	Pass      int     `json:"pass"`
	Files     int     `json:"files"`
	Total     int     `json:"total"` // by the plan
	Rate      float64 `json:"files_per_second"`
	Throttled int64   `json:"throttled"` // answers of KMS so far
}

func (s *rekeyShow) fileLocked(e rekey.Event) {
	s.done++
	switch {
	case s.flags.asJSON && (e.Outcome == rekey.Bad || e.Outcome == rekey.Strange || e.Outcome == rekey.Failed):
		s.json(struct {
			rekey.Event
			Error string `json:"error"`
		}{e, sentence(e.Err)})
	case s.flags.asJSON && time.Since(s.told) > progressEvery:
		s.told = time.Now()
		s.json(progress{"progress", e.Pass, s.done, s.total, float64(s.done) / max(time.Since(s.begun).Seconds(), 0.001), s.throttled()})
	case s.bar != nil && s.done <= s.total: // a pass may meet more than the plan did
		_ = s.bar.Add(1)
	}
}

func (s *rekeyShow) throttled() (n int64) {
	for _, r := range s.pacer.Stats().Regions {
		n += r.Throttled
	}
	return n
}

func (s *rekeyShow) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bar != nil {
		_ = s.bar.Finish()
	}
}

// finish says what was done, and decides the status.
func (s *rekeyShow) finish(r rekey.Report, err error) error {
	if s.flags.asJSON {
		s.jsonReport(r, err)
	} else {
		s.report(r, err)
	}
	switch {
	case errors.Is(err, errDeclined):
		return fail(exitUsage, "", "the rekey of %s was declined: %w", s.dir, err)
	case err != nil:
		return fmt.Errorf("rekeying %s: %w", s.dir, err)
	case !r.Done:
		return fail(exitPartial, s.mend(r), "%d of the files of %s could not be dealt with", r.Failed, s.dir)
	case r.Strange > 0:
		return fail(exitPartial, "if you trust those keys, move these files with --from KEY; \"kmsfs status\" lists the keys", "%d files of %s are under keys that this client does not trust%s, and were left as they are", r.Strange, s.dir, besides(r.Bad))
	case r.Bad > 0:
		return fail(exitPartial, "restore their headers (kmsfs headers import) or delete those files", "%d files of %s have no valid header and were left as they are", r.Bad, s.dir)
	}
	return nil
}

func besides(bad int) string {
	if bad == 0 {
		return ""
	}
	return fmt.Sprintf(", %d more have no valid header", bad)
}

func every(r rekey.Report) string {
	if n := r.Bad + r.Strange; n > 0 {
		return fmt.Sprintf("every file but %d", n)
	}
	return "every file"
}

// unless is for files whose headers are lost here and may be had elsewhere.
func unless(bad int) string {
	if bad == 0 {
		return ""
	}
	return fmt.Sprintf(", but for an older export of headers to bring back the %d files that have no valid one", bad)
}

// mend is what to do about files that failed.
func (s *rekeyShow) mend(r rekey.Report) string {
	next := "mend what is named above and run the same command again"
	if len(r.Plan.From) > 0 {
		next += "; the old key is still needed"
	}
	return next
}

func (s *rekeyShow) jsonReport(r rekey.Report, err error) {
	out := struct {
		Event     string         `json:"event"`
		Done      bool           `json:"done"`
		Changed   int            `json:"changed"`
		Already   int            `json:"already"`
		Bad       int            `json:"bad"`
		Strange   int            `json:"strange"`
		Failed    int            `json:"failed"`
		Verified  int            `json:"verified"`
		Remaining int            `json:"remaining"`
		Headers   map[string]int `json:"headers,omitempty"`
		Calls     int            `json:"calls"`
		Passes    int            `json:"passes"`
		Retired   []string       `json:"retired_keys,omitempty"`
		Error     string         `json:"error,omitempty"`
	}{"done", r.Done, r.Changed, r.Already, r.Bad, r.Strange, r.Failed, r.Verified, r.Remaining, r.Now.Headers, r.Calls, r.Passes, r.Retired, ""}
	if err != nil {
		out.Error = sentence(err)
	}
	s.json(out)
}

func (s *rekeyShow) report(r rekey.Report, err error) {
	for _, problem := range r.Problems {
		fmt.Fprintf(s.err, "kmsfs: %s: %s: %s\n", printable(problem.Path), problem.Outcome, sentence(problem.Err))
	}
	if n := r.Failed + r.Bad + r.Strange - len(r.Problems); n > 0 {
		fmt.Fprintf(s.err, "kmsfs: and %d more\n", n)
	}
	if r.Passes > 0 {
		s.say("%s %d headers of %s%s with %d KMS requests in %d passes", did[r.Plan.Action], r.Changed, s.dir, target(r.Plan), r.Calls, r.Passes)
	}
	if r.Verified > 0 {
		s.say("verified %d of them and of those that were there before: each opens under %s to the data key its file commits to", r.Verified, r.Plan.Key)
	}
	if err == nil {
		s.conclude(r)
	}
}

var did = map[rekey.Action]string{rekey.Move: "moved", rekey.Add: "added a copy to", rekey.Remove: "took a copy out of", rekey.Refresh: "wrapped again"}

func target(plan rekey.Plan) string {
	switch plan.Action {
	case rekey.Remove:
		return ", that under " + plan.Key + ","
	case rekey.Refresh:
		return " by the newest material of " + plan.Key
	case rekey.Add:
		return " under " + plan.Key
	}
	return " to " + plan.Key
}

// conclude says where the operator stands now.
func (s *rekeyShow) conclude(r rekey.Report) {
	leaving := strings.Join(r.Plan.From, " and ")
	switch {
	case !r.Done && leaving != "":
		s.say("%d headers remain under %s, which this tree still needs", r.Remaining, leaving)
	case !r.Done:
	case s.flags.prepare && r.Plan.Action == rekey.Refresh:
		s.say("prepared: now run the workers with --shard; after them nothing is left to do")
	case s.flags.prepare:
		s.say("prepared: now run the workers with --shard, then this command with neither --prepare nor --shard")
	case s.flags.shard != "" && r.Plan.Action == rekey.Refresh:
		s.say("part %s is done", s.flags.shard)
	case s.flags.shard != "":
		s.say("part %s is done; after all parts, run this command once without --shard", s.flags.shard)
	case len(r.Retired) > 0:
		s.say("this tree no longer needs %s%s; copies of old headers elsewhere, in backups say, still do", strings.Join(r.Retired, " and "), unless(r.Bad))
	case r.Plan.Action == rekey.Add:
		s.say("%s opens under %s now, beside its other keys; new files get a copy under the first key of kmsfs.toml only, so run this again before another key is relied upon", every(r), r.Plan.Key)
	case r.Plan.Action == rekey.Refresh && r.Gone > 0:
		s.say("%d entries were renamed or removed meanwhile and may still be under older material of the same key", r.Gone)
	}
}
