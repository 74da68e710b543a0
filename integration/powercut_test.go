package integration

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// A disk is an ext4 of its own under a volume's backing directory, whose power can be
// cut: EXT4_IOC_SHUTDOWN without a flush of the log drops everything that is not on the
// device yet, and the next mount of it replays the journal, as after a power cut. (Not
// so: the device itself loses nothing that it was given.)
type disk struct {
	t          *testing.T
	e          *harness.Env
	image, dir string
}

const (
	ext4Shutdown   = 0x8004587d // _IOR('X', 125, __u32), include/uapi/linux/ext4.h
	withoutLogging = 2
)

func newDisk(t *testing.T, e *harness.Env, volume string) *disk {
	t.Helper()
	s := &disk{t: t, e: e, image: filepath.Join(e.Root, "store.img"), dir: filepath.Join(e.Mkdir(volume), "backing")}
	require.NoError(t, os.Mkdir(s.dir, 0o700))
	f, err := os.Create(s.image)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(192<<20))
	require.NoError(t, f.Close())
	s.run("mkfs.ext4", "-q", "-F", "-I", "512", s.image)
	s.mount()
	t.Cleanup(func() {
		if !s.mounted() {
			return
		}
		s.unmount()
	})
	require.NoError(t, os.Remove(filepath.Join(s.dir, "lost+found")))
	return s
}

func (s *disk) run(name string, args ...string) {
	s.t.Helper()
	out, err := s.e.Command(name, args...).CombinedOutput()
	require.NoError(s.t, err, "%s %v: %s", name, args, out)
}

func (s *disk) mount() { s.t.Helper(); s.run("mount", "-o", "loop", s.image, s.dir) }

func (s *disk) mounted() bool {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	return strings.Contains(string(mounts), " "+s.dir+" ")
}

// unmount waits for those who have a file open there and were just killed.
func (s *disk) unmount() {
	s.t.Helper()
	require.True(s.t, harness.Eventually(time.Minute, func() bool { return unix.Unmount(s.dir, 0) == nil }), "the store is busy")
}

// cut cuts the power of the store under a mount, and what ran on the machine is gone,
// memory too. Afterwards the store is there again.
func (s *disk) cut(v *harness.Volume) {
	s.t.Helper()
	left := "/dev/shm/kmsfs-*" + backingName(s.t, v)
	dir, err := os.Open(s.dir)
	require.NoError(s.t, err)
	require.NoError(s.t, unix.IoctlSetPointerInt(int(dir.Fd()), ext4Shutdown, withoutLogging))
	dir.Close()
	v.Kill()
	v.Env.Must("umount", v.Mnt)
	slots, err := filepath.Glob(left)
	require.NoError(s.t, err)
	for _, path := range slots {
		require.NoError(s.t, os.Remove(path))
	}
	s.unmount()
	s.mount()
}

// TestPowerCutTail: 100 synced bytes are followed by 100 that are not. The journal has
// the new size, the device has old bytes, and so no record is whole. The old end is
// there again at the next mount; if it was not kept, it is found as far as it is not
// written over; and if nothing is to be touched, reading fails, and cuts nothing.
func TestPowerCutTail(t *testing.T) {
	for _, tt := range []struct {
		name  string
		mount []string
		next  []string
		says  string
		lost  bool
	}{
		{"kept", nil, nil, "1 synced ends put back", false},
		{"salvaged", []string{"-o", "tail_save=off"}, []string{"-o", "tail_save=off"}, "1 bad ends cut off", false},
		{"left alone", []string{"-o", "tail_save=off"}, []string{"-o", "tail_save=off", "--no-recover"}, "0 bad ends cut off", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := harness.New(t)
			s := newDisk(t, e, "volume")
			v := e.Init("volume", "--key", localKey(e, "one"))
			v.Damaged()
			v.Mount(tt.mount...)
			want := syncedBytes("log", 200)
			f, err := os.OpenFile(v.Path("log"), os.O_RDWR|os.O_CREATE, 0o600)
			require.NoError(t, err)
			_, err = f.Write(want[:100])
			require.NoError(t, err)
			require.NoError(t, f.Sync())
			_, err = f.Write(want[100:])
			require.NoError(t, err)
			require.NoError(t, syncRange(f)) // it is with the daemon now
			createSynced(t, v.Path("other")) // commits the journal
			s.cut(v)
			f.Close()
			v.Mount(tt.next...)
			require.Contains(t, e.Must("status", v.Dir), tt.says)
			got, err := os.ReadFile(v.Path("log"))
			if tt.lost {
				require.ErrorIs(t, err, unix.EBADMSG)
				v.Remount("-o", "tail_save=off") // it can be put right later
				got, err = os.ReadFile(v.Path("log"))
			}
			require.NoError(t, err)
			require.Equal(t, want[:100], got)
			v.Remount()
			require.NotContains(t, e.Must("status", v.Dir), "uncleanly")
		})
	}
}

