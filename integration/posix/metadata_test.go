package posix

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/integration/harness"
)

// tick is longer than a tick of the kernel's coarse clock, at 100 Hz.
const tick = 11 * time.Millisecond

var timesDiffers = map[string]string{
	"(ftruncate|punch) moves":            "atime is the backing file's, which is read to seal a block anew",
	"truncate to the same moves":         "the kernel keeps the times itself, and changes none if the size stays (as xfs does)",
	"second (-2147483648|17179869184): ": "the kernel keeps the mtime that it was told; what the store can hold is seen after a while",
}

// times notes which times of a file and of its directory an operation moves.
func times(s *stage) {
	require.NoError(s.t, os.Mkdir(s.path("d"), 0o755))
	require.NoError(s.t, os.Mkdir(s.path("d", "sub"), 0o755))
	f := s.path("d", "f")
	s.write("d/f", strings.Repeat("contents", 1000))
	s.write("d/other", "x")
	fd := s.open("d/f", unix.O_RDWR, 0)
	steps := []struct {
		name string
		do   func() error
	}{
		{"chmod", func() error { return unix.Chmod(f, 0o600) }},
		{"chmod to the same", func() error { return unix.Chmod(f, 0o600) }},
		{"chown", func() error { return unix.Chown(f, 5, 6) }},
		{"chown to nobody else", func() error { return unix.Chown(f, -1, -1) }},
		{"write", func() error { _, err := unix.Pwrite(fd, []byte("w"), 0); return err }},
		{"write of nothing", func() error { _, err := unix.Pwrite(fd, nil, 0); return err }},
		{"append", func() error { _, err := unix.Pwrite(fd, []byte("w"), 9000); return err }},
		{"fsync", func() error { return unix.Fsync(fd) }},
		{"ftruncate", func() error { return unix.Ftruncate(fd, 100) }},
		{"ftruncate to the same", func() error { return unix.Ftruncate(fd, 100) }},
		{"truncate", func() error { return unix.Truncate(f, 5000) }},
		{"truncate to the same", func() error { return unix.Truncate(f, 5000) }},
		{"open to truncate", func() error { return harness.Try(f, unix.O_WRONLY|unix.O_TRUNC, 0) }},
		{"open the empty to truncate", func() error { return harness.Try(f, unix.O_WRONLY|unix.O_TRUNC, 0) }},
		{"allocate", func() error { return unix.Fallocate(fd, 0, 0, 10_000) }},
		{"punch", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 5000) }},
		{"setxattr", func() error { return unix.Setxattr(f, "user.a", []byte("b"), 0) }},
		{"removexattr", func() error { return unix.Removexattr(f, "user.a") }},
		{"link", func() error { return unix.Link(f, s.path("d", "l")) }},
		{"rename of the link", func() error { return unix.Rename(s.path("d", "l"), s.path("d", "l2")) }},
		{"rename away", func() error { return unix.Rename(s.path("d", "l2"), s.path("l3")) }},
		{"unlink of the link", func() error { return unix.Unlink(s.path("l3")) }},
		{"rename over it", func() error { return unix.Rename(s.path("d", "other"), s.path("d", "sub", "f")) }},
		{"mkdir beside", func() error { return unix.Mkdir(s.path("d", "m"), 0o755) }},
		{"rmdir beside", func() error { return unix.Rmdir(s.path("d", "m")) }},
		{"symlink beside", func() error { return unix.Symlink("x", s.path("d", "s")) }},
		{"utimens", func() error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, f, []unix.Timespec{{Sec: 1, Nsec: 999_999_999}, {Sec: 2, Nsec: 1}}, 0)
		}},
		{"utimens of nothing", func() error { return utimes(f, unix.UTIME_OMIT, unix.UTIME_OMIT) }},
		{"utimens of atime", func() error { return utimes(f, unix.UTIME_NOW, unix.UTIME_OMIT) }},
		{"utimens of mtime", func() error { return utimes(f, unix.UTIME_OMIT, unix.UTIME_NOW) }},
		{"store to memory", func() error { return poke(fd) }},
		{"copy", func() error {
			in, out := int64(0), int64(5000)
			_, err := unix.CopyFileRange(fd, &in, fd, &out, 10, 0)
			return err
		}},
	}
	for _, step := range steps {
		file, dir := s.clock("d/f"), s.clock("d")
		time.Sleep(tick)
		s.ends(step.name, step.do())
		s.say("%s moves %s of the file, %s of the directory", step.name, moved(file, s.clock("d/f")), moved(dir, s.clock("d")))
	}
	s.farTimes()
}

