package integration

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

// The load under which the daemon is killed: three files of loadBlocks blocks that are
// overwritten 1 MiB at a time, logs to which 100 bytes are appended and synced, and small
// files that are made, appended to, cut and renamed. Each block says which generation it
// is of.
const (
	loadBlock  = 4096
	loadBlocks = 1024
	loadChunk  = 256 // blocks
)

func init() { harness.Helper("kill-load", killLoad) }

// fillBlock is what a generation of a block holds.
func fillBlock(p []byte, block, generation int) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(block)<<32|uint64(generation))
	}
}

// killLoad works until the mount dies under it, and says on stdout what is durable.
func killLoad(args []string) error {
	var out sync.Mutex
	say := func(format string, values ...any) {
		out.Lock()
		defer out.Unlock()
		fmt.Printf(format+"\n", values...)
	}
	dir, round := args[0], args[1]
	failed := make(chan error, 8)
	for i := range 3 { // before anything is said: gaps that are not synced may be unreadable
		if err := makeBlocks(filepath.Join(dir, fmt.Sprint("blocks", i))); err != nil {
			return err
		}
	}
	for i := range 3 {
		go func() { failed <- overwriteLoad(filepath.Join(dir, fmt.Sprint("blocks", i)), say) }()
	}
	for i := range 2 {
		name := fmt.Sprint("log", i)
		go func() {
			if err := writeLog(dir, name, func(n int64) { say("log %s %d", name, n) }); err != nil {
				failed <- err
			}
		}()
	}
	go func() { failed <- smallLoad(dir, round, say) }()
	return <-failed
}

func makeBlocks(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	all := make([]byte, loadBlocks*loadBlock)
	for i := range loadBlocks {
		fillBlock(all[i*loadBlock:][:loadBlock], i, 1)
	}
	if err := os.WriteFile(path, all, 0o600); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func overwriteLoad(path string, say func(string, ...any)) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	chunk := make([]byte, loadChunk*loadBlock)
	from, err := newest(f) // generations go on
	if err != nil {
		return err
	}
	for generation := from + 1; ; generation++ {
		at := rand.N(loadBlocks/loadChunk) * loadChunk
		for i := range loadChunk {
			fillBlock(chunk[i*loadBlock:][:loadBlock], at+i, generation)
		}
		if _, err := f.WriteAt(chunk, int64(at)*loadBlock); err != nil {
			return err
		}
		if generation%3 == 0 {
			if err := f.Sync(); err != nil {
				return err
			}
			say("blocks %s %d %d", filepath.Base(path), at, generation)
		} else if err := syncRange(f); err != nil {
			return err
		}
	}
}

func newest(f *os.File) (generation int, err error) {
	first := make([]byte, 8)
	for block := range loadBlocks {
		if _, err := f.ReadAt(first, int64(block)*loadBlock); err != nil {
			return 0, err
		}
		generation = max(generation, int(uint32(binary.LittleEndian.Uint64(first))))
	}
	return generation, nil
}

