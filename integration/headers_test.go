package integration

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/headers"
	"kmsfs/integration/harness"
	"kmsfs/keys/kmstest"
	"kmsfs/volume"
)

// losing copies a backing directory the way that loses every extended attribute,
// and nothing else.
func losing(t *testing.T, v *harness.Volume) *harness.Volume {
	t.Helper()
	e := v.Env
	c := &harness.Volume{Env: e, Dir: filepath.Join(e.Mkdir("copy"), "backing"), Mnt: e.Mkdir(filepath.Join("copy", "mnt"))}
	e.Do("cp", "-r", "--preserve=mode,ownership,timestamps,links", v.Dir, c.Dir)
	require.Empty(t, headersIn(t, c.Dir))
	t.Cleanup(func() {
		if c.IsMounted() {
			c.Umount()
		}
	})
	return c
}

// headersIn are the attributes of kmsfs below a directory, by path and name.
func headersIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		for name, value := range harness.Xattrs(t, path) {
			if strings.HasPrefix(name, crypt.XattrPrefix) {
				all[rel+" "+name] = value
			}
		}
		return nil
	}))
	return all
}

func strip(t *testing.T, path string) {
	t.Helper()
	require.NoError(t, unix.Removexattr(path, crypt.HeaderXattr))
}

// TestHeadersBackup: a copy without extended attributes reads byte for byte after
// an import. The export takes neither key nor pin, the import one Decrypt a file.
func TestHeadersBackup(t *testing.T) {
	for _, names := range []string{"encrypted", "plain"} {
		t.Run(names, func(t *testing.T) {
			e := harness.New(t)
			kms := e.KMS()
			v := e.Init("volume", "--key", kms.NewKey(), "--names", names)
			tree := sources(t, e)
			linked, odd := filepath.Join(tree, "odd", "linked"), filepath.Join(tree, "odd")
			require.NoError(t, unix.Removexattr(linked, "user.colour")) // users' own attributes are not in an export
			require.NoError(t, unix.Removexattr(linked, "trusted.mark"))
			require.NoError(t, unix.Removexattr(odd, "user.empty"))
			require.NoError(t, unix.Lutimes(odd, []unix.Timeval{{Sec: 5e8}, {Sec: 5e8}}))
			v.Mount()
			e.Do("cp", "-a", tree, v.Path("src"))
			v.Umount()
			want := headersIn(t, v.Dir)
			file := filepath.Join(e.Root, "export")
			same := harness.Unchanged(t, v.Dir)
			harness.New(t).Must("headers", "export", v.Dir, file)
			same()

			c := losing(t, v)
			c.Mount()
			_, err := os.ReadFile(c.Path("src", "odd", "linked"))
			require.Error(t, err, "without the headers nothing in it is of use")
			c.Umount()
			same = harness.Unchanged(t, c.Dir)
			require.Contains(t, e.Must("headers", "import", c.Dir, file, "--dry-run"), "restored")
			same()
			calls := kms.During(func() { e.Must("headers", "import", c.Dir, file, "--yes") })
			require.Equal(t, want, headersIn(t, c.Dir))
			files := 0
			for attribute := range want {
				if strings.HasSuffix(attribute, " "+crypt.HeaderXattr) {
					files++
				}
			}
			for _, op := range calls {
				require.Equal(t, "Decrypt", op)
			}
			require.GreaterOrEqual(t, len(calls), files-1) // a file with two links may be asked for once
			require.LessOrEqual(t, len(calls), files+1)    // and the volume key
			calls = kms.During(func() { e.Must("headers", "import", c.Dir, file, "--yes") })
			require.LessOrEqual(t, len(calls), 1, "what is present needs no proof")

			c.Mount()
			harness.Same(t, tree, c.Path("src"))
			c.Umount()
			e.Must("headers", "export", c.Dir, filepath.Join(e.Root, "again"))
		})
	}
}

// TestHeadersOfSwappedFiles: contents that changed places after the export don't
// get one another's header.
func TestHeadersOfSwappedFiles(t *testing.T) {
	e := harness.New(t)
	v := attacked(t, e)
	file := filepath.Join(e.Root, "export")
	e.Must("headers", "export", v.Dir, file)
	c := losing(t, v)
	e.Do("bash", "-c", `cd "$1" && mv file x && mv other file && mv x other`, "bash", c.Dir)
	r := e.Refused(statusPartial, []string{"file", "other", "mismatch", "does not belong"}, "headers", "import", c.Dir, file, "--yes")
	require.Contains(t, r.Stdout, "2 mismatch")
	require.Empty(t, headersIn(t, c.Dir))
	// Who insists gets what damage is everywhere else: an error, never wrong bytes.
	e.Must("headers", "import", c.Dir, file, "--yes", "--no-verify")
	c.Mount()
	for _, name := range []string{"file", "other"} {
		_, err := os.ReadFile(c.Path(name))
		require.ErrorIs(t, err, unix.EBADMSG)
	}
}

