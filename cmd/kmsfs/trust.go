package main

import (
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"kmsfs/config"
	"kmsfs/crypt"
	"kmsfs/volume"
)

// Trust never comes from the volume: whoever writes the backing directory could
// list a key of his own, wrap a volume key he made under it, and forge everything
// below. So judge sets what the volume says of itself (claim) against what this
// client was told and remembers.

// A claim is what a volume says of itself.
type claim struct {
	Dir        string // absolute
	ID         string
	Commitment string // of the volume key
	Digest     string // of the settings that never change
	Keys       []string
	Copies     []string // keys under which the volume key's header has a copy
}

func claimOf(v *volume.Volume) (claim, error) {
	dir, err := realPath(v.Path())
	if err != nil {
		return claim{}, err
	}
	s, h := v.Settings(), v.Header()
	c := claim{Dir: dir, ID: s.ID.String(), Digest: s.Digest(), Keys: s.Keys, Commitment: hex.EncodeToString(h.Commitment[:])}
	for _, k := range h.Copies {
		c.Copies = append(c.Copies, k.Key)
	}
	return c, nil
}

func realPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}

// A trustRequest is what judge decides about.
type trustRequest struct {
	claim     claim
	Named     []string // the complete list, from --key or the configuration
	Live      bool     // a mount that runs already adopts a change: Named grows by what rekey pinned
	Extra     []string // keys that a rekey was told of by --from and --to
	Accept    []string // --accept-key
	AcceptNew bool     // --accept-new

	Pins       config.Pins
	PinsFile   string
	RequireKMS bool
	Terminal   bool
	// Command is the exact command that would go on with these more arguments.
	Command func(more ...string) string
}

// A verdict says under which keys to go on. Unless Question is answered with
// yes, and the keys in Prove have opened the volume key, it counts for nothing.
type verdict struct {
	Trusted  []string // in order
	Prove    []string
	Question string
	Pin      *config.Pin // to be remembered; nil = nothing changed
}

// judge is the rule of trust. It asks no key service.
func judge(r trustRequest) (verdict, error) {
	pin, known := r.Pins[r.claim.ID]
	if other := r.Pins.ByPath(r.claim.Dir); other != "" && other != r.claim.ID {
		return verdict{}, refuse(fmt.Sprintf("if you replaced it yourself, delete the section [volume.%s] from %s and run the command again", other, r.PinsFile),
			"the volume at %s has changed: its id was %s and is now %s, so somebody may have put another volume in its place", r.claim.Dir, other, r.claim.ID)
	}
	if known && (pin.Commitment != r.claim.Commitment || pin.Settings != r.claim.Digest) {
		return verdict{}, refuse("restore kmsfs.toml from a backup (kmsfs.toml.bak is the last but one)",
			"kmsfs.toml of %s has changed in what never changes (the volume key, format, block size or names), compared with what %s remembers", r.claim.Dir, r.PinsFile)
	}
	d, err := r.judgeKeys(pin, known)
	if err != nil {
		return verdict{}, err
	}
	if i := slices.IndexFunc(d.Trusted, isLocal); r.RequireKMS && i >= 0 {
		return verdict{}, refuse("move the volume to a KMS key on a client without that setting", "the volume %s is under %s, a local key, and the configuration says require_kms = true", r.claim.Dir, d.Trusted[i])
	}
	return d, nil
}

func (r *trustRequest) judgeKeys(pin config.Pin, known bool) (verdict, error) {
	switch {
	case len(r.Named) > 0:
		return r.named(pin, known)
	case known:
		return r.pinned(pin)
	}
	return r.unknown()
}

// named: the person or the configuration gave the complete list.
func (r *trustRequest) named(pin config.Pin, known bool) (verdict, error) {
	trusted := slices.Clone(r.Named)
	if r.Live {
		trusted = nil
		for _, k := range r.claim.Keys {
			if !has(r.Named, k) && !has(pin.Keys, k) {
				return verdict{}, refuse("mount it again with this key named too, or without --key", "%s lists the key %s, but it was mounted with --key for others only", r.claim.Dir, k)
			}
			trusted = append(trusted, k)
		}
	}
	trusted = append(trusted, missing(trusted, r.Extra)...)
	if !slices.ContainsFunc(trusted, func(k string) bool { return has(r.claim.Copies, k) }) {
		return verdict{}, refuse("name one of those if you trust it", "the volume %s is not under the keys that were named (%s), but under %s", r.claim.Dir, strings.Join(trusted, ", "), strings.Join(r.claim.Keys, ", "))
	}
	if known {
		return verdict{Trusted: trusted, Pin: r.moved(pin)}, nil
	}
	return verdict{Trusted: trusted, Pin: r.newPin(trusted)}, nil
}

// moved is the pin of a volume that was found at another path; nil if it is
// where it was.
func (r *trustRequest) moved(pin config.Pin) *config.Pin {
	if pin.Path == r.claim.Dir {
		return nil
	}
	pin.Path = r.claim.Dir
	return &pin
}

