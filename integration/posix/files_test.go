package posix

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// content writes down what a file holds.
func (s *stage) content(what, name string) {
	s.t.Helper()
	data, err := os.ReadFile(s.path(name))
	s.ends(what+" read", err)
	s.say("%s: %d bytes %x", what, len(data), sha256.Sum256(data))
}

// openFlags opens what there is in every way.
func openFlags(s *stage) {
	require.NoError(s.t, os.Mkdir(s.path("dir"), 0o755))
	require.NoError(s.t, unix.Mkfifo(s.path("fifo"), 0o644))
	require.NoError(s.t, unix.Symlink("file", s.path("link")))
	require.NoError(s.t, unix.Symlink("nowhere", s.path("dangling")))
	flags := []struct {
		name string
		bits int
	}{
		{"rdonly", unix.O_RDONLY}, {"wronly", unix.O_WRONLY}, {"rdwr", unix.O_RDWR}, {"creat", unix.O_RDWR | unix.O_CREAT},
		{"excl", unix.O_RDWR | unix.O_CREAT | unix.O_EXCL}, {"trunc", unix.O_WRONLY | unix.O_TRUNC}, {"rdonly trunc", unix.O_TRUNC},
		{"append trunc", unix.O_WRONLY | unix.O_APPEND | unix.O_TRUNC}, {"directory", unix.O_DIRECTORY}, {"nofollow", unix.O_NOFOLLOW},
		{"path", unix.O_PATH}, {"path nofollow", unix.O_PATH | unix.O_NOFOLLOW}, {"creat directory", unix.O_CREAT | unix.O_DIRECTORY},
		{"direct", unix.O_RDWR | unix.O_DIRECT}, {"sync", unix.O_RDWR | unix.O_SYNC}, {"dsync", unix.O_RDWR | unix.O_DSYNC},
		{"noatime", unix.O_RDONLY | unix.O_NOATIME}, {"nonblock", unix.O_RDONLY | unix.O_NONBLOCK}, {"three", 3},
	}
	for _, f := range flags {
		for _, name := range []string{"file", "dir", "dir/", "fifo", "link", "dangling", "nothing", "file/x"} {
			s.write("file", "some contents")
			what := f.name + " of " + name
			fd, err := harness.Open(s.path(name)+strings.Repeat("/", strings.Count(name, "dir/")), f.bits|unix.O_NONBLOCK, 0o640)
			s.ends(what, err)
			if err == nil {
				s.stat(what, fd)
				_ = unix.Close(fd)
			}
			s.content(what, "file")
			_, _ = unix.Unlink(s.path("nowhere")), unix.Unlink(s.path("nothing"))
		}
	}
	s.direct()
}

// direct reads and writes past the cache, and with it in between.
func (s *stage) direct() {
	buf := alignedPages(4)
	fd := s.open("direct", unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT, 0o600)
	cached := s.open("direct", unix.O_RDWR, 0)
	copy(buf, strings.Repeat("direct! ", 2048))
	n, err := unix.Pwrite(fd, buf, 0)
	s.ends(fmt.Sprintf("direct write of %d", n), err)
	_, err = unix.Pwrite(cached, []byte("cached"), 5000)
	s.ends("cached write", err)
	clear(buf)
	n, err = unix.Pread(fd, buf, 4096)
	s.ends("direct read", err)
	s.say("%d bytes, %q", n, buf[900:912])
	n, err = unix.Pwrite(fd, buf[:4096], 64<<10)
	s.ends(fmt.Sprintf("direct write of %d beyond the end", n), err)
	n, err = unix.Pread(fd, buf, 1<<20)
	s.ends(fmt.Sprintf("direct read of %d beyond the end", n), err)
	s.content("direct", "direct")
	for name, flag := range sorted(map[string]int{"sync": unix.O_SYNC, "dsync": unix.O_DSYNC}) {
		fd := s.open("synced", unix.O_RDWR|unix.O_CREAT|flag, 0o600)
		_, err := unix.Pwrite(fd, []byte("synced"), 100)
		require.NoError(s.t, err, name)
	}
	s.content("synced", "synced")
}

