// Command bench measures kmsfs side by side with what it can be compared to, in one
// run and interleaved, and prints medians. Figures of different runs, or of
// different machines, say nothing about each other.
//
//	go run ./integration/bench [-quick] [-rounds N] [-only WHAT] [-peers NAMES] [-scale X] [-doc FILE]
//	go run ./integration/bench rekey [-files 10000,200000] [-rounds 3]
//	go run ./integration/bench latency [-files 20000] [-latency 10ms,25ms] [-rounds 3]
//	go run ./integration/bench inodes [-files 100000,1000000]
//
// It runs as root, which alone may drop the kernel's caches. Targets that are missed
// are told, and are no failure: how fast a machine is, is nobody's fault.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"kmsfs/integration/peers"
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) > 0 && args[0] == "rekey":
		return runRekey(args[1:])
	case len(args) > 0 && args[0] == "latency":
		return runLatency(args[1:])
	case len(args) > 0 && args[0] == "inodes":
		return runInodes(args[1:])
	case len(args) > 0 && args[0] == "step":
		return runStep(args[1:])
	}
	return runAll(args)
}

func runRekey(args []string) error {
	fl := flag.NewFlagSet("rekey", flag.ContinueOnError)
	sizes := fl.String("files", "10000,200000", "numbers of files, separated by commas")
	kinds := fl.String("keys", "local,kms", "which keys, separated by commas")
	rounds := fl.Int("rounds", 3, "how often each is measured")
	dir := fl.String("dir", "", "where to make the volumes; it should be on the file system in question (default: a temporary directory)")
	if err := fl.Parse(args); err != nil {
		return err
	}
	list, err := counts(*sizes)
	if err != nil {
		return err
	}
	return benchRekey(*dir, list, *rounds, strings.Contains(*kinds, "local"), strings.Contains(*kinds, "kms"))
}

func runInodes(args []string) error {
	fl := flag.NewFlagSet("inodes", flag.ContinueOnError)
	sizes := fl.String("files", "100000,1000000", "numbers of files, separated by commas")
	dir := fl.String("dir", "", "where to make the volumes (default: a temporary directory)")
	if err := fl.Parse(args); err != nil {
		return err
	}
	list, err := counts(*sizes)
	if err != nil {
		return err
	}
	return benchInodes(*dir, list)
}

// counts reads numbers of files, separated by commas.
func counts(s string) (list []int, err error) {
	for _, part := range strings.Split(s, ",") {
		n, err := strconv.Atoi(part)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("-files: %q is not a number of files", part)
		}
		list = append(list, n)
	}
	return list, nil
}

// A bench is one run of everything that was asked for.
type bench struct {
	w        *peers.World
	progress io.Writer
	all      []*entrant // that are installed
	rounds   int
	scale    float64
	limit    time.Duration
	only     string
	kmsInit  string
	cold     coldness
	job      job
	report   report
}

// restFor is how long daemons rest before their memory is read.
const restFor = 15 * time.Second

func runAll(args []string) (err error) {
	b := &bench{progress: os.Stderr, limit: 2 * time.Minute}
	fl := flag.NewFlagSet("bench", flag.ContinueOnError)
	quick := fl.Bool("quick", false, "a fifth of the work, two rounds, no slow peers; -doc is not written")
	fl.IntVar(&b.rounds, "rounds", 3, "how often each step is measured")
	others := fl.Int("other-rounds", 1, "the same for CryFS, securefs, EncFS, rclone, and an older gocryptfs beside a newer one")
	fl.StringVar(&b.only, "only", "", "only steps, or groups of them, whose name holds one of `WORDS` separated by commas")
	names := fl.String("peers", "", "only these `PEERS`, separated by commas: gocryptfs, gocryptfs-old, cryfs, securefs, encfs, rclone; \"none\" for none")
	parts := fl.String("parts", "peers,kms,scale", "what to measure: other file systems side by side, latency of KMS, large numbers")
	fl.Float64Var(&b.scale, "scale", 1, "how much each step does, compared with the full size")
	newest := fl.String("gocryptfs", os.Getenv("GOCRYPTFS"), "the newest gocryptfs, built (default: $GOCRYPTFS, else go install)")
	fl.StringVar(&b.kmsInit, "kms-init", "", "further `ARGUMENTS` of kmsfs init, to try with a KMS as well")
	cold := fl.String("cold", string(coldMount), "what is empty before each step: \"mount\", which is made anew, or \"all\" caches of the machine too")
	dir := fl.String("dir", "", "where to work: on the backing file system in question (default: a temporary directory)")
	doc := fl.String("doc", "", "write the report to this `FILE`, and a plot beside it; notes that stand there are kept")
	if err := fl.Parse(args); err != nil {
		return err
	}
	if fl.NArg() > 0 {
		return fmt.Errorf("%q is nothing to measure", fl.Arg(0))
	}
	if b.cold = coldness(*cold); b.cold != coldMount && b.cold != coldAll {
		return fmt.Errorf("-cold is mount or all, not %q", *cold)
	}
	if *quick {
		b.rounds, b.scale = 2, 0.2
		if *names == "" {
			*names = peers.NewestGocryptfs("").Short + "," + peers.Gocryptfs.Short
		}
	}
	// Daemons in the foreground hear Ctrl-C, too, and end; then steps fail, and what is
	// left is cleared away.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	if b.w, err = peers.New(*dir); err != nil {
		return err
	}
	defer b.w.Close()
	if err := b.choose(*newest, *names, *others); err != nil {
		return err
	}
	if err := b.source(); err != nil {
		return err
	}
	b.report.begin(b)
	for _, part := range []struct {
		name string
		run  func() error
	}{{"peers", b.benchPeers}, {"kms", b.benchKMSLatency}, {"scale", b.benchScale}} {
		if !slices.Contains(strings.Split(*parts, ","), part.name) {
			continue
		}
		if err := part.run(); err != nil {
			return err
		}
	}
	b.report.took = time.Since(b.report.began).Round(time.Second)
	fmt.Print(b.report.text())
	if *doc == "" || *quick {
		return nil
	}
	return b.report.write(*doc)
}

