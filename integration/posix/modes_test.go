package posix

import (
	"fmt"
	"os"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

var modesAlone = map[string]string{
	"d(666|000)/f ":          "the kernel asks nobody whether a directory may be searched for what it knows in it",
	"d(666|000) rmdir in it": "likewise",
}

// modes tries what an owner's own modes forbid him. Played as a user it binds the
// daemon, too, which must set headers on such files all the same (DESIGN 4.7).
func modes(s *stage) {
	for _, mode := range []uint32{0o444, 0o400, 0o200, 0o000, 0o644, 0o111} {
		s.fileOf(mode)
	}
	for _, mode := range []uint32{0o555, 0o333, 0o666, 0o111, 0o000} {
		s.directoryOf(mode)
	}
	s.namelessOf(0o444)
	s.script(`
		umask 077; echo secret >mine; stat -c %a mine; umask 0; echo x >all; stat -c %a all; umask 022
		cp /bin/true prog; chmod 555 prog; ./prog; chmod 644 prog; how ./prog; chmod 4755 prog; stat -c %a prog; printf x >>prog; stat -c %a prog
		how chown 0 mine; how chgrp "$(id -g)" mine; how chown "$(id -u)" mine; chmod 2644 mine; stat -c %a mine; printf x >>mine; stat -c %a mine
		mkdir set; chmod 2755 set; mkdir set/d; touch set/f; stat -c '%n %a' set/d set/f
		git init -q repo; cd repo; git config user.name n; git config user.email e; cp ../prog ../all .; git add .; git commit -qm one; for i in 1 2 3; do echo $i >all; git commit -qam $i; done
		find .git/objects -type f -perm 0444 | wc -l; git gc -q; git fsck --full --strict 2>&1; git status --porcelain; cd ..; rm -rf repo
		cp -a mine kept; chmod 444 kept; cp -a kept kept2; stat -c %a kept2; rsync -aX kept kept3; stat -c %a kept3; how rsync -aX mine kept3; stat -c %a kept3
		tar -cf t.tar kept kept2 set; mkdir out; tar -xpf t.tar -C out; stat -c %a out/*; sed -i s/secret/public/ kept; cat kept`)
}

// attempts are what may be tried with a path.
func attempts(path string) []struct {
	name string
	do   func() error
} {
	return []struct {
		name string
		do   func() error
	}{
		{"read", func() error { return harness.Try(path, unix.O_RDONLY, 0) }},
		{"write", func() error { return harness.Try(path, unix.O_WRONLY, 0) }},
		{"both", func() error { return harness.Try(path, unix.O_RDWR, 0) }},
		{"empty", func() error { return harness.Try(path, unix.O_RDONLY|unix.O_TRUNC, 0) }},
		{"create over", func() error { return harness.Try(path, unix.O_RDWR|unix.O_CREAT, 0o600) }},
		{"truncate", func() error { return unix.Truncate(path, 3) }},
		{"access r", func() error { return unix.Access(path, unix.R_OK) }},
		{"access w", func() error { return unix.Access(path, unix.W_OK) }},
		{"access x", func() error { return unix.Access(path, unix.X_OK) }},
		{"setxattr", func() error { return unix.Setxattr(path, "user.b", []byte("b"), 0) }},
		{"getxattr", func() error { _, err := unix.Getxattr(path, "user.a", make([]byte, 10)); return err }},
		{"listxattr", func() error { _, err := unix.Listxattr(path, make([]byte, 100)); return err }},
		{"removexattr", func() error { return unix.Removexattr(path, "user.a") }},
		{"touch", func() error { return utimes(path, unix.UTIME_NOW, unix.UTIME_NOW) }},
		{"date", func() error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Sec: 5}, {Sec: 6}}, 0)
		}},
		{"link", func() error { return unix.Link(path, path+".link") }},
		{"rename", func() error { return unix.Rename(path, path+".moved") }},
		{"rename back", func() error { return unix.Rename(path+".moved", path) }},
		{"rename across", func() error { return unix.Rename(path, path+".d/it") }},
		{"rename across back", func() error { return unix.Rename(path+".d/it", path) }},
		{"chown", func() error { return unix.Chown(path, os.Getuid(), os.Getgid()) }},
	}
}