// syncRange makes the kernel write its dirty pages to the daemon, and nothing more.
func syncRange(f *os.File) error {
	const writeAndWait = 7
	_, _, errno := syscall.Syscall6(syscall.SYS_SYNC_FILE_RANGE, f.Fd(), 0, 0, writeAndWait, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func smallLoad(dir, round string, say func(string, ...any)) error {
	for i := 0; ; i++ {
		name := fmt.Sprintf("small-%s-%d", round, i%50)
		path := filepath.Join(dir, name)
		n := 1 + i*977%30000
		if err := os.WriteFile(path+".tmp", syncedBytes(name, n), 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(path+".tmp", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		m := n + i*331%9000
		if _, err := f.WriteAt(syncedBytes(name, m)[n:], int64(n)); err != nil {
			return err
		}
		if i%2 == 0 {
			if err := f.Truncate(int64(m/2 + 1)); err != nil {
				return err
			}
			m = m/2 + 1
		}
		if err := f.Sync(); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if err := os.Rename(path+".tmp", path); err != nil {
			return err
		}
		say("small %s %d", name, m)
	}
}

// TestKillTearsNothing kills the daemon at random points under load, again and again,
// while a rekey moves the volume to and fro, which is killed as well half of the time:
// every block of every file is readable and of one generation, none older than what was
// durable, every file opens, fsck finds no damage, and the volume can be mounted again
// at once. Without the slots most rounds tear blocks. KMSFS_TEST_CRASHES is how many
// times.
func TestKillTearsNothing(t *testing.T) {
	rounds := fromEnv(t, "KMSFS_TEST_CRASHES", 6)
	if testing.Short() {
		rounds = min(rounds, 3)
	}
	e := harness.New(t)
	keys := []string{localKey(e, "one"), localKey(e, "two")}
	v := e.Init("volume", "--key", keys[0])
	v.Damaged() // what was not synced may be gone
	// A rekey that is killed on its way back leaves a retired key in the list.
	v.Options("--accept-key", keys[0], "--accept-key", keys[1])
	durable := durableLoad{blocks: map[string]map[int]int{}, small: map[string]int{}, logs: map[string]int{}}
	bytesRead, torn, rekeys := int64(0), 0, 0
	v.Mount()
	for round := range rounds {
		rekeys += loadUntilKilled(t, v, round, keys, &durable)
		afterKill(t, v)
		n, bad := durable.check(t, v)
		bytesRead, torn = bytesRead+n, torn+bad
	}
	t.Logf("crashes survived: %d, each in a rekey (%d others had finished), records in logs: %d, bytes compared: %d, blocks torn: %d, losses: 0",
		rounds, rekeys, (durable.logs["log0"]+durable.logs["log1"])/100, bytesRead, torn)
	require.Zero(t, torn)
	e.Must("rekey", v.Dir, "--to", keys[0], "--yes")
	e.Shell(`rm -r "$1"/small*`, v.Mnt) // nothing is undeletable
	v.Umount()
	e.Must("fsck", v.Dir, "--data")
	left, err := filepath.Glob("/dev/shm/kmsfs-*" + backingName(t, v))
	require.NoError(t, err)
	require.Empty(t, left, "an orderly unmount leaves memory behind")
	v.Mount()
	require.NotContains(t, e.Must("status", v.Dir), "uncleanly", "an orderly unmount leaves a mark")
}

func backingName(t *testing.T, v *harness.Volume) string {
	t.Helper()
	var st syscall.Stat_t
	require.NoError(t, syscall.Stat(v.Dir, &st))
	return fmt.Sprintf("-%x-%x", st.Dev, st.Ino)
}

// durableLoad is what the load was told is durable.
type durableLoad struct {
	blocks map[string]map[int]int // file, first block of a chunk, generation
	small  map[string]int         // file, bytes
	logs   map[string]int         // file, bytes
}

// A toAndFro rekeys a volume from one key to the other and back, again and again.
type toAndFro struct {
	mu      sync.Mutex
	current *exec.Cmd // guarded by mu
	over    bool      // guarded by mu
	done    chan int  // how many were finished
}

func rekeyToAndFro(t *testing.T, v *harness.Volume, keys []string) *toAndFro {
	r := &toAndFro{done: make(chan int, 1)}
	go func() {
		finished := 0
		defer func() { r.done <- finished }()
		for r.next(v.Env.Command("kmsfs", "rekey", v.Dir, "--to", keys[(finished+1)%2], "--yes")) {
			if err := r.current.Wait(); err == nil {
				finished++
			} else if !r.isOver() {
				t.Errorf("rekey beside a live mount: %v", err)
				return
			}
		}
	}()
	return r
}

func (r *toAndFro) next(cmd *exec.Cmd) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = cmd
	return !r.over && cmd.Start() == nil
}

func (r *toAndFro) isOver() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.over
}

// end says that the mount is about to be killed, and the rekey too if kill is set.
func (r *toAndFro) end(kill bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	if kill {
		_ = r.current.Process.Kill()
	}
}

// loadUntilKilled returns how many rekeys were finished.
func loadUntilKilled(t *testing.T, v *harness.Volume, round int, keys []string, d *durableLoad) (rekeys int) {
	t.Helper()
	daemons := v.Daemons()
	rekey := rekeyToAndFro(t, v, keys)
	load := v.Env.Helper("kill-load", v.Mnt, strconv.Itoa(round))
	out, err := load.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, load.Start())
	lines := bufio.NewScanner(out)
	killed := make(chan struct{})
	var once sync.Once
	for lines.Scan() {
		once.Do(func() {
			go func() {
				defer close(killed)
				time.Sleep(time.Duration(100+rand.N(500)) * time.Millisecond)
				rekey.end(rand.N(2) == 0)
				for _, pid := range daemons {
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Errorf("killing the daemon: %v", err)
					}
				}
			}()
		})
		d.note(t, strings.Fields(lines.Text()))
	}
	_ = load.Wait() // it fails when the mount is gone
	once.Do(func() { t.Fatal("the load got nothing done") })
	<-killed
	rekeys = <-rekey.done
	require.True(t, harness.Eventually(time.Minute, func() bool { return len(v.Daemons()) == 0 }))
	return rekeys
}

