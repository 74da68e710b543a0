package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"kmsfs/config"
	"kmsfs/keys"
	"kmsfs/rekey"
	"kmsfs/volume"
)

type rekeyFlags struct {
	to, from            string
	accept              []string
	jobs                int
	maxRPS              float64
	dryRun, asJSON, yes bool
}

func (p *program) rekeyCommand() *cobra.Command {
	var f rekeyFlags
	cmd := &cobra.Command{
		Use:   "rekey DIR --to KEY",
		Short: "Move a volume to another key without touching contents",
		Long: `Put the data key of every file in the backing directory DIR under KEY. Contents
are not touched, and the data keys stay what they are: inside one region KMS does it
by ReEncrypt, and no plaintext key ever leaves it.

It is safe to stop at any point and to run again, and works on a live mount:
  1. the new key goes into kmsfs.toml, in first place
  2. a live mount adopts it
  3. every header is moved, until a full pass finds nothing under the old key
  4. the backing store is synced
  5. only then the old key leaves kmsfs.toml
A file that fails is reported and does not stop the rest; the old key then stays,
and running the same command again goes on.

What rekey does not do: it never changes a data key. If data keys have leaked, copy
the files on the mount and rename the copies over them. Old headers in backups
still open with the old key.

Needs kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new one; across
regions, kms:Decrypt and kms:Encrypt.` + statuses(0, 1, 2, 3, 4, 5, 6),
		Args: exactly(1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.fill(cmd, p.cfg.Rekey); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return p.rekey(ctx, args[0], f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.to, "to", "", "the new `KEY`")
	fl.StringVar(&f.from, "from", "", "replace only copies under `KEY`, and trust it; needed if there are several")
	fl.StringArrayVar(&f.accept, "accept-key", nil, "trust `KEY` although it is new in the volume's list; may be repeated")
	fl.IntVar(&f.jobs, "jobs", 0, "move `N` files at a time")
	fl.Float64Var(&f.maxRPS, "max-rps", 0, "send at most `N` requests a second to KMS; its quota is shared by the whole account")
	fl.BoolVar(&f.dryRun, "dry-run", false, "show the plan and change nothing")
	fl.BoolVar(&f.asJSON, "json", false, "report events, one JSON object a line")
	fl.BoolVar(&f.yes, "yes", false, "do not ask; required without a terminal")
	return cmd
}

func (f *rekeyFlags) fill(cmd *cobra.Command, c config.Rekey) error {
	if !cmd.Flags().Changed("jobs") {
		f.jobs = c.Jobs
	}
	if !cmd.Flags().Changed("max-rps") {
		f.maxRPS = c.MaxRPS
	}
	switch {
	case f.to == "":
		return usage("kmsfs rekey wants --to KEY")
	case f.jobs < 1 || f.jobs > 1024:
		return usage("--jobs is 1 to 1024, not %d", f.jobs)
	case f.maxRPS < 0:
		return usage("--max-rps can't be negative")
	}
	return nil
}

func (p *program) rekey(ctx context.Context, dir string, f rekeyFlags) error {
	if !f.dryRun && !f.yes && (!p.tty || f.asJSON) {
		return fail(exitUsage, "look at the plan with --dry-run, then give --yes", "without a terminal kmsfs rekey can't ask whether to go on")
	}
	_ = harden() // data keys may pass through this process; who mounts is warned of what fails
	v, err := volume.Open(dir)
	if err != nil {
		return err
	}
	defer v.Close()
	if text := v.Warning(); text != "" {
		p.warn("%s", text)
	}
	provider, err := p.provider()
	if err != nil {
		return err
	}
	if err := p.rekeyKeys(ctx, provider, &f); err != nil {
		return err
	}
	d, err := p.rekeyTrust(ctx, v, provider, dir, f)
	if err != nil {
		return err
	}
	show := &rekeyShow{program: p, asJSON: f.asJSON, dir: dir}
	report, err := rekey.Run(ctx, v, newRewrapper(provider, v.ID()), rekey.Options{
		To: f.to, From: f.from, Trusted: d.Trusted, Jobs: f.jobs, MaxRPS: f.maxRPS, DryRun: f.dryRun,
		Confirm: func(plan rekey.Plan) error { return show.confirm(plan, f.yes) },
		Event:   show.event,
		Pin:     func(list []string) error { return repin(v, list, slices.Concat(d.Trusted, []string{f.to, f.from})) },
		Reload:  func(ctx context.Context) error { return reloadMounts(ctx, dir, v.ID().String()) },
	})
	show.stop()
	if f.dryRun && err == nil {
		show.plan(report.Plan)
		return nil
	}
	return show.finish(report, err)
}

// rekeyKeys resolves aliases once, so that the volume never depends on one.
func (p *program) rekeyKeys(ctx context.Context, provider keys.Provider, f *rekeyFlags) error {
	for _, name := range []*string{&f.to, &f.from} {
		if *name == "" {
			continue
		}
		list, err := p.resolve(ctx, provider, []string{*name})
		if err != nil {
			return err
		}
		*name = list[0]
	}
	var err error
	f.accept, err = p.resolve(ctx, provider, f.accept)
	return err
}

// rekeyTrust decides which keys a copy may be taken from. It does not open the
// volume key: who moves a tree inside a region need not be able to read it.
func (p *program) rekeyTrust(ctx context.Context, v *volume.Volume, provider keys.Provider, dir string, f rekeyFlags) (verdict, error) {
	ask := trustRequest{Extra: []string{f.to}, Accept: f.accept, Command: func(more ...string) string {
		return commandLine(append([]string{"kmsfs", "rekey", dir, "--to", f.to}, more...)...)
	}}
	if f.from != "" {
		ask.Extra = append(ask.Extra, f.from)
	}
	d, err := p.decide(v, ask)
	if err == nil && !f.dryRun {
		err = p.prove(ctx, v, provider, d)
	}
	return d, err
}

// repin remembers the key list that the volume has now. A key that left it is
// retired: an old copy of kmsfs.toml must not bring it back. The list is read from
// the volume, so a key that was neither judged nor named must not get any further.
func repin(v *volume.Volume, list, trusted []string) error {
	for _, k := range list {
		if !slices.Contains(trusted, k) {
			return refuse("take it out of kmsfs.toml and run the same command again", "kmsfs.toml of %s lists the key %s, which this client does not trust", v.Path(), k)
		}
	}
	c, err := claimOf(v)
	if err != nil {
		return err
	}
	file, err := config.PinsFile()
	if err != nil {
		return err
	}
	return config.UpdatePins(file, func(pins config.Pins) error {
		r := trustRequest{claim: c}
		next := r.newPin(list)
		next.Retired = retire(pins[c.ID], list)
		pins[c.ID] = *next
		return nil
	})
}

// rekeyShow tells a person, or a program, how a rekey goes.
type rekeyShow struct {
	*program
	asJSON bool
	dir    string

	mu   sync.Mutex
	bar  *progressbar.ProgressBar // guarded by mu; nil without a terminal
	done int                      // guarded by mu; files of this pass
	told time.Time                // guarded by mu; of the last progress event
}

// progressEvery is how often --json reports progress.
const progressEvery = time.Second

func (s *rekeyShow) json(v any) { _ = json.NewEncoder(s.out).Encode(v) }

func (s *rekeyShow) plan(plan rekey.Plan) {
	if s.asJSON {
		s.json(struct {
			Event string `json:"event"`
			rekey.Plan
		}{"plan", plan})
		return
	}
	s.say("plan for %s: %d files, %d headers to move to %s", s.dir, plan.Files, plan.Change, plan.To)
	for _, key := range slices.Sorted(maps.Keys(plan.Headers)) {
		s.say("  now under %s: %d", key, plan.Headers[key])
	}
	for _, r := range plan.Routes {
		s.say("  %s: %d files, %s, %d KMS requests a file%s", r.From, r.Files, r.Name, r.Calls, plaintextNote(r.Plaintext))
	}
	if plan.Bad > 0 {
		s.say("  without a header that can be moved: %d", plan.Bad)
	}
	s.say("  KMS requests: %d, about $%.2f", plan.Calls, plan.Price)
}

func plaintextNote(plaintext bool) string {
	if plaintext {
		return ", data keys pass through this process in plaintext"
	}
	return ""
}

var errDeclined = errors.New("nothing was changed")

func (s *rekeyShow) confirm(plan rekey.Plan, yes bool) error {
	if !yes || s.asJSON {
		s.plan(plan)
	}
	if !yes && !s.program.confirm("Go on?") {
		return errDeclined
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if isTerminal(s.err) && !s.asJSON {
		s.bar = progressbar.NewOptions(plan.Files, progressbar.OptionSetWriter(s.err), progressbar.OptionSetDescription("rekey"),
			progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("files"), progressbar.OptionClearOnFinish())
	}
	return nil
}

func (s *rekeyShow) event(e rekey.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e.Kind {
	case "pass":
		s.done = 0
		if s.bar != nil {
			s.bar.Reset()
		}
	case "file":
		s.fileLocked(e)
		return
	}
	if s.asJSON {
		s.json(e)
	}
}

func (s *rekeyShow) fileLocked(e rekey.Event) {
	s.done++
	bad := e.Outcome == rekey.Bad || e.Outcome == rekey.Failed
	switch {
	case s.asJSON && bad:
		s.json(struct {
			rekey.Event
			Error string `json:"error"`
		}{e, sentence(e.Err)})
	case s.asJSON && time.Since(s.told) > progressEvery:
		s.told = time.Now()
		s.json(struct {
			Event string `json:"event"`
			Pass  int    `json:"pass"`
			Files int    `json:"files"`
		}{"progress", e.Pass, s.done})
	case s.bar != nil:
		_ = s.bar.Add(1)
	}
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
	if s.asJSON {
		s.jsonReport(r, err)
	} else {
		s.report(r)
	}
	switch {
	case errors.Is(err, errDeclined):
		return fail(exitUsage, "", "the rekey of %s was declined: %w", s.dir, err)
	case err != nil:
		return fmt.Errorf("rekeying %s: %w", s.dir, err)
	case !r.Done:
		return fail(exitPartial, "mend what is named above and run the same command again; the old key is still needed", "%d of the files of %s could not be moved", r.Failed, s.dir)
	case r.Bad > 0:
		return fail(exitPartial, "restore or delete those files", "%d files of %s have no valid header under a trusted key and were left as they are", r.Bad, s.dir)
	}
	return nil
}

func (s *rekeyShow) jsonReport(r rekey.Report, err error) {
	out := struct {
		Event     string   `json:"event"`
		Done      bool     `json:"done"`
		Rewrapped int      `json:"rewrapped"`
		Already   int      `json:"already"`
		Bad       int      `json:"bad"`
		Failed    int      `json:"failed"`
		Calls     int      `json:"calls"`
		Passes    int      `json:"passes"`
		Retired   []string `json:"retired_keys,omitempty"`
		Error     string   `json:"error,omitempty"`
	}{"done", r.Done, r.Rewrapped, r.Already, r.Bad, r.Failed, r.Calls, r.Passes, r.Retired, ""}
	if err != nil {
		out.Error = sentence(err)
	}
	s.json(out)
}

func (s *rekeyShow) report(r rekey.Report) {
	for _, problem := range r.Problems {
		fmt.Fprintf(s.err, "kmsfs: %s: %s: %s\n", problem.Path, problem.Outcome, sentence(problem.Err))
	}
	if n := r.Failed + r.Bad - len(r.Problems); n > 0 {
		fmt.Fprintf(s.err, "kmsfs: and %d more\n", n)
	}
	if r.Passes > 0 {
		s.say("moved %d headers of %s to %s with %d KMS requests in %d passes", r.Rewrapped, s.dir, r.Plan.To, r.Calls, r.Passes)
	}
	if r.Done && len(r.Retired) > 0 {
		s.say("this tree no longer needs %s; copies of old headers elsewhere, in backups say, still do", strings.Join(r.Retired, " and "))
	}
}
