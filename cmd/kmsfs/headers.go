package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/time/rate"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/headers"
	"kmsfs/internal/durable"
	"kmsfs/keys"
	"kmsfs/volume"
)

func (p *program) headersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "headers",
		Short: "Keep a volume's headers in a file, and put them back",
		Long: `A file without its header is lost: the header, an extended attribute of the backing
file, holds its wrapped data key. cp without -a, rsync without -X, S3, EFS and
DataSync drop extended attributes, and say nothing. Keep the headers in a file of
their own, beside the backup of the contents:

  kmsfs headers export DIR FILE     after each backup, or before a copy
  kmsfs headers import COPY FILE    into the copy, before it is mounted

FILE holds wrapped keys and stored names only; reading files still takes KMS.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(p.headersExportCommand(), p.headersImportCommand())
	return cmd
}

type exportFlags struct{ force, asJSON bool }

func (p *program) headersExportCommand() *cobra.Command {
	var f exportFlags
	cmd := &cobra.Command{
		Use:   "export DIR FILE",
		Short: "Write a volume's headers to a file; needs no key",
		Long: `Write the header of every file of the backing directory DIR to FILE, with directory
ids, sparse marks and kmsfs.toml: what "kmsfs headers import" needs to make a copy
of the backing directory whole that has lost its extended attributes. No key is
needed and no service is asked; names stay encrypted. FILE is compressed and
checksummed, and appears at its place when it is whole and on disk, with mode 0600.
With - in place of FILE it goes to the standard output.

Not in it: contents, symlinks (which hold names of 176 bytes and more), modes,
owners, ACLs, and the extended attributes of users.

It works on a live mount. But a file that is renamed meanwhile can be missed, and
one that is made afterwards is not in it: export from a quiet tree or from a
snapshot, or right after the contents were copied, and again after each rekey. What
was listed and then gone is counted.

A file with contents and without a valid header is named, and the rest is exported
(status 5): its contents can't be opened any more, unless an older export has it.` + statuses(0, 1, 2, 5, 6),
		Args: exactly(2, "DIR and FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return p.headersExport(ctx, args[0], args[1], f)
		},
	}
	cmd.Flags().BoolVar(&f.force, "force", false, "replace FILE if it is there")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "report events, one JSON object a line")
	return cmd
}

const standardOutput = "-"

func (p *program) headersExport(ctx context.Context, dir, file string, f exportFlags) error {
	v, err := volume.Open(dir)
	if err != nil {
		return err
	}
	defer v.Close()
	if text := v.Warning(); text != "" {
		p.warn("%s", text)
	}
	show := &headersShow{program: p, out: p.out, asJSON: f.asJSON, dir: dir, file: file}
	if file == standardOutput {
		if isTerminal(p.out) {
			return usage("an export is not for a terminal; name a FILE, or redirect the output")
		}
		show.out, show.file = p.err, "the standard output"
		report, err := headers.Export(ctx, v, p.out, show.exported)
		return show.finishExport(report, err)
	}
	if err := checkExportFile(dir, file, f.force); err != nil {
		return err
	}
	report, err := exportTo(ctx, v, file, f.force, show.exported)
	return show.finishExport(report, err)
}