func (d *durableLoad) note(t *testing.T, words []string) {
	t.Helper()
	number := func(i int) int {
		n, err := strconv.Atoi(words[i])
		require.NoError(t, err, "%q", words)
		return n
	}
	switch words[0] {
	case "blocks":
		if d.blocks[words[1]] == nil {
			d.blocks[words[1]] = map[int]int{}
		}
		d.blocks[words[1]][number(2)] = number(3)
	case "small":
		d.small[words[1]] = number(2)
	case "log":
		d.logs[words[1]] = number(2)
	}
}

// check reads everything there is.
func (d *durableLoad) check(t *testing.T, v *harness.Volume) (bytes int64, torn int) {
	t.Helper()
	entries, err := os.ReadDir(v.Mnt)
	require.NoError(t, err)
	for _, entry := range entries {
		f, err := os.Open(v.Path(entry.Name()))
		require.NoError(t, err, "every file opens")
		n, bad := readAll(t, f, func(block int, p []byte) {
			if strings.HasPrefix(entry.Name(), "blocks") {
				checkBlock(t, d.blocks[entry.Name()], block, p)
			}
		})
		f.Close()
		bytes, torn = bytes+n, torn+bad
	}
	for name, n := range d.logs {
		got, err := os.ReadFile(v.Path(name))
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(got), n, "%s has lost what was durable", name)
		require.Equal(t, syncedBytes(name, len(got)), got, name)
	}
	for name, n := range d.small {
		got, err := os.ReadFile(v.Path(name))
		require.NoError(t, err)
		// It may have been replaced by a later one that nobody told us of.
		require.Equal(t, syncedBytes(name, len(got)), got, "%s, of which %d bytes were durable", name, n)
		require.NotEmpty(t, got)
	}
	return bytes, torn
}

// readAll reads a file block by block and counts those that can't be read.
func readAll(t *testing.T, f *os.File, each func(block int, p []byte)) (bytes int64, torn int) {
	t.Helper()
	p := make([]byte, loadBlock)
	for block := 0; ; block++ {
		n, err := f.ReadAt(p, int64(block)*loadBlock)
		switch {
		case errors.Is(err, syscall.EBADMSG):
			torn++
			continue
		case err != nil && !errors.Is(err, io.EOF):
			require.NoError(t, err, f.Name())
		case n == 0:
			return bytes, torn
		}
		bytes += int64(n)
		each(block, p[:n])
	}
}

// checkBlock: a block is of one generation, and not older than what is durable.
func checkBlock(t *testing.T, durable map[int]int, block int, p []byte) {
	t.Helper()
	require.Len(t, p, loadBlock, "block %d", block)
	first := binary.LittleEndian.Uint64(p)
	want := make([]byte, len(p))
	generation := int(uint32(first))
	fillBlock(want, block, generation)
	require.GreaterOrEqual(t, generation, max(1, durable[block/loadChunk*loadChunk]), "block %d is older than what was synced", block)
	require.Equal(t, want, p, "block %d", block)
}
