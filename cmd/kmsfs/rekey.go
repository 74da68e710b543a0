package main

import (
	"context"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"kmsfs/config"
	"kmsfs/keys"
	"kmsfs/rekey"
	"kmsfs/volume"
)

type rekeyFlags struct {
	to, add, remove string
	refresh         bool
	from, via       string
	accept          []string
	verify, prepare bool
	shard           string
	jobs            int
	maxRPS          float64
	dryRun, asJSON  bool
	yes             bool

	action rekey.Action
	key    string // --to, --add or --remove, or --from of a refresh
	part   rekey.Shard
}

func (p *program) rekeyCommand() *cobra.Command {
	var f rekeyFlags
	cmd := &cobra.Command{
		Use:   "rekey DIR --to KEY | --add KEY | --remove KEY | --refresh",
		Short: "Move a volume to another key without touching contents",
		Long: `Change under which keys the data keys of the files in the backing directory DIR
stand. Contents are not touched, and the data keys stay what they are.

  --to KEY      the copy under the old key is replaced by one under KEY
  --add KEY     every file gets a copy under KEY besides; KEY becomes that of new files,
                unless kmsfs.toml lists it already: then what is missing is completed
  --remove KEY  the copy under KEY goes, where another proves to be good; never the last
  --refresh     the copy is wrapped again, by the newest material of the same key

From one region to another in two steps, with a check between them:
  kmsfs rekey DIR --add NEW --verify       then mount and use the tree over there
  kmsfs rekey DIR --remove OLD

The way is chosen from the keys' names, and the plan shows it. Inside a region KMS
does all by ReEncrypt, and no plaintext key leaves it. Between regions a data key is
decrypted in one and encrypted in the other by this process, unless --via names a
multi-Region key with a replica in both: then it is ReEncrypt twice. From a
multi-Region key to its own replica only the label changes.

It is safe to stop at any point and to run again, by several at once too, and works
on a live mount:
  1. the new key goes into kmsfs.toml, in first place
  2. a live mount adopts it
  3. every header is changed, until a full pass finds nothing under the old key
  4. the backing store is synced
  5. only then the old key leaves kmsfs.toml
A file that fails is reported and does not stop the rest; the old key then stays,
and running the same command again goes on.

For many workers: run it once with --prepare (steps 1 and 2), then everywhere with
--shard 1/N to N/N (a part of step 3), then once with neither, which finds what is
left, proves that nothing is, and closes. (A refresh leaves no trace in a header: with
workers it ends with them, and a run without --shard would do everything again.)

What rekey does not do: it never changes a data key. If data keys have leaked, copy
the files on the mount and rename the copies over them. Old headers in backups
still open with the old key.

Needs kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new one; between
regions without --via kms:Decrypt and kms:Encrypt; for --verify kms:Decrypt.` + statuses(0, 1, 2, 3, 4, 5, 6),
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
	f.register(cmd)
	return cmd
}

func (f *rekeyFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.to, "to", "", "move to the new `KEY`")
	fl.StringVar(&f.add, "add", "", "add a copy under `KEY`")
	fl.StringVar(&f.remove, "remove", "", "drop the copies under `KEY`")
	fl.BoolVar(&f.refresh, "refresh", false, "wrap again with the newest key material of the same key")
	fl.StringVar(&f.from, "from", "", "work from the copies under `KEY`, and trust it; needed if there are several")
	fl.StringVar(&f.via, "via", "", "go from region to region by way of the multi-Region `KEY`")
	fl.StringArrayVar(&f.accept, "accept-key", nil, "trust `KEY` although it is new in the volume's list; may be repeated")
	fl.BoolVar(&f.verify, "verify", false, "decrypt every copy under the new key and check it against its file's commitment")
	fl.BoolVar(&f.prepare, "prepare", false, "only put the new key into kmsfs.toml and have live mounts adopt it")
	fl.StringVar(&f.shard, "shard", "", "change only the part `I/N` of the files, I from 1 to N")
	fl.IntVar(&f.jobs, "jobs", 0, "change `N` files at a time")
	fl.Float64Var(&f.maxRPS, "max-rps", 0, "send at most `N` requests a second to KMS; its quota is shared by the whole account")
	fl.BoolVar(&f.dryRun, "dry-run", false, "show the plan and change nothing")
	fl.BoolVar(&f.asJSON, "json", false, "report events, one JSON object a line")
	fl.BoolVar(&f.yes, "yes", false, "do not ask; required without a terminal")
}