// checkExportFile refuses what would be no backup, or would destroy something,
// before the tree is walked.
func checkExportFile(dir, file string, force bool) error {
	info, err := os.Lstat(file)
	switch {
	case err == nil && !info.Mode().IsRegular():
		return usage("%s is there and not a regular file; name another one", file)
	case err == nil && !force:
		return fail(exitUsage, "name another one, or give --force to replace it", "%s is there already", file)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	root, err := realPath(dir)
	if err != nil {
		return err
	}
	place, err := realPath(filepath.Dir(file))
	if err != nil {
		return err
	}
	if inside(place, root) {
		return usage("%s lies in the backing directory %s and would be a damaged file of the volume; put it somewhere else", file, dir)
	}
	if m, err := mountOf(place); err == nil && m.isKmsfs() && m.source == root {
		return usage("%s lies on the mount of %s, and could not be read when it is needed; put it somewhere else", file, dir)
	}
	return nil
}

func exportTo(ctx context.Context, v *volume.Volume, file string, replace bool, event func(headers.Event)) (headers.ExportReport, error) {
	to, err := durable.NewFile(file, 0o600)
	if err != nil {
		return headers.ExportReport{}, err
	}
	report, err := headers.Export(ctx, v, to, event)
	if err != nil {
		to.Discard()
		return report, err
	}
	return report, to.Commit(replace)
}

// headersShow tells a person, or a program, how an export or an import goes.
type headersShow struct {
	*program
	out       io.Writer // for reports
	asJSON    bool
	dir, file string
	problems  int // named so far
}

// maxNamed bounds the problems that a person is shown.
const maxNamed = 1000

func (s *headersShow) json(v any) { _ = json.NewEncoder(s.out).Encode(v) }

func (s *headersShow) say(format string, args ...any) {
	fmt.Fprint(s.out, harmless(fmt.Sprintf(format, args...))+"\n")
}

// problem names one file or directory that something is wrong with.
func (s *headersShow) problem(e headers.Event) {
	text := string(e.Outcome)
	if e.Err != nil {
		text = sentence(e.Err)
	}
	if s.asJSON {
		s.json(struct {
			Event   string          `json:"event"`
			Path    string          `json:"path"`
			Outcome headers.Outcome `json:"outcome"`
			Error   string          `json:"error"`
		}{kindName(e.Kind), e.Path, e.Outcome, text})
		return
	}
	if s.problems++; s.problems <= maxNamed {
		fmt.Fprintf(s.err, "kmsfs: %s: %s: %s\n", printable(e.Path), e.Outcome, text)
	}
}

func (s *headersShow) more() {
	if n := s.problems - maxNamed; n > 0 {
		fmt.Fprintf(s.err, "kmsfs: and %d more\n", n)
	}
}

func kindName(k headers.Kind) string {
	if k == headers.KindDir {
		return "directory"
	}
	return "file"
}

func (s *headersShow) exported(e headers.Event) {
	if e.Outcome == headers.Bad || e.Outcome == headers.Failed {
		s.problem(e)
	}
}

// finishExport says what was exported, and decides the status.
func (s *headersShow) finishExport(r headers.ExportReport, err error) error {
	bad := 0
	for _, c := range []headers.Counts{r.Files, r.Dirs} {
		bad += c[headers.Bad] + c[headers.Failed]
	}
	if s.asJSON {
		s.jsonExport(r, err)
	}
	if err != nil {
		return fmt.Errorf("exporting the headers of %s: %w", s.dir, err)
	}
	s.more()
	if !s.asJSON {
		s.say("exported the headers of %d files and the ids of %d directories of %s to %s; %d files are empty and have none", r.Files[headers.Exported], r.Dirs[headers.Exported], s.dir, s.file, r.Files[headers.Empty])
	}
	if n := r.Files[headers.Vanished] + r.Dirs[headers.Vanished]; n > 0 {
		s.warn("%d files or directories of %s were deleted or renamed while it was read; those renamed may be missing from %s, so export again when the tree is quieter", n, s.dir, s.file)
	}
	switch {
	case r.Changed:
		return fail(exitPartial, "export again after the rekey", "the keys of %s were changed while it was read, so kmsfs.toml and the headers in %s may not go together", s.dir, s.file)
	case bad > 0:
		return fail(exitPartial, "restore or delete what is named above", "%d files or directories of %s have no valid header or id, or could not be read, and are not in %s; the rest is", bad, s.dir, s.file)
	}
	return nil
}

func (s *headersShow) jsonExport(r headers.ExportReport, err error) {
	out := struct {
		Event   string         `json:"event"`
		Done    bool           `json:"done"`
		Files   headers.Counts `json:"files"`
		Dirs    headers.Counts `json:"directories"`
		Changed bool           `json:"keys_changed"`
		Error   string         `json:"error,omitempty"`
	}{"done", err == nil, r.Files, r.Dirs, r.Changed, ""}
	if err != nil {
		out.Error = sentence(err)
	}
	s.json(out)
}

type importFlags struct {
	keys, accept                  []string
	jobs                          int
	maxRPS                        float64
	acceptNew, verify, noVerify   bool
	force, dryRun, asJSON, answer bool
}

func (p *program) headersImportCommand() *cobra.Command {
	var f importFlags
	cmd := &cobra.Command{
		Use:   "import DIR FILE",
		Short: "Put headers back that a copy has lost",
		Long: `Put back what "kmsfs headers export" wrote to FILE into the backing directory DIR of
the same volume: a copy that lost its extended attributes, say. Files and
directories are found by their stored path, and no symlink is followed.

  1. FILE is read to its end; if it is cut or altered, nothing is done
  2. what would be done is shown, and confirmed (--dry-run ends here)
  3. kmsfs.toml is restored if it and its backup are missing
  4. headers, directory ids and sparse marks are written
  5. the backing store is synced
Status 0 means all five. It is safe to stop at any point and to run it again.

What stands is kept:
  no header, or a malformed one    the header is written
  the same file id                 copies are added that are missing and whose key
                                   kmsfs.toml lists; a retired key's are not
  another valid header             left, and named as a conflict; --force replaces
                                   it, after saving it in FILE.replaced-TIME, which
                                   can be imported like FILE. The volume must not be
                                   mounted then
  an empty file                    needs none

Before a header is put on a file that had none, its data key is opened and a block
of the contents is read: a header that belongs to other contents is refused. If the
keys can't be had (denied, disabled, unreachable), it is written unverified, which
is said; --verify refuses instead, --no-verify asks nobody and needs no trust. A
mount opens nothing but what a trusted key and the commitment confirm.

After it: mount DIR, read what matters, and run "kmsfs headers export" again, which
names every file that is still without a header. Headers from before a rekey are
under the old key: name both keys with --key, and run the rekey again with --from.

Needs kms:Decrypt to verify.` + statuses(0, 1, 2, 3, 4, 5, 6),
		Args: exactly(2, "DIR and FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.fill(cmd, p.cfg); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return p.headersImport(ctx, args[0], args[1], f)
		},
	}
	f.register(cmd)
	return cmd
}

func (f *importFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringArrayVar(&f.keys, "key", nil, "trust `KEY` and only those named so; may be repeated")
	fl.BoolVar(&f.acceptNew, "accept-new", false, "trust the keys of a volume that is new to this client, without asking")
	fl.StringArrayVar(&f.accept, "accept-key", nil, "trust `KEY` although it is new in the volume's list; may be repeated")
	fl.BoolVar(&f.verify, "verify", false, "write no header whose key can't be had")
	fl.BoolVar(&f.noVerify, "no-verify", false, "do not open data keys: ask no key service, and need no trust")
	fl.BoolVar(&f.force, "force", false, "replace other valid headers and directory ids, after saving them")
	fl.IntVar(&f.jobs, "jobs", 0, "handle `N` files at a time (rekey.jobs in the configuration)")
	fl.Float64Var(&f.maxRPS, "max-rps", 0, "send at most `N` requests a second to KMS (rekey.max_rps in the configuration)")
	fl.BoolVar(&f.dryRun, "dry-run", false, "show what would be done and change nothing")
	fl.BoolVar(&f.asJSON, "json", false, "report events, one JSON object a line")
	fl.BoolVar(&f.answer, "yes", false, "do not ask; required without a terminal")
}

// fill lays the flags that were given over what the configuration says of rekey,
// which is the same kind of work, and of mount, which asks the same question.
func (f *importFlags) fill(cmd *cobra.Command, c *config.Config) error {
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
	case f.verify && f.noVerify:
		return usage("--verify and --no-verify exclude each other")
	case f.jobs < 1 || f.jobs > 1024:
		return usage("--jobs is 1 to 1024, not %d", f.jobs)
	case f.maxRPS < 0:
		return usage("--max-rps can't be negative")
	}
	return nil
}

