package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/rekey"
	"kmsfs/volume"
)

// local is this client's keyring.
func (p *program) local() (*keys.Local, error) {
	dir, err := p.cfg.KeyringDir()
	if err != nil {
		return nil, err
	}
	return keys.NewLocal(dir), nil
}

// provider reaches every key service that the configuration allows.
func (p *program) provider() (keys.Provider, error) { return p.pacedProvider(nil) }

// pacedProvider is provider for a job that asks for as much as KMS gives: pacer
// decides when each request is sent. nil = at once.
func (p *program) pacedProvider(pacer *keys.Pacer) (keys.Provider, error) {
	aws, err := keys.NewAWS(keys.AWSOptions{
		Profiles: p.cfg.KMS.Profiles, Deadline: time.Duration(p.cfg.KMS.Deadline), Pacer: pacer})
	if err != nil {
		return nil, err
	}
	if p.cfg.RequireKMS {
		return keys.NewRouter(aws, nil), nil
	}
	local, err := p.local()
	if err != nil {
		return nil, err
	}
	return keys.NewRouter(aws, local), nil
}

// ring opens and makes data keys of a volume, of which only ID, BlockSize and Shared
// need be set, under the trusted keys. pool is whether fresh keys are
// fetched, and others decrypted, ahead.
func (p *program) ring(provider keys.Provider, s volume.Settings, trusted []string, pool bool) *keys.Ring {
	o := keys.RingOptions{
		Volume: s.ID, BlockLog2: s.BlockLog2(), Shared: s.Shared, Trusted: trusted, Provider: provider,
		Deadline:  time.Duration(p.cfg.KMS.Deadline),
		CacheKeys: p.cfg.KMS.CacheKeys,
		CacheAge:  time.Duration(p.cfg.KMS.CacheAge),
		PoolSize:  p.cfg.KMS.Pool,
		Prefetch:  p.cfg.KMS.Prefetch,
	}
	if !pool {
		o.PoolSize, o.Prefetch = -1, 0
	}
	return keys.NewRing(o)
}

// ringOf is the ring of an open volume.
func (p *program) ringOf(provider keys.Provider, v *volume.Volume, trusted []string, pool bool) *keys.Ring {
	return p.ring(provider, v.Settings(), trusted, pool)
}

// resolve makes key names of what a person wrote: an alias becomes the ARN of
// the key that it points to now.
func (p *program) resolve(ctx context.Context, provider keys.Provider, names []string) ([]string, error) {
	var out []string
	for _, name := range names {
		if a, err := crypt.ParseARN(name); err == nil && a.IsAlias() {
			d, err := provider.Describe(ctx, name)
			if err != nil {
				return nil, fmt.Errorf("resolving the alias %s: %w", name, err)
			}
			name = d.Key
		}
		if err := p.checkKey(name); err != nil {
			return nil, err
		}
		if slices.Contains(out, name) {
			return nil, usage("the key %s is named twice", name)
		}
		out = append(out, name)
	}
	return out, nil
}

func (p *program) checkKey(name string) error {
	if err := crypt.CheckKeyName(name); err != nil {
		return &failure{status: exitUsage, err: err}
	}
	if p.cfg.RequireKMS && keys.IsLocal(name) {
		return fail(exitUsage, "name a KMS key", "%s is a local key, and the configuration says require_kms = true", name)
	}
	return nil
}

// newVolumeKey makes the key of a new volume, with a copy under each of its keys. The
// volume's id is drawn here.
func (p *program) newVolumeKey(ctx context.Context, provider keys.Provider, s volume.Settings) (*crypt.Fresh, error) {
	if _, err := rand.Read(s.ID[:]); err != nil {
		return nil, fmt.Errorf("drawing a volume id: %w", err)
	}
	id, names := s.ID, s.Keys
	ring := p.ring(provider, s, names[:1], false)
	defer ring.Close()
	f, err := ring.NewKey(ctx, crypt.UseVolume)
	if err != nil {
		return nil, err
	}
	for _, name := range names[1:] {
		blob, err := provider.Encrypt(ctx, name, f.Header.EncryptionContext(id), f.Secrets.DataKey())
		if err != nil {
			f.Secrets.Wipe()
			return nil, err
		}
		f.Header.Copies = append(f.Header.Copies, crypt.Copy{Key: name, Blob: blob})
	}
	return f, nil
}

