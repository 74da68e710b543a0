package apps

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

var howLong = flag.Duration("apps.time", 4*time.Second, "how long databases and stressors are kept busy")

func TestMain(m *testing.M) { harness.Main(m) }

// nobody is a user without privilege who has a name, which PostgreSQL wants.
const nobody = 65534

// shared makes a mounted volume that every user may enter.
func shared(t *testing.T) *harness.Volume {
	t.Helper()
	e := harness.New(t)
	e.Must("key", "create", "one")
	v := e.Init("volume", "--key", "local:one")
	v.Options("--allow-other")
	v.Mount()
	for _, dir := range []string{filepath.Dir(v.Mnt), v.Mnt} {
		require.NoError(t, os.Chmod(dir, 0o755))
	}
	return v
}

// A postgres is a database cluster on a mount, run by nobody.
type postgres struct {
	t      *testing.T
	e      *harness.Env
	bin    string
	data   string
	socket string
}

func newPostgres(t *testing.T, v *harness.Volume) *postgres {
	t.Helper()
	dirs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	require.NoError(t, err)
	require.NotEmpty(t, dirs, "PostgreSQL is not installed: scripts/setup.sh test")
	p := &postgres{t: t, e: v.Env.As(nobody, nobody), bin: dirs[len(dirs)-1], data: v.Path("pg", "data")}
	p.socket = p.e.Mkdir("s")
	require.NoError(t, os.Mkdir(v.Path("pg"), 0o700))
	require.NoError(t, os.Chown(v.Path("pg"), nobody, nobody))
	p.do("initdb", "--data-checksums", "--no-instructions", "-U", "nobody", "-A", "trust", "-D", p.data)
	return p
}

// do runs one of its programs, which must succeed.
func (p *postgres) do(program string, args ...string) string {
	p.t.Helper()
	return p.e.Do(filepath.Join(p.bin, program), args...)
}

func (p *postgres) start() {
	p.t.Helper()
	p.do("pg_ctl", "-D", p.data, "-w", "-t", "120", "-l", filepath.Join(p.socket, "log"),
		"-o", "-c listen_addresses= -c full_page_writes=on -c unix_socket_directories="+p.socket, "start")
}

func (p *postgres) stop() {
	p.t.Helper()
	p.do("pg_ctl", "-D", p.data, "-w", "-m", "fast", "stop")
}

// kill ends the server and all its processes at once, without a word.
func (p *postgres) kill() {
	p.t.Helper()
	raw, err := os.ReadFile(filepath.Join(p.data, "postmaster.pid"))
	require.NoError(p.t, err)
	var pid int
	_, err = fmt.Sscan(string(raw), &pid)
	require.NoError(p.t, err)
	for _, child := range children(pid) {
		_ = syscall.Kill(child, syscall.SIGKILL)
	}
	require.NoError(p.t, syscall.Kill(pid, syscall.SIGKILL))
	require.True(p.t, harness.Eventually(10*time.Second, func() bool { return syscall.Kill(pid, 0) != nil }))
}

// children are the processes that a process started.
func children(pid int) (all []int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		raw, _ := os.ReadFile(task)
		for field := range strings.FieldsSeq(string(raw)) {
			var child int
			if _, err := fmt.Sscan(field, &child); err == nil {
				all = append(all, child)
			}
		}
	}
	return all
}

