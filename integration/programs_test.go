package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// local makes a mounted volume with a local key.
func local(t *testing.T, initArgs ...string) *harness.Volume {
	t.Helper()
	e := harness.New(t)
	v := e.Init("volume", append([]string{"--key", localKey(e, "one")}, initArgs...)...)
	v.Mount()
	return v
}

func localKey(e *harness.Env, name string) string {
	e.T.Helper()
	e.Must("key", "create", name)
	return "local:" + name
}

func TestTar(t *testing.T) {
	v := local(t)
	tree := sources(t, v.Env)
	v.Env.Shell(`cd "$1"; tar --xattrs --xattrs-include='*' -cf ../tree.tar . ; mkdir "$2/out"; cd "$2/out"; tar --xattrs --xattrs-include='*' -xpf "$1/../tree.tar"`, tree, v.Mnt)
	// tar keeps times of files to the nanosecond only in its newer formats.
	requireSame(t, tree, v.Path("out"), harness.Mtime)
	v.Remount()
	v.Env.Shell(`cd "$1/out"; tar --xattrs --xattrs-include='*' --format=posix -cf "$2/back.tar" . ; mkdir "$2/back"; cd "$2/back"; tar --xattrs --xattrs-include='*' -xpf ../back.tar`, v.Mnt, v.Env.Mkdir("away"))
	requireSame(t, v.Path("out"), filepath.Join(v.Env.Root, "away", "back"), 0)
}

func requireSame(t *testing.T, a, b string, ignore harness.Ignore) {
	t.Helper()
	diff := harness.Diff(harness.Snapshot(t, a), harness.Snapshot(t, b), ignore)
	require.Empty(t, diff, "%s and %s differ:\n%s", a, b, strings.Join(diff, "\n"))
}

func TestGit(t *testing.T) {
	v := local(t)
	e := v.Env
	e.Set("GIT_AUTHOR_NAME", "A Tester")
	e.Set("GIT_AUTHOR_EMAIL", "tester@example.org")
	e.Set("GIT_COMMITTER_NAME", "A Tester")
	e.Set("GIT_COMMITTER_EMAIL", "tester@example.org")
	repo := e.Mkdir("repository")
	e.Shell(`cd "$1"; git init -q -b main .; cp -r "$2" net; git add .; git commit -qm one
		for i in 1 2 3; do echo $i >>net/file; git add .; git commit -qm "change $i"; done`,
		repo, filepath.Join(harness.GOROOT(t), "src", "net", "http"))
	e.Shell(`cd "$2"
		git clone -q --no-local "$1" clone
		cd clone
		git fsck --full --strict
		test -z "$(git status --porcelain)"
		diff -r --exclude=.git "$1" .
		git checkout -q -b side HEAD~2; echo side >net/side; git add .; git commit -qm side
		git checkout -q main; git merge -q -m merge side
		git gc -q --prune=now; git repack -qadf
		git fsck --full --strict
		git worktree add -q ../tree HEAD~1; test -z "$(git -C ../tree status --porcelain)"
		git push -q "$1" main:pushed`, repo, v.Mnt)
	v.Remount()
	e.Shell(`cd "$1/clone"; git fsck --full --strict; test -z "$(git status --porcelain)"; git stash list`, v.Mnt)
}

