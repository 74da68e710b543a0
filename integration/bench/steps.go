package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A job is what the process of one step gets to know.
type job struct {
	Dir   string // where to work; it is there
	Tree  string // a tar archive of source code
	Clone string // a bare git repository of it
	Sizes sizes
}

// sizes are how much a step does.
type sizes struct {
	Big     int64 // bytes of the large file
	Random  int   // calls of 4 KiB at random
	Appends int   // of 100 bytes
	Fsyncs  int   // of those, with fsync
	Files   int   // small ones
	FanOut  int   // of them in a directory
	Rows    int   // inserted into SQLite in one transaction
	Commits int   // transactions of one row each
	Trans   int   // of each of pgbench's 4 clients
	Many    int   // small files, where it is their number that is tried
	Few     int   // to compare with
	Sparse  int64 // bytes of the sparse file
	Open    int   // files at a time
}

const smallFile = 2 << 10 // bytes

func sizesFor(scale float64) sizes {
	n := func(full, least int) int { return max(least, int(float64(full)*scale)) }
	return sizes{
		Big: int64(n(256, 32)) << 20, Random: n(8192, 500), Appends: n(10000, 1000), Fsyncs: n(200, 20),
		Files: n(20000, 500), FanOut: 100, Rows: n(200000, 10000), Commits: n(300, 30), Trans: n(250, 25),
		Many: n(200000, 5000), Few: n(20000, 500), Sparse: int64(n(20, 2)) << 30, Open: n(1000, 100),
	}
}

// A step is what is measured. The time of run counts, which runs in a process of its
// own; the rest does not.
type step struct {
	name   string
	timed  func(s sizes) string // what exactly
	slow   bool                 // not for peers that take minutes
	reads  func(j job) string   // a file from elsewhere that it reads, if not nil
	tool   string               // a program that it runs, if not ""
	before func(j job) error    // if not nil, and before it gets cold
	run    func(j job) error
	timer  func(j job) (time.Duration, error) // in place of run: it measures itself
	after  func(j job) error                  // if not nil
	ops    int                                // that it does, where the cost of one is told
}

// A group is steps that need what the ones before them made. It begins and ends with
// nothing.
type group struct {
	name  string
	keeps bool // what it made in the first round serves the others
	steps []step
}

func text(format string, args func(s sizes) []any) func(s sizes) string {
	return func(s sizes) string { return fmt.Sprintf(format, args(s)...) }
}

func mib(n int64) int64 { return n >> 20 }

func bigArg(s sizes) []any    { return []any{mib(s.Big)} }
func filesArg(s sizes) []any  { return []any{s.Files} }
func randomArg(s sizes) []any { return []any{s.Random} }

