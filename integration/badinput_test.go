package integration

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/integration/harness"
)

// Exit statuses, as scripts depend on them.
const (
	statusUsage       = 1
	statusDamaged     = 2
	statusRefused     = 3
	statusUnavailable = 4
	statusPartial     = 5
	statusFUSE        = 6
)

// TestUsage: what can't be understood is status 1, and says what.
func TestUsage(t *testing.T) {
	e := harness.New(t)
	dir := e.Mkdir("dir")
	for _, c := range []struct {
		words []string
		args  []string
	}{
		{[]string{"frobnicate"}, []string{"frobnicate"}},
		{[]string{"--frobnicate"}, []string{"init", dir, "--frobnicate"}},
		{nil, []string{"init"}},
		{nil, []string{"mount", dir}},
		{nil, []string{"umount"}},
		{nil, []string{"inspect"}},
		{nil, []string{"rekey", dir}},
		{[]string{"block"}, []string{"init", dir, "--block-size", "5000"}},
		{[]string{"block"}, []string{"init", dir, "--block-size", "1048576"}},
		{[]string{"names", "rot13"}, []string{"init", dir, "--names", "rot13"}},
		{[]string{"nonsense"}, []string{"init", dir, "--key", "nonsense"}},
		{[]string{"arn:aws:s3:us-east-1:111122223333:bucket"}, []string{"init", dir, "--key", "arn:aws:s3:us-east-1:111122223333:bucket"}},
		{[]string{"../up"}, []string{"key", "create", "../up"}},
	} {
		t.Run(strings.Join(c.args, " ")[:min(30, len(strings.Join(c.args, " ")))], func(t *testing.T) {
			same := harness.Unchanged(t, e.Root)
			e.Refused(statusUsage, c.words, c.args...)
			same()
		})
	}
	for _, args := range [][]string{{"help"}, {"help", "mount"}, {"--help"}, {"rekey", "--help"}, {"version"}} {
		require.NotEmpty(t, e.Must(args...), "%v", args)
	}
}

func TestInitRefuses(t *testing.T) {
	e := harness.New(t)
	localKey(e, "one")
	t.Run("a directory that is not empty", func(t *testing.T) {
		dir := e.Mkdir("full")
		require.NoError(t, os.WriteFile(filepath.Join(dir, "precious"), []byte("mine"), 0o600))
		same := harness.Unchanged(t, dir)
		e.Refused(statusUsage, []string{dir, "empty"}, "init", dir, "--key", "local:one")
		same()
	})
	t.Run("a volume", func(t *testing.T) {
		v := e.Init("volume", "--key", "local:one")
		same := harness.Unchanged(t, v.Dir)
		e.Refused(statusUsage, []string{v.Dir}, "init", v.Dir, "--key", "local:one")
		same()
	})
	t.Run("a key that is not there", func(t *testing.T) {
		dir := e.Mkdir("absent")
		same := harness.Unchanged(t, dir)
		e.Refused(statusRefused, []string{"local:absent"}, "init", dir, "--key", "local:absent")
		same()
	})
	t.Run("a file", func(t *testing.T) {
		file := filepath.Join(e.Mkdir("files"), "file")
		require.NoError(t, os.WriteFile(file, nil, 0o600))
		e.Refused(statusUsage, []string{file}, "init", file, "--key", "local:one")
	})
	t.Run("a store without user xattrs", func(t *testing.T) {
		dir := ramfs(t, e)
		e.Refused(statusUsage, []string{dir, "xattr"}, "init", dir, "--key", "local:one")
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, entries)
	})
	t.Run("a kmsfs mount", func(t *testing.T) {
		v := e.Init("outer", "--key", "local:one")
		v.Mount()
		e.Refused(statusUsage, []string{v.Mnt}, "init", v.Mnt, "--key", "local:one")
		require.NoError(t, os.Mkdir(v.Path("inner"), 0o700))
		e.Refused(statusUsage, []string{"kmsfs"}, "init", v.Path("inner"), "--key", "local:one")
	})
	t.Run("two key creates of one name", func(t *testing.T) {
		same := harness.Unchanged(t, e.Var("KMSFS_KEYRING"))
		e.Refused(statusUsage, []string{"one"}, "key", "create", "one")
		same()
	})
}

