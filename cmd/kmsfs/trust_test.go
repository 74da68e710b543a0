package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/config"
)

const (
	keyA        = "arn:aws:kms:us-east-1:111122223333:key/11111111-1111-4111-8111-111111111111"
	keyB        = "arn:aws:kms:eu-west-1:111122223333:key/22222222-2222-4222-8222-222222222222"
	keyOther    = "arn:aws:kms:us-east-1:444455556666:key/33333333-3333-4333-8333-333333333333"
	keyChina    = "arn:aws-cn:kms:cn-north-1:111122223333:key/44444444-4444-4444-8444-444444444444"
	keyMRK      = "arn:aws:kms:us-east-1:111122223333:key/mrk-11112222333344445555666677778888"
	keyMRKThree = "arn:aws:kms:ap-south-1:111122223333:key/mrk-11112222333344445555666677778888"
	keyMRKTwo   = "arn:aws:kms:eu-west-1:111122223333:key/mrk-11112222333344445555666677778888"
)

var (
	testID  = strings.Repeat("a", 32)
	otherID = strings.Repeat("b", 32)
)

// claimed is a volume under keys, each with a copy of the volume key.
func claimed(keys ...string) claim {
	return claim{Dir: "/vol", ID: testID, Commitment: "c0", Digest: "d0", Keys: keys, Copies: keys}
}

func pinnedTo(keys ...string) config.Pins {
	return config.Pins{testID: {Path: "/vol", Commitment: "c0", Settings: "d0", Keys: keys}}
}

