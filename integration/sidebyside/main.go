// Command sidebyside runs suites of file system tests on kmsfs and on what it can be
// compared to, on one machine in one run, and prints counts: the backing file system
// itself, kmsfs with plain and with encrypted names, go-fuse's loopback (what a FUSE
// file system that changes nothing passes), and gocryptfs.
//
//	go run ./integration/sidebyside [-dir DIR] [-pjdfstest DIR] [-xfstests DIR] [-only kmsfs]
//
// The suites are the scenes of integration/posix, go-fuse's posixtest, and pjdfstest
// and xfstests if built ones are given. It runs as root. Failures of the suites are
// counted and logged, and are this command's failure only where kmsfs is worse than
// allowed. Of xfstests the generic quick group is run, with both its devices, on ext4
// and on xfs beneath; of its failures on kmsfs each has its reason in departures.go.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "sidebyside:", err)
		os.Exit(1)
	}
}

func run() error {
	parent := flag.String("dir", "", "where to work: on the backing file system in question (default: a temporary directory)")
	pjdfstest := flag.String("pjdfstest", os.Getenv("PJDFSTEST"), "a built pjdfstest's directory (default: $PJDFSTEST; without one it is left out)")
	xfstests := flag.String("xfstests", os.Getenv("XFSTESTS"), "a built xfstests' directory (default: $XFSTESTS; without one it is left out)")
	checkArgs := flag.String("check", "-fuse -g quick", "what of xfstests to run: arguments of its check")
	beneath := flag.String("beneath", "ext4,xfs", "the file systems that xfstests' devices lie on")
	alone := flag.Bool("xfstests-only", false, "leave out the other suites")
	only := flag.String("only", "", "only the file systems whose names hold this")
	logs := flag.String("logs", "", "where to keep what the suites say (default: they are removed)")
	flag.Parse()
	w, err := newWorld(*parent, *logs)
	if err != nil {
		return err
	}
	defer w.close()
	list, err := w.suites(*pjdfstest)
	if err != nil {
		return err
	}
	if *alone {
		list = nil
	}
	var backings []string
	if *xfstests != "" {
		if *xfstests, err = builtXfstests(*xfstests); err != nil {
			return err
		}
		backings = strings.Split(*beneath, ",")
	}
	var rows []row
	var bad error
	for _, fs := range fileSystems {
		if !strings.Contains(fs.name, *only) {
			continue
		}
		r, err := w.try(fs, list)
		if err != nil {
			return fmt.Errorf("%s: %w", fs.name, err)
		}
		r.xfstests = map[string]count{}
		for _, backing := range backings {
			if fs.device == nil {
				continue
			}
			fmt.Fprintln(os.Stderr, "sidebyside: xfstests on", fs.name, "on", backing)
			v, err := w.xfstests(fs, *xfstests, backing, strings.Fields(*checkArgs))
			if err != nil {
				return fmt.Errorf("%s: %w", fs.name, err)
			}
			if fs.ours {
				bad = errors.Join(bad, named(fs.name, v.judge(backing)))
			}
			r.xfstests[backing] = v.count()
		}
		rows = append(rows, r)
	}
	show(list, backings, rows)
	return errors.Join(bad, judge(list, rows))
}

func named(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s:\n%w", name, err)
}

// A row is what the suites say of one file system.
type row struct {
	fs       fileSystem
	counts   []count
	xfstests map[string]count // by backing store
}

// A count is the end of one suite on one file system.
type count struct{ passed, failed int }

func show(list []suite, backings []string, rows []row) {
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(out, "failed of all")
	for _, s := range list {
		fmt.Fprintf(out, "\t%s", s.name)
	}
	for _, backing := range backings {
		fmt.Fprintf(out, "\txfstests on %s", backing)
	}
	fmt.Fprintln(out)
	for _, r := range rows {
		fmt.Fprint(out, r.fs.name)
		for _, c := range r.counts {
			fmt.Fprintf(out, "\t%d of %d", c.failed, c.passed+c.failed)
		}
		for _, backing := range backings {
			if c, tried := r.xfstests[backing]; tried {
				fmt.Fprintf(out, "\t%d of %d", c.failed, c.passed+c.failed)
			} else {
				fmt.Fprint(out, "\t-")
			}
		}
		fmt.Fprintln(out)
	}
	out.Flush()
}

// judge compares kmsfs with what POSIX.md allows it.
func judge(list []suite, rows []row) (err error) {
	for _, r := range rows {
		for i, c := range r.counts {
			most, judged := r.fs.allowed[list[i].name]
			switch {
			case c.passed == 0:
				err = errors.Join(err, fmt.Errorf("%s on %s: nothing passed", list[i].name, r.fs.name))
			case judged && c.failed > most:
				err = errors.Join(err, fmt.Errorf("%s on %s: %d failed, %d are allowed", list[i].name, r.fs.name, c.failed, most))
			}
		}
	}
	return err
}

// try mounts a file system, runs the suites in it and unmounts it.
func (w *world) try(fs fileSystem, list []suite) (r row, err error) {
	fmt.Fprintln(os.Stderr, "sidebyside: trying", fs.name)
	dir, end, err := fs.mount(w, filepath.Join(w.root, "on", fs.short))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, end()) }()
	r.fs = fs
	for _, s := range list {
		sub := filepath.Join(dir, s.name)
		if err := errors.Join(os.Mkdir(sub, 0o755), os.Chmod(dir, 0o755)); err != nil {
			return r, err
		}
		said, err := s.run(sub)
		if err != nil {
			return r, fmt.Errorf("%s: %w", s.name, err)
		}
		if err := w.keep(fs.short+"."+s.name+".log", said); err != nil {
			return r, err
		}
		r.counts = append(r.counts, s.count(said))
	}
	return r, nil
}
