package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/fsck"
	"kmsfs/headers"
	"kmsfs/keys"
	"kmsfs/volume"
)

type fsckFlags struct {
	keys, accept      []string
	acceptNew, noKeys bool
	data              bool
	repair, cutEnds   bool
	quarantine        string
	jobs              int
	maxRPS            float64
	asJSON            bool
}

// changes reports whether the volume may be changed.
func (f *fsckFlags) changes() bool { return f.repair || f.cutEnds || f.quarantine != "" }

func (p *program) fsckCommand() *cobra.Command {
	var f fsckFlags
	cmd := &cobra.Command{
		Use:   "fsck DIR",
		Short: "Check a volume, and repair what can be repaired without loss",
		Long: `Check the volume in the backing directory DIR. It is never mounted, and nothing is
changed unless --repair, --cut-ends or --quarantine asks for it.

Always: kmsfs.toml and its backup, headers, sizes, stored names, the symlinks that
hold long names, ids that stand twice. With keys: the volume key and settings, names,
directory ids, symlink targets, the users' attributes, and each file's data key
against its commitment (one Decrypt of KMS a file) and its end. With --data: every
block of every file, and holes against their marks. Damage is told by path and by the
range of bytes that can't be read on a mount.

Keys are trusted as by mount. If they can't be had (denied, disabled, unreachable),
that is said, and what needs none is checked; --no-keys does not ask for any.

Beside a live mount a file may be met half-written. What is found is looked for twice,
and what was written in the last minute is marked as busy: run it again.

What to do about damage:
  kmsfs headers import DIR FILE   if headers or directory ids are lost and there is
                                  an export of them
  kmsfs fsck DIR --repair         loses nothing: removes the symlinks of long names
                                  whose entry is gone, writes a missing kmsfs.toml or
                                  kmsfs.toml.bak from the other, gives empty
                                  directories the id that a crash lost
  kmsfs fsck DIR --cut-ends       a file with a bad end is cut back to its last good
                                  block: what stood behind it is LOST, and the file
                                  can be appended to again. On the mount, "truncate"
                                  does the same for one file
  kmsfs fsck DIR --quarantine D   moves files whose header or contents can't be used
                                  into D, a directory beside DIR in its file system:
                                  D/NUMBER/STORED-NAME, with all attributes, listed
                                  in D/` + fsck.ManifestFile + `. Nothing there is overwritten. To
                                  bring one back, rename it to the path that is listed
All three need the volume to be unmounted. The mount stays usable with damaged files
in it: they can be read where they are good, renamed and deleted.

Needs kms:Decrypt. Memory does not grow with the tree; a temporary file (TMPDIR) takes
25 bytes a file and directory, and ids that stand twice, which mean that somebody
copied a file in DIR, are found by sorting it.` + fsckStatuses,
		Args: exactly(1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.fill(cmd, p.cfg); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return p.fsck(ctx, args[0], f)
		},
	}
	f.register(cmd)
	return cmd
}

// fsckStatuses are the statuses of DESIGN 8 in the words of a check.
const fsckStatuses = `

Exit status:
  0  done: no damage, or all of it repaired; what is untidy does not count
  1  usage, configuration or trust
  2  damage was found, and not all of it repaired (whatever else happened)
  3  KMS refused (denied, disabled, not found), so files were not checked
  4  KMS is unavailable, so files were not checked
  5  done in part (interrupted, or files could not be read)
  6  the volume is mounted, and was to be changed`

func (f *fsckFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.BoolVar(&f.data, "data", false, "read and authenticate every block of every file")
	fl.BoolVar(&f.repair, "repair", false, "repair what can be repaired without losing anything")
	fl.BoolVar(&f.cutEnds, "cut-ends", false, "cut bad ends of files back to the last good block, and LOSE what is behind it")
	fl.StringVar(&f.quarantine, "quarantine", "", "move files that can't be used into the directory `D`, outside DIR and in its file system")
	fl.BoolVar(&f.noKeys, "no-keys", false, "check what needs no key, and ask for none")
	fl.StringArrayVar(&f.keys, "key", nil, "trust `KEY` and only those named so; may be repeated")
	fl.BoolVar(&f.acceptNew, "accept-new", false, "trust the keys of a volume that is new to this client, without asking")
	fl.StringArrayVar(&f.accept, "accept-key", nil, "trust `KEY` although it is new in the volume's list; may be repeated")
	fl.IntVar(&f.jobs, "jobs", 0, "check `N` files at a time (rekey.jobs in the configuration)")
	fl.Float64Var(&f.maxRPS, "max-rps", 0, "send at most `N` requests a second to KMS (rekey.max_rps in the configuration)")
	fl.BoolVar(&f.asJSON, "json", false, "report events, one JSON object a line")
}