// farTimes sets times at the edges of what can be stored.
func (s *stage) farTimes() {
	for _, sec := range []int64{0, -1, 1, 1<<31 - 1, 1 << 31, -1 << 31, 1<<32 - 1, 1 << 33, 1 << 34, 1 << 30} { // the last can be stored: it must outlive the mount
		ts := unix.Timespec{Sec: sec, Nsec: 123_456_789}
		err := unix.UtimesNanoAt(unix.AT_FDCWD, s.path("d", "f"), []unix.Timespec{ts, ts}, 0)
		s.ends(fmt.Sprint("second ", sec), err)
		c := s.clock("d/f")
		s.say("second %d: %v %v", sec, c.atime, c.mtime)
	}
	require.NoError(s.t, unix.Symlink("f", s.path("d", "link")))
	ts := unix.Timespec{Sec: 12, Nsec: 345}
	s.ends("of a symlink", unix.UtimesNanoAt(unix.AT_FDCWD, s.path("d", "link"), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	s.say("of a symlink: %v", s.clock("d/link").mtime)
	born := s.clock("d/f").btime
	s.say("born at a time: %v, and not at another later: %v", born.Sec > 0, born == s.clock("d/f").btime)
}

func utimes(path string, atime, mtime int64) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Nsec: atime}, {Nsec: mtime}}, 0)
}

func poke(fd int) error {
	m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	m[0]++
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return err
	}
	return unix.Munmap(m)
}

type clock struct{ atime, mtime, ctime, btime unix.StatxTimestamp }

func (s *stage) clock(name string) clock {
	var st unix.Statx_t
	require.NoError(s.t, unix.Statx(unix.AT_FDCWD, s.path(name), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st))
	return clock{st.Atime, st.Mtime, st.Ctime, st.Btime}
}

func moved(a, b clock) string {
	var list []string
	for _, m := range []struct {
		name string
		a, b unix.StatxTimestamp
	}{{"atime", a.atime, b.atime}, {"mtime", a.mtime, b.mtime}, {"ctime", a.ctime, b.ctime}, {"btime", a.btime, b.btime}} {
		if m.a != m.b {
			list = append(list, m.name)
		}
	}
	return fmt.Sprint(list)
}

var xattrsDiffers = map[string]string{
	"user name of 166": "names are stored encrypted", "user name of 200": "names are stored encrypted", "user name of 250": "names are stored encrypted",
	"user.kmsfs": "ours",
}

// xattrs sets, reads, lists and removes attributes of every kind on every kind of
// file, as root and as others.
func xattrs(s *stage) {
	require.NoError(s.t, os.Mkdir(s.path("dir"), 0o755))
	s.write("file", "x")
	require.NoError(s.t, unix.Symlink("file", s.path("link")))
	require.NoError(s.t, unix.Mkfifo(s.path("fifo"), 0o644))
	for _, name := range []string{"file", "dir", "link", "fifo"} {
		for _, attr := range []string{"user.a", "user.", "user", "trusted.a", "security.a", "system.a", "nothing.a", "", "user.\xff"} {
			s.xattr(name, attr)
		}
		s.list(name)
	}
	for _, n := range []int{1, 100, 165, 166, 200, 250, 251} {
		s.ends(fmt.Sprintf("user name of %d", n), unix.Setxattr(s.path("file"), "user."+strings.Repeat("n", n), []byte("x"), 0))
		s.ends(fmt.Sprintf("trusted name of %d", n), unix.Setxattr(s.path("file"), "trusted."+strings.Repeat("n", n-min(n, 3)), []byte("x"), 0))
	}
	s.write("sizes", "x")
	for _, n := range []int{0, 1, 100, 1000, 3000, 70_000} {
		s.ends(fmt.Sprintf("value of %d", n), unix.Setxattr(s.path("sizes"), "user.v", slices.Repeat([]byte("v"), n), 0))
		got, err := unix.Getxattr(s.path("sizes"), "user.v", nil)
		s.ends(fmt.Sprintf("its size %d", got), err)
		got, err = unix.Getxattr(s.path("sizes"), "user.v", make([]byte, 50))
		s.ends(fmt.Sprintf("read into 50: %d", got), err)
	}
	_, err := unix.Listxattr(s.path("sizes"), make([]byte, 3))
	s.ends("listed into 3", err)
	s.ends("user.kmsfs", unix.Setxattr(s.path("file"), "user.kmsfs", []byte("x"), 0))
}

