package main

import (
	"fmt"
	"strings"
	"time"

	"kmsfs/integration/peers"
)

// A target is what kmsfs is to reach in a step; zero is no target.
type target struct {
	step   string
	faster float64 // times as fast as gocryptfs, at least
	most   float64 // of the loopback's time
}

var targets = []target{
	{"write 1 MiB", 1.6, 1}, {"write 128 KiB", 1.6, 1},
	{"read 1 MiB", 1.4, 1.2}, {"read 128 KiB", 1.4, 1.2},
	{"random write 4 KiB", 4, 1.0 / 3}, {"random read 4 KiB", 1, 1.05},
	{"append 100 bytes", 30, 1.0 / 20},
	{"create", 1.3, 0.8}, {"ls -lR", 6, 0.2}, {"stat", 1.2, 0.9}, {"find", 1.2, 0.9}, {"read small", 1.4, 0.8}, {"rm -rf", 1, 1},
	{"untar", 1, 0}, {"git status", 1, 0}, {"SQLite, one transaction", 1, 0}, {"SQLite, many transactions", 1, 0}, {"pgbench", 1, 0},
}

// Targets of KMS at 10 ms a call, as multiples of the local key's time, and of memory.
const (
	kmsTarget     = 10 * time.Millisecond
	mostCreate    = 1.2
	mostRead      = 1.5
	mostEither    = 1.05 // with an intermediate key
	mostCalls     = 20   // with that, for all opens together
	mostIdle      = 64   // MiB
	mostPeak      = 256  // MiB
	verdictMet    = "met"
	verdictMissed = "**missed**"
)

func verdict(met bool) string {
	if met {
		return verdictMet
	}
	return verdictMissed
}

// targets shows each target and whether it is met.
func (p *report) targets(b *strings.Builder) {
	fmt.Fprint(b, "\n## Targets\n\n| what | target | measured | |\n|---|---|---|---|\n")
	row := func(what, want, got string, met bool) {
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", what, want, got, verdict(met))
	}
	if p.beside != nil {
		for _, t := range targets {
			p.target(t, row)
		}
	}
	for _, k := range p.kms {
		if k.delay == kmsTarget {
			p.kmsTargets(k, row)
		}
	}
	for _, list := range p.daemons() {
		for _, e := range list.entrants {
			if e.short() == peers.Kmsfs.Short && e.peak > 0 {
				row("memory when idle"+list.after, fmt.Sprintf("at most %d MiB", mostIdle), fmt.Sprintf("%d MiB", e.idle>>10), e.idle>>10 <= mostIdle)
				row("memory under load"+list.after, fmt.Sprintf("at most %d MiB", mostPeak), fmt.Sprintf("%d MiB", e.peak>>10), e.peak>>10 <= mostPeak)
			}
		}
	}
}

type daemons struct {
	entrants []*entrant
	after    string
}

func (p *report) daemons() []daemons {
	return []daemons{{p.memories, ""}, {p.scaleMemory, ", large numbers"}}
}

func (p *report) target(t target, row func(what, want, got string, met bool)) {
	ours := peers.Kmsfs.Short
	if r := p.beside.ratios(t.step, p.rival, ours); len(r) > 0 && t.faster > 0 {
		row(t.step, fmt.Sprintf("%.3g times as fast as gocryptfs", t.faster), spread(r), middle(r) >= t.faster)
	}
	if r := p.beside.ratios(t.step, ours, peers.Loopback.Short); len(r) > 0 && t.most > 0 {
		row(t.step, fmt.Sprintf("at most %.3g of the loopback's time", t.most), spread(r), middle(r) <= t.most)
	}
}

func (p *report) kmsTargets(k *kmsRow, row func(what, want, got string, met bool)) {
	create, read := mostCreate, mostRead
	if len(k.init) > 2 { // more than --key KEY: with an intermediate key
		create, read = mostEither, mostEither
		row(k.name+": opening all files", fmt.Sprintf("at most %d calls", mostCalls), fmt.Sprint(k.readCalls), k.readCalls <= mostCalls)
	}
	if r := over(k.create, p.kms[0].create); len(r) > 0 {
		row(k.name+": create", fmt.Sprintf("at most %.3g of the local key's time", create), spread(r), middle(r) <= create)
	}
	if r := over(k.read, p.kms[0].read); len(r) > 0 {
		row(k.name+": read all", fmt.Sprintf("at most %.3g of the local key's time", read), spread(r), middle(r) <= read)
	}
}
