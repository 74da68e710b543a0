package rekey

import (
	"context"
	"errors"
	"fmt"

	"kmsfs/crypt"
)

// What Run refuses, and why it stops.
var (
	// ErrUntrusted: the source is not in the client's trusted list. Rewrapping a
	// copy under such a key would launder a forged header into the new key.
	ErrUntrusted = errors.New("the key is not trusted by this client")
	// ErrAmbiguous: several copies could be replaced.
	ErrAmbiguous = errors.New("more than one copy could be replaced; say which with --from")
	// ErrSameKey: source and target are one key.
	ErrSameKey = errors.New("the old and the new key are the same")
	// ErrLastCopy: nothing else would open what is left.
	ErrLastCopy = errors.New("there is no copy under another trusted key, so this one must stay; add one first, with --add or --to")
	// ErrNotListed: a key that is to be refreshed is not one of the volume's.
	ErrNotListed = errors.New("the volume does not list this key")
	// ErrTooMany: a header has no room for the new copy beside the others.
	ErrTooMany = fmt.Errorf("the volume has copies under %d keys, which is the most there may be; remove one first", crypt.MaxCopies)
	// ErrOvertaken: another run changed the keys of the volume meanwhile.
	ErrOvertaken = errors.New("another run has changed the keys of the volume meanwhile; run this again")
	// ErrNotPrepared: a part was to be swept before the new key is in kmsfs.toml.
	ErrNotPrepared = errors.New("the volume is not prepared for this rekey; run it once with --prepare in place of --shard")
	// ErrRestless: no pass over the tree was quiet enough to prove that nothing is
	// left under the old key.
	ErrRestless = errors.New("files were renamed, removed or still moved during every pass; run this again when the tree is quieter")
	// ErrReload: a live mount did not adopt the new key list.
	ErrReload = errors.New("a live mount did not adopt the new key list")
	// ErrGaveUp: the key service refused so many files in a row that going on
	// would only burn calls.
	ErrGaveUp = errors.New("the key service failed for many files in a row")
)

// An Action is what becomes of the copies in each header.
type Action uint8

// The actions.
const (
	Move    Action = iota // the copy under From, or the only one, is replaced by one under Key
	Add                   // a copy under Key joins the others
	Remove                // the copy under Key goes, once another is proven
	Refresh               // the copy under Key is wrapped again, by the key's newest material
)

func (a Action) String() string {
	switch a {
	case Move:
		return "to"
	case Add:
		return "add"
	case Remove:
		return "remove"
	case Refresh:
		return "refresh"
	}
	return fmt.Sprintf("action-%d", uint8(a))
}

// MarshalText is the action's name, as the command line has it.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// A Rewrapper turns the copy of a header's data key under one key into a copy
// under another. It checks the commitment whenever the plaintext passes through
// this process. Key names are those of the trusted list, which decide what is asked
// where; the label of a copy may name a replica of one (crypt.SameKey).
type Rewrapper interface {
	Route(from, to string) (Route, error)
	Rewrap(ctx context.Context, h *crypt.Header, from, to string) (crypt.Copy, error)
	// Verify decrypts the header's copy under key and checks the commitment.
	Verify(ctx context.Context, h *crypt.Header, key string) error
	// Prove is Verify for who may not decrypt: then ReEncrypt to the same key.
	Prove(ctx context.Context, h *crypt.Header, key string) error
	// Calls is how many requests were sent so far that the key service bills. Headers
	// that share what their copies hold may have one in common.
	Calls() int
}

// A Route is how a copy gets from one key to another.
type Route struct {
	Name      string `json:"name"`      // "ReEncrypt", "Decrypt + Encrypt", ...
	Calls     int    `json:"calls"`     // billed requests per wrapped key
	Plaintext bool   `json:"plaintext"` // the data key passes through this process
}