func (p *program) headersImport(ctx context.Context, dir, file string, f importFlags) error {
	_ = harden() // data keys may pass through this process; who mounts is warned of what fails
	src, err := headers.OpenSource(ctx, file)
	if errors.Is(err, headers.ErrStream) {
		return fail(exitDamaged, "nothing was changed; take another copy of it, or an older export", "%w", err)
	}
	if err != nil {
		return err
	}
	defer src.Close()
	v, lost, err := openTarget(dir, src)
	if err != nil {
		return err
	}
	defer v.Close()
	if text := v.Warning(); text != "" {
		p.warn("%s", text)
	}
	if v.ID() != src.Volume {
		return usage("%s is an export of volume %s, and %s is volume %s; name the backing directory that belongs to it", file, src.Volume, dir, v.ID())
	}
	o := headers.Options{
		Require: f.verify, Force: f.force, DryRun: f.dryRun, Lost: lost, Jobs: f.jobs,
		SaveTo: file + ".replaced-" + time.Now().UTC().Format("20060102T150405Z"),
	}
	ring, err := p.importKeys(ctx, v, dir, file, f)
	if err != nil {
		return err
	}
	if ring != nil {
		defer ring.Close()
		o.Keys = limitedKeys{ring, limiter(f.maxRPS)}
	}
	if !f.dryRun {
		leave, err := v.Join("headers import") // a rekey meanwhile could be undone by it
		if err != nil {
			return err
		}
		defer leave()
	}
	show := &headersShow{program: p, out: p.out, asJSON: f.asJSON, dir: dir, file: file}
	o.Confirm = func(plan headers.Report) error { return show.confirm(ctx, v, plan, f.answer) }
	o.Event = func(e headers.Event, planned bool) { show.imported(e, planned && !f.dryRun) }
	report, err := headers.Import(ctx, v, src, o)
	return show.finishImport(report, f.dryRun, err)
}