// groups are all that there is to measure, in order.
var groups = []group{
	{name: "sequential", steps: []step{
		{name: "write 128 KiB", timed: text("create a file, write %d MiB in calls of 128 KiB, close", bigArg),
			run: func(j job) error { return writeBig(j, "a", 128<<10) }},
		{name: "write 1 MiB", timed: text("create a file, write %d MiB in calls of 1 MiB, close", bigArg),
			run: func(j job) error { return writeBig(j, "b", 1<<20) }},
		{name: "read 128 KiB", timed: text("open, read %d MiB in calls of 128 KiB, close", bigArg),
			run: func(j job) error { return readBig(j, "a", 128<<10) }},
		{name: "read 1 MiB", timed: text("open, read %d MiB in calls of 1 MiB, close", bigArg),
			run: func(j job) error { return readBig(j, "b", 1<<20) }},
		{name: "random read 4 KiB", timed: text("open the large file, %d reads of 4 KiB at random multiples of 4 KiB, close", randomArg),
			run: func(j job) error { return random(j, false) }},
		{name: "random write 4 KiB", timed: text("open the large file, %d writes of 4 KiB at random multiples of 4 KiB, close; no fsync", randomArg),
			run: func(j job) error { return random(j, true) }},
	}},
	{name: "append", steps: []step{
		{name: "append 100 bytes", timed: text("open a new file with O_APPEND, %d writes of 100 bytes, close", func(s sizes) []any { return []any{s.Appends} }),
			run: func(j job) error { return appends(j, "a", j.Sizes.Appends, false) }},
		{name: "append 100 bytes, fsync", slow: true, timed: text("the same with %d writes and an fsync after each", func(s sizes) []any { return []any{s.Fsyncs} }),
			run: func(j job) error { return appends(j, "b", j.Sizes.Fsyncs, true) }},
	}},
	{name: "small files", steps: []step{
		{name: "create", timed: text("mkdir and create %d files of 2 KiB, %d in a directory: open, write, close", func(s sizes) []any { return []any{s.Files, s.FanOut} }),
			run: create},
		{name: "ls -lR", timed: text("ls -lR of the %d files", filesArg), tool: "ls", run: func(j job) error { return program(j, "ls", "-lR", j.Dir) }},
		{name: "find", timed: text("find of the %d files", filesArg), tool: "find", run: func(j job) error { return program(j, "find", j.Dir) }},
		{name: "stat", timed: text("lstat of each of the %d files by its known name", filesArg),
			run: func(j job) error {
				return eachFile(j, func(path string) error { _, err := os.Lstat(path); return err })
			}},
		{name: "read small", timed: text("open, read whole, close each of the %d files by its known name", filesArg),
			run: func(j job) error {
				buf := make([]byte, 2*smallFile)
				return eachFile(j, func(path string) error { return readSmall(path, buf) })
			}},
		{name: "rm -rf", timed: text("rm -rf of the %d files", filesArg), tool: "rm", run: func(j job) error { return program(j, "rm", "-rf", filepath.Join(j.Dir, "files")) }},
	}},
	{name: "untar", steps: []step{
		{name: "untar", timed: func(sizes) string { return "tar x of the source code of Go's standard library and tools" },
			tool: "tar", reads: func(j job) string { return j.Tree },
			run: func(j job) error { return program(j, "tar", "-xf", j.Tree, "-C", j.Dir) }},
	}},
	{name: "git", keeps: true, steps: []step{
		{name: "git status", slow: true, timed: func(sizes) string { return "git status in a clone of the same source code" },
			tool: "git", before: clone,
			run: func(j job) error {
				return program(j, "git", "-C", filepath.Join(j.Dir, "clone"), "-c", "core.preloadIndex=false", "status", "--porcelain")
			}},
	}},
	{name: "sqlite", steps: []step{
		{name: "SQLite, one transaction", timed: text("sqlite3: %d rows of about 100 bytes and an index, one transaction, journal DELETE", func(s sizes) []any { return []any{s.Rows} }),
			tool: "sqlite3", run: func(j job) error { return sqlite(j, "a", oneTransaction(j.Sizes.Rows)) }},
		{name: "SQLite, many transactions", slow: true, timed: text("sqlite3: %d transactions of one row, journal WAL, synchronous FULL", func(s sizes) []any { return []any{s.Commits} }),
			tool: "sqlite3", run: func(j job) error { return sqlite(j, "b", manyTransactions(j.Sizes.Commits)) }},
	}},
	{name: "pgbench", keeps: true, steps: []step{
		{name: "pgbench", slow: true, timed: text("pgbench on PostgreSQL with its defaults: 4 clients, %d transactions each, scale 5", func(s sizes) []any { return []any{s.Trans} }),
			before: startPostgres, timer: pgbench, after: stopPostgres},
	}},
}

