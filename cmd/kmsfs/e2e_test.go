package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/keys/kmstest"
	"kmsfs/volume"
)

func TestMainTrip(t *testing.T) {
	for _, godebug := range []string{"", "fips140=only"} {
		t.Run("GODEBUG="+godebug, func(t *testing.T) {
			c := newClient(t)
			c.env = append(c.env, "GODEBUG="+godebug)
			dir, point := c.path("vol"), c.path("mnt")
			require.NoError(t, os.Mkdir(point, 0o755))
			r := c.ok("init", dir)
			require.Contains(t, r.out, "local:default")
			require.Contains(t, r.err, c.path("config/kmsfs/keys/default.key"))
			require.Contains(t, r.err, "losing it loses the data")
			st, err := os.Stat(dir)
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o700), st.Mode().Perm())

			c.mount(dir, point)
			c.write(filepath.Join(point, "a/b"), "hello")
			pid := daemonOf(t, dir)
			c.ok("umount", point)
			require.False(t, mounted(t, point))
			require.False(t, alive(pid), "umount returns when the daemon is gone")

			c.mount(dir, point)
			c.reads(filepath.Join(point, "a/b"), "hello")
			c.ok("umount", point)
			require.Equal(t, godebug != "", strings.Contains(c.ok("version").out, "enforced"))
		})
	}
}

// A rekey of a live mount: what was open, old files and new files go on, and the
// old key can be thrown away.
func TestRekeyLive(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	c.mount(dir, point)
	for i := range 30 {
		c.write(filepath.Join(point, "d", fmt.Sprint(i)), fmt.Sprint("contents ", i))
	}
	open, err := os.Open(filepath.Join(point, "d", "0"))
	require.NoError(t, err)
	defer open.Close()
	// Opened before the rekey, written after it: it must not keep the old key.
	held, err := os.Create(filepath.Join(point, "held"))
	require.NoError(t, err)
	defer held.Close()

	r := c.ok("rekey", dir, "--to", "local:next", "--dry-run")
	require.Contains(t, r.out, "30 headers to move to local:next")
	c.bad(exitUsage, []string{"--yes"}, "rekey", dir, "--to", "local:next")
	r = c.ok("rekey", dir, "--to", "local:next", "--yes")
	require.Contains(t, r.out, "moved 30 headers")
	require.Contains(t, r.out, "no longer needs local:default")
	require.NoError(t, os.Remove(c.path("config/kmsfs/keys/default.key")))

	c.write(filepath.Join(point, "new"), "under the new key")
	_, err = held.WriteString("written late")
	require.NoError(t, err)
	require.NoError(t, held.Close())
	buf := make([]byte, 20)
	n, _ := open.Read(buf)
	require.Equal(t, "contents 0", string(buf[:n]))
	require.NoError(t, open.Close())
	c.ok("umount", point)
	c.mount(dir, point)
	for i := range 30 {
		c.reads(filepath.Join(point, "d", fmt.Sprint(i)), fmt.Sprint("contents ", i))
	}
	c.reads(filepath.Join(point, "new"), "under the new key")
	c.reads(filepath.Join(point, "held"), "written late")
	c.ok("umount", point)
	for path := range snapshot(t, dir) {
		if in, err := inspectFile(path); err == nil && in.Use == "file" {
			require.Equal(t, "local:next", in.Copies[0].Key)
		}
	}
	// Again: nothing to do, and still no need of the old key.
	c.ok("rekey", dir, "--to", "local:next", "--yes")
}

// A mount that was started with --key for other keys refuses the new one, and the
// rekey stops before it has moved a file.
func TestRekeyRefusedByAMountWithoutThePin(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	other := newClient(t) // same keyring, pins of its own
	other.env = append(other.env, "KMSFS_KEYRING="+c.path("config/kmsfs/keys"), "XDG_RUNTIME_DIR="+c.path("run"))
	other.mount(dir, point, "--key", "local:default")
	c.write(filepath.Join(point, "a"), "x")
	r := c.run("rekey", dir, "--to", "local:next", "--yes")
	require.Equal(t, exitMount, r.status, r.err)
	require.Contains(t, r.err, "--key for others only")
	other.ok("umount", point)
	r = c.ok("rekey", dir, "--to", "local:next", "--yes")
	require.Contains(t, r.out, "moved 1 headers")
}