// A Watch hears what a live mount moves while a pass is under way: a pass does not
// meet what goes from a place before it to one behind it.
type Watch interface {
	// Mounted says whether a mount is watched. Then every change comes through it.
	Mounted() bool
	// Moved is what was given a new name since the last call, however long ago. With
	// an error that is not known; nor whether nobody has mounted the volume meanwhile.
	Moved(context.Context) ([]Spot, error)
	Close()
}

// A Spot is where something stood after it was given a name there.
type Spot struct {
	Path string // of stored names, relative to the root
	Ino  uint64 // what got it; 0 = not known
}

// Options say what to do.
type Options struct {
	Action  Action
	Key     string   // the new key; of Remove the one that goes; of Refresh "" = the only one
	From    string   // the copy to work from; "" = the only one, of Add whichever is cheapest
	Trusted []string // keys that a source may be under; From and Key are named by the caller and count
	Jobs    int      // files at a time; 0 = 16
	Verify  bool     // every copy under Key is decrypted and checked against the commitment
	DryRun  bool     // only plan
	Prepare bool     // only the first two steps
	Shard   Shard    // only a part of the third step

	// Confirm sees the plan before anything is changed; an error ends the run.
	Confirm func(Plan) error
	// Event hears of everything that happens, one call at a time.
	Event func(Event)
	// Pin remembers the key list that the volume now has, before live mounts are
	// told of it and after the old key has left.
	Pin func(keys []string) error
	// Reload returns when every live mount has adopted the key list on disk, and makes
	// new files under none of the keys that are to leave.
	Reload func(ctx context.Context, leaving []string) error
	// Watch begins to hear what a live mount moves; nil = nobody has it mounted.
	Watch func(context.Context) (Watch, error)

	fault func(point string) error // for tests: a crash at a named point
	apart bool                     // for tests: as on a host that shares no locks with others
}

// A Plan is what a run would do.
type Plan struct {
	Action Action   `json:"action"`
	Key    string   `json:"key"`
	From   []string `json:"from,omitempty"` // keys that leave the volume
	Census
	Change  int         `json:"change"`  // headers to change
	Strange int         `json:"strange"` // headers under keys that this client does not trust
	Failed  int         `json:"failed"`  // files that could not be read, or about which nothing can be decided
	Routes  []PlanRoute `json:"routes"`
	Calls   int         `json:"calls"` // requests to KMS
	Price   float64     `json:"price"` // US dollars
}

// A PlanRoute is the way from one old key.
type PlanRoute struct {
	From string `json:"from"`
	Route
	Files int `json:"files"`
	Keys  int `json:"keys"` // wrapped keys: one a file, or one for many in a volume whose envelope is shared
}

// pricePerCall: AWS KMS bills $0.03 for 10,000 symmetric requests.
const pricePerCall = 0.03 / 10000

// Outcome is what became of one file.
type Outcome string

// The outcomes.
const (
	Changed Outcome = "changed" // its header was changed now
	Already Outcome = "already" // nothing is to be done
	Empty   Outcome = "empty"   // holds no bytes: its next contents get a fresh key
	Gone    Outcome = "gone"    // deleted or renamed meanwhile: somebody has to look again
	Bad     Outcome = "bad"     // no valid header of this volume: nothing to work from
	Strange Outcome = "strange" // its header is under keys that this client does not trust
	Failed  Outcome = "failed"  // could be under the old key still
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

// A Problem is a file that was not dealt with, and why.
type Problem struct {
	Path    string
	Outcome Outcome
	Err     error
}

// A Report is what a run did. The counts of files are those of the last pass,
// Changed, Verified and Calls those of all.
type Report struct {
	Plan      Plan
	Now       Census // after the last pass
	Changed   int
	Already   int
	Bad       int
	Strange   int
	Failed    int
	Gone      int
	Verified  int
	Remaining int // copies under the keys that are to leave, after the last pass
	Calls     int
	Passes    int
	Problems  []Problem // the first of them, at most maxProblems
	Done      bool      // everything that was asked for
	Retired   []string  // the keys that left kmsfs.toml
}

const maxProblems = 1000
