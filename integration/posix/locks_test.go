package posix

import (
	"strings"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// recordLocks has processes lock ranges against each other, as processes (fcntl(2))
// and as open file descriptions.
func recordLocks(s *stage) {
	s.write("f", strings.Repeat("contents", 100))
	require.NoError(s.t, unix.Link(s.path("f"), s.path("g")))
	a, b := s.actor("a"), s.actor("b")
	for _, who := range []*actor{a, b} {
		who.does("open 1 f rw")
		who.does("open 2 g rw")
		who.does("open r f r")
		who.does("open w f w")
		who.does("open p f path")
	}
	for _, kind := range []string{"posix", "ofd"} {
		s.ranges(kind, a, b)
		s.waiting(kind, a, b)
	}
	s.closing(a, b)
	s.deadlock(a, b)
	s.lockHolders(a, b)
	a.leaves()
	b.does("lock 1 posix w 0 0")
}

// ranges splits, joins, converts and refuses.
func (s *stage) ranges(kind string, a, b *actor) {
	a.does("lock 1 %s w 100 100", kind)
	a.does("lock 1 %s r 140 20", kind)
	a.does("lock 1 %s un 120 10", kind)
	for _, r := range []string{"0 100", "0 101", "120 10", "130 10", "140 20", "160 1", "199 1", "200 0", "0 0"} {
		for _, typ := range []string{"r", "w"} {
			b.does("ask 1 %s %s %s", kind, typ, r)
			b.does("lock 2 %s %s %s", kind, typ, r) // by the other name of the file
			b.does("lock 2 %s un %s", kind, r)
		}
	}
	a.does("lock 2 %s w 150 1000", kind) // one process, but another description
	a.does("lock 2 %s un 0 0", kind)
	b.does("lock 1 %s w 0 0", kind)
	b.does("lock 1 %s un 0 0", kind)
	for _, bad := range []string{"r " + kind + " w 0 1", "w " + kind + " r 0 1", "p " + kind + " r 0 1", "1 " + kind + " w -1 1",
		"1 " + kind + " w 10 -5", "1 " + kind + " w 10 -11", "1 " + kind + " w 0x7fffffffffffffff 2", "1 " + kind + " w 0x7fffffffffffffff 1"} {
		a.does("lock %s", bad)
	}
	b.does("ask 1 %s w 0 0", kind)
	a.does("lock 1 %s un 0 0", kind)
	a.does("lock 2 %s un 0 0", kind)
	b.does("lock 1 %s un 0 0", kind)
}

// waiting has one wait for the other, in turn, and gives up a wait with its process.
func (s *stage) waiting(kind string, a, b *actor) {
	a.does("lock 1 %s w 10 10", kind)
	b.waits("lock 1 %s-wait w 15 10", kind)
	a.does("write 1 15 locks-are-advisory")
	c := s.actor("c")
	c.does("open 1 f rw")
	c.does("write 1 12 no-holder-needed")
	c.waits("lock 1 %s-wait w 10 1", kind)
	c.kill()
	a.does("lock 1 %s un 15 5", kind)
	b.ends("lock 1 %s-wait w 15 10", kind)
	a.does("lock 1 %s un 10 5", kind)
	b.does("lock 1 %s w 0 0", kind) // nothing is left of c
	a.waits("lock 1 %s-wait r 0 1", kind)
	b.does("lock 1 %s r 0 5", kind) // less is enough
	a.ends("lock 1 %s-wait r 0 1", kind)
	for _, who := range []*actor{a, b} {
		who.does("lock 1 %s un 0 0", kind)
	}
}

// closing: a process loses its locks with any of its descriptors of the file, a
// description with its last one.
func (s *stage) closing(a, b *actor) {
	a.does("lock 1 posix w 0 10")
	a.does("open 3 g r")
	b.does("lock 1 posix w 0 10")
	a.does("close 3")
	b.does("lock 1 posix w 0 10")
	b.does("lock 1 posix un 0 0")
	a.does("open 4 f rw")
	a.does("dup 5 4")
	a.does("lock 4 ofd w 0 10")
	a.does("lock 1 ofd w 5 1") // another description, same process
	a.does("lock 1 posix w 5 1")
	a.does("close 4")
	b.does("lock 1 ofd w 0 10")
	a.does("close 5")
	b.does("lock 1 ofd w 0 10")
	b.does("lock 1 ofd un 0 0")
}

// deadlock: whoever would close a circle is told. OFD locks know no circles.
func (s *stage) deadlock(a, b *actor) {
	a.does("lock 1 posix w 0 10")
	b.does("lock 1 posix w 10 10")
	a.waits("lock 1 posix-wait w 10 10")
	b.does("lock 1 posix-wait w 0 10")
	b.does("lock 1 posix un 0 0")
	a.ends("lock 1 posix-wait w 10 10")
	a.does("lock 1 posix un 0 0")
}

// lockHolders: who is told to be in the way, through renames, removal and exit.
func (s *stage) lockHolders(a, b *actor) {
	fd := s.open("f", unix.O_RDWR, 0)
	s.ends("lock", unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 3, Len: 4}))
	a.does("ask 1 posix w 0 0")
	require.NoError(s.t, unix.Rename(s.path("f"), s.path("moved")))
	b.does("ask 2 posix w 0 0")
	a.does("open 6 moved rw")
	a.does("lock 6 posix w 0 0")
	require.NoError(s.t, unix.Unlink(s.path("moved")))
	require.NoError(s.t, unix.Unlink(s.path("g")))
	a.does("lock 6 posix w 0 0")
	s.close(fd)
	a.does("lock 6 posix w 0 0")
	b.does("ask 1 posix r 0 0")
	b.waits("lock 1 posix-wait r 0 0")
	a.does("close 6") // any descriptor of the file
	b.ends("lock 1 posix-wait r 0 0")
	b.does("lock 1 posix un 0 0")
	a.does("lock 1 posix w 0 0")
	a.does("lock 1 ofd w 7 7")
}