// strangersXattrs has others try the attributes of files that are not theirs.
func strangersXattrs(s *stage) {
	s.script(`touch theirs; chmod 644 theirs
		how u 30001:30001 setfattr -n user.a -v 1 theirs; chmod 666 theirs; how u 30001:30001 setfattr -n user.a -v 1 theirs
		how u 30001:30001 setfattr -n trusted.a -v 1 theirs; how u 30001:30001 setfattr -n security.a -v 1 theirs
		setfattr -n trusted.b -v 2 theirs; u 30001:30001 getfattr -d -m - theirs; getfattr -d -m '^(user|trusted|security)' theirs
		chmod 600 theirs; how u 30001:30001 getfattr -n user.a theirs
		mkdir sticky; chmod 1777 sticky; how u 30001:30001 setfattr -n user.a -v 1 sticky
		cp --preserve=all theirs copy; getfattr -d -m '^(user|trusted)' copy; mv copy moved; getfattr -d moved`)
}

func (s *stage) xattr(name, attr string) {
	p, what := s.path(name), fmt.Sprintf("%s %q", name, attr)
	s.ends(what+" replace", unix.Lsetxattr(p, attr, []byte("1"), unix.XATTR_REPLACE))
	s.ends(what+" create", unix.Lsetxattr(p, attr, []byte("2"), unix.XATTR_CREATE))
	s.ends(what+" create again", unix.Lsetxattr(p, attr, []byte("3"), unix.XATTR_CREATE))
	s.ends(what+" set", unix.Lsetxattr(p, attr, []byte("four"), 0))
	buf := make([]byte, 100)
	n, err := unix.Lgetxattr(p, attr, buf)
	s.ends(fmt.Sprintf("%s get %q", what, buf[:max(n, 0)]), err)
	s.ends(what+" remove", unix.Lremovexattr(p, attr))
	s.ends(what+" remove again", unix.Lremovexattr(p, attr))
	_, err = unix.Lgetxattr(p, attr, buf)
	s.ends(what+" get what is gone", err)
	_ = unix.Lsetxattr(p, attr, []byte("stays"), 0)
}

func (s *stage) list(name string) {
	buf := make([]byte, 1000)
	n, err := unix.Llistxattr(s.path(name), buf)
	s.ends("list of "+name, err)
	all := strings.Split(string(buf[:max(n, 0)]), "\x00")
	slices.Sort(all)
	s.say("list of %s: %q", name, all)
}

// acls sets access and default ACLs, and has several users try what they permit.
func acls(s *stage) {
	s.script(`
		show() { getfacl -cpE "$@" | tr '\n' ' '; stat -c '%a' "$@"; }
		try() { for id in 30001:30001 30002:30002 30003:30003:30005; do
			u $id test -r $1 && echo "$id reads $1"; u $id test -w $1 && echo "$id writes $1"; u $id test -x $1 && echo "$id runs $1"
			u $id cat $1 >/dev/null && echo "$id has read $1"; u $id sh -c "echo x >>$1" && echo "$id has written $1"; done; true; }
		umask 022; echo x >f; chmod 640 f; chown 30001:30005 f; show f; try f
		setfacl -m u:30002:rw f; show f; try f
		setfacl -m g:30005:--- f; show f; try f
		chmod 604 f; show f; try f
		chmod 660 f; show f; try f
		setfacl -m m::r f; show f; try f
		setfacl -x u:30002 f; show f; setfacl -b f; show f; try f
		mkdir d; setfacl -m d:u:30002:rwx,d:g:30005:rx,d:o::- d; show d
		umask 077; touch d/f; mkdir d/d; mkfifo d/p; ln -s f d/l; show d/f; show d/d; show d/p; touch d/d/deep; show d/d/deep
		mknod d/n c 1 3; show d/n; chmod 777 d; u 30003:30003 touch d/theirs; show d/theirs; stat -c %u:%g d/theirs
		setfacl -k d; show d; touch d/after; show d/after; umask 022
		how u 30001:30001 setfacl -m u:30003:r f; how u 30003:30003 setfacl -m u:30003:r f
		mkdir g; chgrp 30005 g; chmod 2775 g; setfacl -m d:g::rwx g; touch g/f; mkdir g/d; show g/f; show g/d; stat -c %g:%a g/f g/d
		echo x >s; chown 30001:30005 s; chmod 2770 s; u 30001:30001 setfacl -m u:30002:r s; stat -c %a s
		chmod 2770 s; setfacl -m u:30002:r s; stat -c %a s
		mkdir o; chown 30001:30005 o; chmod 6777 o; u 30001:30001 setfacl -m d:u:30002:r o; stat -c %a o; u 30001:30001 setfacl -m u:30002:r o; stat -c %a o
		cp -p d/theirs copy; show copy; rm -f copy; setfacl -m u:30002:rw,m::r f; cp -a f copy; show copy
		setfattr -n system.posix_acl_access -v 0x0200 f 2>/dev/null || echo 'a malformed one is refused'
		getfattr -d -m posix d d/d f 2>/dev/null | grep -c posix_acl || true
		ln -s f sl; setfacl -m u:30001:r sl; show f; how setfacl -m d:u:1:r f 2>/dev/null`)
}