func TestSQLite(t *testing.T) {
	for _, mode := range []string{"WAL", "DELETE"} {
		t.Run(mode, func(t *testing.T) {
			v := local(t)
			e := v.Env
			db := v.Path("db")
			sql := func(text string) string {
				return strings.TrimSpace(e.Do("sqlite3", "-bail", "-cmd", ".timeout 20000", db, text))
			}
			sql(fmt.Sprintf("PRAGMA journal_mode=%s; CREATE TABLE t(i INTEGER PRIMARY KEY, x TEXT); CREATE INDEX tx ON t(x);", mode))
			fill := "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<%d) INSERT INTO t(x) SELECT hex(randomblob(60)) FROM c;"
			sql("BEGIN;" + fmt.Sprintf(fill, 20000) + "COMMIT; UPDATE t SET x=hex(randomblob(100)) WHERE i%3=0; DELETE FROM t WHERE i%5=0;")
			// Several writers and a reader at once: locks, shared memory and all.
			e.Shell(`for w in 1 2 3; do
				(for n in $(seq 20); do echo "BEGIN IMMEDIATE; `+fmt.Sprintf(fill, 20)+` COMMIT;"; done | sqlite3 -bail -cmd '.timeout 20000' "$1") & pids="${pids:-} $!"
			done
			for n in $(seq 10); do sqlite3 -cmd '.timeout 20000' "$1" 'SELECT count(*), sum(length(x)) FROM t' >/dev/null; done
			for p in $pids; do wait $p; done`, db)
			require.Equal(t, "17200", sql("SELECT count(*) FROM t"))
			require.Equal(t, "ok", sql("PRAGMA integrity_check"))
			v.Remount()
			require.Equal(t, "ok", sql("PRAGMA integrity_check"))
			require.Equal(t, "17200", sql("SELECT count(*) FROM t"))
			sql("VACUUM;")
			require.Equal(t, "ok", sql("PRAGMA integrity_check"))
		})
	}
}

func TestRsync(t *testing.T) {
	v := local(t)
	v.Options("--allow-other")
	v.Remount()
	e := v.Env
	tree := sources(t, e)
	withACLs(e, tree)
	sync := func(from, to string) string {
		return e.Do("rsync", "-aHAX", "--modify-window=-1", "--delete", "--itemize-changes", from+"/", to+"/")
	}
	require.NotEmpty(t, sync(tree, v.Path("in")))
	require.Empty(t, sync(tree, v.Path("in")), "the second time must find nothing to do")
	harness.Same(t, tree, v.Path("in"))
	v.Remount()
	require.Empty(t, e.Do("rsync", "-aHAX", "--checksum", "--modify-window=-1", "--delete", "--itemize-changes", tree+"/", v.Path("in")+"/"))
	out := e.Mkdir("out")
	require.NotEmpty(t, sync(v.Path("in"), out))
	require.Empty(t, sync(v.Path("in"), out))
	harness.Same(t, tree, out)
}

func TestSedInPlace(t *testing.T) {
	v := local(t)
	e := v.Env
	tree := e.Mkdir("tree")
	e.Do("cp", "-a", filepath.Join(harness.GOROOT(t), "src", "encoding"), tree)
	e.Do("cp", "-a", tree, v.Path("tree"))
	edit := `cd "$1"; find . -name '*.go' -exec sed -i -e 's/encoding/ENCODING/g' -e '3d' -e '$ a last line' {} + ; find . -type f -exec chmod u+w {} +; echo appended >>encoding/json/decode.go`
	e.Shell(edit, tree)
	e.Shell(edit, v.Path("tree"))
	requireSame(t, tree, v.Path("tree"), harness.Mtime)
	v.Remount()
	requireSame(t, tree, v.Path("tree"), harness.Mtime)
}

func TestSparseCopies(t *testing.T) {
	v := local(t)
	e := v.Env
	source := filepath.Join(e.Mkdir("source"), "sparse")
	require.NoError(t, os.WriteFile(source, harness.Noise(100), 0o600))
	require.NoError(t, os.Truncate(source, 64<<20))
	for i := range int64(6) {
		harness.WriteAt(t, source, i*10<<20+i*1000, harness.Noise(70000))
	}
	e.Shell(`cd "$2"; cp --sparse=always "$1" in; cmp "$1" in; cp --sparse=always in copy; cmp in copy; cp --sparse=auto in auto; cmp in auto`, source, v.Mnt)
	v.Remount()
	e.Shell(`cd "$2"; cmp "$1" in; cmp "$1" copy; cmp "$1" auto
		cp --sparse=always in "$1.out"; cmp "$1" "$1.out"`, source, v.Mnt)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(v.Stored("in"), &st))
	require.Less(t, st.Blocks*512, int64(16<<20), "the holes take room in the backing store")
}