// openTarget opens the volume that is to be made whole; lost says that it has no
// kmsfs.toml any more.
func openTarget(dir string, src *headers.Source) (v *volume.Volume, lost bool, err error) {
	v, err = volume.Open(dir)
	switch {
	case errors.Is(err, volume.ErrNotVolume):
		v, err = volume.OpenLost(dir, src.Settings)
		return v, err == nil, err
	case errors.Is(err, crypt.ErrDamaged):
		return nil, false, fail(exitDamaged, "move both out of it and run the same command again, which restores them", "kmsfs.toml and kmsfs.toml.bak can't be used: %w", err)
	}
	return v, false, err
}

// importKeys opens the volume as a mount does. nil without an error: the import
// goes on unverified, because that was asked for or because the keys can't be had.
func (p *program) importKeys(ctx context.Context, v *volume.Volume, dir, file string, f importFlags) (*keys.Ring, error) {
	if f.noVerify {
		return nil, nil
	}
	ring, err := p.openForImport(ctx, v, dir, file, f)
	var refused *failure
	switch {
	case err == nil:
		return ring, nil
	case headers.Unreachable(err) && !f.verify:
		p.warn("headers are written without verifying that they belong to the contents: %s", sentence(err))
		return nil, nil
	case errors.As(err, &refused):
		next := "--no-verify imports without asking any key"
		if refused.next != "" {
			next = refused.next + "; or " + next
		}
		return nil, fail(refused.status, next, "%w", refused.err)
	}
	return nil, err
}

func (p *program) openForImport(ctx context.Context, v *volume.Volume, dir, file string, f importFlags) (*keys.Ring, error) {
	provider, err := p.provider()
	if err != nil {
		return nil, err
	}
	named, err := p.resolve(ctx, provider, f.keys)
	if err != nil {
		return nil, err
	}
	accept, err := p.resolve(ctx, provider, f.accept)
	if err != nil {
		return nil, err
	}
	ask := trustRequest{Named: named, Accept: accept, AcceptNew: f.acceptNew, Command: func(more ...string) string {
		return commandLine(append([]string{"kmsfs", "headers", "import", dir, file}, more...)...)
	}}
	return p.openTrusted(ctx, v, provider, ask)
}

func limiter(maxRPS float64) *rate.Limiter {
	if maxRPS > 0 {
		return rate.NewLimiter(rate.Limit(maxRPS), 1)
	}
	return rate.NewLimiter(rate.Inf, 1)
}

// limitedKeys opens at most so many data keys a second: the KMS quota is shared by
// the whole account.
type limitedKeys struct {
	ring  *keys.Ring
	limit *rate.Limiter
}

func (k limitedKeys) Open(ctx context.Context, h *crypt.Header) (*crypt.Secrets, error) {
	if err := k.limit.Wait(ctx); err != nil {
		return nil, err
	}
	return k.ring.Open(ctx, h)
}

// imported names what could not be put back. The plan tells of the same files
// again.
func (s *headersShow) imported(e headers.Event, again bool) {
	switch e.Outcome {
	case headers.Conflict, headers.Mismatch, headers.Foreign, headers.Missing, headers.Failed:
		if !again {
			s.problem(e)
		}
	}
}