// TestHeadersAfterRekey: an export from before a rekey brings no old copies back,
// and is still good for a file that lost its header.
func TestHeadersAfterRekey(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	first, second := kms.NewKey(), kms.NewKey()
	v := e.Init("volume", "--key", first, "--names", "plain")
	v.Mount()
	for _, name := range []string{"a", "b", "c"} {
		require.NoError(t, os.WriteFile(v.Path(name), harness.Noise(9000), 0o600))
	}
	v.Umount()
	file := filepath.Join(e.Root, "export")
	e.Must("headers", "export", v.Dir, file)
	e.Must("rekey", v.Dir, "--to", second, "--yes")
	before := headersIn(t, v.Dir)
	e.Must("headers", "import", v.Dir, file, "--yes")
	require.Equal(t, before, headersIn(t, v.Dir))

	strip(t, filepath.Join(v.Dir, "b"))
	calls := kms.During(func() {
		e.Refused(statusPartial, []string{"b", "does not trust", first}, "headers", "import", v.Dir, file, "--yes")
	})
	require.Equal(t, []string{"Decrypt"}, calls, "the volume key, and nothing under the retired key")
	e.Must("headers", "import", v.Dir, file, "--yes", "--key", second, "--key", first)
	require.Equal(t, map[string]int{first: 1, second: 2}, v.KeysOf())
	e.Must("rekey", v.Dir, "--to", second, "--from", first, "--yes")
	require.Equal(t, map[string]int{second: 3}, v.KeysOf())
	v.Mount()
	require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path("b"), 0, 9000))
}

// TestHeadersImportTrust: a volume that is new to the client is not asked about
// KMS behind its back; unverified needs no trust, for nobody is asked.
func TestHeadersImportTrust(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	key := kms.NewKey()
	v := e.Init("volume", "--key", key, "--names", "plain")
	v.Mount()
	require.NoError(t, os.WriteFile(v.Path("file"), harness.Noise(9000), 0o600))
	v.Umount()
	file := filepath.Join(e.Root, "export")
	e.Must("headers", "export", v.Dir, file)
	want := headersIn(t, v.Dir)
	strip(t, filepath.Join(v.Dir, "file"))
	e.Set("XDG_STATE_HOME", e.Mkdir("other state"))
	same := harness.Unchanged(t, v.Dir)
	calls := kms.During(func() {
		e.Refused(statusUsage, []string{"new to this client", "--key " + key, "--no-verify"}, "headers", "import", v.Dir, file, "--yes")
		same()
		e.Refused(statusUsage, []string{"--yes", "--dry-run"}, "headers", "import", v.Dir, file, "--no-verify")
		same()
		e.Must("headers", "import", v.Dir, file, "--no-verify", "--yes")
	})
	require.Empty(t, calls)
	require.Equal(t, want, headersIn(t, v.Dir))
	strip(t, filepath.Join(v.Dir, "file"))
	e.Must("headers", "import", v.Dir, file, "--key", key, "--yes")
	require.Equal(t, want, headersIn(t, v.Dir))
	e.Must("headers", "import", v.Dir, file) // nothing to change: nothing to ask
	v.Mount()
}

// TestHeadersImportWithoutKeys: an outage or a denial is no reason to leave a tree
// unreadable, unless one says so.
func TestHeadersImportWithoutKeys(t *testing.T) {
	e := harness.New(t)
	kms := e.KMS()
	key := kms.NewKey()
	v := e.Init("volume", "--key", key, "--names", "plain")
	v.Mount()
	for _, name := range []string{"a", "b", "c"} {
		require.NoError(t, os.WriteFile(v.Path(name), harness.Noise(9000), 0o600))
	}
	v.Umount()
	file := filepath.Join(e.Root, "export")
	e.Must("headers", "export", v.Dir, file)
	want := headersIn(t, v.Dir)
	for _, name := range []string{"a", "b", "c"} {
		strip(t, filepath.Join(v.Dir, name))
	}
	kms.SetState(key, kmstest.Disabled)
	same := harness.Unchanged(t, v.Dir)
	e.Refused(statusRefused, []string{key, "disabled"}, "headers", "import", v.Dir, file, "--yes", "--verify")
	same()
	r := e.Kmsfs("headers", "import", v.Dir, file, "--yes")
	require.Zero(t, r.Status, "%v", r)
	require.Equal(t, 1, strings.Count(r.Stderr, "without verifying"), "said once: %v", r)
	require.Equal(t, want, headersIn(t, v.Dir))
	kms.SetState(key, kmstest.Enabled)
	v.Mount()
}