func TestJudge(t *testing.T) {
	type row struct {
		name     string
		r        trustRequest
		trusted  []string
		prove    []string
		question string
		pin      []string // keys of the new pin; nil = none is written
		retired  []string
		refused  string
		next     string
	}
	rows := []row{
		// unknown volumes
		{name: "unknown, nobody to ask", r: trustRequest{claim: claimed(keyA, keyB)}, refused: "new to this client", next: "if you trust it, run: kmsfs mount /vol /mnt --key " + keyA + " --key " + keyB},
		{name: "unknown, a terminal", r: trustRequest{claim: claimed(keyA), Terminal: true}, trusted: []string{keyA}, question: "account 111122223333, region us-east-1", pin: []string{keyA}},
		{name: "unknown, accept-new", r: trustRequest{claim: claimed(keyA), AcceptNew: true}, trusted: []string{keyA}, pin: []string{keyA}},
		{name: "unknown, its keys accepted by name", r: trustRequest{claim: claimed(keyA), Accept: []string{keyA}}, trusted: []string{keyA}, pin: []string{keyA}},
		{name: "unknown, only some accepted", r: trustRequest{claim: claimed(keyA, keyOther), Accept: []string{keyA}}, refused: "new to this client"},
		{name: "unknown, named", r: trustRequest{claim: claimed(keyA, keyB), Named: []string{keyB}}, trusted: []string{keyB}, pin: []string{keyB}},
		{name: "named keys have no copy", r: trustRequest{claim: claimed(keyA), Named: []string{keyOther}}, refused: "not under the keys that were named", next: "name one of those"},
		{name: "named replica of a multi-Region key", r: trustRequest{claim: claimed(keyMRK), Named: []string{keyMRKTwo}}, trusted: []string{keyMRKTwo}, pin: []string{keyMRKTwo}},

		// known volumes
		{name: "as pinned", r: trustRequest{claim: claimed(keyA), Pins: pinnedTo(keyA)}, trusted: []string{keyA}},
		{name: "as pinned, another path", r: trustRequest{claim: func() claim { c := claimed(keyA); c.Dir = "/moved"; return c }(), Pins: pinnedTo(keyA)}, trusted: []string{keyA}, pin: []string{keyA}},
		{name: "new key of a known account", r: trustRequest{claim: claimed(keyB, keyA), Pins: pinnedTo(keyA)}, trusted: []string{keyB, keyA}, prove: []string{keyB}, pin: []string{keyB, keyA}},
		{name: "new key and the old one gone", r: trustRequest{claim: claimed(keyB), Pins: pinnedTo(keyA)}, trusted: []string{keyB}, prove: []string{keyB}, pin: []string{keyB}, retired: []string{keyA}},
		{name: "new key of another account", r: trustRequest{claim: claimed(keyOther, keyA), Pins: pinnedTo(keyA)}, refused: "another account", next: "if you trust that key, run: kmsfs mount /vol /mnt --accept-key " + keyOther},
		{name: "new key of another partition", r: trustRequest{claim: claimed(keyChina, keyA), Pins: pinnedTo(keyA)}, refused: "another account"},
		{name: "new key of another account, accepted", r: trustRequest{claim: claimed(keyOther, keyA), Pins: pinnedTo(keyA), Accept: []string{keyOther}}, trusted: []string{keyOther, keyA}, pin: []string{keyOther, keyA}},
		{name: "local key in place of KMS", r: trustRequest{claim: claimed("local:evil", keyA), Pins: pinnedTo(keyA)}, refused: "another account"},
		{name: "KMS key in place of a local one", r: trustRequest{claim: claimed(keyOther, "local:a"), Pins: pinnedTo("local:a")}, refused: "another account"},
		{name: "new local key beside a local one", r: trustRequest{claim: claimed("local:b", "local:a"), Pins: pinnedTo("local:a")}, trusted: []string{"local:b", "local:a"}, prove: []string{"local:b"}, pin: []string{"local:b", "local:a"}},
		{name: "listed without a copy", r: trustRequest{claim: func() claim { c := claimed(keyB, keyA); c.Copies = []string{keyA}; return c }(), Pins: pinnedTo(keyA)}, refused: "no copy under it"},
		{name: "retired key is back", r: trustRequest{claim: claimed(keyA, keyB), Pins: retired(keyA, keyB)}, refused: "was retired", next: "--accept-key " + keyA},
		{name: "retired key is back, accepted", r: trustRequest{claim: claimed(keyA, keyB), Pins: retired(keyA, keyB), Accept: []string{keyA}}, trusted: []string{keyA, keyB}, pin: []string{keyA, keyB}},
		{name: "replica of a pinned key", r: trustRequest{claim: claimed(keyMRKTwo), Pins: pinnedTo(keyMRK)}, trusted: []string{keyMRKTwo}, prove: []string{keyMRKTwo}, pin: []string{keyMRKTwo}, retired: []string{keyMRK}},
		{name: "replica of a retired key", r: trustRequest{claim: claimed(keyMRKTwo, keyB), Pins: retired(keyMRK, keyB)}, refused: "was retired", next: "--accept-key " + keyMRKTwo},
		{name: "retired replica of a pinned key", r: trustRequest{claim: claimed(keyMRK), Pins: retired(keyMRK, keyMRKTwo)}, refused: "was retired"},
		{name: "third replica of a pinned key", r: trustRequest{claim: claimed(keyMRKThree, keyMRKTwo), Pins: retired(keyMRK, keyMRKTwo)}, trusted: []string{keyMRKThree, keyMRKTwo}, prove: []string{keyMRKThree}, pin: []string{keyMRKThree, keyMRKTwo}, retired: []string{keyMRK}},
		{name: "replica of an accepted key", r: trustRequest{claim: claimed(keyMRKTwo, keyOther), Pins: pinnedTo(keyOther), Accept: []string{keyMRK}}, refused: "another account"},
		{name: "named keys leave the pin alone", r: trustRequest{claim: claimed(keyA, keyB), Pins: pinnedTo(keyA), Named: []string{keyB}}, trusted: []string{keyB}},
		{name: "accept-new is not for known volumes", r: trustRequest{claim: claimed(keyOther, keyA), Pins: pinnedTo(keyA), AcceptNew: true, Terminal: true}, refused: "another account"},

		// forged or exchanged volumes
		{name: "another volume at a pinned path", r: trustRequest{claim: claimed(keyA), Pins: config.Pins{otherID: {Path: "/vol", Commitment: "c0", Settings: "d0", Keys: []string{keyA}}}, AcceptNew: true, Named: []string{keyA}}, refused: "has changed", next: "[volume." + otherID + "]"},
		{name: "another volume key", r: trustRequest{claim: func() claim { c := claimed(keyA); c.Commitment = "c1"; return c }(), Pins: pinnedTo(keyA), Named: []string{keyA}}, refused: "what never changes"},
		{name: "other settings", r: trustRequest{claim: func() claim { c := claimed(keyA); c.Digest = "d1"; return c }(), Pins: pinnedTo(keyA)}, refused: "what never changes"},

		// require_kms
		{name: "local key, KMS required", r: trustRequest{claim: claimed("local:a"), Pins: pinnedTo("local:a"), RequireKMS: true}, refused: "require_kms"},
		{name: "KMS key, KMS required", r: trustRequest{claim: claimed(keyA), Pins: pinnedTo(keyA), RequireKMS: true}, trusted: []string{keyA}},

		// a mount that runs already
		{name: "live, rekeyed here", r: live(claimed(keyB, keyA), pinnedTo(keyB, keyA), standing{Trusted: s(keyA), Listed: s(keyA), Pinned: s(keyA)}), trusted: s(keyB, keyA)},
		{name: "live, the end of that rekey", r: live(claimed(keyB), retired(keyA, keyB), standing{Trusted: s(keyB, keyA), Listed: s(keyB, keyA), Pinned: s(keyB, keyA)}), trusted: s(keyB)},
		{name: "live, changed elsewhere", r: live(claimed(keyB, keyA), pinnedTo(keyA), standing{Trusted: s(keyA), Listed: s(keyA), Pinned: s(keyA)}), refused: "mounted with --key for others only"},
		{name: "live, nothing changed: its own list and order", r: live(claimed(keyA, keyB), pinnedTo(keyA, keyB, keyOther), standing{Trusted: s(keyB, keyA), Listed: s(keyA, keyB), Pinned: s(keyA, keyB, keyOther)}), trusted: s(keyB, keyA)},
		{name: "live, nothing changed: one of two", r: live(claimed(keyA, keyB), pinnedTo(keyA, keyB), standing{Trusted: s(keyB), Listed: s(keyA, keyB), Pinned: s(keyA, keyB)}), trusted: s(keyB)},
		{name: "live, rekeyed here to a key that was second", r: live(claimed(keyB, keyA), pinnedTo(keyB, keyA), standing{Trusted: s(keyA, keyB), Listed: s(keyA, keyB), Pinned: s(keyA, keyB)}), trusted: s(keyB, keyA)},
		{name: "live, rekeyed elsewhere to a key that was second", r: live(claimed(keyB, keyA), pinnedTo(keyA, keyB), standing{Trusted: s(keyA), Listed: s(keyA, keyB), Pinned: s(keyA, keyB)}), refused: "mounted with --key for others only"},
		{name: "live, a key was added here", r: live(claimed(keyA, keyB), pinnedTo(keyA, keyB), standing{Trusted: s(keyA), Listed: s(keyA), Pinned: s(keyA)}), trusted: s(keyA, keyB)},
		{name: "live, named though retired before", r: live(claimed(keyA, keyB), retired(keyA, keyB), standing{Trusted: s(keyA), Listed: s(keyA, keyB), Pinned: s(keyB), Retired: s(keyA)}), trusted: s(keyA)},
		{name: "live, a whole rekey here at once", r: live(claimed(keyB), retired(keyA, keyB), standing{Trusted: s(keyA), Listed: s(keyA, keyB), Pinned: s(keyA, keyB)}), trusted: s(keyB)},
		{name: "live, a whole rekey elsewhere", r: live(claimed(keyB), pinnedTo(keyA), standing{Trusted: s(keyA), Listed: s(keyA, keyB), Pinned: s(keyA)}), refused: "not under the keys"},
		{name: "live, a key that is gone from the middle", r: live(claimed(keyA, keyB), retired(keyOther, keyA), standing{Trusted: s(keyB, keyOther), Listed: s(keyA, keyOther, keyB), Pinned: s(keyA, keyOther)}), trusted: s(keyB)},
		{name: "live, the pin was deleted", r: live(claimed(keyA), nil, standing{Trusted: s(keyA), Listed: s(keyA), Pinned: s(keyA)}), trusted: s(keyA)},

		// rekey
		{name: "rekey, unknown volume", r: trustRequest{claim: claimed(keyA), Extra: []string{keyOther}}, refused: "new to this client", next: "--from " + keyA},
		{name: "rekey, unknown volume with --from", r: trustRequest{claim: claimed(keyA), Extra: []string{keyOther, keyA}}, trusted: []string{keyA, keyOther}, pin: []string{keyA}},
		{name: "rekey to another account", r: trustRequest{claim: claimed(keyA), Pins: pinnedTo(keyA), Extra: []string{keyOther}}, trusted: []string{keyA, keyOther}},
		{name: "rekey, configured, a planted key", r: trustRequest{claim: claimed(keyB, keyA), Named: s(keyA), Extra: s(keyOther, keyA)}, refused: "lists the key " + keyB},
		{name: "rekey, configured, a pinned key beside", r: trustRequest{claim: claimed(keyB, keyA), Named: s(keyA), Pins: pinnedTo(keyB, keyA), Extra: s(keyOther, keyA)}, trusted: s(keyA, keyOther, keyB)},
		{name: "mount, configured, a planted key", r: trustRequest{claim: claimed(keyOther, keyA), Named: s(keyA)}, trusted: s(keyA), pin: s(keyA)},
		{name: "rekey resumed", r: trustRequest{claim: claimed(keyOther, keyA), Pins: pinnedTo(keyA), Extra: []string{keyOther}}, trusted: []string{keyOther, keyA}, pin: []string{keyOther, keyA}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			row.r.PinsFile = "/state/known_volumes.toml"
			if row.r.Command == nil {
				row.r.Command = func(more ...string) string {
					return commandLine(append([]string{"kmsfs", "mount", "/vol", "/mnt"}, more...)...)
				}
			}
			d, err := judge(row.r)
			if row.refused != "" {
				require.ErrorContains(t, err, row.refused)
				status, next := diagnose(err)
				require.Equal(t, exitUsage, status)
				require.Contains(t, next, row.next)
				return
			}
			require.NoError(t, err)
			require.Equal(t, row.trusted, d.Trusted)
			require.Equal(t, row.prove, d.Prove)
			require.Equal(t, row.question == "", d.Question == "")
			require.Contains(t, d.Question, row.question)
			if row.pin == nil {
				require.Nil(t, d.Pin)
				return
			}
			require.Equal(t, &config.Pin{Path: row.r.claim.Dir, Commitment: "c0", Settings: "d0", Keys: row.pin, Retired: row.retired}, normal(d.Pin))
		})
	}
}

func s(keys ...string) []string { return keys }

// live is what a running mount, started with --key, asks.
func live(c claim, pins config.Pins, now standing) trustRequest {
	return trustRequest{claim: c, Pins: pins, Named: now.Trusted, Live: &now}
}

func retired(gone, kept string) config.Pins {
	p := pinnedTo(kept)
	pin := p[testID]
	pin.Retired = []string{gone}
	p[testID] = pin
	return p
}

// normal makes an empty list nil, for comparison.
func normal(p *config.Pin) *config.Pin {
	if p != nil && len(p.Retired) == 0 {
		p.Retired = nil
	}
	return p
}

// A refusal is about trust also when nothing can be asked of a key service.
func TestRefusalIsAFailure(t *testing.T) {
	_, err := judge(trustRequest{claim: claimed(keyA), Command: func(...string) string { return "x" }})
	var f *failure
	require.True(t, errors.As(err, &f))
}