func TestRekeyJSONAndBadFile(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	c.mount(dir, point)
	c.write(filepath.Join(point, "good"), "x")
	c.write(filepath.Join(point, "bad"), "y")
	c.ok("umount", point)
	var victim string
	for path := range snapshot(t, dir) {
		if in, err := inspectFile(path); err == nil && in.Use == "file" {
			victim = path
		}
	}
	require.NoError(t, unix.Setxattr(victim, crypt.HeaderXattr, []byte("not a header"), 0))
	r := c.run("rekey", dir, "--to", "local:next", "--yes", "--json")
	require.Equal(t, exitPartial, r.status, r.err)
	events := map[string]map[string]any{}
	for _, line := range strings.Split(strings.TrimSpace(r.out), "\n") {
		var e map[string]any
		require.NoError(t, json.Unmarshal([]byte(line), &e), line)
		events[e["event"].(string)] = e
	}
	require.EqualValues(t, 1, events["plan"]["change"])
	require.Equal(t, filepath.Base(victim), events["file"]["path"])
	require.Equal(t, "bad", events["file"]["outcome"])
	require.Equal(t, true, events["done"]["done"])
	require.EqualValues(t, 1, events["done"]["changed"])
}

// The whole trip on KMS: init, mount, rekey in a region with one ReEncrypt a file,
// local to KMS and back.
func TestKMS(t *testing.T) {
	srv := kmstest.New(t, nil)
	c := newClient(t)
	c.env = append(c.env, srv.Env(srv.Admin())...)
	one, two := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	alias := srv.CreateAlias("alias/tree", one)
	dir, point := c.volume(alias)
	require.Contains(t, string(must(os.ReadFile(filepath.Join(dir, "kmsfs.toml")))), one, "an alias is resolved once")

	c.mount(dir, point)
	for i := range 5 {
		c.write(filepath.Join(point, fmt.Sprint(i)), "x")
	}
	srv.Reset()
	r := c.ok("rekey", dir, "--to", two, "--yes")
	require.Contains(t, r.out, "moved 5 headers")
	require.Equal(t, 6, srv.Count("ReEncrypt"), "one a file and one for the volume key")
	srv.SetState(one, kmstest.Disabled)
	c.ok("umount", point)
	c.mount(dir, point)
	c.reads(filepath.Join(point, "3"), "x")
	c.ok("umount", point)

	srv.SetState(two, kmstest.Disabled)
	c.bad(exitRefused, []string{two, "us-east-1", "enable the key"}, "mount", dir, point)
	srv.SetState(two, kmstest.Enabled)
	c.ok("key", "create", "home")
	r = c.ok("rekey", dir, "--to", "local:home", "--yes")
	require.Contains(t, r.out, "moved 5 headers")
	srv.SetDown("us-east-1", true)
	c.mount(dir, point)
	c.reads(filepath.Join(point, "3"), "x")
	c.ok("umount", point)
	srv.SetDown("us-east-1", false)
	c.ok("rekey", dir, "--to", two, "--yes")
	srv.SetDown("us-east-1", true)
	c.bad(exitUnavailable, []string{two}, "mount", dir, point, "-o", "kms_deadline=1s")
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A principal that may only ReEncrypt moves the tree, and can't mount it.
func TestRekeyWithoutDecrypt(t *testing.T) {
	srv := kmstest.New(t, nil)
	owner, mover := newClient(t), newClient(t)
	owner.env = append(owner.env, srv.Env(srv.Admin())...)
	one, two := srv.CreateKey("us-east-1"), srv.CreateKey("us-east-1")
	dir, point := owner.volume(one)
	owner.mount(dir, point)
	owner.write(filepath.Join(point, "a"), "secret")
	owner.ok("umount", point)

	p := srv.AddPrincipal("mover", kmstest.Rule{Actions: []string{"ReEncryptFrom", "ReEncryptTo"}, Keys: []string{one, two}})
	mover.env = append(mover.env, srv.Env(p)...)
	mover.bad(exitUsage, []string{"--from " + one}, "rekey", dir, "--to", two, "--yes")
	mover.ok("rekey", dir, "--to", two, "--from", one, "--yes")
	mover.bad(exitRefused, []string{two, "kms:Decrypt", "us-east-1"}, "mount", dir, point)

	// The owner's pin knows only the old key; the new one proves itself.
	srv.SetState(one, kmstest.Disabled)
	owner.mount(dir, point)
	owner.reads(filepath.Join(point, "a"), "secret")
	owner.ok("umount", point)
}

// kill -9 of a rekey, again and again, on a live mount: the next run goes on, and at
// the end every file reads back without the old key.
func TestRekeyKilled(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.ok("key", "create", "next")
	c.mount(dir, point)
	const files = 300
	for i := range files {
		c.write(filepath.Join(point, fmt.Sprint("d", i%9), fmt.Sprint(i)), fmt.Sprint("contents ", i))
	}
	killed := 0
	for wait := 10 * time.Millisecond; killed < 40; wait += 7 * time.Millisecond {
		cmd := c.command("rekey", dir, "--to", "local:next", "--yes", "--jobs", "1")
		require.NoError(t, cmd.Start())
		time.Sleep(wait)
		_ = cmd.Process.Kill()
		if cmd.Wait() == nil {
			break // it was faster
		}
		killed++
		i := killed % files
		c.reads(filepath.Join(point, fmt.Sprint("d", i%9), fmt.Sprint(i)), fmt.Sprint("contents ", i))
	}
	require.Greater(t, killed, 3)
	r := c.ok("rekey", dir, "--to", "local:next", "--yes")
	t.Logf("killed %d times; %s", killed, r.out)
	require.NoError(t, os.Remove(c.path("config/kmsfs/keys/default.key")))
	c.ok("umount", point)
	c.mount(dir, point)
	for i := range files {
		c.reads(filepath.Join(point, fmt.Sprint("d", i%9), fmt.Sprint(i)), fmt.Sprint("contents ", i))
	}
	c.ok("umount", point)
}

// What the live mount says on its control socket.
func TestControl(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	t.Setenv("XDG_RUNTIME_DIR", c.path("run"))
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	conn, peer, err := dialControl(v.ID().String(), daemonOf(t, dir))
	require.NoError(t, err)
	defer conn.Close()
	reply, err := request(t.Context(), conn, controlRequest{Op: "status"}, controlIdle)
	require.NoError(t, err)
	live := reply.leaseStatus
	require.Len(t, live.Leases, 1)
	require.Equal(t, "valid", live.Leases[0].State)
	require.Equal(t, []float64{60, 900}, []float64{live.Lease, live.Grace})
	reply.leaseStatus = leaseStatus{}
	require.Equal(t, controlReply{OK: true, PID: int(peer.Pid), Volume: v.ID().String(), Dir: dir, Mountpoint: point, Keys: []string{"local:default"}}, reply)
	_, err = request(t.Context(), conn, controlRequest{Op: "reload"}, controlIdle)
	require.NoError(t, err)
	_, err = request(t.Context(), conn, controlRequest{Op: "bogus"}, controlIdle)
	require.ErrorContains(t, err, "unknown request")
	_, err = conn.Write([]byte("not json\n"))
	require.NoError(t, err)
	_, _, err = dialControl(v.ID().String(), 1)
	require.Error(t, err, "an answer of another process than the lock's holder must not count")

	// A key list that may not be trusted is refused, and the mount goes on.
	listKey(t, dir, keyOther, []byte("forged"))
	other, _, err := dialControl(v.ID().String(), 0)
	require.NoError(t, err)
	defer other.Close()
	_, err = request(t.Context(), other, controlRequest{Op: "reload"}, controlIdle)
	require.ErrorContains(t, err, "another account")
	c.write(filepath.Join(point, "a"), "x")
	c.reads(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
}

func TestForegroundAndSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			c := newClient(t)
			dir, point := c.volume()
			var log strings.Builder
			cmd := c.command("mount", "-f", dir, point)
			cmd.Stderr = &log
			require.NoError(t, cmd.Start())
			eventually(t, "mounted", func() bool { return mounted(t, point) })
			eventually(t, "writable", func() bool { return os.WriteFile(filepath.Join(point, "a"), []byte("x"), 0o644) == nil })
			require.NoError(t, cmd.Process.Signal(sig))
			require.NoError(t, cmd.Wait(), log.String())
			require.False(t, mounted(t, point))
			require.Contains(t, log.String(), "unmounted")
			c.mount(dir, point)
			c.reads(filepath.Join(point, "a"), "x")
			c.ok("umount", point)
		})
	}
}