// ramfs is a file system without user xattrs.
func ramfs(t *testing.T, e *harness.Env) string {
	t.Helper()
	dir := e.Mkdir("ramfs")
	require.NoError(t, unix.Mount("ramfs", dir, "ramfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// TestMountRefuses: each row is a volume or a machine in a bad state; mount says
// why, by the right status, and changes nothing.
func TestMountRefuses(t *testing.T) {
	type row struct {
		name   string
		status int
		words  []string
		harm   func(t *testing.T, v *harness.Volume) (args []string)
	}
	settings := func(v *harness.Volume) []string {
		return []string{filepath.Join(v.Dir, "kmsfs.toml"), filepath.Join(v.Dir, "kmsfs.toml.bak")}
	}
	edit := func(old, new string) func(*testing.T, *harness.Volume) []string {
		return func(t *testing.T, v *harness.Volume) []string {
			for _, path := range settings(v) {
				text, err := os.ReadFile(path)
				require.NoError(t, err)
				require.Contains(t, string(text), old)
				require.NoError(t, os.WriteFile(path, []byte(strings.Replace(string(text), old, new, 1)), 0o600))
			}
			return nil
		}
	}
	rows := []row{
		{"corrupt TOML", statusDamaged, []string{"kmsfs.toml", "line"}, edit("block_size", "block size")},
		{"unknown key in TOML", statusDamaged, []string{"kmsfs.toml", "line"}, edit("block_size", "surprise = 1\nblock_size")},
		{"empty TOML", statusDamaged, []string{"kmsfs.toml"}, func(t *testing.T, v *harness.Volume) []string {
			for _, path := range settings(v) {
				require.NoError(t, os.Truncate(path, 0))
			}
			return nil
		}},
		{"no volume at all", statusUsage, []string{"kmsfs.toml"}, func(t *testing.T, v *harness.Volume) []string {
			for _, path := range settings(v) {
				require.NoError(t, os.Remove(path))
			}
			return nil
		}},
		{"unknown format", statusDamaged, []string{"format"}, edit("format = 1", "format = 2")},
		{"block size edited", statusDamaged, []string{"kmsfs.toml"}, edit("block_size = 4096", "block_size = 8192")},
		{"names edited", statusUsage, []string{"kmsfs.toml", "names"}, edit("names = 'encrypted'", "names = 'plain'")},
		{"key list changed behind the pin", statusUsage, []string{"local:two"}, edit("'local:one'", "'local:two'")},
		{"key added behind the pin", statusUsage, []string{"local:two"}, edit("'local:one'", "'local:two',\n  'local:one'")},
		{"AWS key added behind the pin", statusUsage, []string{"arn:aws:kms:eu-west-1:999999999999:key/mrk-00000000000000000000000000000001"},
			edit("'local:one'", "'arn:aws:kms:eu-west-1:999999999999:key/mrk-00000000000000000000000000000001',\n  'local:one'")},
		{"wrong key", statusUsage, []string{"local:two"}, func(*testing.T, *harness.Volume) []string { return []string{"--key", "local:two"} }},
		{"key file lost", statusRefused, []string{"local:one"}, func(t *testing.T, v *harness.Volume) []string {
			require.NoError(t, os.RemoveAll(v.Env.Var("KMSFS_KEYRING")))
			return nil
		}},
		{"unpinned", statusUsage, []string{"local:one", "--key local:one"}, func(t *testing.T, v *harness.Volume) []string {
			v.Env.Set("XDG_STATE_HOME", v.Env.Mkdir("other state"))
			return nil
		}},
		{"another volume at a pinned path", statusUsage, []string{"volume"}, func(t *testing.T, v *harness.Volume) []string {
			other := v.Env.Init("other", "--key", "local:one")
			require.NoError(t, os.RemoveAll(v.Dir))
			require.NoError(t, os.Rename(other.Dir, v.Dir))
			return nil
		}},
		{"no mountpoint", statusFUSE, []string{"mnt"}, func(t *testing.T, v *harness.Volume) []string {
			require.NoError(t, os.Remove(v.Mnt))
			return nil
		}},
		{"mountpoint is a file", statusFUSE, []string{"mnt"}, func(t *testing.T, v *harness.Volume) []string {
			require.NoError(t, os.Remove(v.Mnt))
			require.NoError(t, os.WriteFile(v.Mnt, nil, 0o600))
			return nil
		}},
		{"unknown mount option", statusUsage, []string{"frobnicate"}, func(*testing.T, *harness.Volume) []string { return []string{"-o", "frobnicate"} }},
		{"unknown key in the configuration", statusUsage, []string{"config.toml:2", "frobnicate"}, func(t *testing.T, v *harness.Volume) []string {
			dir := filepath.Join(v.Env.Var("XDG_CONFIG_HOME"), "kmsfs")
			require.NoError(t, os.MkdirAll(dir, 0o700))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte("# mine\nfrobnicate = true\n"), 0o600))
			return nil
		}},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			e := harness.New(t)
			localKey(e, "one")
			localKey(e, "two")
			v := e.Init("volume", "--key", "local:one")
			args := r.harm(t, v)
			same := harness.Unchanged(t, v.Dir)
			e.Refused(r.status, r.words, append([]string{"mount", v.Dir, v.Mnt}, args...)...)
			require.False(t, v.IsMounted())
			require.Empty(t, v.Daemons())
			same()
		})
	}
}

