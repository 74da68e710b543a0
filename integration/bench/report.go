package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/integration/peers"
)

// A report is what a run found, as text in Markdown.
type report struct {
	began       time.Time
	took        time.Duration
	machine     []string
	absent      []string
	rival       string // the gocryptfs that targets speak of
	rounds      int
	sizes       sizes
	beside      *race
	kms         []*kmsRow
	scale       []*scaling
	memories    []*entrant // after the steps
	scaleMemory []*entrant // after large numbers
	cold        coldness
}

func (p *report) begin(b *bench) {
	p.began, p.rounds, p.sizes, p.cold = time.Now(), b.rounds, b.job.Sizes, b.cold
	p.machine = machine(b.w)
}

// machine describes where it was measured, without saying whose it is.
func machine(w *peers.World) []string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	kind, _ := w.Run("findmnt", "-n", "-o", "FSTYPE", "-T", w.Root)
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(info), "model name")
	model, _, _ = strings.Cut(strings.TrimLeft(model, "\t :"), "\n")
	mem, _ := os.ReadFile("/proc/meminfo")
	var kib int64
	_, _ = fmt.Sscanf(string(mem), "MemTotal: %d kB", &kib)
	return []string{
		fmt.Sprintf("%d CPUs (%s), %d GiB of memory", runtime.NumCPU(), model, kib>>20),
		fmt.Sprintf("Linux %s, %s, %s", unix.ByteSliceToString(u.Release[:]), runtime.GOARCH, runtime.Version()),
		fmt.Sprintf("backing file system: %s", strings.TrimSpace(string(kind))),
	}
}

// text is the whole report but for the notes.
func (p *report) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %s in %v, %d rounds:\n\n", p.began.UTC().Format("2006-01-02"), p.took, p.rounds)
	for _, m := range p.machine {
		fmt.Fprintf(&b, "- %s\n", m)
	}
	if p.beside != nil {
		for _, e := range p.beside.entrants {
			if e.version != "" {
				fmt.Fprintf(&b, "- %s: %s\n", e.peer.Name, e.version)
			}
		}
	}
	for _, a := range p.absent {
		fmt.Fprintf(&b, "- absent: %s\n", a)
	}
	for _, section := range []struct {
		show bool
		text func(*strings.Builder)
	}{
		{true, p.targets}, {p.beside != nil, p.times}, {p.beside != nil, p.others}, {p.beside != nil, p.cpu}, {true, p.memory},
		{p.kms != nil, p.latency}, {p.scale != nil, p.scaling}, {p.beside != nil, p.meaning},
	} {
		if section.show {
			section.text(&b)
		}
	}
	return b.String()
}

// Notes are written by hand between these lines.
const (
	notesBegin = "<!-- notes: kept by make bench -->\n"
	notesEnd   = "<!-- end of notes -->\n"
)

const heading = `# Benchmarks

Written by ` + "`make bench`" + ` (as root; ` + "`make bench BENCH=-quick`" + ` takes minutes and writes
nothing). Figures of one run, interleaved, can be compared with each other, and with
nothing else.

`

// write writes the report and its plot, and keeps the notes.
func (p *report) write(file string) error {
	notes := "\n"
	if old, err := os.ReadFile(file); err == nil {
		_, rest, _ := bytes.Cut(old, []byte(notesBegin))
		if kept, _, ok := bytes.Cut(rest, []byte(notesEnd)); ok {
			notes = string(kept)
		}
	}
	plot := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file)) + ".svg"
	body := heading
	if p.beside != nil {
		body += "![Time as a multiple of the loopback's](" + plot + ")\n\n"
		if err := os.WriteFile(filepath.Join(filepath.Dir(file), plot), []byte(p.plot()), 0o644); err != nil {
			return err
		}
	}
	body += p.text() + "\n" + notesBegin + notes + notesEnd
	return os.WriteFile(file, []byte(body), 0o644)
}

// ratios are an entrant's times as multiples of another's, round by round, sorted.
func (r *race) ratios(step, of, to string) (list []float64) {
	a, b := r.samples[step][of], r.samples[step][to]
	for i := range min(len(a), len(b)) {
		list = append(list, a[i].wall.Seconds()/b[i].wall.Seconds())
	}
	slices.Sort(list)
	return list
}

func middle[T any](sorted []T) T { return sorted[len(sorted)/2] }

