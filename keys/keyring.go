package keys

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"kmsfs/crypt"
)

// A key file is NAME.key in the keyring directory (mode 0700), mode 0600, one
// line of five words:
//
//	kmsfs-local-key-1 ID STATE SECRET SUM
//
// ID is 16 random bytes in hexadecimal, STATE "enabled" or "disabled", SECRET
// 32 random bytes in base64, SUM the first 8 bytes of SHA-256 over the line
// before it, in hexadecimal (a mistyped restored backup should say so, and not
// look like damaged data). Whoever can read it can read the data.
const (
	keyFileMagic = "kmsfs-local-key-1"
	keySuffix    = ".key"
	maxKeyFile   = 512 // bytes; a well-formed one has 132 or 133
	sumSize      = 8
)

type keyFile struct {
	id     [keyIDSize]byte
	State  string     // stateEnabled or stateDisabled
	secret *crypt.Key // wiped by whoever loaded the file
}

func (f *keyFile) wipe() { f.secret.Wipe() }

// A LocalKey is a key of a keyring, as List shows it.
type LocalKey struct {
	Key   string // "local:NAME"
	ID    string // hexadecimal; stands in every blob the key wraps
	State string // "Enabled" or "Disabled"; "" if Err is set
	Path  string
	Err   error // why the file can't be used
}

// Path is where the file of a local key is, or would be.
func (l *Local) Path(key string) string {
	return filepath.Join(l.dir, strings.TrimPrefix(key, crypt.LocalPrefix)+keySuffix)
}

// Create makes a new random key, durably. A key that exists is never replaced:
// the error then is fs.ErrExist.
func (l *Local) Create(key string) error {
	if err := checkLocal("CreateKey", key); err != nil {
		return err
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return fmt.Errorf("making the keyring: %w", err)
	}
	if err := checkKeyring(l.dir); err != nil {
		return err
	}
	secret, err := crypt.RandomKey()
	if err != nil {
		return fmt.Errorf("drawing a local key: %w", err)
	}
	f := keyFile{State: stateEnabled, secret: secret}
	defer f.wipe()
	if _, err := rand.Read(f.id[:]); err != nil {
		return fmt.Errorf("drawing a key id: %w", err)
	}
	return l.write(key, &f, os.Link)
}

// Disable makes every use of the key fail until Enable.
func (l *Local) Disable(key string) error { return l.setState(key, stateDisabled) }

// Enable undoes Disable.
func (l *Local) Enable(key string) error { return l.setState(key, stateEnabled) }

func (l *Local) setState(key, state string) error {
	f, err := l.load(context.Background(), "UpdateKey", key)
	if err != nil {
		return err
	}
	defer f.wipe()
	f.State = state
	return l.write(key, f, os.Rename)
}

// List shows the keys of the keyring by name. A keyring that does not exist
// holds none.
func (l *Local) List() ([]LocalKey, error) {
	entries, err := os.ReadDir(l.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing local keys: %w", err)
	}
	var out []LocalKey
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), keySuffix)
		key := crypt.LocalPrefix + name
		if !ok || crypt.CheckKeyName(key) != nil {
			continue
		}
		k := LocalKey{Key: key, Path: l.Path(key)}
		f, err := l.load(context.Background(), "ListKeys", key)
		if err != nil {
			k.Err = err
		} else {
			k.ID, k.State = hex.EncodeToString(f.id[:]), f.State
			f.wipe()
		}
		out = append(out, k)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Key < out[j].Key })
	return out, nil
}

// write puts a key file in place by publish: os.Link, which refuses to replace
// a file, or os.Rename, which replaces it in one step. Either way a power cut
// leaves no half-written key under the name.
func (l *Local) write(key string, f *keyFile, publish func(from, to string) error) error {
	var tag [8]byte
	if _, err := rand.Read(tag[:]); err != nil {
		return fmt.Errorf("drawing a file name: %w", err)
	}
	temp := filepath.Join(l.dir, fmt.Sprintf(".%x.tmp", tag))
	defer os.Remove(temp) // after a link it is the second name; after a rename it is gone
	line, err := f.marshal()
	if err == nil {
		err = writeSynced(temp, line)
	}
	if err != nil {
		return fmt.Errorf("writing the file of %s: %w", key, err)
	}
	if err := publish(temp, l.Path(key)); err != nil {
		return fmt.Errorf("writing the file of %s: %w", key, err)
	}
	return syncDir(l.dir)
}

func writeSynced(path string, line []byte) error {
	defer clear(line)
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(line)
	return errors.Join(err, w.Sync(), w.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing the keyring: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("syncing the keyring: %w", err)
	}
	return nil
}

