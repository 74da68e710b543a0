package main

import (
	"bufio"
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/keys"
	"kmsfs/volume"
)

// dataKeyOf is the raw data key of the one regular file of a volume under
// local:default, and what HKDF extracts from it.
func dataKeyOf(t *testing.T, c *client, dir string) (secrets [][]byte) {
	t.Helper()
	v, err := volume.Open(dir)
	require.NoError(t, err)
	defer v.Close()
	local := keys.NewLocal(c.path("config/kmsfs/keys"))
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), "kmsfs.") {
			return err
		}
		f := must(os.Open(path))
		defer f.Close()
		h, err := v.ParseHeader(must(volume.ReadHeader(int(f.Fd()))))
		require.NoError(t, err)
		k, err := local.Decrypt(t.Context(), h.Copies[0].Key, h.EncryptionContext(v.ID()), h.Copies[0].Blob)
		require.NoError(t, err)
		defer k.Wipe()
		return k.Use(func(raw []byte) error {
			prk, err := hkdf.Extract(sha256.New, raw, h.File[:])
			secrets = append(secrets, bytes.Clone(raw), prk)
			return err
		})
	}))
	require.Len(t, secrets, 2, "one file was expected")
	return secrets
}

// localSecretOf is the secret of local:default, as it is and as its file has it.
func localSecretOf(t *testing.T, c *client) [][]byte {
	t.Helper()
	words := strings.Fields(string(must(os.ReadFile(c.path("config/kmsfs/keys/default.key")))))
	require.Len(t, words, 5)
	raw, err := base64.StdEncoding.DecodeString(words[3])
	require.NoError(t, err)
	return [][]byte{raw, []byte(words[3])}
}

// inMemory counts the secrets that stand in the writable memory of a process.
func inMemory(t *testing.T, pid int, secrets [][]byte) (found int) {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	require.NoError(t, err)
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	require.NoError(t, err)
	defer mem.Close()
	regions := 0
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var mode string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); n != 3 || !strings.HasPrefix(mode, "rw") {
			continue
		}
		data := make([]byte, to-from)
		n, err := mem.ReadAt(data, from)
		if err != nil && err != io.EOF && n == 0 {
			continue // a guard page
		}
		regions++
		for _, s := range secrets {
			found += bytes.Count(data[:n], s)
		}
		clear(data)
	}
	require.Greater(t, regions, 3)
	return found
}

// TestKeysLeaveMemory: the raw keys of an open file stand in the daemon's memory, and do
// no more after a lock, after an unlock that was not used, and once a closed file's key
// has aged out of the cache.
func TestKeysLeaveMemory(t *testing.T) {
	require.Zero(t, os.Geteuid(), "only root may look into the daemon")
	c := newClient(t)
	dir, point := c.volume()
	path := filepath.Join(point, "a")
	c.mount(dir, point)
	c.write(path, "contents")
	c.ok("umount", point)
	secrets := dataKeyOf(t, c, dir)
	c.mount(dir, point, "-o", "cache_age=5s")
	pid := daemonOf(t, dir)
	require.Zero(t, inMemory(t, pid, secrets))
	wrapping := localSecretOf(t, c) // the mount has used it to open the volume's key
	forgotten := func() {
		require.Eventually(t, func() bool { return inMemory(t, pid, wrapping) == 0 }, 10*time.Second, 50*time.Millisecond, "the secret of the local key is kept for a second")
	}
	forgotten()

	open, err := os.Open(path)
	require.NoError(t, err)
	defer open.Close()
	require.Positive(t, inMemory(t, pid, secrets), "the search finds nothing: this tests nothing")
	c.ok("lock", point)
	require.Zero(t, inMemory(t, pid, secrets), "after lock")
	require.Zero(t, inMemory(t, pid, wrapping), "after lock")
	require.NoError(t, open.Close())
	eventually(t, "the daemon has heard of it", func() bool { // else unlock gives the file its key
		var r volumeReport
		require.NoError(t, json.Unmarshal([]byte(c.ok("status", "--json", dir).out), &r))
		return r.Live.OpenFiles == 0
	})
	c.ok("unlock", point)
	require.Zero(t, inMemory(t, pid, secrets))

	c.reads(path, "contents")
	require.Positive(t, inMemory(t, pid, secrets))
	forgotten()
	require.Eventually(t, func() bool { return inMemory(t, pid, secrets) == 0 }, time.Minute, 100*time.Millisecond, "the key expires")
	c.ok("umount", point)
}