// A busy mount is not unmounted by umount; SIGTERM detaches it and it is served
// until its last user is gone.
func TestBusy(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	f, err := os.Create(filepath.Join(point, "a"))
	require.NoError(t, err)
	defer f.Close()
	c.bad(exitMount, []string{"busy", "fuser"}, "umount", point)
	pid := daemonOf(t, dir)
	require.NoError(t, syscall.Kill(pid, syscall.SIGTERM))
	eventually(t, "detached", func() bool { return !mounted(t, point) })
	_, err = f.WriteString("still served")
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
	eventually(t, "gone", func() bool { return !alive(pid) })
	c.mount(dir, point)
	c.reads(filepath.Join(point, "a"), "still served")
	c.ok("umount", point)
}

func TestKilledDaemon(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	pid := daemonOf(t, dir)
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	eventually(t, "dead", func() bool { return !alive(pid) })
	c.bad(exitMount, []string{"left over", "kmsfs umount " + point}, "mount", dir, point)
	c.ok("umount", point)
	c.mount(dir, point)
	c.ok("umount", point)
}

func TestDaemonIsPrivate(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	pid := daemonOf(t, dir)
	limits := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))))
	require.Regexp(t, `Max core file size\s+0\s+0`, limits)
	for _, fd := range []int{0, 1, 2} {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
		require.NoError(t, err)
		require.Equal(t, "/dev/null", to)
	}
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	require.NoError(t, err)
	require.Equal(t, "/", cwd)
	st, err := os.Stat(c.path("run/kmsfs"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), st.Mode().Perm())
	c.ok("umount", point)
	left, err := os.ReadDir(c.path("run/kmsfs"))
	require.NoError(t, err)
	require.Empty(t, left, "the control socket is gone")
}

