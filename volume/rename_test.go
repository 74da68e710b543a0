package volume

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Every combination of short and long names, target there or not, flags, in one
// directory and across two; contents, listing and sidecars are checked.
func TestRenameMatrix(t *testing.T) {
	flags := map[string]uint{
		"plain": 0, "noreplace": unix.RENAME_NOREPLACE, "exchange": unix.RENAME_EXCHANGE,
		"whiteout": unix.RENAME_WHITEOUT, "whiteout+noreplace": unix.RENAME_WHITEOUT | unix.RENAME_NOREPLACE,
	}
	names := map[string][2]string{"short": {"old", "new"}, "long": {longName("o"), longName("n")}}
	for _, mode := range bothModes {
		v, _ := newVolume(t, mode)
		r := root(t, v)
		i := 0
		for from := range names {
			for to := range names {
				for _, exists := range []bool{false, true} {
					for _, across := range []bool{false, true} {
						for flag, bits := range flags {
							i++
							c := renameCase{old: names[from][0], new: names[to][1], exists: exists, flags: bits}
							c.a = mkdir(t, r, fmt.Sprint("a", i))
							c.b = c.a
							if across {
								c.b = mkdir(t, r, fmt.Sprint("b", i))
							}
							t.Run(fmt.Sprintf("%s/%s to %s/exists=%v/across=%v/%s", mode, from, to, exists, across, flag), c.run)
						}
					}
				}
			}
		}
	}
}

type renameCase struct {
	a, b     *Dir
	old, new string
	exists   bool
	flags    uint
}

func (c renameCase) run(t *testing.T) {
	touch(t, c.a, c.old, "old")
	if c.exists {
		touch(t, c.b, c.new, "new")
	}
	err := c.a.Rename(c.old, c.b, c.new, c.flags)
	wantOld, wantNew := "", "old" // contents afterwards; "" = no such file
	switch {
	case c.exists && c.flags&unix.RENAME_NOREPLACE != 0:
		require.ErrorIs(t, err, unix.EEXIST)
		wantOld, wantNew = "old", "new"
	case !c.exists && c.flags&unix.RENAME_EXCHANGE != 0:
		require.ErrorIs(t, err, unix.ENOENT)
		wantOld, wantNew = "old", ""
	case c.flags&unix.RENAME_EXCHANGE != 0:
		require.NoError(t, err)
		wantOld = "new"
	default:
		require.NoError(t, err)
	}
	if err == nil && c.flags&unix.RENAME_WHITEOUT != 0 {
		var st unix.Stat_t
		require.NoError(t, c.a.Lstat(c.old, &st))
		require.EqualValues(t, unix.S_IFCHR, st.Mode&unix.S_IFMT)
		require.Contains(t, list(t, c.a), c.old, "the whiteout keeps the name, and its sidecar")
	} else {
		got, _ := content(t, c.a, c.old)
		require.Equal(t, wantOld, got)
		require.Equal(t, wantOld != "", contains(list(t, c.a), c.old))
	}
	got, _ := content(t, c.b, c.new)
	require.Equal(t, wantNew, got)
	require.Equal(t, wantNew != "", contains(list(t, c.b), c.new))
	consistent(t, c.a)
	consistent(t, c.b)
}

func contains(names []string, want string) bool {
	for _, n := range names {
		if n == want {
			return true
		}
	}
	return false
}

// gocryptfs loses the entry: mkdir LONG d; mv -T d LONG.
func TestRenameDirectoryOverLongName(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	mkdir(t, d, longName("L"))
	touch(t, mkdir(t, d, "d"), "f", "x")
	require.NoError(t, d.Rename("d", d, longName("L"), 0))
	require.Equal(t, []string{longName("L")}, list(t, d))
	require.Equal(t, []string{"f"}, list(t, openDir(t, d, longName("L"))))
	consistent(t, d)
	mkdir(t, d, "e")
	require.ErrorIs(t, d.Rename("e", d, longName("L"), 0), unix.ENOTEMPTY)
	consistent(t, d)
}

// rename(2) between two links of one file does nothing: both names stay.
func TestRenameBetweenLinksOfOneFile(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, longName("a"), "x")
	fd, err := d.OpenPath(longName("a"))
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, d.Link(fd, longName("b")))
	require.NoError(t, d.Rename(longName("a"), d, longName("b"), 0))
	require.NoError(t, d.Rename(longName("a"), d, longName("a"), 0))
	require.Equal(t, []string{longName("a"), longName("b")}, list(t, d))
	consistent(t, d)
}

func TestRenameOfDamagedEntries(t *testing.T) {
	v, _ := newVolume(t, NamesEncrypted)
	d := root(t, v)
	touch(t, d, longName("a"), "x")
	require.NoError(t, os.Remove(storedPath(t, d, longName("a"))+sidecarSuffix))
	names := list(t, d)
	require.True(t, strings.HasPrefix(names[0], DamagedPrefix+longPrefix))
	require.ErrorIs(t, d.Rename(names[0], d, DamagedPrefix+"y", 0), unix.EPERM)
	require.NoError(t, d.Rename(names[0], d, "saved", 0))
	require.Equal(t, []string{"saved"}, list(t, d))
	require.Len(t, stored(t, d), 1)
}
