package posix

import (
	"flag"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// A scene is played in a directory and writes down what could be noticed there.
type scene struct {
	name string
	play func(s *stage)
	// differs maps how a line begins (a regular expression) to the reason for which
	// the mount may say something else there; each stands in POSIX.md.
	differs map[string]string
	// alone is what may differ besides on a user's mount of his own.
	alone map[string]string
	// root: it acts as several users, or makes devices.
	root bool
}

// A stage is where a scene is played: a fresh directory, and its transcript.
type stage struct {
	t   *testing.T
	env *harness.Env
	dir string
	log []string

	files []int // what open gave and close did not end yet
}

func (s *stage) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *stage) say(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

// ends writes down how a call ended.
func (s *stage) ends(what string, err error) { s.say("%s: %s", what, errnoOf(err)) }

// errnoOf is the name of what a call ended with.
func errnoOf(err error) string {
	for e := err; e != nil; {
		if errno, is := e.(unix.Errno); is {
			return unix.ErrnoName(errno)
		}
		u, wraps := e.(interface{ Unwrap() error })
		if !wraps {
			return e.Error()
		}
		e = u.Unwrap()
	}
	return "ok"
}

// open opens for the scene's own use: that must succeed.
func (s *stage) open(name string, flags int, mode uint32) int {
	s.t.Helper()
	fd, err := harness.Open(s.path(name), flags, mode)
	require.NoError(s.t, err, "opening %s", name)
	s.files = append(s.files, fd)
	return fd
}

// close ends what open gave.
func (s *stage) close(fd int) {
	s.t.Helper()
	s.files = slices.DeleteFunc(s.files, func(f int) bool { return f == fd })
	require.NoError(s.t, unix.Close(fd))
}

func (s *stage) write(name, content string) {
	s.t.Helper()
	require.NoError(s.t, os.WriteFile(s.path(name), []byte(content), 0o644))
}

// stat writes down the attributes that are the same everywhere.
func (s *stage) stat(what string, fd int) {
	s.t.Helper()
	var st unix.Stat_t
	require.NoError(s.t, unix.Fstat(fd, &st), what)
	s.say("%s: mode %o nlink %d owner %d:%d size %d", what, st.Mode, st.Nlink, st.Uid, st.Gid, sizeOf(&st))
}

// sizeOf leaves out the size of directories: each file system has its own idea.
func sizeOf(st *unix.Stat_t) int64 {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return 0
	}
	return st.Size
}

// tree writes down what lies beneath the stage.
func (s *stage) tree(what string) {
	s.t.Helper()
	for name, e := range sorted(harness.Snapshot(s.t, s.dir)) {
		s.say("%s: %s: mode %o owner %d:%d size %d nlink %d %s%s", what, name, e.Mode, e.UID, e.GID, e.Size, e.Links, e.Target, e.Sum)
	}
}

// script plays a script of bash in the stage, whose output is the transcript. In
// it "u 3:4:5 program..." runs a program as user 3 in groups 4 and 5.
func (s *stage) script(text string) {
	s.t.Helper()
	const prelude = `cd "$1"; u() { local id=$1; shift; local g=${id#*:}; setpriv --reuid="${id%%:*}" --regid="${g%%:*}" --groups="${g//:/,}" "$@"; }
		how() { "$@" && echo "$*: done" || echo "$*: refused"; }
		`
	out := s.env.Shell(prelude+"{\n"+text+"\n} 2>&1", s.dir)
	for line := range strings.Lines(out) {
		s.say("%s", strings.TrimRight(line, "\n"))
	}
}

// volume makes a mount that many users share, with the device files and setuid
// programs that plain directories have.
func volume(t *testing.T, e *harness.Env, name string, args ...string) *harness.Volume {
	t.Helper()
	key := "local:" + filepath.Base(name)
	e.Must("key", "create", filepath.Base(name))
	v := e.Init(name, append([]string{"--key", key}, args...)...)
	for _, dir := range []string{filepath.Dir(v.Mnt), v.Mnt} {
		require.NoError(t, os.Chmod(dir, 0o755))
	}
	v.Options("--allow-other", "-o", "suid,dev")
	v.Mount()
	return v
}