func TestReadOnlyAndLogFile(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	c.write(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
	c.mount(dir, point, "--read-only", "--log-file", c.path("log"))
	require.ErrorIs(t, os.WriteFile(filepath.Join(point, "b"), nil, 0o644), unix.EROFS)
	c.reads(filepath.Join(point, "a"), "x")
	c.ok("umount", point)
	require.Contains(t, string(must(os.ReadFile(c.path("log")))), "unmounted")
}

// A mount that fails in the background: the message and the status come through.
func TestBackgroundFailurePassesOn(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	require.NoError(t, os.Remove(c.path("config/kmsfs/keys/default.key")))
	r := c.bad(exitRefused, []string{"local:default", "KMSFS_KEYRING"}, "mount", dir, point)
	require.Equal(t, 1, strings.Count(r.err, "kmsfs: "), "said once: %s", r.err)
	require.False(t, mounted(t, point))
}

func TestInspect(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	c.write(filepath.Join(point, "a"), strings.Repeat("x", 5000))
	c.bad(exitUsage, []string{"backing directory " + dir}, "inspect", filepath.Join(point, "a"))
	c.ok("umount", point)
	var file string
	for path := range snapshot(t, dir) {
		if in, err := inspectFile(path); err == nil && in.Use == "file" {
			file = path
		}
	}
	r := c.ok("inspect", file)
	require.Contains(t, r.out, "5000 bytes, stored in 5064")
	require.Contains(t, r.out, "under local:default")
	r = c.ok("inspect", "--json", file, filepath.Join(dir, "kmsfs.toml"))
	lines := strings.Split(strings.TrimSpace(r.out), "\n")
	require.Len(t, lines, 2)
	var in inspection
	require.NoError(t, json.Unmarshal([]byte(lines[0]), &in))
	require.EqualValues(t, 5000, *in.Plain)
	require.NoError(t, json.Unmarshal([]byte(lines[1]), &in))
	require.Equal(t, "volume", in.Use)

	raw := xattrOf(t, file)
	for name, header := range map[string][]byte{"cut": raw[:len(raw)-1], "version": append([]byte("KMSF\x63"), raw[5:]...), "flipped": append(raw[:60:60], append([]byte{raw[60] ^ 1}, raw[61:]...)...)} {
		require.NoError(t, unix.Setxattr(file, crypt.HeaderXattr, header, 0), name)
		c.bad(exitDamaged, []string{file, "malformed header"}, "inspect", file)
	}
	require.NoError(t, unix.Removexattr(file, crypt.HeaderXattr))
	c.bad(exitDamaged, []string{file, "no kmsfs header"}, "inspect", file)
	c.bad(exitUsage, []string{"not a regular file"}, "inspect", dir)
	c.bad(exitUsage, []string{"no such file"}, "inspect", filepath.Join(dir, "none"))
	c.bad(exitUsage, []string{"wants FILE"}, "inspect")
}

func xattrOf(t *testing.T, file string) []byte {
	t.Helper()
	buf := make([]byte, crypt.MaxHeader)
	n, err := unix.Getxattr(file, crypt.HeaderXattr, buf)
	require.NoError(t, err)
	return buf[:n]
}

func TestKeys(t *testing.T) {
	c := newClient(t)
	require.Empty(t, c.ok("key", "list").out)
	r := c.ok("key", "create", "a")
	require.Contains(t, r.out, c.path("config/kmsfs/keys/a.key"))
	c.ok("key", "create", "local:b")
	r = c.ok("key", "list")
	require.Equal(t, 2, strings.Count(r.out, "\n"))
	require.Contains(t, r.out, "local:a\tenabled\t")
	c.bad(exitUsage, []string{"local:a exists already"}, "key", "create", "a")
	c.bad(exitUsage, []string{"not the name of a local key"}, "key", "create", "../a")
}

func TestUsage(t *testing.T) {
	c := newClient(t)
	require.Contains(t, c.ok("--help").out, "Exit status")
	require.Contains(t, c.ok("help", "mount").out, "Exit status")
	require.Contains(t, c.ok("completion", "bash").out, "kmsfs")
	for _, args := range [][]string{{"mount"}, {"mount", "x"}, {"bogus"}, {"mount", "--bogus", "a", "b"}, {"umount"}, {"rekey", "x"}, {"version", "x"}, {"mount", "a", "b", "-o", "bogus"}} {
		c.bad(exitUsage, nil, args...)
	}
	for _, args := range [][]string{
		{"one of --to KEY", "--yes"}, {"one of --to KEY", "--to", "local:a", "--add", "local:b"}, {"one of --to KEY", "--remove", "local:a", "--refresh"},
		{"--via goes with", "--remove", "local:a", "--via", "local:b"}, {"--shard", "--to", "local:a", "--shard", "5/4"},
		{"--prepare comes once", "--to", "local:a", "--shard", "1/4", "--prepare"}, {"--jobs", "--to", "local:a", "--jobs", "0"},
		{"negative", "--to", "local:a", "--max-rps", "-1"}, {"unknown flag", "--to", "local:a", "--bogus"}, {"--yes", "--to", "local:a"},
	} {
		c.bad(exitUsage, args[:1], append([]string{"rekey", "x"}, args[1:]...)...)
	}
	c.write(c.path("config/kmsfs/config.toml"), "\nrequire_kmz = true\n")
	c.bad(exitUsage, []string{"config.toml:2: unknown key \"require_kmz\""}, "version")
}

// Every kind of bad input: one clear sentence, the right status, and nothing
// changed on disk.
func TestBadInput(t *testing.T) {
	cross := "arn:aws:kms:us-east-1:444455556666:key/33333333-3333-4333-8333-333333333333"
	type bad struct {
		name   string
		status int
		says   []string
		setup  func(t *testing.T, c *client, dir, point string) (args []string)
	}
	mount := func(dir, point string, more ...string) []string {
		return append([]string{"mount", dir, point}, more...)
	}
	for _, b := range []bad{
		{"init of a directory that is not empty", exitUsage, []string{"not empty"}, func(t *testing.T, c *client, dir, point string) []string {
			c.write(c.path("full/file"), "x")
			return []string{"init", c.path("full")}
		}},
		{"init twice", exitUsage, []string{"not empty"}, func(t *testing.T, c *client, dir, point string) []string { return []string{"init", dir} }},
		{"init with a bad block size", exitUsage, []string{"--block-size"}, func(t *testing.T, c *client, dir, point string) []string {
			return []string{"init", c.path("new"), "--block-size", "5000"}
		}},
		{"init with bad names", exitUsage, []string{"--names"}, func(t *testing.T, c *client, dir, point string) []string {
			return []string{"init", c.path("new"), "--names", "hashed"}
		}},
		{"init with a key that is none", exitUsage, []string{"bogus"}, func(t *testing.T, c *client, dir, point string) []string {
			return []string{"init", c.path("new"), "--key", "bogus"}
		}},
		{"init with a local key that is missing", exitRefused, []string{"local:none"}, func(t *testing.T, c *client, dir, point string) []string {
			return []string{"init", c.path("new"), "--key", "local:none"}
		}},
		{"init with a local key where KMS is required", exitUsage, []string{"require_kms"}, func(t *testing.T, c *client, dir, point string) []string {
			c.write(c.path("config/kmsfs/config.toml"), "require_kms = true\n")
			return []string{"init", c.path("new")}
		}},
		{"mount of a local key where KMS is required", exitUsage, []string{"require_kms"}, func(t *testing.T, c *client, dir, point string) []string {
			c.write(c.path("config/kmsfs/config.toml"), "require_kms = true\n")
			return mount(dir, point)
		}},
		{"no volume", exitUsage, []string{"not a kmsfs volume", "kmsfs init"}, func(t *testing.T, c *client, dir, point string) []string {
			require.NoError(t, os.Mkdir(c.path("plain"), 0o755))
			return mount(c.path("plain"), point)
		}},
		{"no directory", exitUsage, []string{"no such file"}, func(t *testing.T, c *client, dir, point string) []string { return mount(c.path("none"), point) }},
		{"no mountpoint", exitMount, []string{"mountpoint"}, func(t *testing.T, c *client, dir, point string) []string { return mount(dir, c.path("none")) }},
		{"mountpoint is a file", exitMount, []string{"not a directory"}, func(t *testing.T, c *client, dir, point string) []string {
			c.write(c.path("file"), "x")
			return mount(dir, c.path("file"))
		}},
		{"mountpoint is not empty", exitMount, []string{"not empty", "nonempty"}, func(t *testing.T, c *client, dir, point string) []string {
			c.write(c.path("full/file"), "x")
			return mount(dir, c.path("full"))
		}},
		{"mountpoint inside DIR", exitUsage, []string{"inside the backing directory"}, func(t *testing.T, c *client, dir, point string) []string {
			require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
			return mount(dir, filepath.Join(dir, "sub"))
		}},
		{"mountpoint inside DIR by a symlink", exitUsage, []string{"inside the backing directory"}, func(t *testing.T, c *client, dir, point string) []string {
			require.NoError(t, os.Symlink(dir, c.path("link")))
			return mount(c.path("link"), dir)
		}},
		{"DIR inside the mountpoint", exitUsage, []string{"inside the mountpoint"}, func(t *testing.T, c *client, dir, point string) []string { return mount(dir, c.home) }},
		{"corrupt kmsfs.toml and backup", exitDamaged, []string{"kmsfs.toml", "line"}, func(t *testing.T, c *client, dir, point string) []string {
			edit(t, dir, func(s string) string { return strings.Replace(s, "format =", "format !", 1) })
			return mount(dir, point)
		}},
		{"unknown key in kmsfs.toml", exitDamaged, []string{"unknown key", "kmsfs.toml"}, func(t *testing.T, c *client, dir, point string) []string {
			edit(t, dir, func(s string) string { return s + "\ntrust = 'me'\n" })
			return mount(dir, point)
		}},
		{"names mode edited", exitUsage, []string{"what never changes"}, func(t *testing.T, c *client, dir, point string) []string {
			edit(t, dir, func(s string) string { return strings.Replace(s, "'encrypted'", "'plain'", 1) })
			return mount(dir, point)
		}},
		{"names mode edited, no pin", exitDamaged, []string{"without the volume key"}, func(t *testing.T, c *client, dir, point string) []string {
			edit(t, dir, func(s string) string { return strings.Replace(s, "'encrypted'", "'plain'", 1) })
			require.NoError(t, os.RemoveAll(c.path("state")))
			return mount(dir, point, "--accept-new")
		}},
		{"unpinned without a terminal", exitUsage, []string{"new to this client", "--key local:default"}, func(t *testing.T, c *client, dir, point string) []string {
			require.NoError(t, os.RemoveAll(c.path("state")))
			return mount(dir, point)
		}},
		{"wrong key named", exitUsage, []string{"not under the keys that were named"}, func(t *testing.T, c *client, dir, point string) []string {
			c.ok("key", "create", "other")
			return mount(dir, point, "--key", "local:other")
		}},
		{"another key under the same name", exitUsage, []string{"local:default"}, func(t *testing.T, c *client, dir, point string) []string {
			require.NoError(t, os.Remove(c.path("config/kmsfs/keys/default.key")))
			c.ok("key", "create", "default")
			return mount(dir, point)
		}},
		{"key of another account behind the pin", exitUsage, []string{cross, "--accept-key " + cross}, func(t *testing.T, c *client, dir, point string) []string {
			listKey(t, dir, cross, []byte("forged"))
			return mount(dir, point)
		}},
		{"forged copy under a neighbour key behind the pin", exitUsage, []string{"local:mine"}, func(t *testing.T, c *client, dir, point string) []string {
			c.ok("key", "create", "mine")
			listKey(t, dir, "local:mine", make([]byte, 93))
			return mount(dir, point)
		}},
		{"another volume at a pinned path", exitUsage, []string{"has changed", "known_volumes.toml"}, func(t *testing.T, c *client, dir, point string) []string {
			c.ok("init", c.path("other"))
			require.NoError(t, os.Rename(dir, c.path("away")))
			require.NoError(t, os.Rename(c.path("other"), dir))
			return mount(dir, point, "--key", "local:default")
		}},
		{"damaged pins", exitUsage, []string{"known_volumes.toml:1"}, func(t *testing.T, c *client, dir, point string) []string {
			c.write(c.path("state/kmsfs/known_volumes.toml"), "[[[")
			return mount(dir, point)
		}},
		{"umount of something else", exitMount, []string{"not a kmsfs mountpoint"}, func(t *testing.T, c *client, dir, point string) []string { return []string{"umount", point} }},
		{"rekey to a key that is missing", exitRefused, []string{"local:none"}, func(t *testing.T, c *client, dir, point string) []string {
			return []string{"rekey", dir, "--to", "local:none", "--yes"}
		}},
		{"rekey to itself", exitUsage, []string{"are the same"}, func(t *testing.T, c *client, dir, point string) []string {
			return []string{"rekey", dir, "--to", "local:default", "--from", "local:default", "--yes"}
		}},
	} {
		t.Run(b.name, func(t *testing.T) {
			c := newClient(t)
			dir, point := c.volume()
			args := b.setup(t, c, dir, point)
			before := snapshot(t, dir, c.home)
			c.bad(b.status, b.says, args...)
			require.Equal(t, before, snapshot(t, dir, c.home))
			require.False(t, mounted(t, point))
		})
	}
}

// listKey puts a key and a copy of the volume key into kmsfs.toml.
func listKey(t *testing.T, dir, key string, blob []byte) {
	t.Helper()
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	require.NoError(t, v.Update(func(s *volume.Settings) error {
		h, err := crypt.ParseHeader(s.Header)
		if err != nil {
			return err
		}
		h.Copies = append([]crypt.Copy{{Key: key, Blob: blob}}, h.Copies...)
		s.Keys = append([]string{key}, s.Keys...)
		s.Header, err = h.Marshal()
		return err
	}))
}

// A damaged kmsfs.toml with a good backup: it mounts, and says so.
func TestBackupOfSettings(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "kmsfs.toml"), []byte("nonsense"), 0o600))
	r := c.ok("mount", dir, point)
	require.Contains(t, r.err, "kmsfs.toml.bak is used instead")
	c.ok("umount", point)
}