// TestMountRefusesPlaces is about where one mounts.
func TestMountRefusesPlaces(t *testing.T) {
	e := harness.New(t)
	localKey(e, "one")
	v := e.Init("volume", "--key", "local:one")
	inside := filepath.Join(v.Dir, "inside")
	require.NoError(t, os.Mkdir(inside, 0o700))
	same := harness.Unchanged(t, v.Dir)
	t.Run("mountpoint inside the backing directory", func(t *testing.T) {
		e.Refused(statusUsage, []string{inside}, "mount", v.Dir, inside)
		e.Refused(statusUsage, []string{v.Dir}, "mount", v.Dir, v.Dir)
		same()
	})
	require.NoError(t, os.Remove(inside))
	t.Run("twice", func(t *testing.T) {
		v.Mount()
		require.NoError(t, os.WriteFile(v.Path("file"), []byte("here"), 0o600))
		pid := fmt.Sprint(v.Daemons()[0])
		e.Refused(statusFUSE, []string{v.Dir, pid}, "mount", v.Dir, e.Mkdir("second"))
		e.Refused(statusFUSE, []string{v.Dir}, "mount", v.Dir, v.Mnt)
		content, err := os.ReadFile(v.Path("file"))
		require.NoError(t, err)
		require.Equal(t, "here", string(content))
	})
	t.Run("a backing directory that is a kmsfs mount", func(t *testing.T) {
		e.Refused(statusUsage, []string{v.Mnt}, "mount", v.Mnt, e.Mkdir("third"))
	})
	t.Run("unmounting what is not mounted", func(t *testing.T) {
		e.Refused(statusFUSE, []string{"third"}, "umount", e.Mkdir("third"))
	})
	t.Run("a store without user xattrs", func(t *testing.T) {
		dir := ramfs(t, e)
		for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
			text, err := os.ReadFile(filepath.Join(v.Dir, name))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
		}
		e.Refused(statusUsage, []string{dir, "xattr"}, "mount", dir, e.Mkdir("third"), "--key", "local:one", "--accept-new")
	})
}

