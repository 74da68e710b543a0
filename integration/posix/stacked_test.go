package posix

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/integration/harness"
)

// mutate is what a container does to its root: change, replace, remove, remove a
// directory and make it anew, rename one, link.
const mutate = `cd "$1"
	cat etc/conf; echo changed >>etc/conf; rm etc/gone; test ! -e etc/gone; rm -r usr/old; mkdir usr/old; touch usr/old/new; ls usr/old
	mv usr/lib usr/moved; ls usr/moved; ln etc/conf etc/hard; stat -c %h etc/conf; chmod 600 etc/mode; setfattr -n user.a -v b etc/mode; getfattr -n user.a etc/mode
	ln -s conf etc/link; cat etc/link; mkfifo etc/fifo; echo new >usr/file; mv usr/file etc/conf2; find . | sort; find . -type f | sort | xargs sha256sum; rm -rf usr; ls`

const seed = `cd "$1"; mkdir -p etc usr/old/deep usr/lib; echo conf >etc/conf; echo gone >etc/gone; echo mode >etc/mode; echo x >usr/old/x; echo y >usr/old/deep/y; seq 5000 >usr/lib/big`

// TestOverlay has the mount as the lower and as the upper layer of an overlay, with
// attributes of root's and of the user's own: what a program sees, and what is left
// after a remount, is what a plain directory gives.
func TestOverlay(t *testing.T) {
	e := harness.New(t)
	v := volume(t, e, "volume", "--names", "encrypted")
	beside := filepath.Join(e.Root, "beside")
	kinds := map[string]string{"trusted": "", "user": ",userxattr"}
	for kind := range kinds {
		for _, dir := range []string{v.Path(kind), filepath.Join(beside, kind)} {
			e.Shell(`mkdir -p "$1"/{lower,upper,work}`, dir)
			e.Shell(seed, filepath.Join(dir, "lower"))
		}
	}
	for kind, option := range kinds {
		plain, ours := filepath.Join(beside, kind), v.Path(kind)
		want := overlay(t, e, plain, plain, option)
		for where, layers := range map[string][2]string{"both": {ours, ours}, "lower": {ours, plain}, "upper": {plain, ours}} {
			t.Run(kind+"/"+where, func(t *testing.T) {
				require.Equal(t, want, overlay(t, e, layers[0], layers[1], option))
			})
		}
	}
}

// overlay plays mutate on an overlay and lists what is seen of it by a second one.
func overlay(t *testing.T, e *harness.Env, lower, upper, option string) string {
	t.Helper()
	merged := filepath.Join(e.Root, "merged")
	require.NoError(t, os.MkdirAll(merged, 0o755))
	return e.Shell(`rm -rf "$2"/upper "$2"/work; mkdir "$2"/upper "$2"/work
		for round in first second; do
			mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$2/upper,workdir=$2/work$3" "$4"
			trap 'umount "$4"' EXIT
			if [ $round = first ]; then bash -euc "$5" bash "$4"; fi
			echo $round; cd "$4"; find . | sort; cd /
			umount "$4"; trap - EXIT
		done`, lower, upper, option, merged, mutate)
}

// TestInContainer: a bind mount of a directory, and of a file, in a mount namespace
// and as a root directory, work and end with it.
func TestInContainer(t *testing.T) {
	e := harness.New(t)
	v := volume(t, e, "volume", "--names", "encrypted")
	e.Shell(`mkdir -p "$1"/root/{data,proc}; echo before >"$1"/root/file; echo config >"$1"/config; touch "$1"/root/config`, v.Mnt)
	out := e.Shell(`unshare --mount --propagation private --pid --fork bash -euc '
		mount --bind "$1/root" "$1/root"; mount --bind "$1/config" "$1/root/config"; mount -t proc proc "$1/root/proc"
		mount -o remount,bind,ro "$1/root/config"
		for d in usr bin lib lib64; do mkdir -p "$1/root/$d"; mount --bind /$d "$1/root/$d"; done
		exec chroot "$1/root" /bin/bash -euc "cat file config; echo after >data/file; if echo x 2>/dev/null >config; then exit 1; fi
			mv data/file data/moved; ls /data; cat /data/moved; echo \$\$; cd /; pwd; stat -c %m data"' bash "$1"`, v.Mnt)
	require.Equal(t, "before\nconfig\nmoved\nafter\n1\n/\n/\n", out)
	require.Equal(t, "after\n", e.Shell(`cat "$1"/root/data/moved; rmdir "$1"/root/{usr,bin,lib,lib64}`, v.Mnt))
	require.Equal(t, "config\n", e.Do("cat", v.Path("config")))
}