// TestHeadersRefusals: each is one sentence, and changes nothing.
func TestHeadersRefusals(t *testing.T) {
	e := harness.New(t)
	v, other := attacked(t, e), e.Init("another", "--key", "local:one", "--names", "plain")
	file, cut := filepath.Join(e.Root, "export"), filepath.Join(e.Root, "cut")
	e.Must("headers", "export", v.Dir, file)
	e.Must("headers", "export", other.Dir, filepath.Join(e.Root, "other export"))
	raw, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(cut, raw[:len(raw)-5], 0o600))
	strip(t, filepath.Join(v.Dir, "file"))
	require.NoError(t, os.Symlink(file, filepath.Join(e.Root, "link")))
	same := harness.Unchanged(t, e.Root)
	for _, c := range []struct {
		status int
		words  []string
		args   []string
	}{
		{statusDamaged, []string{cut, "cut short"}, []string{"import", v.Dir, cut, "--yes"}},
		{statusUsage, []string{"regular file"}, []string{"import", v.Dir, e.Root, "--yes"}},
		{statusUsage, []string{"no such file"}, []string{"import", v.Dir, filepath.Join(e.Root, "none"), "--yes"}},
		{statusUsage, []string{"other export", "belongs"}, []string{"import", v.Dir, filepath.Join(e.Root, "other export"), "--yes"}},
		{statusUsage, []string{"--verify", "--no-verify"}, []string{"import", v.Dir, file, "--verify", "--no-verify"}},
		{statusUsage, []string{file, "--force"}, []string{"export", v.Dir, file}},
		{statusUsage, []string{"not a regular file"}, []string{"export", v.Dir, filepath.Join(e.Root, "link"), "--force"}},
		{statusUsage, []string{"backing directory"}, []string{"export", v.Dir, filepath.Join(v.Dir, "export")}},
		{statusUsage, []string{"not a kmsfs volume"}, []string{"export", e.Root, filepath.Join(e.Root, "new")}},
		{statusUsage, nil, []string{"export", v.Dir}},
	} {
		e.Refused(c.status, c.words, append([]string{"headers"}, c.args...)...)
		same()
	}
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode().Perm())
}

// TestHeadersExportNamesTheLost: the rest is exported, to a file or to a pipe.
func TestHeadersExportNamesTheLost(t *testing.T) {
	e := harness.New(t)
	v := attacked(t, e)
	v.Damaged()
	file := filepath.Join(e.Root, "export")
	want := header(t, filepath.Join(v.Dir, "other"))
	strip(t, filepath.Join(v.Dir, "file"))
	r := e.Refused(statusPartial, []string{"kmsfs: file: bad", "restore"}, "headers", "export", v.Dir, file)
	require.Contains(t, r.Stdout, "headers of 1 files")
	e.Shell(`kmsfs headers export "$1" - > "$2" || [ $? = 5 ]; cmp "$2" "$3"`, v.Dir, filepath.Join(e.Root, "piped"), file)
	strip(t, filepath.Join(v.Dir, "other"))
	r = e.Kmsfs("headers", "import", v.Dir, filepath.Join(e.Root, "piped"), "--yes", "--json")
	require.Zero(t, r.Status, "%v", r)
	require.Equal(t, want, header(t, filepath.Join(v.Dir, "other")))
	lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	var done struct {
		Event   string
		Done    bool
		Durable bool
		Files   map[string]int
	}
	require.NoError(t, json.Unmarshal([]byte(lines[len(lines)-1]), &done))
	require.Equal(t, "done", done.Event)
	require.True(t, done.Done && done.Durable)
	require.Equal(t, map[string]int{"restored": 1}, done.Files)
}