// The command that a refusal names is exact: run by a shell, it works.
func TestTheNamedCommandWorks(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	require.NoError(t, os.RemoveAll(c.path("state")))
	r := c.bad(exitUsage, []string{"run: kmsfs mount"}, "mount", dir, point)
	_, command, _ := strings.Cut(strings.TrimSpace(r.err), "run: ")
	sh := exec.Command("sh", "-c", command)
	sh.Env = append(c.env, "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"))
	out, err := sh.CombinedOutput()
	require.NoError(t, err, string(out))
	require.True(t, mounted(t, point))
	c.ok("umount", point)
	c.mount(dir, point) // and it is remembered
	c.ok("umount", point)
}

func TestMountingTwice(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	c.mount(dir, point)
	second := c.path("mnt2")
	require.NoError(t, os.Mkdir(second, 0o755))
	c.bad(exitMount, []string{fmt.Sprint("process ", daemonOf(t, dir)), "mount on " + point}, "mount", dir, second)
	c.bad(exitMount, []string{"mounted already", "kmsfs umount"}, "mount", dir, point)

	// The mount itself is no backing directory.
	require.NoError(t, os.Mkdir(filepath.Join(point, "sub"), 0o755))
	c.bad(exitUsage, []string{"itself on a kmsfs mount"}, "init", filepath.Join(point, "sub"))
	c.bad(exitUsage, []string{"itself on a kmsfs mount"}, "mount", point, second)
	c.write(filepath.Join(point, "a"), "unharmed")
	c.reads(filepath.Join(point, "a"), "unharmed")
	c.ok("umount", point)
}