// marshal writes the line into one buffer, which the caller wipes.
func (f *keyFile) marshal() ([]byte, error) {
	line := fmt.Appendf(make([]byte, 0, maxKeyFile), "%s %x %s ", keyFileMagic, f.id, strings.ToLower(f.State))
	err := f.secret.Use(func(raw []byte) error {
		line = base64.StdEncoding.AppendEncode(line, raw)
		return nil
	})
	line = append(line, ' ')
	sum := sha256.Sum256(line)
	return append(hex.AppendEncode(line, sum[:sumSize]), '\n'), err
}

var errKeyFile = errors.New("it is damaged, or not a kmsfs local key file")

// parseKeyFile reads what marshal wrote, and nothing else. Its errors never
// quote the line.
func parseKeyFile(line []byte) (*keyFile, error) {
	w := bytes.Split(line, []byte(" "))
	if len(w) != 5 || string(w[0]) != keyFileMagic || len(w[1]) != 2*keyIDSize {
		return nil, errKeyFile
	}
	f := &keyFile{State: stateEnabled}
	if string(w[2]) == strings.ToLower(stateDisabled) {
		f.State = stateDisabled
	}
	if _, err := hex.Decode(f.id[:], w[1]); err != nil {
		return nil, errKeyFile
	}
	raw := make([]byte, base64.StdEncoding.DecodedLen(len(w[3])))
	defer clear(raw)
	n, err := base64.StdEncoding.Decode(raw, w[3])
	if err != nil || n != crypt.KeySize {
		return nil, errKeyFile
	}
	if f.secret, err = crypt.NewKey(raw[:n]); err != nil {
		return nil, err
	}
	again, err := f.marshal()
	defer clear(again)
	if err != nil || !bytes.Equal(again, line) { // the checksum, and everything else
		f.wipe()
		return nil, errKeyFile
	}
	return f, nil
}

// load reads a key file, refusing one that others could read or replace.
func (l *Local) load(ctx context.Context, op, key string) (*keyFile, error) {
	if err := checkLocal(op, key); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, contextError(ctx, op, key)
	}
	path := l.Path(key)
	if f := l.recent.get(path); f != nil {
		return f, nil
	}
	raw, st, err := readPrivate(path)
	defer clear(raw)
	if err != nil {
		return nil, localError(op, key, path, err)
	}
	f, err := parseKeyFile(raw)
	if err != nil {
		return nil, newError(KindRejected, op, key, fmt.Errorf("the key file %s can't be used: %w", path, err))
	}
	l.recent.put(path, st, f)
	return f, nil
}

// checkLocal keeps path separators and ".." out of file names.
func checkLocal(op, key string) error {
	err := crypt.CheckKeyName(key)
	if err == nil && !IsLocal(key) {
		err = fmt.Errorf("%q is not a local key", key)
	}
	if err != nil {
		return newError(KindRejected, op, key, err)
	}
	return nil
}

func localError(op, key, path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return withCode(newError(KindNotFound, op, key, fmt.Errorf("there is no key file %s", path)), "NotFoundException")
	case errors.Is(err, fs.ErrPermission):
		return newError(KindDenied, op, key, err)
	case errors.Is(err, errExposed):
		return newError(KindRejected, op, key, err)
	}
	return newError(KindUnavailable, op, key, err)
}

var errExposed = errors.New("it can be read or replaced by others: chmod go-rwx it, and think of the key as known to them")

func checkKeyring(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("checking the keyring: %w", err)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("the keyring %s can be written by others: chmod 700 it", dir)
	}
	return nil
}

// readPrivate reads a small file that belongs to us (or root) alone, and says what it
// was before it was read.
func readPrivate(path string) ([]byte, stamp, error) {
	// O_NONBLOCK: a FIFO planted under the name must not hang a mount.
	// It is read for each use, so without package os, which asks epoll about it.
	fd, err := -1, error(syscall.EINTR)
	for err == syscall.EINTR {
		fd, err = syscall.Open(path, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, stamp{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return nil, stamp{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	owned := int(st.Uid) == os.Geteuid() || st.Uid == 0
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Mode&0o077 != 0 || !owned {
		return nil, stamp{}, fmt.Errorf("the key file %s: %w", path, errExposed)
	}
	buf := make([]byte, maxKeyFile)
	for n := 0; ; {
		more, err := syscall.Pread(fd, buf[n:], int64(n))
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return buf, stamp{}, &os.PathError{Op: "read", Path: path, Err: err}
		case more == 0 || n+more == int(st.Size) || n+more == len(buf):
			return buf[:n+more], stampOf(&st), nil
		}
		n += max(more, 0)
	}
}