func readBig(j job, name string, call int) error {
	f, err := os.Open(filepath.Join(j.Dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, call)
	for done := int64(0); done < j.Sizes.Big; {
		n, err := f.Read(buf)
		if err != nil {
			return err
		}
		done += int64(n)
	}
	return nil
}

func writeBig(j job, name string, call int) error {
	f, err := os.OpenFile(filepath.Join(j.Dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	buf := make([]byte, call)
	fillBytes(buf)
	for done := int64(0); done < j.Sizes.Big && err == nil; done += int64(call) {
		_, err = f.Write(buf)
	}
	return errors.Join(err, f.Close())
}

func fillBytes(p []byte) {
	r := rand.NewPCG(1, 2)
	for i := range p {
		p[i] = byte(r.Uint64())
	}
}

func random(j job, write bool) error {
	flags := os.O_RDONLY
	if write {
		flags = os.O_WRONLY
	}
	f, err := os.OpenFile(filepath.Join(j.Dir, "b"), flags, 0)
	if err != nil {
		return err
	}
	buf := make([]byte, 4<<10)
	fillBytes(buf)
	r := rand.New(rand.NewPCG(3, 4))
	for i := 0; i < j.Sizes.Random && err == nil; i++ {
		at := r.Int64N(j.Sizes.Big/int64(len(buf))) * int64(len(buf))
		if write {
			_, err = f.WriteAt(buf, at)
		} else {
			_, err = f.ReadAt(buf, at)
		}
	}
	return errors.Join(err, f.Close())
}

func appends(j job, name string, n int, fsync bool) error {
	f, err := os.OpenFile(filepath.Join(j.Dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	line := make([]byte, 100)
	fillBytes(line)
	for i := 0; i < n && err == nil; i++ {
		if _, err = f.Write(line); err == nil && fsync {
			err = f.Sync()
		}
	}
	return errors.Join(err, f.Close())
}

// eachFile calls op with the path of each small file.
func eachFile(j job, op func(path string) error) error {
	for i := range j.Sizes.Files {
		if err := op(filepath.Join(j.Dir, "files", "d"+strconv.Itoa(i/j.Sizes.FanOut), "f"+strconv.Itoa(i))); err != nil {
			return err
		}
	}
	return nil
}

func create(j job) error {
	content := make([]byte, smallFile)
	fillBytes(content)
	i := 0
	return eachFile(j, func(path string) error {
		if i++; (i-1)%j.Sizes.FanOut == 0 {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
		}
		return createOne(path, content)
	})
}

// open makes the one system call that a C program would. Signals of Go's own scheduler
// interrupt it, so it is tried again as package os does.
func open(path string, flags int) (fd int, err error) {
	for {
		if fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0o644); err != unix.EINTR {
			return fd, err
		}
	}
}

func createOne(path string, content []byte) error {
	fd, err := open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)
	if err != nil {
		return &fs.PathError{Op: "create", Path: path, Err: err}
	}
	_, err = unix.Write(fd, content)
	return errors.Join(err, unix.Close(fd))
}

func readSmall(path string, buf []byte) error {
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := unix.Read(fd, buf)
	if err == nil && n != smallFile {
		err = fmt.Errorf("reading %s: %d bytes: %w", path, n, io.ErrUnexpectedEOF)
	}
	return errors.Join(err, unix.Close(fd))
}

// program runs one, whose output is thrown away.
func program(_ job, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// warm reads what a step takes from elsewhere into the page cache.
func (s step) warm(j job) error {
	if s.tool != "" {
		if err := exec.Command(s.tool, "--version").Run(); err != nil {
			return fmt.Errorf("%s --version: %w", s.tool, err)
		}
	}
	if s.reads == nil {
		return nil
	}
	f, err := os.Open(s.reads(j))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

// clone makes the clone once.
func clone(j job) error {
	to := filepath.Join(j.Dir, "clone")
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	return program(j, "git", "clone", "-q", "--no-hardlinks", j.Clone, to)
}

// runStep is the process of one step: it is told what to do on its command line, and
// says on standard output how many nanoseconds it took.
func runStep(args []string) error {
	if len(args) != 3 {
		return errors.New("step PHASE NAME JOB is for bench's own use")
	}
	var j job
	if err := json.Unmarshal([]byte(args[2]), &j); err != nil {
		return err
	}
	for _, g := range slices.Concat(groups, scaleGroups(j.Sizes), []group{{steps: kmsSteps}}) {
		for _, s := range g.steps {
			if s.name == args[1] {
				return s.phase(args[0], j)
			}
		}
	}
	return fmt.Errorf("there is no step %q", args[1])
}

func (s step) phase(phase string, j job) error {
	switch {
	case phase == "before" && s.before != nil:
		return s.before(j)
	case phase == "after" && s.after != nil:
		return s.after(j)
	case phase != "run":
		return nil
	}
	start := time.Now()
	var took time.Duration
	var err error
	if s.timer != nil {
		took, err = s.timer(j)
	} else {
		err = s.run(j)
		took = time.Since(start)
	}
	fmt.Println(took.Nanoseconds())
	return err
}