// alignedPages is memory that O_DIRECT takes.
func alignedPages(n int) []byte {
	m, err := unix.Mmap(-1, 0, n*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return m
}

var allocateDiffers = map[string]string{
	"mode 0x8 ":  "COLLAPSE_RANGE: blocks are sealed with their index",
	"mode 0x20 ": "INSERT_RANGE: likewise",
}

// allocate tries every mode of fallocate(2) in every place.
func allocate(s *stage) {
	const keep, punch, zero = unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE
	modes := []uint32{0, keep, punch, punch | keep, zero, zero | keep, unix.FALLOC_FL_COLLAPSE_RANGE,
		unix.FALLOC_FL_INSERT_RANGE, unix.FALLOC_FL_UNSHARE_RANGE, punch | zero, 0x800}
	ranges := [][2]int64{{0, 4096}, {0, 100_000}, {4096, 8192}, {5000, 100}, {39_000, 5000}, {40_000, 1}, {45_000, 4096}, {0, 0}, {-1, 10}, {10, -1}, {0, 3 << 20}}
	for _, mode := range modes {
		for _, r := range ranges {
			what := fmt.Sprintf("mode %#x at %d for %d", mode, r[0], r[1])
			s.write("f", strings.Repeat("contents", 5000))
			fd := s.open("f", unix.O_RDWR, 0)
			s.ends(what, unix.Fallocate(fd, mode, r[0], r[1]))
			s.content(what, "f")
			s.close(fd)
			s.content(what+" closed", "f")
		}
	}
	s.ends("read-only", unix.Fallocate(s.open("f", unix.O_RDONLY, 0), 0, 0, 10))
	s.ends("of a directory", unix.Fallocate(s.open(".", unix.O_RDONLY, 0), 0, 0, 10))
	s.ends("far away", unix.Fallocate(s.open("f", unix.O_RDWR, 0), 0, 1<<62, 1<<62))
	s.ends("one byte too far", unix.Fallocate(s.open("f", unix.O_RDWR, 0), 0, 1<<63-1, 1))
}

// holes asks for data and holes; where exactly they are is the file system's own
// affair, but not where data is, where the end is, and what is refused.
func holes(s *stage) {
	const size = 24 << 20
	fd := s.open("f", unix.O_RDWR|unix.O_CREAT, 0o644)
	require.NoError(s.t, unix.Ftruncate(fd, size))
	_, err := unix.Pwrite(fd, []byte("island"), 9<<20)
	require.NoError(s.t, err)
	require.NoError(s.t, unix.Fsync(fd))
	s.close(fd)
	fd = s.open("f", unix.O_RDONLY, 0)
	for _, off := range []int64{0, 9 << 20, 9<<20 + 3, size - 1, size, size + 1, -1} {
		for name, whence := range sorted(map[string]int{"data": unix.SEEK_DATA, "hole": unix.SEEK_HOLE}) {
			at, err := unix.Seek(fd, off, whence)
			if err != nil {
				at = -1
			}
			s.say("a %s from %d: in bounds %v", name, off, err != nil || at >= off && at <= size)
		}
	}
	at, err := unix.Seek(fd, 9<<20+3, unix.SEEK_DATA)
	s.ends("in the island", err)
	s.say("data at %d", at)
	at, err = unix.Seek(fd, size, unix.SEEK_HOLE)
	s.ends(fmt.Sprintf("at the end %d", at), err)
	at, err = unix.Seek(fd, 2<<20, unix.SEEK_DATA)
	s.ends("before the island", err)
	s.say("data near the island: %v", at > 8<<20 && at <= 9<<20)
	at, err = unix.Seek(fd, 0, unix.SEEK_HOLE)
	s.ends(fmt.Sprintf("the first hole %d", at), err)
	s.content("sparse", "f")
	var st unix.Stat_t
	require.NoError(s.t, unix.Fstat(fd, &st))
	s.say("takes little room: %v", st.Blocks*512 < 4<<20)
	s.script(`cp --sparse=always f copy; cmp f copy; cp --sparse=never f full; cmp f full; cp f auto; cmp f auto; tar -cSf f.tar f; mkdir out; tar -xSf f.tar -C out; cmp f out/f; echo copied`)
}

var mappingDiffers = map[string]string{
	"after a cut and a growth": "the kernel's FUSE does not clear what memory holds behind the end when a file grows",
	"unmapped":                 "likewise",
}

// mapping reads and writes files through memory.
func mapping(s *stage) {
	page := os.Getpagesize()
	fd := s.open("f", unix.O_RDWR|unix.O_CREAT, 0o644)
	_, err := unix.Write(fd, []byte(strings.Repeat("contents", 2*page/8)+"tail"))
	require.NoError(s.t, err)
	m, err := unix.Mmap(fd, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(s.t, err)
	private, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	require.NoError(s.t, err)
	copy(private, "mine alone")
	copy(m[10:], "through memory")
	s.say("behind the end: %d", m[2*page+100])
	copy(m[2*page:], "TAIL and beyond the end")
	s.ends("msync", unix.Msync(m, unix.MS_SYNC))
	s.content("mapped", "f")
	require.NoError(s.t, unix.Ftruncate(fd, int64(3*page)))
	s.content("longer: what was written behind the end is gone", "f")
	require.NoError(s.t, unix.Ftruncate(fd, int64(page+5)))
	copy(m[page+5:], "beyond")
	require.NoError(s.t, unix.Ftruncate(fd, int64(2*page)))
	s.say("after a cut and a growth: %q", m[page:page+12])
	_, err = unix.Pwrite(fd, []byte("by write(2)"), 100)
	require.NoError(s.t, err)
	s.say("seen in memory: %q, not in the private part: %q", m[100:111], private[:10])
	s.close(fd)
	copy(m[200:], "after close")
	require.NoError(s.t, errors.Join(unix.Munmap(m), unix.Munmap(private)))
	s.content("unmapped", "f")
	s.script(`cp /bin/true prog; chmod 755 prog; ./prog; echo "a program runs: $?"; cp /bin/sleep busy; ./busy 60 & pid=$!
		until [ "$(cat /proc/$pid/comm)" = busy ]; do sleep 0.01; done; echo x 2>/dev/null >busy || echo "a running program is not written"; kill $pid; wait $pid || true`)
}

func init() {
	harness.Helper("append", appendLines)
	harness.Helper("limited", limited)
}

// appending has two processes append to one file; no line is lost or torn.
func appending(s *stage) {
	first, second := s.env.Helper("append", s.path("log"), "a"), s.env.Helper("append", s.path("log"), "b")
	require.NoError(s.t, first.Start())
	require.NoError(s.t, second.Start())
	s.ends("first", first.Wait())
	s.ends("second", second.Wait())
	data, err := os.ReadFile(s.path("log"))
	require.NoError(s.t, err)
	whole := map[string]int{}
	for line := range strings.Lines(string(data)) {
		if rest, tail, ok := strings.Cut(line, " "); ok && tail == strings.Repeat(rest[:1], len(tail)-1)+"\n" {
			whole[rest[:1]]++
		}
	}
	s.say("whole lines %v in %d bytes", whole, len(data))
	fd := s.open("log", unix.O_RDWR|unix.O_APPEND, 0)
	n, err := unix.Pwrite(fd, []byte("at the end all the same"), 5) // pwrite(2), BUGS
	s.ends(fmt.Sprintf("pwrite of %d", n), err)
	s.stat("log", fd)
}

func appendLines(args []string) error {
	fd, err := harness.Open(args[0], unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	for i := range 500 {
		line := fmt.Sprintf("%s%d %s\n", args[1], i, strings.Repeat(args[1], i%300))
		if _, err := unix.Write(fd, []byte(line)); err != nil {
			return err
		}
	}
	return unix.Close(fd)
}

// copying moves bytes without reading them.
func copying(s *stage) {
	s.write("from", strings.Repeat("0123456789", 20_000))
	from, to := s.open("from", unix.O_RDWR, 0), s.open("to", unix.O_RDWR|unix.O_CREAT, 0o600)
	for _, c := range [][3]int64{{0, 0, 100_000}, {5, 3, 4096}, {199_990, 300_000, 100}, {200_000, 0, 10}, {300_000, 0, 10}, {0, 0, 0}} {
		in, out := c[0], c[1]
		n, err := unix.CopyFileRange(from, &in, to, &out, int(c[2]), 0)
		s.ends(fmt.Sprintf("copy of %v: %d", c, n), err)
		s.content("copy", "to")
	}
	in, out := int64(0), int64(50)
	_, err := unix.CopyFileRange(from, &in, from, &out, 100, 0)
	s.ends("copy onto itself", err)
	out = 100_000
	n, err := unix.CopyFileRange(from, &in, from, &out, 5000, 0)
	s.ends(fmt.Sprintf("copy inside one file: %d", n), err)
	s.content("itself", "from")
	in = 1000
	n, err = unix.Sendfile(to, from, &in, 10_000)
	s.ends(fmt.Sprintf("sendfile: %d", n), err)
	s.content("sent", "to")
	s.script(`cp --reflink=auto from auto; cmp from auto; cat from | dd of=piped status=none; cmp from piped; dd if=from of=odd bs=777 status=none; cmp from odd; truncate -s 100 odd; stat -c %s odd`)
}

// limits reaches the caller's own limits, in a process of its own.
func limits(s *stage) {
	for line := range strings.Lines(s.env.Help("limited", s.dir)) {
		s.say("%s", strings.TrimSpace(line))
	}
	s.content("limited", "limited")
}

func limited(args []string) error {
	path := args[0] + "/limited"
	fd, err := harness.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	const size = 10_000
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: size}); err != nil {
		return err
	}
	ignoreSignal(unix.SIGXFSZ)
	say := func(what string, n int, err error) { fmt.Printf("%s: %d %s\n", what, n, errnoOf(err)) }
	n, err := unix.Pwrite(fd, make([]byte, 9000), 0)
	say("below", n, err)
	n, err = unix.Pwrite(fd, make([]byte, 9000), 9000)
	say("across", n, err)
	n, err = unix.Pwrite(fd, make([]byte, 9000), size)
	say("beyond", n, err)
	say("truncate to the limit", 0, unix.Ftruncate(fd, size))
	say("truncate beyond", 0, unix.Ftruncate(fd, size+1))
	say("allocate beyond", 0, unix.Fallocate(fd, 0, 0, size+1))
	in, out := int64(0), int64(9990)
	n, err = unix.CopyFileRange(fd, &in, fd, &out, 100, 0)
	say("copy across", n, err)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 30, Max: 30}); err != nil {
		return err
	}
	for err = nil; err == nil; {
		_, err = harness.Open(path, unix.O_RDWR, 0)
	}
	say("too many", 0, err)
	say("create", 0, harness.Try(args[0]+"/more", unix.O_CREAT|unix.O_WRONLY, 0o600))
	return nil
}

// ignoreSignal ignores it for real: the runtime would only not tell us.
func ignoreSignal(sig syscall.Signal) {
	type action struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}
	const sigIgn = 1
	_, _, _ = unix.Syscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action{handler: sigIgn})), 0, 8, 0, 0)
}

// leases asks for each kind while the file is open in each way.
func leases(s *stage) {
	s.write("f", "x")
	for name, flags := range sorted(map[string]int{"read": unix.O_RDONLY, "write": unix.O_WRONLY, "both": unix.O_RDWR}) {
		fd := s.open("f", flags, 0)
		for kind, lease := range sorted(map[string]int{"read": unix.F_RDLCK, "write": unix.F_WRLCK, "none": unix.F_UNLCK}) {
			_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, lease)
			s.ends("open for "+name+", a lease to "+kind, err)
			got, err := unix.FcntlInt(uintptr(fd), unix.F_GETLEASE, 0)
			s.ends(fmt.Sprintf("open for %s, leased to %s: %d", name, kind, got), err)
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		}
		s.close(fd)
	}
}
