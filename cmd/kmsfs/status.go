package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/rekey"
	"kmsfs/volume"
)

func (p *program) statusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status DIR",
		Short: "Count the headers of a volume by KMS key; needs no key",
		Long: `Show what the volume in the backing directory DIR is, who has it mounted, which
keys it lists, and how many files have a copy of their data key under each key;
then the files with contents that no header of this volume stands for. Paths are
those in DIR. No key is needed and no service is asked: it is what the headers say,
and "kmsfs rekey --verify" proves it. Of a live mount it shows the leases as well, if
its control socket can be reached: valid, grace (KMS does not answer) or revoked; and
what it has asked of KMS, and how long anybody waited for that.

To cut off the volume, disable every key that is shown, and every replica of it.` + statuses(0, 1, 2, 6),
		Args: exactly(1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return p.volumeStatus(ctx, args[0], asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object")
	return cmd
}

// A volumeReport is what kmsfs status tells.
type volumeReport struct {
	Dir       string          `json:"dir"`
	Volume    string          `json:"volume"`
	Format    int             `json:"format"`
	Names     string          `json:"names"`
	Envelope  volume.Envelope `json:"envelope"`
	BlockSize int             `json:"block_size"`
	Mounted   *volume.Holder  `json:"mounted,omitempty"`
	Live      *leaseStatus    `json:"live,omitempty"` // what the mount says, if it can be asked
	Keys      []keyReport     `json:"keys"`
	Files     int             `json:"files"`
	Empty     int             `json:"empty"`
	NoHeader  int             `json:"no_header"`
	Problems  []problemReport `json:"problems,omitempty"`
}

// A keyReport is one key that the volume lists or that headers name.
type keyReport struct {
	Key     string `json:"key"`
	Local   bool   `json:"local"` // not KMS
	Listed  bool   `json:"listed"`
	First   bool   `json:"first"`   // wraps the keys of new files
	Retired bool   `json:"retired"` // this client remembers that it was
	Headers int    `json:"headers"`
}

type problemReport struct {
	Path  string `json:"path"`
	Error string `json:"error"`
}

func (p *program) volumeStatus(ctx context.Context, dir string, asJSON bool) error {
	v, err := volume.Open(dir)
	if err != nil {
		return err
	}
	defer v.Close()
	if text := v.Warning(); text != "" {
		p.warn("%s", text)
	}
	holder, err := holderOf(dir)
	if err != nil {
		return err
	}
	census, problems, err := rekey.Survey(ctx, v, p.cfg.Rekey.Jobs, nil)
	if err != nil {
		return fmt.Errorf("looking at the headers of %s: %w", dir, err)
	}
	retired, err := retiredKeys(v)
	if err != nil {
		return err
	}
	s := v.Settings()
	r := volumeReport{Dir: dir, Volume: s.ID.String(), Format: s.Format, Names: string(s.Names), Envelope: s.Envelope(), BlockSize: s.BlockSize, Mounted: holder, Live: liveLeases(ctx, s.ID.String(), holder),
		Keys: keyReports(s.Keys, retired, census), Files: census.Files, Empty: census.Empty, NoHeader: census.Bad}
	for _, q := range problems {
		r.Problems = append(r.Problems, problemReport{q.Path, sentence(q.Err)})
	}
	if asJSON {
		err = json.NewEncoder(p.out).Encode(r)
	} else {
		p.showStatus(r)
	}
	if err == nil && r.NoHeader > 0 {
		err = fail(exitDamaged, "restore their headers (kmsfs headers import) or delete them", "%d files of %s have contents and no valid header", r.NoHeader, dir)
	}
	return err
}

// retiredKeys are those that this client has seen leave the volume.
func retiredKeys(v *volume.Volume) ([]string, error) {
	file, err := config.PinsFile()
	if err != nil {
		return nil, err
	}
	pins, err := config.LoadPins(file)
	return pins[v.ID().String()].Retired, err
}

// keyReports lists the keys in the volume's order, then what else headers name.
func keyReports(listed, retired []string, c rekey.Census) (out []keyReport) {
	all := slices.Clone(listed)
	for _, k := range slices.Sorted(maps.Keys(c.Headers)) {
		if !slices.Contains(all, k) {
			all = append(all, k)
		}
	}
	for i, k := range all {
		out = append(out, keyReport{Key: k, Local: isLocal(k), Listed: i < len(listed), First: i == 0,
			Retired: slices.Contains(retired, k), Headers: c.Headers[k]})
	}
	return out
}

func (p *program) showStatus(r volumeReport) {
	p.say("%s: volume %s, format %d, %s names, %s envelope, blocks of %d bytes", r.Dir, r.Volume, r.Format, r.Names, r.Envelope, r.BlockSize)
	if r.Mounted != nil {
		p.say("  in use by process %d on %s (%s)", r.Mounted.PID, r.Mounted.Host, r.Mounted.Owner)
	}
	if r.Live != nil && r.Live.Locked {
		p.say("  LOCKED by \"kmsfs lock\"")
	}
	for _, k := range r.Keys {
		p.say("  %s: %d headers%s%s", k.Key, k.Headers, k.notes(), r.Live.notes(k.Key))
	}
	if r.Live != nil {
		for _, line := range r.Live.Cost.lines() {
			p.say("  %s", line)
		}
		r.Live.Recovery.show(p)
	}
	p.say("  files with contents: %d, of which without a valid header: %d; empty files: %d", r.Files, r.NoHeader, r.Empty)
	for _, q := range r.Problems {
		fmt.Fprintf(p.err, "kmsfs: %s: %s\n", printable(q.Path), q.Error)
	}
}

func (k keyReport) notes() (text string) {
	if k.First {
		text += ", for new files"
	}
	if !k.Listed {
		text += ", NOT LISTED in kmsfs.toml"
	}
	if k.Retired {
		text += fmt.Sprintf(", retired: \"kmsfs rekey DIR --to KEY --from %s\" moves what is left", k.Key)
	}
	switch a, err := crypt.ParseARN(k.Key); {
	case k.Local:
		text += " (LOCAL KEY: not KMS)"
	case err == nil && a.IsMultiRegion():
		text += " (multi-Region: its replicas open them too)"
	}
	return text
}
