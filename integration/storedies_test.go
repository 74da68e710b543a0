package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// TestStoreDies cuts the power at one call of the store after the other of everything that
// a program does: neither that call nor any later one happens, the daemon is gone, and so is
// what was in memory. What is left is one prefix of all calls in their order, attributes,
// renames and the symlinks of long names too. The volume mounts at once; nothing is there
// but what was before or was to be; what was synced before and not written to reads whole;
// what can't be read is EBADMSG; all can be deleted, and fsck finds nothing else.
//
// KMSFS_TEST_FAULTS=all takes every call, else every twelfth.
func TestStoreDies(t *testing.T) {
	e := harness.New(t)
	store := e.Store()
	v := e.InitOn(store, "volume", "--key", localKey(e, "one"))
	v.Damaged()
	d := &dying{v: v, store: store, step: 12}
	if os.Getenv("KMSFS_TEST_FAULTS") == "all" {
		d.step = 1
	}
	for i, deed := range deeds() {
		if deed.name == "read" || deed.name == "list" || deed.name == "get attribute" {
			continue // they change nothing
		}
		if !t.Run(deed.name, func(t *testing.T) { d.one(t, deed, 1+i%d.step) }) {
			return
		}
	}
	t.Logf("power cuts survived: %d, bytes compared: %d, unreadable blocks: %d, losses: 0", d.cuts, d.compared, d.unread)
}

type dying struct {
	t     *testing.T // of the deed
	v     *harness.Volume
	store *harness.Store
	step  int

	cuts, compared, unread int
}

func (d *dying) one(t *testing.T, deed deed, first int) {
	d.t = t
	v := d.v
	var before, after map[string]sight
	v.Mount()
	for at := first; ; at += d.step {
		dir := v.Path("d")
		require.NoError(t, unix.Mkdir(dir, 0o700))
		require.NoError(t, deed.prepare(dir))
		if before == nil {
			example := v.Path("example")
			require.NoError(t, unix.Mkdir(example, 0o700))
			require.NoError(t, deed.prepare(example))
			before = see(t, example)
			require.NoError(t, deed.do(example))
			after = see(t, example)
			require.NoError(t, os.RemoveAll(example))
		}
		v.Remount() // so that nothing is cached
		d.store.Die(at)
		err := deed.do(dir)
		hit := d.cut()
		what := fmt.Sprintf("%s: the power is cut at call %d of the store, a %s: %v", deed.name, at, hit, err)
		v.Mount()
		now := d.see(dir)
		require.Empty(t, d.judge(before, after, now, deed.name == "write anew", hit == "" && err == nil), what)
		v.Umount()
		found, _, _ := fsck(t, v, "--data")
		for _, f := range found { // what was never written, and no other damage
			fresh := f.Kind == "data" && *f.From >= int64(len(before[strings.TrimPrefix(f.Path, "d/")].bytes))
			require.True(t, f.Level == "untidy" || fresh, "%s: %+v; there is %v", what, f, now)
		}
		v.Mount()
		require.NoError(t, os.RemoveAll(dir), what)
		if hit == "" {
			v.Umount()
			return
		}
		d.cuts++
	}
}

// cut ends the daemon and what it had in memory, and says which call was the first that
// did not happen.
func (d *dying) cut() (hit string) {
	d.v.Kill()
	hit = d.store.Lift()
	d.v.Env.Must("umount", d.v.Mnt)
	slots, err := filepath.Glob("/dev/shm/kmsfs-*" + backingName(d.t, d.v))
	require.NoError(d.t, err)
	for _, path := range slots {
		require.NoError(d.t, os.Remove(path))
	}
	return hit
}

// A remnant is a sight of which some blocks can't be read.
type remnant struct {
	sight
	bad map[int]bool
}

func (r remnant) String() string {
	return fmt.Sprintf("%s of %s; bad blocks: %v", r.kind, outline(r.bytes), r.bad)
}

// see is what stands in a directory after a crash.
func (d *dying) see(dir string) map[string]remnant {
	t, all := d.t, map[string]remnant{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		info, err := entry.Info()
		if err != nil {
			return err
		}
		r := remnant{sight{kind: info.Mode().Type().String()}, map[int]bool{}}
		if info.Mode().IsRegular() {
			r.bytes, err = d.readBlocks(path, info.Size(), r.bad)
		}
		all[rel] = r
		return err
	}))
	return all
}

func (d *dying) readBlocks(path string, size int64, bad map[int]bool) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, unix.EBADMSG) {
		for at := 0; at*block < int(size); at++ {
			bad[at] = true
		}
		return make([]byte, size), nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := make([]byte, size)
	for at := 0; at*block < len(p); at++ {
		_, err := f.ReadAt(p[at*block:min((at+1)*block, len(p))], int64(at*block))
		if errors.Is(err, unix.EBADMSG) {
			bad[at] = true
		} else if err != nil && err != io.EOF {
			return nil, err
		}
	}
	d.compared += len(p)
	d.unread += len(bad)
	return p, nil
}

// judge says what is wrong with what a crash left. Synced is what was done to its end.
func (d *dying) judge(before, after map[string]sight, now map[string]remnant, anew, synced bool) string {
	blockOf := func(p []byte, at int) []byte {
		return p[min(at*block, len(p)):min((at+1)*block, len(p))]
	}
	for path, x := range now {
		b, was := before[path]
		a, will := after[path]
		if path == "tmp" {
			continue
		}
		if !was && !will {
			return path + " was not there and is not to be"
		}
		for at := 0; at*block < len(x.bytes); at++ {
			got, old, new := blockOf(x.bytes, at), blockOf(b.bytes, at), blockOf(a.bytes, at)
			switch {
			case x.bad[at] && !synced && at*block >= len(b.bytes): // no call was torn: only gaps are unreadable
			case x.bad[at]:
				return fmt.Sprintf("block %d of %s can't be read", at, path)
			case bytes.Equal(got, old), bytes.Equal(got, new):
			case len(old) < block && len(bytes.Trim(got, "\x00")) == 0: // it grew, and was not written
			case len(got) < block && (bytes.HasPrefix(old, got) || bytes.HasPrefix(new, got)):
			case len(old) < block && bytes.HasPrefix(got, old) && len(bytes.Trim(got[len(old):], "\x00")) == 0:
			default:
				return fmt.Sprintf("block %d of %s is neither old nor new", at, path)
			}
		}
		if was && will && len(x.bytes) < min(len(b.bytes), len(a.bytes)) && (!anew || len(x.bytes) > 0) {
			return path + " is shorter than ever"
		}
	}
	for path := range before {
		_, will := after[path]
		if _, is := now[path]; will && !is {
			return path + " is lost"
		}
	}
	if synced {
		for path, a := range after {
			if !bytes.Equal(now[path].bytes, a.bytes) {
				return path + " was synced and has other bytes"
			}
		}
	}
	return ""
}