// TestSettingsFallBack: one damaged copy of kmsfs.toml is no loss.
func TestSettingsFallBack(t *testing.T) {
	v := local(t)
	require.NoError(t, os.WriteFile(v.Path("file"), []byte("here"), 0o600))
	v.Umount()
	require.NoError(t, os.WriteFile(filepath.Join(v.Dir, "kmsfs.toml"), []byte("\x00\x00"), 0o600))
	r := v.TryMount()
	require.Zero(t, r.Status, "%v", r)
	require.Contains(t, r.Stderr, "kmsfs.toml")
	content, err := os.ReadFile(v.Path("file"))
	require.NoError(t, err)
	require.Equal(t, "here", string(content))
}

// TestUnpinnedVolumes: what the message of a refused mount recommends works, and
// the pin it makes serves the next mount.
func TestUnpinnedVolumes(t *testing.T) {
	for _, args := range [][]string{{"--accept-new"}, {"--key", "local:one"}} {
		e := harness.New(t)
		v := e.Init("volume", "--key", localKey(e, "one"))
		e.Set("XDG_STATE_HOME", e.Mkdir("other state"))
		v.Mount(args...)
		v.Remount()
	}
}

// TestBadHeaders: a file whose header is not what it should be can't be opened,
// and everything else can be done with it. inspect says what is wrong.
func TestBadHeaders(t *testing.T) {
	rows := []struct {
		name    string
		harm    func(t *testing.T, v *harness.Volume, raw []byte) []byte // nil: no header
		inspect int
	}{
		{"unknown version", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[4]++; return sealCRC(raw) }, statusDamaged},
		{"downgraded", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[4] = 0; return sealCRC(raw) }, statusDamaged},
		{"unknown suite", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[5]++; return sealCRC(raw) }, statusDamaged},
		{"unknown flag", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[7] |= 0x80; return sealCRC(raw) }, statusDamaged},
		{"other block size", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[8]++; return sealCRC(raw) }, 0},
		{"other use", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte {
			raw[9] = byte(crypt.UseVolume)
			return sealCRC(raw)
		}, 0},
		{"truncated", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { return raw[:len(raw)/2] }, statusDamaged},
		{"one byte", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { return raw[:1] }, statusDamaged},
		{"empty", func(*testing.T, *harness.Volume, []byte) []byte { return []byte{} }, statusDamaged},
		{"too long", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { return append(raw, 0) }, statusDamaged},
		{"bit flipped", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[60] ^= 1; return raw }, statusDamaged},
		{"commitment changed", func(_ *testing.T, _ *harness.Volume, raw []byte) []byte { raw[60] ^= 1; return sealCRC(raw) }, 0},
		{"stripped", func(*testing.T, *harness.Volume, []byte) []byte { return nil }, statusDamaged},
		{"of another volume", func(t *testing.T, v *harness.Volume, _ []byte) []byte {
			foreign := v.Env.Init("foreign", "--key", "local:one", "--names", "plain")
			foreign.Mount()
			require.NoError(t, os.WriteFile(foreign.Path("file"), harness.Noise(9000), 0o600))
			return header(t, foreign.Dir+"/file")
		}, 0},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			e := harness.New(t)
			v := e.Init("volume", "--key", localKey(e, "one"), "--names", "plain")
			v.Mount()
			for _, name := range []string{"file", "other"} {
				require.NoError(t, os.WriteFile(v.Path(name), harness.Noise(9000), 0o600))
			}
			v.Umount()
			v.Damaged()
			stored := filepath.Join(v.Dir, "file")
			setHeader(t, stored, r.harm(t, v, header(t, stored)))
			same := harness.Unchanged(t, v.Dir)
			got := e.Kmsfs("inspect", stored)
			require.Equal(t, r.inspect, got.Status, "%v", got)
			kind := "header"
			if r.name == "commitment changed" { // only the key can tell
				kind = "key"
			}
			requireFsckSays(t, v, "file "+kind)
			v.Mount()
			require.ErrorIs(t, harness.Try(v.Path("file"), unix.O_RDONLY, 0), unix.EBADMSG)
			require.ErrorIs(t, harness.Try(v.Path("file"), unix.O_RDWR, 0), unix.EBADMSG)
			require.ErrorIs(t, unix.Truncate(v.Path("file"), 100), unix.EBADMSG)
			v.Umount()
			same()
			v.Mount()
			require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path("other"), 0, 9000))
			deletable(t, v, "file")
		})
	}
}

