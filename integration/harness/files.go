package harness

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Noise is the same n bytes each time; no block of them looks like another.
func Noise(n int) []byte {
	var seed [32]byte
	r := rand.NewChaCha8(seed)
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

// GOROOT is the toolchain's directory: a real tree that every developer has.
func GOROOT(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	require.NoError(t, err)
	return strings.TrimSpace(string(out))
}

// WriteAt changes bytes in the middle of a file, on the mount or beneath it.
func WriteAt(t testing.TB, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(p, off)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

// ReadAt reads n bytes of a file, which must be there.
func ReadAt(t testing.TB, path string, off int64, n int) []byte {
	t.Helper()
	p, err := TryReadAt(path, off, n)
	require.NoError(t, err, "reading %d bytes at %d of %s", n, off, path)
	return p
}

// TryReadAt reads n bytes of a file by one pread(2) of the kernel's page cache
// or what is behind it.
func TryReadAt(path string, off int64, n int) ([]byte, error) {
	fd, err := Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	p := make([]byte, n)
	n, err = unix.Pread(fd, p, off)
	return p[:max(n, 0)], err
}

// Open is open(2), without what package os does to its errors. A runtime signal
// of Go that interrupts it doesn't count.
func Open(path string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// Try opens and closes.
func Try(path string, flags int, mode uint32) error {
	fd, err := Open(path, flags, mode)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// Find is the first file beneath dir, in the order of names, that f accepts.
func Find(t testing.TB, dir string, f func(st *unix.Stat_t) bool) (found string) {
	t.Helper()
	walk(t, dir, func(path string, st *unix.Stat_t) {
		if found == "" && st.Mode&unix.S_IFMT == unix.S_IFREG && f(st) {
			found = path
		}
	})
	require.NotEmpty(t, found, "nothing fits in %s", dir)
	return found
}