// confirm shows the plan, asks, and sees to it that nobody has the files open whose
// header is replaced: what was then written to them would be lost.
func (s *headersShow) confirm(ctx context.Context, v *volume.Volume, plan headers.Report, yes bool) error {
	if !yes && (!s.tty || s.asJSON) {
		return fail(exitUsage, "look at what would be done with --dry-run, then give --yes", "without a terminal kmsfs headers import can't ask whether to go on")
	}
	if s.asJSON {
		s.json(importJSON("plan", plan))
	}
	if !yes {
		s.counts("plan for", plan)
		if !s.program.confirm("Go on?") {
			return errDeclined
		}
	}
	if plan.Files[headers.Replaced]+plan.Dirs[headers.Replaced] > 0 {
		r, err := lockAndReplay(ctx, v, "headers import --force")
		for _, e := range r.Errs {
			s.program.warn("a write that the last mount was killed in is not finished: %v", e)
		}
		return err
	}
	return nil
}

// counts says what was done, or would be.
func (s *headersShow) counts(what string, r headers.Report) {
	s.say("%s %s, from %s", what, s.dir, s.file)
	for _, row := range []struct {
		name string
		c    headers.Counts
	}{{"headers", r.Files}, {"directory ids", r.Dirs}} {
		var parts []string
		for _, out := range slices.Sorted(maps.Keys(row.c)) {
			parts = append(parts, fmt.Sprintf("%d %s", row.c[out], out))
		}
		if len(parts) > 0 {
			s.say("  %s: %s", row.name, strings.Join(parts, ", "))
		}
	}
	if r.Settings {
		s.say("  kmsfs.toml: restored")
	}
	if r.Saved != "" {
		s.say("  what was replaced is kept in %s", r.Saved)
	}
}

// finishImport says what was done, and decides the status.
func (s *headersShow) finishImport(r headers.Report, dryRun bool, err error) error {
	s.more()
	switch {
	case s.asJSON:
		s.jsonImport(r, dryRun, err)
	case dryRun:
		s.counts("plan for", r)
	case err == nil || r.Durable:
		s.counts("put back into", r)
	}
	if r.Unreachable != nil && r.Unverified > 0 {
		s.warn("%d headers were written without verifying that they belong to the contents: %s", r.Unverified, sentence(r.Unreachable))
	}
	var known *failure
	switch {
	case errors.Is(err, errDeclined):
		return fail(exitUsage, "", "the import into %s was declined: %w", s.dir, err)
	case errors.As(err, &known):
		return err
	case err != nil:
		return fmt.Errorf("importing %s into %s: %w", s.file, s.dir, err)
	case r.KeysChanged:
		return fail(exitPartial, "run the rekey again, then the same import", "the keys of %s were changed during the import", s.dir)
	case r.Problems() > 0 && dryRun:
		return fail(exitPartial, "look at what is named above", "%d records of %s could not be put back into %s", r.Problems(), s.file, s.dir)
	case r.Problems() > 0:
		return fail(exitPartial, "look at what is named above", "%d records of %s could not be put back into %s; the rest is there", r.Problems(), s.file, s.dir)
	}
	return nil
}

// An importResult is the report for programs.
type importResult struct {
	Event      string         `json:"event"`
	Done       bool           `json:"done"`
	Files      headers.Counts `json:"files"`
	Dirs       headers.Counts `json:"directories"`
	Settings   bool           `json:"settings_restored"`
	Unverified int            `json:"unverified"`
	Saved      string         `json:"saved,omitempty"`
	Durable    bool           `json:"durable"`
	Error      string         `json:"error,omitempty"`
}

func importJSON(event string, r headers.Report) importResult {
	return importResult{Event: event, Files: r.Files, Dirs: r.Dirs, Settings: r.Settings, Unverified: r.Unverified, Saved: r.Saved, Durable: r.Durable}
}

func (s *headersShow) jsonImport(r headers.Report, dryRun bool, err error) {
	if dryRun && err == nil {
		s.json(importJSON("plan", r))
		return
	}
	out := importJSON("done", r)
	out.Done = err == nil && r.Problems() == 0
	if err != nil {
		out.Error = sentence(err)
	}
	s.json(out)
}