func TestDdTruncateFallocate(t *testing.T) {
	v := local(t)
	e := v.Env
	script := `cd "$1"
		dd if=../random of=a bs=4097 status=none; cmp ../random a
		dd if=../random of=a bs=333 seek=1000 count=777 conv=notrunc status=none
		dd if=../random of=direct bs=64k oflag=direct status=none; dd if=direct bs=64k iflag=direct status=none | cmp - ../random
		dd if=../random of=a bs=1M oflag=append conv=notrunc status=none
		truncate -s 12345 b; truncate -s +5 b; truncate -s 100M b; truncate -s 4096 b; truncate -s 0 b; truncate -s 5000 b
		fallocate -l 1M c; fallocate -p -o 5000 -l 100000 c; fallocate -n -o 2M -l 1M c; fallocate -z -o 1000 -l 9000 a
		dd if=../random of=c bs=1000 count=30 seek=3 conv=notrunc,fsync status=none
		sha256sum a b c; stat -c '%n %s' a b c`
	twin := e.Mkdir("twin/dir")
	e.Shell(`dd if=/dev/urandom of="$1/random" bs=1M count=8 status=none; cp "$1/random" "$2"`, filepath.Dir(twin), filepath.Dir(v.Mnt))
	want := e.Shell(script, twin)
	require.Equal(t, want, e.Shell(script, v.Mnt), "the mount and the file system beneath disagree")
	v.Remount()
	require.Equal(t, want, e.Shell(`cd "$1"; sha256sum a b c; stat -c '%n %s' a b c`, v.Mnt))
}

// TestSharedMapping lets two processes work on one shared mapping of a file: what
// one writes the other sees, and the file has it in the end.
func TestSharedMapping(t *testing.T) {
	v := local(t)
	path := v.Path("mapped")
	require.NoError(t, os.WriteFile(path, make([]byte, mappedSize), 0o600))
	ping, pong := v.Env.Helper("mmap", path, "0"), v.Env.Helper("mmap", path, "1")
	var out [2]bytes.Buffer
	ping.Stderr, pong.Stderr = &out[0], &out[1]
	require.NoError(t, ping.Start())
	require.NoError(t, pong.Start())
	err := errors.Join(ping.Wait(), pong.Wait())
	require.NoError(t, err, "%s %s", &out[0], &out[1])
	v.Remount()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	for i := range mappedSize {
		if i%4096 > 3 {
			require.Equal(t, byte(mappedRounds), content[i], "byte %d", i)
		}
	}
}

const (
	mappedSize   = 64 << 10
	mappedRounds = 200
)

func init() { harness.Helper("mmap", mapTurns) }

// mapTurns takes turns with another process: whoever's turn it is (the first
// four bytes count the turns) raises every byte but the first four of each page.
func mapTurns(args []string) error {
	fd, err := unix.Open(args[0], unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	m, err := unix.Mmap(fd, 0, mappedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	me := uint32(args[1][0] - '0')
	for {
		turn := load(m)
		if turn == mappedRounds {
			return unix.Msync(m, unix.MS_SYNC)
		}
		if turn%2 != me {
			continue
		}
		for i := range m {
			if i%4096 < 4 {
				continue
			}
			if m[i] != byte(turn) {
				return fmt.Errorf("byte %d is %d in turn %d", i, m[i], turn)
			}
			m[i]++
		}
		store(m, turn+1)
	}
}

func load(m []byte) uint32 { return atomic.LoadUint32((*uint32)(unsafe.Pointer(&m[0]))) }

func store(m []byte, turn uint32) { atomic.StoreUint32((*uint32)(unsafe.Pointer(&m[0])), turn) }