// wholeLocks has processes lock whole files by flock(2).
func wholeLocks(s *stage) {
	s.write("f", "contents")
	require.NoError(s.t, unix.Mkdir(s.path("d"), 0o755))
	a, b := s.actor("a"), s.actor("b")
	for name, mode := range sorted(map[string]string{"r": "r", "w": "w", "p": "path"}) {
		a.does("open %s f %s", name, mode)
		b.does("open %s f %s", name, mode)
		a.does("open d%s d %s", name, mode)
		b.does("open d%s d %s", name, mode)
	}
	for _, how := range []string{"shared", "exclusive", "nonsense"} {
		for _, fd := range []string{"r", "w", "p", "dr"} {
			a.does("flock %s %s", fd, how)
			for _, other := range []string{"shared", "exclusive"} {
				b.does("flock %s %s", fd, other)
				b.does("flock %s un", fd)
			}
			a.does("flock %s un", fd)
		}
	}
	a.does("flock r exclusive")
	a.does("flock w exclusive") // one process, but another description
	a.does("lock w posix w 0 0")
	a.does("lock w ofd w 0 0") // flock and fcntl don't know each other
	b.does("lock r posix r 0 0")
	b.waits("flock w exclusive wait")
	a.does("flock r shared")
	a.does("write w 0 advisory")
	a.does("flock r un")
	b.ends("flock w exclusive wait")
	b.does("dup w2 w")
	b.does("close w")
	a.does("flock r shared")
	b.does("close w2")
	a.does("flock r shared")
	b.does("flock r shared")
	a.does("flock r exclusive") // a conversion that fails loses what there was
	b.does("flock r exclusive")
	a.does("flock r shared")
	b.does("flock r shared")
	a.does("flock r shared")
	b.waits("flock r exclusive wait")
	a.leaves()
	b.ends("flock r exclusive wait")
	c := s.actor("c")
	c.does("open f f r")
	c.waits("flock f shared wait")
	b.kill()
	c.ends("flock f shared wait")
}

// brokenLeases has others open a leased file: those who don't wait are refused, those
// who do wait until the holder lets go.
func brokenLeases(s *stage) {
	s.write("f", "contents")
	a, b := s.actor("a"), s.actor("b")
	a.does("open f f r")
	a.does("lease f r")
	b.does("open r f r")
	a.does("lease f w")
	b.does("open w f nonblock-rw")
	a.does("leased f")
	b.waits("open w f rw")
	a.does("lease f un")
	b.ends("open w f rw")
	a.does("lease f r") // somebody writes
	b.does("close w")
	a.does("lease f w") // somebody reads
	b.does("close r")
	a.does("lease f w")
	b.does("open r f nonblock")
	b.waits("open r f r")
	a.does("leased f")
	a.does("lease f r") // less is enough
	b.ends("open r f r")
	b.does("close r")
	a.does("leased f")
	b.waits("open w f w")
	a.leaves()
	b.ends("open w f w")
}

// together has two processes share what they map, and reach what ends them.
func together(s *stage) {
	s.write("f", strings.Repeat("contents", 2000))
	a, b := s.actor("a"), s.actor("b")
	for _, who := range []*actor{a, b} {
		who.does("open f f rw")
		who.does("map f 16384")
	}
	a.does("store 4090 from-a-over-the-edge")
	b.does("load 4088 20")
	b.does("store 5 from-b")
	a.does("load 0 16")
	a.does("write f 8000 by-write")
	b.does("load 7996 16")
	b.does("sync")
	s.content("shared", "f")
	require.NoError(s.t, unix.Truncate(s.path("f"), 5000))
	a.does("load 4996 10")
	b.does("store 4990 before-and-behind-the-end")
	a.does("load 4990 20")
	s.content("cut", "f")
	a.leaves()
	b.does("store 0 alone")
	b.kill() // what it stored is the file's
	s.content("left", "f")
	s.script(`{
		(ulimit -f 10; trap - XFSZ; head -c 20000 /dev/zero >big) || echo "ended by $?"; stat -c %s big
		(ulimit -f 10; trap '' XFSZ; head -c 20000 /dev/zero >big2) || echo "ended by $?"; stat -c %s big2
		(ulimit -f 10; truncate -s 10240 cut; truncate -s 10241 cut) || echo "ended by $?"; stat -c %s cut
		python3 -c 'import mmap, os; f = open("gone", "w+b"); f.truncate(8192); m = mmap.mmap(f.fileno(), 8192); f.truncate(100); print(m[200], flush=True); print(m[5000])' || echo "ended by $?"
		} 2>/dev/null`)
}
