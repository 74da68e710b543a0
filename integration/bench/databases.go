package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

func sqlite(j job, name, script string) error {
	cmd := exec.Command("sqlite3", "-bail", filepath.Join(j.Dir, name+".db"))
	cmd.Stdin, cmd.Stderr = strings.NewReader(script), os.Stderr
	return cmd.Run()
}

const sqliteTable = "CREATE TABLE t(i INTEGER PRIMARY KEY, x TEXT); CREATE INDEX tx ON t(x);\n"

func oneTransaction(rows int) string {
	return "PRAGMA journal_mode=DELETE; PRAGMA synchronous=FULL; BEGIN; " + sqliteTable + fmt.Sprintf(
		"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < %d) INSERT INTO t SELECT i, printf('%%08x%%090d', i * 2654435761 %% 4294967296, i) FROM n; COMMIT;\n", rows)
}

func manyTransactions(n int) string {
	var b strings.Builder
	b.WriteString("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; " + sqliteTable)
	for i := range n {
		fmt.Fprintf(&b, "INSERT INTO t(x) VALUES (printf('%%0100d', %d));\n", i)
	}
	return b.String()
}

// A postgres is a cluster in the directory of a job. PostgreSQL refuses to be run by
// root, and another user may not enter a mount of root's. So it runs as root in a
// user namespace in which root has another number: to the mount it is the one who
// mounted it.
type postgres struct{ bin, data, sockets string }

func postgresOf(j job) (p postgres, err error) {
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(dirs) == 0 {
		return p, errors.New("PostgreSQL is not installed (apt-get install postgresql)")
	}
	return postgres{dirs[len(dirs)-1], filepath.Join(j.Dir, "pg"), j.Dir + ".s"}, nil
}

func (p postgres) command(program string, args ...string) *exec.Cmd {
	args = append([]string{"--user", "--map-user=1000", "--map-group=1000", filepath.Join(p.bin, program)}, args...)
	cmd := exec.Command("unshare", args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PGUSER=bench", "PGHOST="+p.sockets, "PGDATABASE=postgres")
	return cmd
}

func (p postgres) do(program string, args ...string) error {
	log, err := os.CreateTemp("", "kmsfs-pg.")
	if err != nil {
		return err
	}
	defer os.Remove(log.Name())
	defer log.Close()
	cmd := p.command(program, args...)
	// A file, not a pipe, which the server would hold open.
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%s: %w: %s", program, err, said)
	}
	return nil
}

// startPostgres starts the server on a cluster that it makes once.
func startPostgres(j job) error {
	p, err := postgresOf(j)
	if err != nil {
		return err
	}
	_, there := os.Stat(filepath.Join(p.data, "filled"))
	if there != nil {
		err = errors.Join(os.RemoveAll(p.data), os.MkdirAll(p.sockets, 0o700),
			p.do("initdb", "--no-instructions", "-U", "bench", "-A", "trust", "-D", p.data))
	}
	if err == nil {
		err = p.do("pg_ctl", "-D", p.data, "-w", "-t", "120", "-l", filepath.Join(p.sockets, "log"), "-o", "-c listen_addresses= -c unix_socket_directories="+p.sockets, "start")
	}
	if err != nil || there == nil {
		return err
	}
	if err := p.do("pgbench", "-i", "-q", "-s", "5"); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(p.data, "filled"), nil, 0o600)
}

// pgbench measures the transactions, after a checkpoint.
func pgbench(j job) (time.Duration, error) {
	p, err := postgresOf(j)
	if err != nil {
		return 0, err
	}
	if err := p.do("psql", "-qc", "CHECKPOINT"); err != nil {
		return 0, err
	}
	start := time.Now()
	err = p.do("pgbench", "-n", "-t", fmt.Sprint(j.Sizes.Trans), "-c", "4", "-j", "2")
	return time.Since(start), err
}

func stopPostgres(j job) error {
	p, err := postgresOf(j)
	if err != nil {
		return err
	}
	return p.do("pg_ctl", "-D", p.data, "-w", "-m", "fast", "stop")
}