// fill lays the flags that were given over what the configuration says of rekey,
// which is the same kind of work, and of mount, which asks the same question.
func (f *fsckFlags) fill(cmd *cobra.Command, c *config.Config) error {
	if !cmd.Flags().Changed("jobs") {
		f.jobs = c.Rekey.Jobs
	}
	if !cmd.Flags().Changed("max-rps") {
		f.maxRPS = c.Rekey.MaxRPS
	}
	if !cmd.Flags().Changed("accept-new") {
		f.acceptNew = c.Mount.AcceptNew
	}
	switch {
	case f.jobs < 1 || f.jobs > 1024:
		return usage("--jobs is 1 to 1024, not %d", f.jobs)
	case f.maxRPS < 0:
		return usage("--max-rps can't be negative")
	case f.noKeys && f.data:
		return usage("--data reads contents, which --no-keys rules out")
	case f.noKeys && f.cutEnds:
		return usage("--cut-ends needs keys, to tell a good block from a bad one")
	case f.noKeys && len(f.keys)+len(f.accept) > 0:
		return usage("--no-keys goes without --key and --accept-key")
	}
	return nil
}

func (p *program) fsck(ctx context.Context, dir string, f fsckFlags) error {
	_ = harden() // data keys pass through this process; who mounts is warned of what fails
	show := &fsckShow{program: p, flags: f, dir: dir, pacer: keys.NewPacer(f.maxRPS)}
	v, err := volume.Open(dir)
	if errors.Is(err, crypt.ErrDamaged) {
		err = fail(exitDamaged, "restore kmsfs.toml from a backup; \"kmsfs headers import\" does so if both copies are moved away", "kmsfs.toml and kmsfs.toml.bak can't be used: %w", err)
	}
	if err != nil {
		return show.finish(fsck.Report{}, err)
	}
	defer v.Close()
	report, err := p.check(ctx, v, show, f)
	show.stop()
	return show.finish(report, err)
}

// check opens the volume as far as its keys can be had, and has it checked.
func (p *program) check(ctx context.Context, v *volume.Volume, show *fsckShow, f fsckFlags) (fsck.Report, error) {
	o := fsck.Options{Jobs: f.jobs, Repair: f.repair, Finding: show.finding, Progress: show.progress}
	ring, err := p.fsckKeys(ctx, v, show, f, &o)
	if err != nil {
		return fsck.Report{}, err
	}
	if ring != nil {
		defer ring.Close()
		o.Keys, o.Data, o.CutEnds = ring, f.data, f.cutEnds
	}
	if f.changes() { // nothing is written into a volume before it is trusted, not even a lock
		if err := p.lockUnchanged(ctx, v); err != nil {
			return fsck.Report{}, err
		}
		if ring != nil {
			p.putTailsBack(ctx, v, ring)
		}
	}
	if f.quarantine != "" {
		q, err := fsck.OpenQuarantine(v, f.quarantine)
		if err != nil {
			return fsck.Report{}, refuseQuarantine(err)
		}
		defer q.Close()
		o.Quarantine = q
	}
	if !f.changes() {
		if o.Live, err = p.liveness(v); err != nil {
			return fsck.Report{}, err
		}
	}
	if err := show.begin(ctx, v); err != nil {
		return fsck.Report{}, err
	}
	return fsck.Run(ctx, v, o)
}

// lockUnchanged takes the volume's lock, and finishes what a killed mount had under
// way: that is no damage. Headers must not be judged by a list of keys that was read
// before a rekey.
func (p *program) lockUnchanged(ctx context.Context, v *volume.Volume) error {
	r, err := lockAndReplay(ctx, v, "fsck")
	if err != nil {
		return err
	}
	for _, e := range r.Errs {
		p.warn("a write that the last mount was killed in is not finished: %v", e)
	}
	changed, err := v.Reload()
	if err == nil && changed {
		err = fail(exitPartial, "run the same command again", "the keys of %s were changed just now", v.Path())
	}
	return err
}

