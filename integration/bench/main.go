// Command bench measures kmsfs side by side with what it can be compared to, in one
// run and interleaved, and prints medians. Figures of different runs, or of
// different machines, say nothing about each other.
//
//	go run ./integration/bench rekey [-files 10000,200000] [-rounds 3]
//	go run ./integration/bench latency [-files 20000] [-latency 10ms,25ms] [-rounds 3]
package main

import (
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 && args[0] == "latency" {
		return runLatency(args[1:])
	}
	if len(args) == 0 || args[0] != "rekey" {
		return fmt.Errorf("say what to measure: rekey or latency")
	}
	fl := flag.NewFlagSet("rekey", flag.ContinueOnError)
	sizes := fl.String("files", "10000,200000", "numbers of files, separated by commas")
	kinds := fl.String("keys", "local,kms", "which keys, separated by commas")
	rounds := fl.Int("rounds", 3, "how often each is measured")
	dir := fl.String("dir", "", "where to make the volumes; it should be on the file system in question (default: a temporary directory)")
	if err := fl.Parse(args[1:]); err != nil {
		return err
	}
	var list []int
	for _, s := range strings.Split(*sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("-files: %q is not a number of files", s)
		}
		list = append(list, n)
	}
	return benchRekey(*dir, list, *rounds, strings.Contains(*kinds, "local"), strings.Contains(*kinds, "kms"))
}