// choose finds who takes part.
func (b *bench) choose(newest, names string, others int) error {
	list := []peers.Peer{peers.Backing, peers.Loopback, peers.Kmsfs, peers.NewestGocryptfs(newest), peers.Gocryptfs, peers.Cryfs, peers.Securefs, peers.Encfs, peers.Rclone}
	haveGocryptfs := false
	for _, p := range list {
		e := &entrant{peer: p, rounds: b.rounds}
		if !e.essential() && names != "" && !slices.Contains(strings.Split(names, ","), p.Short) {
			continue
		}
		version, err := p.Find(b.w)
		if absent := (peers.Absent{}); errors.As(err, &absent) {
			fmt.Fprintf(b.progress, "bench: without %s: %v\n", p.Name, err)
			b.report.absent = append(b.report.absent, fmt.Sprintf("%s: %v", p.Name, err))
			continue
		}
		if err != nil {
			return err
		}
		gocryptfs := strings.HasPrefix(p.Short, "gocryptfs")
		if !e.essential() && (!gocryptfs || haveGocryptfs) {
			e.rounds = min(others, b.rounds)
		}
		if gocryptfs && !haveGocryptfs {
			haveGocryptfs = true
			b.report.rival = p.Short
		}
		e.version = version
		b.all = append(b.all, e)
	}
	return nil
}

// find is the entrant of a peer, for a race of its own.
func (b *bench) find(p peers.Peer) *entrant {
	for _, e := range b.all {
		if e.peer.Short == p.Short {
			return &entrant{peer: e.peer, version: e.version, rounds: 1}
		}
	}
	return nil
}

// source makes an archive and a git repository of the source code of Go, which is at
// hand wherever this program is built.
func (b *bench) source() error {
	goroot, err := b.w.Run("go", "env", "GOROOT")
	if err != nil {
		return err
	}
	src := filepath.Join(strings.TrimSpace(string(goroot)), "src")
	if b.scale < 1 {
		src = filepath.Join(src, "cmd")
	}
	b.job = job{Tree: b.w.Path("tree.tar"), Clone: b.w.Path("tree.git"), Sizes: sizesFor(b.scale)}
	tree := b.w.Path("tree")
	for _, args := range [][]string{
		{"cp", "-rL", src, tree},
		{"tar", "-cf", b.job.Tree, "-C", b.w.Root, "tree"},
		{"git", "-C", tree, "init", "-q"},
		{"git", "-C", tree, "add", "-A", "-f"},
		{"git", "-C", tree, "-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "-q", "-m", "all"},
		{"git", "clone", "-q", "--bare", tree, b.job.Clone},
		{"rm", "-rf", tree},
	} {
		if _, err := b.w.Run(args[0], args[1:]...); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) race(entrants []*entrant, rounds int) *race {
	return &race{w: b.w, entrants: entrants, rounds: rounds, limit: b.limit, job: b.job, wanted: b.wanted, cold: b.cold, results: newResults()}
}

func (b *bench) wanted(name string) bool {
	return slices.ContainsFunc(strings.Split(b.only, ","), func(w string) bool { return strings.Contains(name, w) })
}

// benchPeers measures all steps on everybody.
func (b *bench) benchPeers() (err error) {
	r := b.race(b.all, b.rounds)
	defer func() { err = errors.Join(err, r.end()) }()
	if err := r.mount("beside"); err != nil {
		return err
	}
	if err := r.measure(groups); err != nil {
		return err
	}
	b.report.beside = r
	return b.benchMemory()
}

// benchMemory has processes that are not started anew before each step go through the
// steps once, and looks at what they keep.
func (b *bench) benchMemory() (err error) {
	var list []*entrant
	for _, e := range b.all {
		if e.fast() && e.m.PID() != 0 && e.dead == nil {
			list = append(list, &entrant{peer: e.peer, version: e.version, rounds: 1})
		}
	}
	r := b.race(list, 1)
	r.cold = coldInodes
	defer func() { err = errors.Join(err, r.end()) }()
	if err := r.mount("memory"); err != nil {
		return err
	}
	var load []group
	for _, g := range groups {
		if !g.keeps {
			load = append(load, g)
		}
	}
	if err := r.measure(load); err != nil {
		return err
	}
	r.rest()
	b.report.memories = list
	return nil
}