func (f *rekeyFlags) fill(cmd *cobra.Command, c config.Rekey) error {
	if !cmd.Flags().Changed("jobs") {
		f.jobs = c.Jobs
	}
	if !cmd.Flags().Changed("max-rps") {
		f.maxRPS = c.MaxRPS
	}
	if !cmd.Flags().Changed("verify") {
		f.verify = c.Verify
	}
	if err := f.choose(); err != nil {
		return err
	}
	switch {
	case f.jobs < 1 || f.jobs > 1024:
		return usage("--jobs is 1 to 1024, not %d", f.jobs)
	case f.maxRPS < 0:
		return usage("--max-rps can't be negative")
	case f.via != "" && f.action != rekey.Move && f.action != rekey.Add:
		return usage("--via goes with --to and --add only")
	case f.shard != "" && f.prepare:
		return usage("--prepare comes once before all workers, --shard is for each of them")
	}
	if f.shard == "" {
		return nil
	}
	var err error
	if f.part, err = rekey.ParseShard(f.shard); err != nil {
		return usage("--shard: %v", err)
	}
	return nil
}

// choose makes one action of four flags.
func (f *rekeyFlags) choose() error {
	chosen := 0
	for action, key := range map[rekey.Action]string{rekey.Move: f.to, rekey.Add: f.add, rekey.Remove: f.remove} {
		if key != "" {
			chosen++
			f.action, f.key = action, key
		}
	}
	if f.refresh {
		chosen++
		f.action, f.key = rekey.Refresh, f.from
	}
	if chosen != 1 {
		return usage("kmsfs rekey wants one of --to KEY, --add KEY, --remove KEY and --refresh")
	}
	return nil
}

// command is this run as a person would repeat it.
func (f *rekeyFlags) command(dir string, more ...string) string {
	args := []string{"kmsfs", "rekey", dir, "--" + f.action.String()}
	if f.action != rekey.Refresh {
		args = append(args, f.key)
	}
	if f.via != "" {
		args = append(args, "--via", f.via)
	}
	return commandLine(append(args, more...)...)
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
	pacer := keys.NewPacer(f.maxRPS)
	provider, err := p.pacedProvider(pacer)
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
	show := &rekeyShow{program: p, flags: f, dir: dir, pacer: pacer}
	rewrapper := newRewrapper(provider, v.ID(), f.via)
	defer rewrapper.Close()
	report, err := rekey.Run(ctx, v, rewrapper, rekey.Options{
		Action: f.action, Key: f.key, From: f.from, Trusted: d.Trusted, Jobs: f.jobs,
		Verify: f.verify, DryRun: f.dryRun, Prepare: f.prepare, Shard: f.part,
		Confirm: func(plan rekey.Plan) error { return show.confirm(plan, f.yes) },
		Event:   show.event,
		Pin:     func(list []string) error { return repin(v, list, d.Trusted, f) },
		Reload: func(ctx context.Context, leaving []string) error {
			return reloadMounts(ctx, dir, v.ID().String(), leaving)
		},
		Watch: func(ctx context.Context) (rekey.Watch, error) { return watchMounts(ctx, dir, v.ID().String()) },
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
	for _, name := range []*string{&f.key, &f.from, &f.via} {
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
	ask := trustRequest{Extra: []string{}, Accept: f.accept, Command: func(more ...string) string { return f.command(dir, more...) }}
	named := []string{f.key, f.from}
	if f.action == rekey.Remove {
		ask.Leaving, named = f.key, named[1:]
	}
	for _, key := range named {
		if key != "" && !slices.Contains(ask.Extra, key) {
			ask.Extra = append(ask.Extra, key)
		}
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
func repin(v *volume.Volume, list, trusted []string, f rekeyFlags) error {
	var keep []string
	for _, k := range list {
		switch {
		case slices.Contains(trusted, k) || f.action != rekey.Remove && (k == f.key || k == f.from):
			keep = append(keep, k)
		case f.action != rekey.Remove || k != f.key: // what is on its way out is not remembered
			return refuse("take it out with \"kmsfs rekey --remove\" and run the same command again", "kmsfs.toml of %s lists the key %s, which this client does not trust", v.Path(), k)
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
		next := r.newPin(keep)
		next.Retired = retire(pins[c.ID], keep)
		pins[c.ID] = *next
		return nil
	})
}