// spread shows the median and, in brackets, the extremes.
func spread(list []float64) string {
	switch len(list) {
	case 0:
		return "-"
	case 1:
		return fmt.Sprintf("%.2f", list[0])
	}
	return fmt.Sprintf("%.2f (%.2f-%.2f)", middle(list), list[0], list[len(list)-1])
}

func wall(samples []sample) time.Duration {
	var list []time.Duration
	for _, s := range samples {
		list = append(list, s.wall)
	}
	return median(list)
}

// measured are the steps that were measured and wanted, in order.
func (r *race) measured() (list []step) {
	for _, g := range groups {
		for _, s := range g.steps {
			if (r.wanted(s.name) || r.wanted(g.name)) && len(r.samples[s.name][peers.Kmsfs.Short]) > 0 {
				list = append(list, s)
			}
		}
	}
	return list
}

func (p *report) times(b *strings.Builder) {
	ours, plain := peers.Kmsfs.Short, peers.Loopback.Short
	fmt.Fprintf(b, "\n## Times\n\nSeconds are medians; ratios are medians of the ratios of each round, with the smallest and the largest.\n\n")
	fmt.Fprintf(b, "| step | backing store, s | loopback, s | kmsfs, s | gocryptfs, s | kmsfs / loopback | gocryptfs / loopback | times as fast as gocryptfs |\n|---|---|---|---|---|---|---|---|\n")
	for _, s := range p.beside.measured() {
		fmt.Fprintf(b, "| %s |", s.name)
		for _, short := range []string{peers.Backing.Short, plain, ours, p.rival} {
			if list := p.beside.samples[s.name][short]; len(list) > 0 {
				fmt.Fprintf(b, " %.3f |", wall(list).Seconds())
			} else {
				fmt.Fprint(b, " - |")
			}
		}
		fmt.Fprintf(b, " %s | %s | %s |\n", spread(p.beside.ratios(s.name, ours, plain)), spread(p.beside.ratios(s.name, p.rival, plain)), spread(p.beside.ratios(s.name, p.rival, ours)))
	}
}

// others shows everybody else, as multiples of kmsfs.
func (p *report) others(b *strings.Builder) {
	var list []*entrant
	for _, e := range p.beside.entrants {
		if !e.essential() && e.short() != p.rival {
			list = append(list, e)
		}
	}
	if len(list) == 0 {
		return
	}
	fmt.Fprint(b, "\n## Other peers\n\nHow many times as fast kmsfs is.\n\n| step |")
	for _, e := range list {
		fmt.Fprintf(b, " %s |", e.peer.Name)
	}
	fmt.Fprintf(b, "\n|---|%s\n", strings.Repeat("---|", len(list)))
	for _, s := range p.beside.measured() {
		fmt.Fprintf(b, "| %s |", s.name)
		for _, e := range list {
			switch r := p.beside.ratios(s.name, e.short(), peers.Kmsfs.Short); {
			case len(r) > 0:
				fmt.Fprintf(b, " %.2f |", middle(r))
			case p.beside.failed[s.name][e.short()] != nil:
				fmt.Fprint(b, " fails |")
			default:
				fmt.Fprint(b, " - |")
			}
		}
		fmt.Fprintln(b)
	}
	for _, e := range list {
		if e.dead != nil {
			fmt.Fprintf(b, "\n%s was taken out: %v.\n", e.peer.Name, e.dead)
		}
	}
}

func (p *report) cpu(b *strings.Builder) {
	var list []*entrant
	for _, e := range p.beside.entrants {
		if e.short() != peers.Backing.Short {
			list = append(list, e)
		}
	}
	fmt.Fprint(b, "\n## CPU seconds of the daemon\n\n| step |")
	for _, e := range list {
		fmt.Fprintf(b, " %s |", e.peer.Name)
	}
	fmt.Fprintf(b, "\n|---|%s\n", strings.Repeat("---|", len(list)))
	for _, s := range p.beside.measured() {
		fmt.Fprintf(b, "| %s |", s.name)
		for _, e := range list {
			var used []time.Duration
			for _, sm := range p.beside.samples[s.name][e.short()] {
				used = append(used, sm.cpu)
			}
			if len(used) == 0 {
				fmt.Fprint(b, " - |")
				continue
			}
			fmt.Fprintf(b, " %.2f |", median(used).Seconds())
		}
		fmt.Fprintln(b)
	}
}