// putTailsBack does what the next mount would do: what was synced and torn by a power
// cut is no damage.
func (p *program) putTailsBack(ctx context.Context, v *volume.Volume, ring *keys.Ring) {
	r := v.RecoverTails(ctx, ring.Open)
	for _, ino := range r.Put {
		p.warn("the synced end of inode %d was torn by a power cut and is put back", ino)
	}
	for _, err := range r.Errs {
		p.warn("%v", err)
	}
}

func refuseQuarantine(err error) error {
	if errors.Is(err, fsck.ErrOtherStore) || errors.Is(err, fsck.ErrInside) || errors.Is(err, fsck.ErrNotPrivate) {
		return &failure{status: exitUsage, err: err}
	}
	return fmt.Errorf("opening the quarantine: %w", err)
}

// liveness tells whether somebody has the volume mounted, or had since now.
func (p *program) liveness(v *volume.Volume) (func() bool, error) {
	before, err := v.Look()
	if err != nil {
		return nil, err
	}
	if h := before.Holder; h != nil {
		p.warn("%s is in use by process %d on %s (%s): what is found in files that are being written may be gone in a moment", v.Path(), h.PID, h.Host, h.Owner)
	}
	return func() bool {
		now, err := v.Look()
		return err != nil || now.Holder != nil || now.Session != before.Session
	}, nil
}

// fsckKeys opens the volume as a mount does. nil without an error: the check goes on
// without keys, because that was asked for, because they can't be had, or because the
// volume's key is damaged, which is then a finding.
func (p *program) fsckKeys(ctx context.Context, v *volume.Volume, show *fsckShow, f fsckFlags, o *fsck.Options) (*keys.Ring, error) {
	if f.noKeys {
		return nil, nil
	}
	provider, err := p.pacedProvider(show.pacer)
	if err != nil {
		return nil, err
	}
	ring, err := p.openForFsck(ctx, v, provider, f)
	var refused *failure
	switch {
	case err == nil:
		defer ring.Close()
		return p.fsckRing(provider, v, ring.Trusted()), nil
	case headers.Unreachable(err):
		p.warn("only what needs no key is checked, since the volume's key can't be had: %s", sentence(err))
		show.keyless = err
		return nil, nil
	case errors.As(err, &refused) && refused.status == exitUsage:
		next := "--no-keys checks what needs no key"
		if refused.next != "" {
			next = refused.next + "; or " + next
		}
		return nil, fail(exitUsage, next, "%w", refused.err)
	case errors.Is(err, crypt.ErrDamaged):
		o.VolumeErr = err
		return nil, nil
	}
	return nil, err
}

func (p *program) openForFsck(ctx context.Context, v *volume.Volume, provider keys.Provider, f fsckFlags) (*keys.Ring, error) {
	named, err := p.resolve(ctx, provider, f.keys)
	if err != nil {
		return nil, err
	}
	accept, err := p.resolve(ctx, provider, f.accept)
	if err != nil {
		return nil, err
	}
	ask := trustRequest{Named: named, Accept: accept, AcceptNew: f.acceptNew, Command: func(more ...string) string {
		return commandLine(append([]string{"kmsfs", "fsck", v.Path()}, more...)...)
	}}
	return p.openTrusted(ctx, v, provider, ask)
}

// fsckPatience is how long one data key may take in all. What a request waits for
// its turn counts here; how long KMS may be silent is kms.deadline, as ever.
const fsckPatience = 30 * time.Minute

// fsckRing opens each data key once, so it remembers none; intermediate keys it does.
func (p *program) fsckRing(provider keys.Provider, v *volume.Volume, trusted []string) *keys.Ring {
	s := v.Settings()
	return keys.NewRing(keys.RingOptions{
		Volume: s.ID, BlockLog2: s.BlockLog2(), Shared: s.Shared, Trusted: trusted, Provider: provider,
		Deadline: fsckPatience, CacheKeys: -1, PoolSize: -1,
	})
}

// count is how much there is to do, for the progress bar.
func countFiles(ctx context.Context, v *volume.Volume, data bool) (n int64, err error) {
	err = v.Walk(ctx, func(it *volume.Item) error {
		if !data || it.Err != nil {
			n++
			return nil
		}
		fd, st, err := it.OpenPath()
		if err == nil {
			unix.Close(fd)
			n += crypt.PlainSize(st.Size, v.BlockSize())
		}
		return nil
	})
	return n, err
}
