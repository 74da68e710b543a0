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
	return claimMade(dir, v.Settings(), v.Header()), nil
}

func claimMade(dir string, s volume.Settings, h *crypt.Header) claim {
	c := claim{Dir: dir, ID: s.ID.String(), Digest: s.Digest(), Keys: s.Keys, Commitment: hex.EncodeToString(h.Commitment[:])}
	for _, k := range h.Copies {
		c.Copies = append(c.Copies, k.Key)
	}
	return c
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
	Named     []string  // the complete list, from --key or the configuration
	Live      *standing // what a running mount goes by; it adopts a change of the list
	Extra     []string  // keys that a rekey was told of by --from, --to and --add; nil = no rekey
	Leaving   string    // the key of rekey --remove: it may stand in the list, and is not trusted for being named
	Accept    []string  // --accept-key
	AcceptNew bool      // --accept-new

	Pins       config.Pins
	PinsFile   string
	RequireKMS bool
	Terminal   bool
	// Command is the exact command that would go on with these more arguments.
	Command func(more ...string) string
}

// standing is what a running mount went by when it last looked.
type standing struct {
	Trusted []string // its own list, first = new files
	Listed  []string // the list of kmsfs.toml
	Pinned  []string // this client's pin
	Retired []string
}

// A verdict says under which keys to go on. Unless Question is answered with
// yes, and the keys in Prove have opened the volume key, it counts for nothing.
type verdict struct {
	Trusted  []string // in order
	Prove    []string
	Question string
	Pin      *config.Pin // to be remembered; nil = nothing changed
	Standing standing    // what a mount goes by from now on
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
	if i := slices.Index(r.claim.Keys, r.Leaving); i >= 0 && len(r.claim.Keys) > 1 && !slices.Contains(pin.Keys, r.Leaving) {
		r.claim.Keys = slices.Delete(slices.Clone(r.claim.Keys), i, i+1)
	}
	if !known && r.Live != nil { // somebody deleted the pin of a running mount: nothing was gained or lost
		pin.Keys, pin.Retired = r.Live.Pinned, r.Live.Retired
	}
	d, err := r.judgeKeys(pin, known)
	if err != nil {
		return verdict{}, err
	}
	if i := slices.IndexFunc(d.Trusted, isLocal); r.RequireKMS && i >= 0 {
		return verdict{}, refuse("move the volume to a KMS key on a client without that setting", "the volume %s is under %s, a local key, and the configuration says require_kms = true", r.claim.Dir, d.Trusted[i])
	}
	if d.Pin != nil {
		pin = *d.Pin
	}
	d.Standing = standing{Trusted: d.Trusted, Listed: r.claim.Keys, Pinned: pin.Keys, Retired: pin.Retired}
	return d, nil
}

func (r *trustRequest) judgeKeys(pin config.Pin, known bool) (verdict, error) {
	switch {
	case len(r.Named) > 0 && r.Live != nil:
		return r.live(pin, known)
	case len(r.Named) > 0:
		return r.named(pin, known)
	case known:
		return r.pinned(pin)
	}
	return r.unknown()
}

// named: the person or the configuration gave the complete list. What else
// kmsfs.toml lists is not trusted and enters no pin. A mount can leave it there; a
// rekey writes the list anew, and would sign off for every reader what was planted.
func (r *trustRequest) named(pin config.Pin, known bool) (verdict, error) {
	trusted := slices.Clone(r.Named)
	if r.Extra != nil {
		trusted = append(trusted, missing(trusted, append(slices.Clone(r.Extra), pin.Keys...))...)
		if strange := missing(trusted, r.claim.Keys); len(strange) > 0 {
			return verdict{}, refuse("if you trust it, add it to the configuration; if somebody planted it, take it out of kmsfs.toml",
				"kmsfs.toml of %s lists the key %s, which this client does not trust", r.claim.Dir, strange[0])
		}
	}
	if err := r.covered(trusted); err != nil {
		return verdict{}, err
	}
	if known {
		return verdict{Trusted: trusted, Pin: r.moved(pin)}, nil
	}
	return verdict{Trusted: trusted, Pin: r.newPin(trusted)}, nil
}

