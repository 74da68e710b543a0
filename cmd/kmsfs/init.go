package main

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/volume"
)

const defaultKey = crypt.LocalPrefix + "default"

type initFlags struct {
	keys      []string
	names     string
	envelope  string
	blockSize int
}

func (p *program) initCommand() *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Make an empty directory a volume",
		Long: `Make the empty (or missing) directory DIR a volume: kmsfs.toml is written into it,
its mode becomes 0700, and this client remembers it. The first --key wraps the keys
of new files; every --key can open the volume. Without --key, and without keys in
the configuration, the local key local:default is made and used; then whoever
copies its file can read the data, and losing the file loses the data.

Names of files are encrypted unless --names plain. With --envelope shared the copies
in headers hold intermediate keys, from which the data keys of up to 4096 files are
derived: one KMS request then opens them all, and a rekey asks once for each, at the
price that KMS logs and grants so many files at once, and that whoever learns an
intermediate key can read them (SECURITY.md). None of this can be changed later.` + statuses(0, 1, 3, 4),
		Args: exactly(1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.fill(cmd, p.cfg.Init)
			return p.init(cmd.Context(), args[0], f)
		},
	}
	cmd.Flags().StringArrayVar(&f.keys, "key", nil, "wrap data keys with `KEY`; may be repeated")
	cmd.Flags().StringVar(&f.names, "names", "encrypted", "how names of files are stored: `encrypted|plain`")
	cmd.Flags().StringVar(&f.envelope, "envelope", "per-file", "what KMS wraps, a data key for each file or one for many: `per-file|shared`")
	cmd.Flags().IntVar(&f.blockSize, "block-size", crypt.DefaultBlockSize, "bytes sealed together, a power of two from 4096 to 65536: `N`")
	return cmd
}

func (f *initFlags) fill(cmd *cobra.Command, c config.Init) {
	if !cmd.Flags().Changed("key") {
		f.keys = c.Keys
	}
	if !cmd.Flags().Changed("names") {
		f.names = c.Names
	}
	if !cmd.Flags().Changed("envelope") {
		f.envelope = c.Envelope
	}
	if !cmd.Flags().Changed("block-size") {
		f.blockSize = c.BlockSize
	}
}

func (f *initFlags) check() error {
	if f.names != string(volume.NamesEncrypted) && f.names != string(volume.NamesPlain) {
		return usage("--names is encrypted or plain, not %q", f.names)
	}
	if f.envelope != string(volume.EnvelopePerFile) && f.envelope != string(volume.EnvelopeShared) {
		return usage("--envelope is per-file or shared, not %q", f.envelope)
	}
	if n := f.blockSize; n < crypt.MinBlockSize || n > crypt.MaxBlockSize || n&(n-1) != 0 {
		return usage("--block-size is a power of two from %d to %d, not %d", crypt.MinBlockSize, crypt.MaxBlockSize, n)
	}
	if len(f.keys) > crypt.MaxCopies {
		return usage("a volume has at most %d keys, not %d", crypt.MaxCopies, len(f.keys))
	}
	return nil
}

func (p *program) init(ctx context.Context, dir string, f initFlags) error {
	if err := f.check(); err != nil {
		return err
	}
	_ = harden() // data keys may pass through this process; who mounts is warned of what fails
	// Everything that can be refused is refused before a key is made or asked.
	if err := volume.Prepare(dir); err != nil {
		return err
	}
	if err := p.checkPins(); err != nil {
		return err
	}
	provider, err := p.provider()
	if err != nil {
		return err
	}
	names, err := p.initKeys(ctx, provider, f.keys)
	if err != nil {
		return err
	}
	s := volume.Settings{Format: volume.Format, BlockSize: f.blockSize, Names: volume.NamesMode(f.names), Shared: f.envelope == string(volume.EnvelopeShared), Keys: names}
	fresh, err := p.newVolumeKey(ctx, provider, s)
	if err != nil {
		return err
	}
	defer fresh.Secrets.Wipe()
	s.ID = fresh.Header.Volume
	if s.Header, err = fresh.Header.Marshal(); err != nil {
		return err
	}
	if err := volume.Create(dir, s, fresh.Secrets); err != nil {
		return err
	}
	return p.initDone(dir, s, fresh.Header)
}

// checkPins finds a damaged pin file before anything was made.
func (p *program) checkPins() error {
	file, err := config.PinsFile()
	if err == nil {
		_, err = config.LoadPins(file)
	}
	return err
}

// initKeys are the keys of the new volume; with none named, the default one.
func (p *program) initKeys(ctx context.Context, provider keys.Provider, named []string) ([]string, error) {
	if len(named) > 0 {
		return p.resolve(ctx, provider, named)
	}
	if err := p.checkKey(defaultKey); err != nil {
		return nil, err
	}
	local, err := p.local()
	if err != nil {
		return nil, err
	}
	if err := local.Create(defaultKey); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return []string{defaultKey}, nil
}

// initDone pins the volume and tells the person what there is now. It goes by what
// this process made: kmsfs.toml may have been exchanged since.
func (p *program) initDone(dir string, s volume.Settings, h *crypt.Header) error {
	at, err := realPath(dir)
	if err != nil {
		return err
	}
	if err := pinNew(claimMade(at, s, h)); err != nil {
		return err
	}
	p.say("made %s a kmsfs volume (id %s, names %s, block size %d, envelope %s)", dir, s.ID, s.Names, s.BlockSize, s.Envelope())
	for _, k := range s.Keys {
		p.say("key: %s", k)
	}
	p.warnLocal(s.Keys)
	p.say("mount it: %s", commandLine("kmsfs", "mount", dir)+" MOUNTPOINT")
	return nil
}

// pinNew remembers a volume that this client made. A volume that stood at the
// path before is gone: the directory was empty.
func pinNew(c claim) error {
	file, err := config.PinsFile()
	if err != nil {
		return err
	}
	return config.UpdatePins(file, func(pins config.Pins) error {
		for old := pins.ByPath(c.Dir); old != ""; old = pins.ByPath(c.Dir) {
			p := pins[old]
			p.Path = ""
			pins[old] = p
		}
		r := trustRequest{claim: c}
		pins[c.ID] = *r.newPin(c.Keys)
		return nil
	})
}

// warnLocal says what a local key is not.
func (p *program) warnLocal(names []string) {
	local, err := p.local()
	if err != nil {
		return
	}
	for _, k := range names {
		if keys.IsLocal(k) {
			path, _ := filepath.Abs(local.Path(k))
			p.warn("%s is a local key and not in KMS: its file %s opens every file of this volume, and losing it loses the data; back it up", k, path)
		}
	}
}