func createSynced(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteString("synced")
	require.NoError(t, err)
	require.NoError(t, f.Sync())
}

func init() { harness.Helper("log-writer", logWriter) }

// logWriter appends 100 bytes to each of some logs and syncs, again and again, and says
// how many bytes of which are durable. Between two syncs it hands some more to the
// daemon, for a power cut to find them half written.
func logWriter(args []string) error {
	var out sync.Mutex
	failed := make(chan error)
	for i := range 4 {
		name := fmt.Sprint("log", i)
		go func() {
			failed <- writeLog(args[0], name, func(n int64) {
				out.Lock()
				defer out.Unlock()
				fmt.Println(name, n)
			})
		}()
	}
	return <-failed
}

func writeLog(dir, name string, durable func(n int64)) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	all := syncedBytes(name, 1<<20)
	for n := info.Size(); n+100 <= int64(len(all)); n += 100 {
		for _, m := range []int64{40, 100} {
			if _, err := f.WriteAt(all[n:n+m], n); err != nil {
				return err
			}
			if err := syncRange(f); err != nil {
				return err
			}
		}
		if err := f.Sync(); err != nil {
			return err
		}
		durable(n + 100)
	}
	return nil
}

// TestPowerCutUnderLoad cuts the power of the backing store under logs to which 100
// bytes are appended and synced, again and again: no record that was acknowledged is
// lost, and every file opens. KMSFS_TEST_CUTS is how many times.
func TestPowerCutUnderLoad(t *testing.T) {
	rounds := fromEnv(t, "KMSFS_TEST_CUTS", 3)
	e := harness.New(t)
	s := newDisk(t, e, "volume")
	v := e.Init("volume", "--key", localKey(e, "one"))
	v.Damaged()
	acknowledged := map[string]int{}
	compared, records := 0, 0
	v.Mount()
	for round := range rounds {
		before := records
		records += logUntilCut(t, s, v, round, acknowledged)
		require.Greater(t, records, before, "the load got nothing done")
		v.Mount()
		for name, n := range acknowledged {
			got, err := os.ReadFile(v.Path(name))
			require.NoError(t, err, "%s, of which %d bytes were synced", name, n)
			require.GreaterOrEqual(t, len(got), n, name)
			require.Equal(t, syncedBytes(name, len(got)), got, name)
			compared += len(got)
		}
	}
	t.Logf("power cuts survived: %d, records acknowledged: %d, bytes compared: %d, losses: 0", rounds, records, compared)
	require.Contains(t, e.Must("status", "--json", v.Dir), "unclean_since")
}

func logUntilCut(t *testing.T, s *disk, v *harness.Volume, round int, acknowledged map[string]int) (records int) {
	t.Helper()
	writer := v.Env.Helper("log-writer", v.Mnt)
	out, err := writer.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, writer.Start())
	cut := false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		name, n, ok := strings.Cut(lines.Text(), " ")
		require.True(t, ok, lines.Text())
		if cut { // ext4 itself says yes to some fsync that this shutdown overtakes (one in ten times)
			continue
		}
		acknowledged[name], err = strconv.Atoi(n)
		require.NoError(t, err)
		if records++; records == 20+round*7 {
			s.cut(v)
			cut = true
		}
	}
	_ = writer.Wait() // it fails when the mount is gone
	return records
}