// TestHeadersLive: export and import work beside a mount; what a mount may have
// open is not replaced beneath it.
func TestHeadersLive(t *testing.T) {
	v := local(t, "--names", "plain")
	e := v.Env
	for _, name := range []string{"a", "b"} {
		require.NoError(t, os.WriteFile(v.Path(name), harness.Noise(9000), 0o600))
	}
	file := filepath.Join(e.Root, "export")
	e.Must("headers", "export", v.Dir, file)
	e.Refused(statusUsage, []string{"mount"}, "headers", "export", v.Dir, v.Path("export"))
	v.Remount()
	strip(t, filepath.Join(v.Dir, "a"))
	require.ErrorIs(t, harness.Try(v.Path("a"), unix.O_RDONLY, 0), unix.EBADMSG)
	e.Must("headers", "import", v.Dir, file, "--yes")
	require.Equal(t, harness.Noise(9000), harness.ReadAt(t, v.Path("a"), 0, 9000))

	require.NoError(t, os.Remove(v.Path("b")))
	require.NoError(t, os.WriteFile(v.Path("b"), []byte("another generation"), 0o600))
	want := headersIn(t, v.Dir)
	r := e.Refused(statusPartial, []string{"b", "conflict"}, "headers", "import", v.Dir, file, "--yes")
	require.Contains(t, r.Stdout, "1 conflict")
	e.Refused(statusFUSE, []string{"unmount"}, "headers", "import", v.Dir, file, "--yes", "--force")
	require.Equal(t, want, headersIn(t, v.Dir))
	left, err := filepath.Glob(file + ".*")
	require.NoError(t, err)
	require.Empty(t, left)

	v.Umount()
	r = e.Kmsfs("headers", "import", v.Dir, file, "--yes", "--force", "--no-verify")
	require.Zero(t, r.Status, "%v", r)
	saved, err := filepath.Glob(file + ".replaced-*")
	require.NoError(t, err)
	require.Len(t, saved, 1)
	require.Contains(t, r.Stdout, saved[0])
	require.NotEqual(t, want, headersIn(t, v.Dir))
	e.Must("headers", "import", v.Dir, saved[0], "--yes", "--force")
	require.Equal(t, want, headersIn(t, v.Dir))
	v.Mount()
	require.Equal(t, "another generation", string(harness.ReadAt(t, v.Path("b"), 0, 100)))
}

// TestHeadersRestoreSettings: a backing directory that lost kmsfs.toml too.
func TestHeadersRestoreSettings(t *testing.T) {
	v := local(t)
	e := v.Env
	require.NoError(t, os.MkdirAll(v.Path("dir", strings.Repeat("long", 60)), 0o700))
	require.NoError(t, os.WriteFile(v.Path("dir", strings.Repeat("long", 60), "file"), []byte("contents"), 0o600))
	v.Umount()
	file := filepath.Join(e.Root, "export")
	e.Must("headers", "export", v.Dir, file)
	c := losing(t, v)
	settings, err := os.ReadFile(filepath.Join(c.Dir, "kmsfs.toml"))
	require.NoError(t, err)
	for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
		require.NoError(t, os.Remove(filepath.Join(c.Dir, name)))
	}
	same := harness.Unchanged(t, c.Dir)
	e.Refused(statusUsage, []string{"--yes"}, "headers", "import", c.Dir, file)
	same()
	require.Contains(t, e.Must("headers", "import", c.Dir, file, "--yes"), "kmsfs.toml: restored")
	for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
		got, err := os.ReadFile(filepath.Join(c.Dir, name))
		require.NoError(t, err)
		require.Equal(t, settings, got)
	}
	c.Mount()
	got, err := os.ReadFile(c.Path("dir", strings.Repeat("long", 60), "file"))
	require.NoError(t, err)
	require.Equal(t, "contents", string(got))
}

// TestHeadersForgedSettings: a kmsfs.toml in an export is judged like one in a
// volume, before it is written; and if nobody is asked, by the mount.
func TestHeadersForgedSettings(t *testing.T) {
	e := harness.New(t)
	v := attacked(t, e)
	localKey(e, "mallory")
	settings, err := os.ReadFile(filepath.Join(v.Dir, "kmsfs.toml"))
	require.NoError(t, err)
	opened, err := volume.ParseSettings(settings)
	require.NoError(t, err)
	forged, err := os.Create(filepath.Join(e.Root, "forged"))
	require.NoError(t, err)
	defer forged.Close()
	w, err := headers.NewWriter(forged, opened.ID, []byte(strings.Replace(string(settings), "local:one", "local:mallory", 1)))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	for _, name := range []string{"kmsfs.toml", "kmsfs.toml.bak"} {
		require.NoError(t, os.Remove(filepath.Join(v.Dir, name)))
	}
	same := harness.Unchanged(t, v.Dir)
	e.Refused(statusUsage, []string{"local:mallory"}, "headers", "import", v.Dir, forged.Name(), "--yes")
	same()
	e.Must("headers", "import", v.Dir, forged.Name(), "--yes", "--no-verify")
	e.Refused(statusUsage, []string{"local:mallory"}, "mount", v.Dir, v.Mnt)
}