func (p *postgres) sql(text string) string {
	p.t.Helper()
	return strings.TrimSpace(p.do("psql", "-h", p.socket, "-U", "nobody", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-qAtc", text))
}

func (p *postgres) bench(args ...string) harness.Result {
	p.t.Helper()
	return p.e.Run(filepath.Join(p.bin, "pgbench"), append(args, "-h", p.socket, "-U", "nobody", "postgres")...)
}

// check: every transaction moved the same amount in four tables, and no index or
// heap is damaged.
func (p *postgres) check() {
	p.t.Helper()
	sums := strings.Split(p.sql(`SELECT sum(abalance) FROM pgbench_accounts UNION ALL SELECT sum(tbalance) FROM pgbench_tellers
		UNION ALL SELECT sum(bbalance) FROM pgbench_branches UNION ALL SELECT sum(delta) FROM pgbench_history`), "\n")
	require.Len(p.t, sums, 4)
	for _, s := range sums {
		require.Equal(p.t, sums[0], s, "the books don't balance: %v", sums)
	}
	p.sql("CREATE EXTENSION IF NOT EXISTS amcheck")
	p.do("pg_amcheck", "-h", p.socket, "-U", "nobody", "-d", "postgres", "--heapallindexed")
}

// TestPostgreSQL fills a database, kills the server in the middle of the work, and
// has it recover; nothing that was committed is lost, and no page fails its checksum.
func TestPostgreSQL(t *testing.T) {
	v := shared(t)
	p := newPostgres(t, v)
	p.start()
	r := p.bench("-i", "-q", "-s", "3")
	require.Zero(t, r.Status, "%v", r)
	seconds := fmt.Sprint(max(1, int(howLong.Seconds())))
	r = p.bench("-n", "-T", seconds, "-c", "4", "-j", "2")
	require.Zero(t, r.Status, "%v", r)
	p.check()
	p.sql("CREATE TABLE committed(i int); INSERT INTO committed SELECT generate_series(1, 20000)")

	busy := p.e.Command(filepath.Join(p.bin, "pgbench"), "-n", "-T", "60", "-c", "4", "-j", "2", "-h", p.socket, "-U", "nobody", "postgres")
	require.NoError(t, busy.Start())
	time.Sleep(*howLong / 4)
	p.kill()
	require.Error(t, busy.Wait(), "the server was killed, and its client noticed nothing")
	p.start()
	require.Equal(t, "20000", p.sql("SELECT count(*) FROM committed"))
	p.check()
	p.stop()
	p.do("pg_checksums", "--check", "-D", p.data)
	v.Remount()
	p.start()
	p.check()
	p.stop()
}

// TestSQLiteKilled kills a writer in the middle of its transactions: what it said it
// had committed is there, and the file is whole, in both kinds of journal.
func TestSQLiteKilled(t *testing.T) {
	v := shared(t)
	for _, mode := range []string{"WAL", "DELETE"} {
		db := v.Path(mode + ".db")
		sql := func(text string) string { return strings.TrimSpace(v.Env.Do("sqlite3", "-bail", db, text)) }
		sql("PRAGMA journal_mode=" + mode + "; CREATE TABLE t(i INTEGER PRIMARY KEY, x TEXT); CREATE INDEX tx ON t(x)")
		for range 3 {
			said := filepath.Join(v.Env.Root, "said")
			writer := v.Env.Command("bash", "-c", `while true; do echo "INSERT INTO t(x) SELECT hex(randomblob(300)) FROM (SELECT 1 UNION SELECT 2); SELECT max(i) FROM t;"; done | exec sqlite3 -bail "$1" >"$2"`, "bash", db, said)
			require.NoError(t, writer.Start())
			time.Sleep(*howLong / 8)
			require.NoError(t, syscall.Kill(-writer.Process.Pid, syscall.SIGKILL)) // its session, with the shell
			_ = writer.Wait()
			require.Equal(t, "ok", sql("PRAGMA integrity_check"), mode)
			raw, err := os.ReadFile(said)
			require.NoError(t, err)
			lines := strings.Split(string(raw), "\n")
			if len(lines) > 1 {
				var committed, found int
				_, err = fmt.Sscan(lines[len(lines)-2], &committed)
				require.NoError(t, err)
				_, err = fmt.Sscan(sql("SELECT max(i) FROM t"), &found)
				require.NoError(t, err)
				require.GreaterOrEqual(t, found, committed, mode)
			}
		}
		require.NotEqual(t, "0", sql("SELECT count(*) FROM t"), "the writer never got to write")
	}
}

// cProject makes a project of many small C files that depend on one another's
// headers, with a Makefile that finds out how.
const cProject = `mkdir -p "$1"; cd "$1"
	for i in $(seq 60); do
		printf '#pragma once\n#include "f%d.h"\nint f%d(int);\n' $((i / 2)) $i >f$i.h
		printf '#include "f%d.h"\n#include <stdio.h>\n#include <stdlib.h>\nint f%d(int n) { static char big[%d]; big[n %% 7] = 1; return n <= 0 ? %d : f%d(n - big[n %% 7]) + 1; }\n' $i $i $((i * 1000)) $i $((i / 2)) >f$i.c
	done
	printf '#pragma once\nint f0(int);\n' >f0.h; printf 'int f0(int n) { return n; }\n' >f0.c
	printf '#include <stdio.h>\n#include "f60.h"\nint main(void) { printf("%%d\\n", f60(100)); }\n' >main.c
	printf 'CFLAGS = -O1 -MMD -g\nOBJ = $(patsubst %%.c,%%.o,$(wildcard *.c))\nprog: libf.a main.o\n\t$(CC) -o $@ main.o libf.a\nlibf.a: $(filter-out main.o,$(OBJ))\n\t$(AR) rcs $@ $^\n-include $(OBJ:.o=.d)\n' >Makefile`

// TestBuild builds a C project in parallel, on the mount and beside it: the same
// files are made anew after each change, which is a matter of times and of mapped
// files, and the program says the same.
func TestBuild(t *testing.T) {
	v := shared(t)
	build := func(dir string) string {
		v.Env.Shell(cProject, dir)
		return v.Env.Shell(`cd "$1"; export LC_ALL=C
			made() { make -j4 | grep -c -- ' -c ' || true; }
			made; ./prog; made; touch f7.h; made; echo 'int extra;' >>f3.c; made; ./prog; rm f9.o; made; make -j4 -q; nm prog | grep -c ' T f'; strip prog; ./prog`, dir)
	}
	want := build(filepath.Join(v.Env.Root, "beside"))
	require.Contains(t, want, "62\n", "this is not the number of files")
	require.Equal(t, want, build(v.Path("project")))
	v.Remount()
	v.Env.Shell(`cd "$1"; make -j4 -q; ./prog`, v.Path("project"))
}

// TestMirror keeps a mirror of a system's own tree, with all its owners, modes, links
// and attributes, while that tree changes.
func TestMirror(t *testing.T) {
	v := shared(t)
	e := v.Env
	tree := filepath.Join(e.Root, "system")
	e.Shell(`mkdir "$1"; cp -a /etc "$1"; mkdir "$1"/include; cp -a /usr/include/{linux,asm-generic,stdio.h} "$1"/include; cd "$1/etc"; ln passwd passwd.link; setfacl -m u:1234:r passwd; setfattr -n user.a -v b hosts; chattr -R -i . 2>/dev/null || true`, tree)
	mirror := func() string {
		return e.Do("rsync", "-aHAX", "--modify-window=-1", "--delete", "--itemize-changes", tree+"/", v.Path("mirror")+"/")
	}
	require.NotEmpty(t, mirror())
	harness.Same(t, tree, v.Path("mirror"))
	e.Shell(`cd "$1"; rm -r include/linux/netfilter; mv etc/hosts etc/hosts.old; chmod 600 etc/passwd; echo x >>etc/profile; mkdir new; mv include new; chown -R 1:2 new/include/asm-generic; ln -s new link; setfattr -x user.a etc/hosts.old`, tree)
	require.NotEmpty(t, mirror())
	require.Empty(t, mirror(), "the second time must find nothing to do")
	v.Remount()
	harness.Same(t, tree, v.Path("mirror"))
}

// stressors are those of stress-ng that work on files; each checks what it can. Not
// among them is io: it syncs every mount of the machine.
var stressors = []string{"access", "aio", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "fallocate", "fcntl", "fiemap",
	"filename", "flock", "fstat", "getdent", "hdd", "inotify", "iomix", "lease", "link", "locka", "lockf", "lockofd", "metamix", "mknod", "mmapfork",
	"msync", "open", "punch", "readahead", "rename", "revio", "seek", "sendfile", "splice", "symlink", "sync-file", "touch", "utime", "xattr"}

// TestStress has stress-ng's stressors of file systems work at once and verify.
func TestStress(t *testing.T) {
	v := shared(t)
	known := v.Env.Do("stress-ng", "--stressors")
	args := []string{"--temp-path", v.Path("stress"), "--timeout", fmt.Sprintf("%.0fs", howLong.Seconds()), "--verify", "--metrics-brief", "--hdd-bytes", "16M", "--aggressive"}
	running := 0
	for _, s := range stressors {
		if strings.Contains(" "+strings.Join(strings.Fields(known), " ")+" ", " "+s+" ") {
			args = append(args, "--"+s, "1")
			running++
		}
	}
	require.Greater(t, running, 30, "this stress-ng knows too few of the stressors: %s", known)
	require.NoError(t, os.Mkdir(v.Path("stress"), 0o777))
	r := v.Env.Run("stress-ng", args...)
	require.Zero(t, r.Status, "%v", r)
	require.NotContains(t, r.Stderr+r.Stdout, "fail:", "%v", r)
}