// users lets several of them, in several groups, work in each other's directories.
func users(s *stage) {
	s.script(`
		show() { stat -c '%n %A %u:%g' "$@"; }
		umask 022; mkdir pub; chmod 1777 pub; mkdir team; chown 30001:30005 team; chmod 2770 team; mkdir set; chgrp 30005 set; chmod 2777 set
		u 30001:30001 sh -c 'umask 027; echo a >pub/a; mkdir pub/da; ln pub/a pub/a2; ln -s a pub/la; mkfifo pub/fa'; show pub/*
		how u 30002:30002 rm -f pub/a; how u 30002:30002 mv pub/a pub/b; how u 30002:30002 mv pub/da pub/db
		how u 30002:30002 cat pub/a; how u 30002:30001 cat pub/a; how u 30002:30002:30001 cat pub/a; how u 30002:30002 sh -c 'echo x >>pub/a'
		how u 30002:30002 ln pub/a pub/stolen; how u 30002:30002 touch pub/a; how u 30002:30002 chmod 777 pub/a; how u 30002:30002 truncate -s 0 pub/a
		how u 30002:30002 rm -f pub/la; how u 30001:30001 rm -f pub/la; how u 30001:30001 mv pub/da pub/dc
		how u 30001:30001 chown 30002 pub/a; how u 30001:30001 chgrp 30005 pub/a; how u 30001:30001:30005 chgrp 30005 pub/a; show pub/a
		how u 30001:30001:30005 chown 30001:30005 pub/dc; show pub/dc
		how u 30002:30002 ls team; how u 30002:30002:30005 ls team; how u 30002:30005 touch team/x; how u 30002:30002:30005 mkdir team/d; show team/*
		u 30003:30003 mkdir set/d; u 30003:30003 touch set/f; u 30003:30003 ln -s f set/l; u 30003:30003 mkfifo set/p; show set/*
		u 30003:30003 sh -c 'umask 0; touch set/exec; chmod 2755 set/exec'; show set/exec; u 30003:30003:30005 chmod 2755 set/exec; show set/exec
		u 30003:30003 install -m 2755 /bin/true set/inst; show set/inst; u 30003:30003:30005 install -m 2755 /bin/true set/inst; show set/inst
		for m in 000 022 027 077 777; do u 30003:30003 sh -c "umask $m; touch pub/f$m; mkdir pub/d$m"; done; show pub/*
		how u 30001:30001 mkdir pub/f000/x; how u 30003:30003 rmdir pub/d777; how u 30001:30001 ls pub/d077; how u 30001:30001 test -x pub/d077
		chmod 711 pub/d000; u 30003:30003 touch pub/d000/in; how u 30001:30001 ls pub/d000; how u 30001:30001 cat pub/d000/in; how u 30001:30001 cat pub/d000/none
		how u 30001:30001 mknod pub/null c 1 3; how u 30001:30001 mkfifo pub/p; how u 30001:30001 touch -d 2001-01-01 pub/f000; how u 30003:30003 touch -d 2001-01-01 pub/f000
		chmod 666 pub/f000; how u 30001:30001 touch pub/f000; how u 30001:30001 touch -d 2001-01-01 pub/f000; how u 30001:30001 dd if=pub/f000 iflag=noatime status=none
		echo '#!/bin/sh' >pub/script; chmod 744 pub/script; how u 30001:30001 pub/script; chmod 755 pub/script; how u 30001:30001 pub/script
		chown 30004:30005 pub/dc; chmod 0 pub/dc; show pub/dc; how u 30004:30004 ls pub/dc; how u 30004:30004 chmod 700 pub/dc; how u 30004:30004 ls pub/dc
		for i in 1 2 3 4; do u 3000$i:3000$i sh -c 'for n in $(seq 40); do echo $1 >pub/by.$1.$n; done' sh $i & done; wait; stat -c '%n %u' pub/by.* | awk '{ split($1, p, "."); if ($2 != 30000 + p[2]) print "wrong owner:", $0; n++ } END { print n }'`)
}

var privilegesDiffer = map[string]string{
	"stored of ": "the daemon writes what was stored through a mapping, and a write takes security.capability off the backing file",
}

