package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/integration/peers"
)

// scaleGroups come in pairs, a small and a large one; the cost of one operation must
// be about the same.
func scaleGroups(s sizes) (list []group) {
	for _, n := range []int{s.Few, s.Many} {
		list = append(list, manyFiles("one directory", n, flat), manyFiles("deep tree", n, deep))
	}
	for _, size := range []int64{s.Sparse / 20, s.Sparse} {
		list = append(list, sparseFile(size, s.Random*2))
	}
	for _, n := range []int{s.Open / 100, s.Open} {
		list = append(list, openFiles(n, s.Open*10))
	}
	return list
}

// flat puts all files in one directory.
func flat(i int) string { return "f" + strconv.Itoa(i) }

const (
	perDir = 10 // files
	subs   = 3  // subdirectories of each
)

// deep puts perDir files into each directory of a tree.
func deep(i int) string {
	var path []string
	for d := i / perDir; d > 0; d = (d - 1) / subs {
		path = append(path, "d"+strconv.Itoa((d-1)%subs))
	}
	return filepath.Join(strings.Join(path, "/"), "f"+strconv.Itoa(i%perDir))
}

func manyFiles(where string, n int, name func(i int) string) group {
	each := func(op func(path string, i int) error) func(j job) error {
		return func(j job) error {
			for i := range n {
				if err := op(filepath.Join(j.Dir, "many", name(i)), i); err != nil {
					return err
				}
			}
			return nil
		}
	}
	content, buf := make([]byte, smallFile), make([]byte, 2*smallFile)
	made := func(path string, i int) error {
		if i%perDir == 0 {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
		}
		return createOne(path, content)
	}
	title := func(op string) string { return scaleName(where, op, fmt.Sprint(n)) }
	return group{name: fmt.Sprintf("%s %d", where, n), steps: []step{
		{name: title("create"), ops: n, run: each(made)},
		{name: title("ls -lR"), ops: n, run: func(j job) error { return program(j, "ls", "-lR", j.Dir) }},
		{name: title("stat"), ops: n, run: each(func(path string, _ int) error { _, err := os.Lstat(path); return err })},
		{name: title("read"), ops: n, run: each(func(path string, _ int) error { return readSmall(path, buf) })},
		{name: title("rm -rf"), ops: n, run: func(j job) error { return program(j, "rm", "-rf", filepath.Join(j.Dir, "many")) }},
	}}
}

// scaleName joins what is tried and how large it is, so that both can be told again.
func scaleName(where, op, size string) string { return where + ", " + op + ": " + size }

func sparseFile(size int64, n int) group {
	at := func(write bool) func(j job) error {
		return func(j job) error { return randomSparse(filepath.Join(j.Dir, "sparse"), size, n, write) }
	}
	title := func(op string) string { return scaleName("sparse file", op, fmt.Sprintf("%d GiB", size>>30)) }
	if size < 1<<30 {
		title = func(op string) string { return scaleName("sparse file", op, fmt.Sprintf("%d MiB", size>>20)) }
	}
	return group{name: title("all"), steps: []step{
		{name: title("random 4 KiB write"), ops: n, run: at(true)},
		{name: title("random 4 KiB read"), ops: n, run: at(false)},
	}}
}

// randomSparse writes at n random places of a file that was only given a size, with
// an fsync at the end, or reads the same places.
func randomSparse(path string, size int64, n int, write bool) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	if write {
		err = f.Truncate(size)
	}
	r := rand.New(rand.NewPCG(5, 6))
	buf := make([]byte, 4<<10)
	for i := 0; i < n && err == nil; i++ {
		at := r.Int64N(size/int64(len(buf))) * int64(len(buf))
		if write {
			_, err = f.WriteAt(buf, at)
		} else {
			_, err = f.ReadAt(buf, at)
		}
	}
	if write && err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// openFiles opens n files at once and writes to them in turn, then reads.
func openFiles(n, ops int) group {
	return group{name: fmt.Sprintf("open files %d", n), steps: []step{
		{name: scaleName("open files", "append 4 KiB in turn, fsync all", fmt.Sprint(n)), ops: ops, run: func(j job) error {
			return inTurn(j.Dir, n, func(fds []int) error { return writeInTurn(fds, ops) })
		}},
	}}
}

func inTurn(dir string, n int, op func(fds []int) error) (err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	for i := range n {
		fd, err := open(filepath.Join(dir, strconv.Itoa(i)), unix.O_CREAT|unix.O_RDWR)
		if err != nil {
			return fmt.Errorf("opening file %d of %d: %w", i, n, err)
		}
		fds = append(fds, fd)
	}
	return op(fds)
}

func writeInTurn(fds []int, ops int) error {
	buf := make([]byte, 4<<10)
	for i := range ops {
		if _, err := unix.Write(fds[i%len(fds)], buf); err != nil {
			return err
		}
	}
	for _, fd := range fds {
		if err := unix.Fsync(fd); err != nil {
			return err
		}
	}
	return nil
}

// A scaling is one operation at two sizes.
type scaling struct {
	what, small, large string // sizes
	cost               map[string][2]time.Duration
}

// benchScale measures what many of something cost, on kmsfs and the loopback.
func (b *bench) benchScale() (err error) {
	r := b.race([]*entrant{b.find(peers.Kmsfs), b.find(peers.Loopback)}, 1)
	r.cold = coldInodes
	defer func() { err = errors.Join(err, r.end()) }()
	if err := r.mount("scale"); err != nil {
		return err
	}
	list := scaleGroups(r.job.Sizes)
	if err := r.measure(list); err != nil {
		return err
	}
	r.rest()
	b.report.scale = pairs(list, r.results)
	b.report.scaleMemory = r.entrants
	return nil
}

// pairs finds the two sizes of each operation.
func pairs(list []group, res *results) (all []*scaling) {
	known := make(map[string]*scaling)
	for _, g := range list {
		for _, s := range g.steps {
			what, size, _ := strings.Cut(s.name, ": ")
			p, second := known[what]
			if !second {
				p = &scaling{what: what, small: size, cost: make(map[string][2]time.Duration)}
				known[what] = p
				all = append(all, p)
			}
			p.large = size
			for short, samples := range res.samples[s.name] {
				c := p.cost[short]
				c[bit(second)] = samples[0].wall / time.Duration(s.ops)
				p.cost[short] = c
			}
		}
	}
	return all
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}