// pinned: this client knows the volume. What is new in its list must prove
// itself or is refused, before any key service is asked.
func (r *trustRequest) pinned(pin config.Pin) (verdict, error) {
	var d verdict
	for _, k := range r.claim.Keys {
		switch {
		case has(pin.Keys, k), has(r.Accept, k), has(r.Extra, k):
		case has(pin.Retired, k):
			return d, refuse("if you brought it back yourself, run: "+r.Command("--accept-key", k),
				"kmsfs.toml of %s lists the key %s again, which was retired", r.claim.Dir, k)
		case !slices.ContainsFunc(pin.Keys, func(p string) bool { return neighbours(p, k) }):
			return d, refuse("if you trust that key, run: "+r.Command("--accept-key", k),
				"kmsfs.toml of %s lists the key %s, which this client does not know and which is in another account than the known %s", r.claim.Dir, k, strings.Join(pin.Keys, ", "))
		case !has(r.claim.Copies, k):
			return d, refuse("restore kmsfs.toml from a backup", "kmsfs.toml of %s lists the key %s, but the volume key has no copy under it", r.claim.Dir, k)
		default:
			d.Prove = append(d.Prove, k)
		}
		d.Trusted = append(d.Trusted, k)
	}
	next := r.newPin(d.Trusted)
	next.Retired = slices.DeleteFunc(append(slices.Clone(pin.Retired), missing(pin.Retired, pin.Keys)...), func(k string) bool { return has(d.Trusted, k) })
	if next.Path != pin.Path || !slices.Equal(next.Keys, pin.Keys) || !slices.Equal(next.Retired, pin.Retired) {
		d.Pin = next
	}
	d.Trusted = append(d.Trusted, missing(d.Trusted, r.Extra)...)
	return d, nil
}

// unknown: this client has never seen the volume.
func (r *trustRequest) unknown() (verdict, error) {
	d := verdict{Trusted: r.claim.Keys, Pin: r.newPin(r.claim.Keys)}
	named := len(missing(append(slices.Clone(r.Accept), r.Extra...), r.claim.Keys)) == 0
	switch {
	case r.AcceptNew || named:
		d.Trusted = append(slices.Clone(d.Trusted), missing(d.Trusted, r.Extra)...)
	case r.Terminal:
		d.Question = r.question()
	default:
		return verdict{}, refuse("if you trust it, run: "+r.Command(r.naming()...),
			"the volume %s (id %s) is new to this client and is under %s", r.claim.Dir, r.claim.ID, strings.Join(r.claim.Keys, ", "))
	}
	return d, nil
}

// naming are the arguments that trust exactly what the volume lists now.
func (r *trustRequest) naming() (args []string) {
	flag := "--key"
	if r.Extra != nil { // a rekey has no --key
		flag = "--from"
	}
	for _, k := range missing(r.Extra, r.claim.Keys) {
		args = append(args, flag, k)
	}
	return args
}

func (r *trustRequest) question() string {
	var b strings.Builder
	fmt.Fprintf(&b, "The volume %s (id %s) is new to this client. Its keys are:\n", r.claim.Dir, r.claim.ID)
	for _, k := range r.claim.Keys {
		fmt.Fprintf(&b, "  %s (%s)\n", k, whose(k))
	}
	b.WriteString("Whoever controls one of them can read and forge everything in it. Trust them?")
	return b.String()
}

// whose says to whom a key belongs, for people.
func whose(key string) string {
	a, err := crypt.ParseARN(key)
	if err != nil {
		return "a local key of this machine"
	}
	return fmt.Sprintf("account %s, region %s, partition %s", a.Account, a.Region, a.Partition)
}

func (r *trustRequest) newPin(keys []string) *config.Pin {
	return &config.Pin{Path: r.claim.Dir, Commitment: r.claim.Commitment, Settings: r.claim.Digest, Keys: slices.Clone(keys)}
}

// neighbours reports whether two keys belong to the same account of the same
// partition; the local keys of this machine are one account.
func neighbours(a, b string) bool {
	x, errX := crypt.ParseARN(a)
	y, errY := crypt.ParseARN(b)
	if errX != nil || errY != nil {
		return isLocal(a) && isLocal(b)
	}
	return x.Partition == y.Partition && x.Account == y.Account
}

func isLocal(key string) bool { return strings.HasPrefix(key, crypt.LocalPrefix) }

func has(list []string, key string) bool {
	return slices.ContainsFunc(list, func(k string) bool { return crypt.SameKey(k, key) })
}

// missing are the keys of want that list has not.
func missing(list, want []string) (out []string) {
	for _, k := range want {
		if !has(list, k) {
			out = append(out, k)
		}
	}
	return out
}

func refuse(next, format string, args ...any) error { return fail(exitUsage, next, format, args...) }