func TestNoUserXattrs(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	bare := c.path("bare")
	require.NoError(t, os.Mkdir(bare, 0o755))
	require.NoError(t, unix.Mount("none", bare, "ramfs", 0, ""), "a file system without xattrs is needed, and root")
	for _, sub := range []string{"new", "vol"} {
		require.NoError(t, os.Mkdir(filepath.Join(bare, sub), 0o700))
	}
	c.bad(exitUsage, []string{"extended attributes"}, "init", filepath.Join(bare, "new"))
	for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
		require.NoError(t, os.WriteFile(filepath.Join(bare, "vol", name), must(os.ReadFile(filepath.Join(dir, name))), 0o600))
	}
	c.bad(exitUsage, []string{"extended attributes"}, "mount", filepath.Join(bare, "vol"), point)
	left, err := os.ReadDir(filepath.Join(bare, "new"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// Configuration names the keys of a volume in place of --key.
func TestKeysFromConfiguration(t *testing.T) {
	c := newClient(t)
	dir, point := c.volume()
	v, err := volume.Open(dir)
	require.NoError(t, err)
	id := v.ID().String()
	require.NoError(t, v.Close())
	require.NoError(t, os.RemoveAll(c.path("state")))
	c.write(c.path("extra.toml"), "[volume.\""+id+"\"]\nkeys = ['local:default']\n[mount]\nread_only = true\n")
	c.ok("--config", c.path("extra.toml"), "mount", dir, point)
	require.ErrorIs(t, os.WriteFile(filepath.Join(point, "b"), nil, 0o644), unix.EROFS)
	c.ok("umount", point)
}