// in plays a scene in a fresh directory in parent, and gives its transcript.
func (sc scene) in(t *testing.T, e *harness.Env, parent string) []string {
	t.Helper()
	mine := *e
	mine.T = t // what fails here ends this scene and no other
	s := &stage{t: t, env: &mine, dir: filepath.Join(parent, sc.name)}
	require.NoError(t, os.Mkdir(s.dir, 0o777))
	require.NoError(t, os.Chmod(s.dir, 0o777))
	t.Cleanup(func() {
		for _, fd := range slices.Clone(s.files) {
			s.close(fd)
		}
	})
	sc.play(s)
	require.NotEmpty(t, s.log, "the scene noticed nothing")
	return s.log
}

// elsewhere is how integration/sidebyside has other file systems tried.
var elsewhere = flag.String("at", "", "play scenes and go-fuse's suite in this `directory`, not on mounts of kmsfs")

// TestScenes plays all scenes in a plain directory and on mounts.
func TestScenes(t *testing.T) {
	e := harness.New(t)
	places := map[string]string{"elsewhere": *elsewhere}
	switch {
	case harness.Unprivileged():
		places = userPlaces(t, e)
	case *elsewhere == "":
		places = map[string]string{
			"encrypted": volume(t, e, "encrypted", "--names", "encrypted").Mnt,
			"plain":     volume(t, e, "plain", "--names", "plain").Mnt,
		}
	}
	playAll(t, e, scenes, e.Root, places)
}

// onXFS are the exceptions that go another way with an xfs beneath: by scene, how a
// line begins, and why it differs there; without a reason it does not differ.
var onXFS = map[string]map[string]string{
	"allocate": {"mode 0x40 ": "UNSHARE_RANGE: no two files share what is sealed"},
	"times":    {"truncate to the same moves": ""},
}

// TestScenesOnXFS has an xfs beneath the mount, and beside it. It shares no blocks:
// a copy that does may be shorter than what was asked for.
func TestScenesOnXFS(t *testing.T) {
	e := harness.New(t)
	dir := disk(t, e, "xfs", 1<<30, "-m", "reflink=0")
	list := slices.Clone(scenes)
	for i, sc := range list {
		list[i].differs = maps.Clone(sc.differs)
		for begin, reason := range onXFS[sc.name] {
			if list[i].differs[begin] = reason; reason == "" {
				delete(list[i].differs, begin)
			}
		}
	}
	playAll(t, e, list, dir, map[string]string{"encrypted": volume(t, e, "xfs/volume", "--names", "encrypted").Mnt})
}

// playAll compares scenes on some places with a plain directory in dir.
func playAll(t *testing.T, e *harness.Env, list []scene, dir string, places map[string]string) {
	t.Helper()
	plain := filepath.Join(dir, "beside")
	require.NoError(t, os.Mkdir(plain, 0o755))
	for _, sc := range list {
		if sc.root && harness.Unprivileged() {
			continue
		}
		t.Run(sc.name, func(t *testing.T) {
			want := sc.in(t, e, plain)
			for where, dir := range places {
				t.Run(where, func(t *testing.T) { sc.at(where).compare(t, want, sc.in(t, e, dir)) })
			}
		})
	}
}

// at is the scene with the exceptions for a place.
func (sc scene) at(where string) scene {
	all := maps.Clone(sc.differs)
	if where == "alone" && sc.alone != nil {
		all = maps.Clone(sc.alone)
		maps.Copy(all, sc.differs)
	}
	sc.differs = all
	return sc
}

func (sc scene) compare(t *testing.T, want, got []string) {
	t.Helper()
	used := map[string]bool{}
	for i := range max(len(want), len(got)) {
		a, b := at(want, i), at(got, i)
		if a == b {
			continue
		}
		if begin := sc.excused(a); begin != "" {
			used[begin] = true
			continue
		}
		t.Errorf("line %d\n  the file system says %s\n  the mount says       %s", i+1, a, b)
	}
	if *elsewhere != "" {
		return // the exceptions are ours
	}
	for begin, reason := range sc.differs {
		require.True(t, used[begin], "no line differs at %q any more (%s): take it out here and in POSIX.md", begin, reason)
	}
}

func (sc scene) excused(line string) string {
	for begin := range sc.differs {
		if regexp.MustCompile("^" + begin).MatchString(line) {
			return begin
		}
	}
	return ""
}

// sorted goes through a map in the order of its keys: transcripts are compared.
func sorted[V any](m map[string]V) iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, key := range slices.Sorted(maps.Keys(m)) {
			if !yield(key, m[key]) {
				return
			}
		}
	}
}

func at(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return "nothing"
}