// fileOf makes a file of that mode, writes by the descriptor that made it, and tries
// what there is with the mode in force.
func (s *stage) fileOf(mode uint32) {
	name := fmt.Sprintf("f%03o", mode)
	fd := s.open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, mode)
	require.NoError(s.t, os.Mkdir(s.path(name+".d"), 0o755))
	_, err := unix.Pwrite(fd, []byte("contents"), 0)
	s.ends(name+" first write", err)
	_, err = unix.Pwrite(fd, []byte("more"), 10_000)
	s.ends(name+" second write", err)
	s.ends(name+" ftruncate", unix.Ftruncate(fd, 9000))
	s.ends(name+" fsetxattr", unix.Fsetxattr(fd, "user.a", []byte("a"), 0))
	s.ends(name+" fallocate", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 4096))
	s.tries(name)
	s.stat(name+" open", fd)
	s.close(fd)
	require.NoError(s.t, unix.Chmod(s.path(name), 0o644))
	require.NoError(s.t, unix.Setxattr(s.path(name), "user.a", []byte("a"), 0))
	s.write(name, "written anew")
	require.NoError(s.t, unix.Chmod(s.path(name), mode))
	s.tries(name + ".link")
	require.NoError(s.t, unix.Chmod(s.path(name), 0o644))
	s.content(name, name)
	_, err = unix.Getxattr(s.path(name), "user.b", make([]byte, 10))
	s.ends(name+" attribute in the end", err)
}

func (s *stage) tries(name string) {
	if _, err := os.Stat(s.path(name) + ".d"); err != nil {
		require.NoError(s.t, os.Mkdir(s.path(name)+".d", 0o755))
	}
	for _, a := range attempts(s.path(name)) {
		s.ends(name+" "+a.name, a.do())
	}
	var st unix.Stat_t
	s.ends(name+" stat", unix.Lstat(s.path(name), &st))
	s.say("%s: mode %o size %d nlink %d", name, st.Mode, sizeOf(&st), st.Nlink)
}

// directoryOf fills a directory, sets its mode, and tries it and what is in it.
func (s *stage) directoryOf(mode uint32) {
	name := fmt.Sprintf("d%03o", mode)
	require.NoError(s.t, os.MkdirAll(s.path(name, "sub", "in"), 0o755))
	require.NoError(s.t, os.Mkdir(s.path(name+".d"), 0o755))
	s.write(name+"/f", "inside")
	fd := s.open(name+"/f", unix.O_RDWR, 0)
	require.NoError(s.t, unix.Chmod(s.path(name), mode))
	s.tries(name)
	for _, a := range attempts(s.path(name, "f")) {
		s.ends(name+"/f "+a.name, a.do())
	}
	_, err := os.ReadDir(s.path(name))
	s.ends(name+" list", err)
	s.ends(name+" create", createIn(s.path(name, "new")))
	s.ends(name+" mkdir", unix.Mkdir(s.path(name, "newdir"), 0o755))
	s.ends(name+" symlink", unix.Symlink("x", s.path(name, "newlink")))
	s.ends(name+" tmpfile", harness.Try(s.path(name), unix.O_TMPFILE|unix.O_RDWR, 0o600))
	s.ends(name+" rmdir in it", unix.Rmdir(s.path(name, "sub", "in")))
	s.ends(name+" rmdir", unix.Rmdir(s.path(name, "sub")))
	s.ends(name+" unlink", unix.Unlink(s.path(name, "f")))
	_, err = unix.Pwrite(fd, []byte("still open"), 0)
	s.ends(name+" write to what is open", err)
	s.ends(name+" fchmod of it", unix.Fchmod(fd, 0o400))
	s.ends(name+" fsync of it", unix.Fsync(fd))
	s.stat(name+" it", fd)
	s.close(fd)
	s.ends(name+" chmod", unix.Chmod(s.path(name), 0o755))
	s.ends(name+" removed", os.RemoveAll(s.path(name)))
}

// namelessOf gives a name to a file that nobody may write.
func (s *stage) namelessOf(mode uint32) {
	fd := s.open(".", unix.O_TMPFILE|unix.O_RDWR, mode)
	_, err := unix.Write(fd, []byte("nameless"))
	s.ends("nameless write", err)
	s.ends("nameless link", unix.Linkat(unix.AT_FDCWD, fdPath(fd), unix.AT_FDCWD, s.path("named"), unix.AT_SYMLINK_FOLLOW))
	_, err = unix.Write(fd, []byte(" and named"))
	s.ends("nameless write on", err)
	s.stat("nameless", fd)
	s.close(fd)
	s.ends("nameless by its name", harness.Try(s.path("named"), unix.O_RDWR, 0))
	s.content("nameless", "named")
}