func (p *report) memory(b *strings.Builder) {
	fmt.Fprintf(b, "\n## Memory of the daemon\n\nMiB resident: at most (VmHWM), and %v after the run.\n\n| daemon | peak | idle |\n|---|---|---|\n", restFor)
	for _, list := range p.daemons() {
		for _, e := range list.entrants {
			if e.peak > 0 {
				fmt.Fprintf(b, "| %s%s | %.0f | %.0f |\n", e.peer.Name, list.after, float64(e.peak)/1024, float64(e.idle)/1024)
			}
		}
	}
}

func (p *report) latency(b *strings.Builder) {
	fmt.Fprintf(b, "\n## Latency of KMS\n\n%d files of 2 KiB are created, then, on a new mount and cold, read by tar. KMS is a server on\nloopback, whose own work is on the same CPUs.\n\n", p.sizes.Files)
	fmt.Fprint(b, "| keys | create, s | of the local key's time | KMS calls a file | read all, s | of the local key's time | KMS calls a file |\n|---|---|---|---|---|---|---|\n")
	for _, row := range p.kms {
		create, read := p.kms[0].create, p.kms[0].read
		fmt.Fprintf(b, "| %s | %.2f | %s | %.3f | %.2f | %s | %.3f |\n", row.name, median(slices.Clone(row.create)).Seconds(), spread(over(row.create, create)), float64(row.createCalls)/float64(p.sizes.Files),
			median(slices.Clone(row.read)).Seconds(), spread(over(row.read, read)), float64(row.readCalls)/float64(p.sizes.Files))
	}
	for _, row := range p.kms {
		for i, what := range []string{kmsCreate, kmsRead} {
			if row.delay > 0 && len(row.live[i]) > 0 {
				fmt.Fprintf(b, "\nCounters of the mount after %s, %s: %s.\n", what, row.name, strings.Join(lines(row.live[i]), ", "))
			}
		}
	}
}

// over divides times round by round.
func over(a, b []time.Duration) (list []float64) {
	for i := range min(len(a), len(b)) {
		list = append(list, a[i].Seconds()/b[i].Seconds())
	}
	slices.Sort(list)
	return list
}

func (p *report) scaling(b *strings.Builder) {
	fmt.Fprint(b, "\n## Large numbers\n\nMicroseconds an operation, at a small and a large size; cost grows linearly where growth is 1.\nDirectories of the deep tree hold 10 files and 3 directories each.\n\n")
	fmt.Fprint(b, "| what | sizes | kmsfs, small | large | growth | loopback, small | large | growth |\n|---|---|---|---|---|---|---|---|\n")
	for _, s := range p.scale {
		if s.cost[peers.Kmsfs.Short][0] == 0 {
			continue // it was not asked for
		}
		fmt.Fprintf(b, "| %s | %s, %s |", s.what, s.small, s.large)
		for _, short := range []string{peers.Kmsfs.Short, peers.Loopback.Short} {
			c := s.cost[short]
			fmt.Fprintf(b, " %.1f | %.1f | %.2f |", us(c[0]), us(c[1]), us(c[1])/us(c[0]))
		}
		fmt.Fprintln(b)
	}
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

func (p *report) meaning(b *strings.Builder) {
	b.WriteString(strings.Replace(`
## What is timed

Each file system has a backing directory of its own on the same store, and its defaults;
kmsfs has a local key. Before each step what is dirty is written out, and the caches are made
cold: @@COLD@@. (CryFS, securefs, EncFS and rclone,
which take seconds to mount, only lose their inodes from the kernel's caches; pgbench begins
warm.) No step but those that say so ends with an fsync: at close all data are with the
daemon, and with the backing store's page cache. The loopback's daemon serves contents itself:
passthrough, by which the kernel would do that, is off. rclone writes through a cache on disk
(--vfs-cache-mode full --vfs-write-back 0s).

`, "@@COLD@@", map[coldness]string{
		coldMount: "the mount is made anew,\nand the backing store's cache stays, so that file systems are compared and not the disk",
		coldAll:   "all caches of the machine are\ndropped, the backing store's too",
	}[p.cold], 1))
	for _, s := range p.beside.measured() {
		fmt.Fprintf(b, "- %s: %s\n", s.name, s.timed(p.sizes))
	}
}