// privileges tries what clears setuid, setgid and capabilities: for each mode, each
// way to write, and each user.
func privileges(s *stage) {
	ways := map[string]string{
		"write": "printf x >f", "append": "printf x >>f", "truncate": "truncate -s 5 f", "same": "truncate -s 9 f", "longer": "truncate -s 9000 f",
		"allocate": "fallocate -l 100000 f", "punch": "fallocate -p -o 0 -l 4 f", "inplace": "printf x | dd of=f conv=notrunc status=none",
		"direct": "dd if=/dev/zero of=f bs=4096 count=1 oflag=direct conv=notrunc status=none", "chown": "chown 30001:30001 f", "chgrp": "chgrp 30005 f",
		"touch": "touch f", "open": ": <>f", "chmod": "chmod g+w f", "copy": "cat /bin/true >f", "link": "ln f g; rm g", "xattr": "setfattr -n user.a -v b f",
		"zero": "fallocate -z -o 0 -l 4 f", "keep": "fallocate -n -l 100000 f",
		"copied": python("os.copy_file_range(g, f, 5)"), "sent": python("os.sendfile(f, g, 0, 5)"), "spliced": python("r, w = os.pipe(); os.write(w, b\"x\"); os.splice(r, f, 1)"),
		"pieces": python("os.pwritev(f, [b\"x\", b\"y\"], 1, os.RWF_DSYNC)"), "nothing": python("os.pwrite(f, b\"\", 0)"), "stored": python("import mmap; mmap.mmap(f, 9)[0] = 1"),
	}
	var text strings.Builder
	text.WriteString("printf contents: >from\n")
	for way, command := range sorted(ways) {
		modes := "6777 2767 777"
		if strings.HasPrefix(command, "python3") {
			modes = "6777" // it starts slowly
		}
		fmt.Fprintf(&text, `for mode in %s; do for who in 0:0 30001:30001:30005 30002:30002; do
			rm -f f; printf contents: >f; chown 30001:30005 f; setcap cap_net_raw+ep f; chmod $mode f
			u $who sh -c '%s' 2>/dev/null && r=done || r=refused
			echo "%s of $mode by $who: $r $(stat -c %%a f) $(getcap f)"; done; done
			`, modes, command, way)
	}
	s.script(text.String())
}

// python writes to f as open by the program and g to read from.
func python(does string) string {
	return "python3 -c \"import os; f = os.open(\\\"f\\\", os.O_RDWR); g = os.open(\\\"from\\\", 0); " + strings.ReplaceAll(does, `"`, `\"`) + "\""
}

// special has programs meet at fifos, sockets and devices.
func special(s *stage) {
	s.script(`
		mkfifo p; (echo through a fifo >p) & cat p; wait
		mknod zero c 1 5; head -c 3 zero | od -An -tx1; mknod b b 7 99; stat -c '%F %t:%T' zero b
		python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.bind("sock"); s.listen(); c = socket.socket(socket.AF_UNIX); c.connect("sock"); a, _ = s.accept(); c.send(b"hello"); print(a.recv(9))'
		stat -c '%F %a' sock; test -S sock; mv sock moved; test -S moved; cp -a p p2; test -p p2; chmod 600 p2; stat -c %a p2
		how truncate -s 5 zero; how mknod p c 1 3; ln zero zero2; stat -c %h zero; rm zero; head -c 1 zero2 | od -An -tx1; rm p p2 b moved zero2; ls -A`)
}

// notify watches a directory and a file in it.
func notify(s *stage) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	require.NoError(s.t, err)
	defer unix.Close(fd)
	require.NoError(s.t, os.Mkdir(s.path("d"), 0o755))
	s.write("d/f", "x")
	for _, name := range []string{"d", "d/f"} {
		_, err := unix.InotifyAddWatch(fd, s.path(name), unix.IN_ALL_EVENTS)
		require.NoError(s.t, err)
	}
	s.script(`cd d; echo new >n; echo more >>n; cat n; chmod 600 n; mv n m; ln m l; rm l; touch f; echo y >f; setfattr -n user.a -v b f; mkdir s; rmdir s; mv m ../out; mv ../out in; rm f in; ls`)
	time.Sleep(50 * time.Millisecond) // the last close is reported by its process's end
	for _, event := range events(s, fd) {
		s.say("event %s", event)
	}
}

func events(s *stage, fd int) (all []string) {
	buf := make([]byte, 64<<10)
	n, err := unix.Read(fd, buf)
	require.NoError(s.t, err)
	for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
		size := int(binary.NativeEndian.Uint32(b[12:]))
		name := strings.TrimRight(string(b[16:16+size]), "\x00")
		all = append(all, fmt.Sprintf("%#x of watch %d: %s", binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b), name))
		b = b[16+size:]
	}
	return all
}
