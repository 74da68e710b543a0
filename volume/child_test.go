package volume

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
)

// Some of what holds must be shown as a user without CAP_DAC_OVERRIDE: the test
// binary runs itself as nobody (uid 65534), with a job in its environment.
const childEnv = "KMSFS_VOLUME_TEST_JOB"

const nobody = 65534

var childJobs = map[string]func(dir string) error{
	"headers on 0444": childHeaders,
	"foreign file":    childForeign,
	"directories":     childDirectories,
}

func childMain(job string) int {
	unix.Umask(0)
	name, dir, _ := strings.Cut(job, ":")
	if err := childJobs[name](dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// asNobody runs a job in a directory of the child's own.
func asNobody(t *testing.T, job string, prepare func(dir string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	require.Contains(t, childJobs, job)
	dir, err := os.MkdirTemp("/tmp", "kmsfs-volume-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chown(dir, nobody, nobody))
	if prepare != nil {
		prepare(dir)
	}
	// The test binary may lie where nobody can't reach: it is run through a
	// descriptor's copy.
	exe, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	copyOf := dir + ".test"
	require.NoError(t, os.WriteFile(copyOf, exe, 0o755))
	t.Cleanup(func() { os.Remove(copyOf) })
	require.NoError(t, os.Chmod(copyOf, 0o755))
	cmd := exec.Command(copyOf)
	cmd.Dir = "/tmp"
	cmd.Env = append(os.Environ(), childEnv+"="+job+":"+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

func expect(err error, conditions ...any) error {
	for i := 0; i+1 < len(conditions); i += 2 {
		if !conditions[i].(bool) {
			err = errors.Join(err, errors.New(conditions[i+1].(string)))
		}
	}
	return err
}

func modeOf(fd int) uint32 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Mode & 0o7777
}

func TestHeadersOnReadOnlyFilesOfAnUnprivilegedUser(t *testing.T) {
	asNobody(t, "headers on 0444", nil)
}

// childHeaders creates files as git creates objects: mode 0444, open read-write.
func childHeaders(dir string) error {
	for _, mode := range []uint32{0o444, 0o400, 0o000, 0o644, 0o2444} {
		name := fmt.Sprintf("%s/file-%o", dir, mode)
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, mode)
		if err != nil {
			return err
		}
		s := NewBacking(fd)
		one, two := bytes.Repeat([]byte{1}, 300), bytes.Repeat([]byte{2}, 900)
		if err := errors.Join(s.SetHeader(one), s.SetSparseMark([]byte("mark"))); err != nil {
			return fmt.Errorf("mode %o: %w", mode, err)
		}
		path, err := unix.Open(name, unix.O_PATH, 0)
		if err != nil {
			return err
		}
		if err := ReplaceHeader(path, one, two); err != nil {
			return fmt.Errorf("mode %o, replacing: %w", mode, err)
		}
		err = expect(nil, modeOf(fd) == mode, fmt.Sprintf("mode is %o, was %o", modeOf(fd), mode))
		unix.Fchmod(fd, 0o600)
		got, errRead := ReadHeader(fd)
		if err := errors.Join(err, errRead, expect(nil, bytes.Equal(got, two), "wrong header")); err != nil {
			return fmt.Errorf("mode %o: %w", mode, err)
		}
	}
	return nil
}

func TestHeadersOnForeignFilesAreRefused(t *testing.T) {
	asNobody(t, "foreign file", func(dir string) {
		require.NoError(t, os.WriteFile(dir+"/foreign", []byte("x"), 0o444))
		require.NoError(t, unix.Setxattr(dir+"/foreign", crypt.HeaderXattr, []byte("old"), 0))
	})
}

func childForeign(dir string) error {
	fd, err := unix.Open(dir+"/foreign", unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	err = ReplaceHeader(fd, []byte("old"), []byte("new"))
	got, errRead := ReadHeader(fd)
	return errors.Join(errRead, expect(nil,
		errors.Is(err, unix.EACCES), fmt.Sprintf("replacing a foreign file's header: %v", err),
		string(got) == "old", "the header changed",
		modeOf(fd) == 0o444, "the mode changed"))
}

func TestDirectoriesOfAnUnprivilegedUser(t *testing.T) { asNobody(t, "directories", nil) }

// childDirectories makes directories that forbid what their ids need.
func childDirectories(dir string) error {
	data, err := crypt.RandomKey()
	if err != nil {
		return err
	}
	id, _ := crypt.NewIdentity(crypt.VolumeID{1}, crypt.UseVolume, 12)
	secrets, err := crypt.Commit(&id, data)
	if err != nil {
		return err
	}
	raw, _ := (&crypt.Header{Identity: id, Copies: []crypt.Copy{{Key: "local:x", Blob: []byte("b")}}}).Marshal()
	set := Settings{Format: 1, ID: id.Volume, BlockSize: 4096, Names: NamesEncrypted, Keys: []string{"local:x"}, Header: raw}
	if err := Create(dir+"/vol", set, secrets); err != nil {
		return err
	}
	v, err := Open(dir + "/vol")
	if err != nil {
		return err
	}
	defer v.Close()
	if err := v.Unlock(secrets); err != nil {
		return err
	}
	d, err := v.Root()
	if err != nil {
		return err
	}
	for _, mode := range []uint32{0o755, 0o555, 0o300, 0o000, 0o1555} {
		name := fmt.Sprintf("dir-%o", mode)
		if err := d.Mkdir(name, mode); err != nil {
			return fmt.Errorf("mkdir with mode %o: %w", mode, err)
		}
		sub, err := d.OpenDir(name)
		if err != nil {
			return fmt.Errorf("opening a directory of mode %o: %w", mode, err)
		}
		if err := expect(sub.Err(), modeOf(sub.fd) == mode, fmt.Sprintf("mode %o became %o", mode, modeOf(sub.fd))); err != nil {
			return err
		}
		// With Link, a nameless file gets a long name without any privilege.
		if mode == 0o755 {
			fd, err := sub.Tmpfile(unix.O_RDWR, 0o600)
			if err != nil {
				return err
			}
			if err := sub.Link(fd, longName("l")); err != nil {
				return fmt.Errorf("linking: %w", err)
			}
			if err := sub.Unlink(longName("l")); err != nil {
				return err
			}
		}
		sub.Close()
		if err := d.Rmdir(name); err != nil {
			return fmt.Errorf("rmdir of mode %o: %w", mode, err)
		}
	}
	return nil
}