// live: a mount that was told the complete list keeps it, and its order. Only a
// rekey by this client, which the pin tells of, adds to it and takes away.
func (r *trustRequest) live(pin config.Pin, known bool) (verdict, error) {
	trusted := slices.DeleteFunc(slices.Clone(r.Live.Trusted), func(k string) bool {
		return slices.Contains(pin.Retired, k) && !slices.Contains(r.Live.Retired, k)
	})
	for i, k := range pin.Keys {
		// Also a key that was second before: a rekey made it that of new files.
		switch first := i == 0 && k != r.Live.Pinned[0]; {
		case first:
			rest := slices.DeleteFunc(trusted, func(t string) bool { return t == k })
			trusted = append([]string{k}, rest...)
		case !slices.Contains(r.Live.Pinned, k) && !slices.Contains(trusted, k):
			trusted = append(trusted, k)
		}
	}
	if err := r.followed(trusted); err != nil {
		return verdict{}, err
	}
	d := verdict{Trusted: trusted}
	if known {
		d.Pin = r.moved(pin)
	}
	return d, r.covered(trusted)
}

// followed refuses a change of kmsfs.toml that a mount with the list trusted would
// not go along with: whoever moves headers has to hear of it first.
func (r *trustRequest) followed(trusted []string) error {
	list, before := r.claim.Keys, r.Live.Listed
	// The key of new files is another: ours go on under theirs, behind the sweep. (It
	// also changes when the one before it leaves, which is the end of a rekey.)
	moved := list[0] != before[0] && slices.Contains(list, before[0]) && slices.Index(trusted, list[0]) != 0
	for i, k := range list {
		isNew := !slices.Contains(before, k) && !slices.Contains(trusted, k)
		if isNew || moved && i == 0 {
			return refuse("mount it again with this key named too, or without --key", "%s lists the key %s, but it was mounted with --key for others only", r.claim.Dir, k)
		}
	}
	return nil
}

// covered refuses keys of which none opens the volume.
func (r *trustRequest) covered(trusted []string) error {
	if !slices.ContainsFunc(trusted, func(k string) bool { return has(r.claim.Copies, k) }) {
		return refuse("name one of those if you trust it", "the volume %s is not under the keys that were named (%s), but under %s", r.claim.Dir, strings.Join(trusted, ", "), strings.Join(r.claim.Keys, ", "))
	}
	return nil
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
// itself or is refused, before any key service is asked. A replica of a known key
// is new: its name decides which region of which service is asked.
func (r *trustRequest) pinned(pin config.Pin) (verdict, error) {
	var d verdict
	for _, k := range r.claim.Keys {
		switch {
		case slices.Contains(pin.Keys, k), slices.Contains(r.Accept, k), slices.Contains(r.Extra, k):
		case slices.Contains(pin.Retired, k), has(pin.Retired, k) && !has(pin.Keys, k):
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
	next.Retired = retire(pin, d.Trusted)
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
	flag, strange := "--key", missing(r.Extra, r.claim.Keys)
	switch { // a rekey has no --key, and only one --from
	case r.Extra != nil && len(strange) == 1:
		flag = "--from"
	case r.Extra != nil:
		flag = "--accept-key"
	}
	for _, k := range strange {
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

// retire are the keys that are retired when list follows a pin. Labels count, not
// the key behind: a replica that left the list must not come back silently.
func retire(pin config.Pin, list []string) (out []string) {
	for _, k := range slices.Concat(pin.Retired, pin.Keys) {
		if !slices.Contains(list, k) && !slices.Contains(out, k) {
			out = append(out, k)
		}
	}
	return out
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