// TestMovedHeaders: a header is right in itself, and belongs to another file of
// the volume. No block opens under it.
func TestMovedHeaders(t *testing.T) {
	all := damage{size, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}
	move := func(t *testing.T, swap bool) *harness.Volume {
		v := attacked(t, harness.New(t))
		v.Damaged()
		file, other := filepath.Join(v.Dir, "file"), filepath.Join(v.Dir, "other")
		mine := header(t, file)
		setHeader(t, file, header(t, other))
		if swap {
			setHeader(t, other, mine)
		}
		found, _, result := fsck(t, v, "--data")
		require.Equal(t, statusDamaged, result.Status, "%v", result)
		require.Equal(t, all.bad, badBlocks(found)["file"])
		require.Equal(t, swap, len(badBlocks(found)) == 2, "%v", result)
		v.Mount()
		return v
	}
	t.Run("planted", func(t *testing.T) {
		v := move(t, false)
		requireDamage(t, v.Path("file"), all)
		require.Equal(t, harness.Noise(size + 1)[1:], harness.ReadAt(t, v.Path("other"), 0, size))
		deletable(t, v, "file")
	})
	t.Run("swapped", func(t *testing.T) {
		v := move(t, true)
		for _, name := range []string{"file", "other"} {
			requireDamage(t, v.Path(name), all)
			deletable(t, v, name)
		}
	})
	t.Run("planted on an empty file", func(t *testing.T) {
		v := attacked(t, harness.New(t))
		v.Damaged()
		file, planted := filepath.Join(v.Dir, "file"), header(t, filepath.Join(v.Dir, "other"))
		require.NoError(t, os.Truncate(file, 0))
		setHeader(t, file, planted)
		v.Mount()
		harness.WriteAt(t, v.Path("file"), 0, []byte("anew"))
		v.Umount()
		require.NotEqual(t, planted[:76], header(t, file)[:76], "bytes were added under a header that was found on disk")
		v.Mount()
		require.Equal(t, "anew", string(harness.ReadAt(t, v.Path("file"), 0, 9)))
	})
}

// deletable does with a damaged file what needs no key: a file is never stuck.
func deletable(t *testing.T, v *harness.Volume, name string) {
	t.Helper()
	path := v.Path(name)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.True(t, info.Mode().IsRegular())
	require.NoError(t, os.Chmod(path, 0o640))
	require.NoError(t, os.Chown(path, 1, 2))
	require.NoError(t, os.Chtimes(path, info.ModTime(), info.ModTime()))
	require.NoError(t, os.Rename(path, path+".moved"))
	require.NoError(t, os.Remove(path+".moved"))
	_, err = os.Lstat(path)
	require.ErrorIs(t, err, unix.ENOENT)
}

func header(t *testing.T, path string) []byte {
	t.Helper()
	buf := make([]byte, crypt.MaxHeader)
	n, err := unix.Getxattr(path, crypt.HeaderXattr, buf)
	require.NoError(t, err, path)
	return buf[:n]
}

func setHeader(t *testing.T, path string, raw []byte) {
	t.Helper()
	if raw == nil {
		require.NoError(t, unix.Removexattr(path, crypt.HeaderXattr))
		return
	}
	require.NoError(t, unix.Setxattr(path, crypt.HeaderXattr, raw, 0))
}

// sealCRC makes the checksum right again, as an attacker would.
func sealCRC(raw []byte) []byte {
	body := raw[:len(raw)-4]
	return binary.LittleEndian.AppendUint32(body, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
}