// rewrapper gives package rekey what it needs of package keys.
type rewrapper struct{ *keys.Rewrapper }

func newRewrapper(provider keys.Provider, id crypt.VolumeID, via string) rewrapper {
	return rewrapper{keys.NewRewrapperVia(provider, id, via)}
}

// Route implements rekey.Rewrapper.
func (r rewrapper) Route(from, to string) (rekey.Route, error) {
	way, err := r.Rewrapper.Route(from, to)
	return rekey.Route{Name: way.Name(), Calls: way.Calls, Plaintext: way.Plaintext}, err
}

// openTrusted decides whom to trust, fetches the volume key and unlocks v. It
// may ask the person at the terminal. The volume's pin is brought up to date
// only after the volume key has opened.
func (p *program) openTrusted(ctx context.Context, v *volume.Volume, provider keys.Provider, ask trustRequest) (*keys.Ring, error) {
	verdict, err := p.decide(v, ask)
	if err != nil {
		return nil, err
	}
	if err := p.prove(ctx, v, provider, verdict); err != nil {
		return nil, err
	}
	ring := p.ringOf(provider, v, verdict.Trusted, true)
	secrets, err := ring.Open(ctx, v.Header())
	if err == nil {
		err = v.Unlock(secrets)
	}
	if err == nil {
		err = remember(v.ID().String(), verdict.Pin)
	}
	if err != nil {
		ring.Close()
		return nil, fmt.Errorf("opening the volume %s: %w", v.Path(), err)
	}
	return ring, nil
}

// decide is judge with the client's pins, and with the person at the terminal.
func (p *program) decide(v *volume.Volume, ask trustRequest) (verdict, error) {
	file, err := config.PinsFile()
	if err != nil {
		return verdict{}, err
	}
	pins, err := config.LoadPins(file)
	if err != nil {
		return verdict{}, err
	}
	ask.claim, err = claimOf(v)
	if err != nil {
		return verdict{}, err
	}
	ask.Pins, ask.PinsFile, ask.RequireKMS, ask.Terminal = pins, file, p.cfg.RequireKMS, p.tty
	mine := p.cfg.Volume[ask.claim.ID]
	if len(ask.Named) == 0 {
		ask.Named = mine.Keys
	}
	ask.Accept = append(slices.Clone(ask.Accept), mine.AcceptKeys...)
	d, err := judge(ask)
	if err == nil && d.Question != "" && !p.confirm(d.Question) {
		err = fail(exitUsage, "", "the volume %s is not trusted", ask.claim.Dir)
	}
	return d, err
}

// prove opens the volume key's copies under keys that are new to this client:
// only somebody allowed to Decrypt or ReEncrypt the old copy can have made them.
func (p *program) prove(ctx context.Context, v *volume.Volume, provider keys.Provider, d verdict) error {
	for _, key := range d.Prove {
		ring := p.ringOf(provider, v, []string{key}, false)
		secrets, err := ring.Open(ctx, v.Header())
		ring.Close()
		if errors.Is(err, crypt.ErrDamaged) {
			return refuse("restore kmsfs.toml from a backup", "kmsfs.toml of %s lists the key %s, which is new to this client and does not open the volume key: %w", v.Path(), key, err)
		}
		if err != nil {
			return fmt.Errorf("kmsfs.toml of %s lists the key %s, which is new to this client and must prove itself: %w", v.Path(), key, err)
		}
		secrets.Wipe()
	}
	return nil
}

// remember writes a pin; nil is none.
func remember(id string, pin *config.Pin) error {
	if pin == nil {
		return nil
	}
	file, err := config.PinsFile()
	if err != nil {
		return err
	}
	return config.UpdatePins(file, func(pins config.Pins) error {
		pins[id] = *pin
		return nil
	})
}
