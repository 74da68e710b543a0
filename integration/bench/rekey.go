package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
)

// latency is what a call to KMS takes, and throttle what an account may call.
const (
	latency  = 10 * time.Millisecond
	throttle = 1000 // a second
	awsJobs  = "64"
)

func benchRekey(parent string, sizes []int, rounds int, local, kms bool) error {
	w, err := newWorld(parent)
	if err != nil {
		return err
	}
	defer w.close()
	if _, err := w.run("key", "create", "two"); err != nil { // "one" is there
		return err
	}
	fmt.Println("| headers | what | seconds | headers/s | of the minimal loop's time | CPU seconds | peak MiB |")
	fmt.Println("|---|---|---|---|---|---|---|")
	for _, n := range sizes {
		if local {
			if err := benchLocal(w, n, rounds); err != nil {
				return err
			}
		}
		if kms {
			if err := benchKMS(w, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// benchLocal compares a rekey between local keys, which is the cost of the walk and
// of the attributes, with programs that do only that.
func benchLocal(w *world, n, rounds int) error {
	dir, err := w.fill(fmt.Sprint("local", n), "local:one", n)
	if err != nil {
		return err
	}
	keys := []string{"local:two", "local:one"}
	rows := []struct {
		name string
		run  func(round int) (cost, error)
	}{
		{"minimal loop: read, write and read each header, one sync", func(int) (cost, error) { return loop(dir, true) }},
		{"minimal loop: read each header", func(int) (cost, error) { return loop(dir, false) }},
		{"getfattr -R", func(int) (cost, error) {
			// It complains of directories, which have no header, and exits with 1.
			return w.measure(exec.Command("sh", "-c", `getfattr -R -n "$0" --only-values "$1" >/dev/null 2>&1; [ $? -le 1 ]`, crypt.HeaderXattr, dir))
		}},
		{"kmsfs status", func(int) (cost, error) { return w.run("status", dir) }},
		{"kmsfs rekey --dry-run", func(r int) (cost, error) { return w.run("rekey", dir, "--to", keys[r%2], "--dry-run") }},
		{"kmsfs rekey, local key", func(r int) (cost, error) { return w.run("rekey", dir, "--to", keys[r%2], "--yes") }},
	}
	all := make([][]cost, len(rows))
	for round := range rounds {
		for i, row := range rows {
			c, err := row.run(round)
			if err != nil {
				return err
			}
			all[i] = append(all[i], c)
		}
	}
	floor := medianCost(all[0]).wall
	for i, row := range rows {
		print(n, row.name, medianCost(all[i]), floor)
	}
	return os.RemoveAll(dir)
}

func print(n int, name string, c cost, floor time.Duration) {
	of := ""
	if floor > 0 {
		of = fmt.Sprintf("%.2f", c.wall.Seconds()/floor.Seconds())
	}
	fmt.Printf("| %d | %s | %.2f | %.0f | %s | %.2f | %.0f |\n", n, name, c.wall.Seconds(), float64(n)/c.wall.Seconds(), of, c.cpu.Seconds(), float64(c.peak)/1024)
}

// loop does what a rekey must at least do, without any care: one goroutine, paths.
func loop(dir string, write bool) (cost, error) {
	start := time.Now()
	buf := make([]byte, crypt.MaxHeader)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		n, err := unix.Lgetxattr(path, crypt.HeaderXattr, buf)
		if err == unix.ENODATA {
			return nil
		}
		if err == nil && write {
			err = unix.Lsetxattr(path, crypt.HeaderXattr, buf[:n], unix.XATTR_REPLACE)
			if err == nil {
				_, err = unix.Lgetxattr(path, crypt.HeaderXattr, buf)
			}
		}
		return err
	})
	if err == nil && write {
		err = syncfs(dir)
	}
	return cost{wall: time.Since(start)}, err
}

func syncfs(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// benchKMS rekeys on a KMS on loopback with the latency of a real one, then under a
// limit of calls.
func benchKMS(w *world, n int) error {
	srv, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		return err
	}
	defer srv.Close()
	w.Env = append(w.Env, srv.Env(srv.Admin())...)
	keys := []string{srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")}
	dir, err := w.fill(fmt.Sprint("kms", n), keys[0], n)
	if err != nil {
		return err
	}
	srv.SetLatency(latency)
	srv.Reset()
	c, err := w.run("rekey", dir, "--to", keys[1], "--yes", "--jobs", awsJobs)
	if err != nil {
		return err
	}
	print(n, fmt.Sprintf("kmsfs rekey, KMS at %v a call, --jobs %s", latency, awsJobs), c, 0)
	srv.Throttle(throttle)
	srv.Reset()
	c, err = w.run("rekey", dir, "--to", keys[0], "--yes", "--jobs", awsJobs)
	if err != nil {
		return err
	}
	print(n, fmt.Sprintf("the same, throttled at %d calls a second", throttle), c, 0)
	throttledRate(srv)
	return os.RemoveAll(dir)
}

// throttledRate tells how much of the limit was used while there was work. A file that
// fails ends the measurement: kmsfs exits with 5 then.
func throttledRate(srv *kmstest.Server) {
	var first, last time.Time
	good, refused := 0, 0
	for _, c := range srv.Calls() {
		if c.Error != "" {
			refused++
			continue
		}
		good++
		if first.IsZero() {
			first = c.Time
		}
		last = c.Time
	}
	if good <= throttle {
		fmt.Printf("| | of the limit: not known, with so few calls | | | | | |\n")
		return
	}
	seconds := last.Sub(first).Seconds()
	// The server's bucket holds one second's calls, which are not rate.
	rate := float64(good-throttle) / seconds
	fmt.Printf("| | of the limit: %.1f%%; refused and sent again: %.1f%% of all calls | | | | | |\n", 100*rate/throttle, 100*float64(refused)/float64(good+refused))
}
