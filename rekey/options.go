package rekey

import (
	"context"
	"errors"

	"kmsfs/crypt"
)

// What Run refuses.
var (
	// ErrUntrusted: the source is not in the client's trusted list. Rewrapping a
	// copy under such a key would launder a forged header into the new key.
	ErrUntrusted = errors.New("the key is not trusted by this client")
	// ErrAmbiguous: several copies could be replaced.
	ErrAmbiguous = errors.New("more than one copy could be replaced; say which with --from")
	// ErrSameKey: source and target are one key.
	ErrSameKey = errors.New("the old and the new key are the same")
	// ErrRestless: no pass over the tree was quiet enough to prove that nothing is
	// left under the old key.
	ErrRestless = errors.New("files were renamed, removed or still moved during every pass; run this again when the tree is quieter")
	// ErrReload: a live mount did not adopt the new key list.
	ErrReload = errors.New("a live mount did not adopt the new key list")
	// ErrGaveUp: the key service refused so many files in a row that going on
	// would only burn calls.
	ErrGaveUp = errors.New("the key service failed for many files in a row")
)

// A Rewrapper turns the copy of a header's data key under one key into a copy
// under another. It checks the commitment whenever the plaintext passes through
// this process. from is the name in the trusted list, which decides what is asked
// where; the label of h's only copy may name a replica of it (crypt.SameKey).
type Rewrapper interface {
	Route(from, to string) (Route, error)
	Rewrap(ctx context.Context, h *crypt.Header, from, to string) (crypt.Copy, error)
}

// A Route is how a copy gets from one key to another.
type Route struct {
	Name      string `json:"name"`      // "ReEncrypt", "Decrypt + Encrypt", ...
	Calls     int    `json:"calls"`     // billed requests per file
	Plaintext bool   `json:"plaintext"` // the data key passes through this process
}

// Options say what to do.
type Options struct {
	To      string   // the new key
	From    string   // the copy to replace; "" = the only one
	Trusted []string // keys that a source may be under; From and To are named by the caller and count
	Jobs    int      // files at a time; 0 = 16
	MaxRPS  float64  // requests to the key service a second; 0 = no limit
	DryRun  bool     // only plan

	// Confirm sees the plan before anything is changed; an error ends the run.
	Confirm func(Plan) error
	// Event hears of everything that happens, one call at a time.
	Event func(Event)
	// Pin remembers the key list that the volume now has, before live mounts are
	// told of it and after the old key has left.
	Pin func(keys []string) error
	// Reload returns when every live mount has adopted the key list on disk.
	Reload func(context.Context) error
	// Moves counts the directories that live mounts have renamed so far: a
	// directory moved from a place not yet swept to one that was would be missed.
	Moves func(context.Context) (uint64, error)

	fault func(point string) error // for tests: a crash at a named point
}

// A Plan is what a run would do.
type Plan struct {
	To      string         `json:"to"`
	From    []string       `json:"from"`    // keys whose copies are replaced
	Files   int            `json:"files"`   // regular files with contents
	Change  int            `json:"change"`  // headers to rewrap
	Headers map[string]int `json:"headers"` // headers by the key of a copy
	Routes  []PlanRoute    `json:"routes"`
	Bad     int            `json:"bad"`   // files that can't be rekeyed
	Calls   int            `json:"calls"` // requests to KMS
	Price   float64        `json:"price"` // US dollars
}

// A PlanRoute is the way from one old key.
type PlanRoute struct {
	From string `json:"from"`
	Route
	Files int `json:"files"`
}

// pricePerCall: AWS KMS bills $0.03 for 10,000 symmetric requests.
const pricePerCall = 0.03 / 10000

// Outcome is what became of one file.
type Outcome string

// The outcomes.
const (
	Rewrapped Outcome = "rewrapped" // moved to the new key now
	Already   Outcome = "already"   // is under the new key, or has no copy under the old one
	Empty     Outcome = "empty"     // holds no bytes: its next contents get a fresh key
	Gone      Outcome = "gone"      // deleted or renamed meanwhile: another pass has to look
	Bad       Outcome = "bad"       // no valid header of this volume under a trusted key: nothing to move
	Failed    Outcome = "failed"    // could be under the old key still
)

// An Event is one thing that happened: Kind is "file", "pass" or "step".
type Event struct {
	Kind    string  `json:"event"`
	Path    string  `json:"path,omitempty"`
	Outcome Outcome `json:"outcome,omitempty"`
	Err     error   `json:"-"`
	Pass    int     `json:"pass,omitempty"`
	Step    string  `json:"step,omitempty"`
}

// A Problem is a file that was not moved, and why.
type Problem struct {
	Path    string
	Outcome Outcome
	Err     error
}

// A Report is what a run did. The counts of files are those of the last pass,
// Rewrapped and Calls those of all.
type Report struct {
	Plan      Plan
	Rewrapped int
	Already   int
	Bad       int
	Failed    int
	Gone      int
	Calls     int
	Passes    int
	Problems  []Problem // the first of them, at most maxProblems
	Done      bool      // all five steps; the volume no longer lists the old key
	Retired   []string  // the keys that left kmsfs.toml
}

const maxProblems = 1000
