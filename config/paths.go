package config

import (
	"fmt"
	"os"
	"path/filepath"
)

// Places of the client's own files. A variable that is set wins also for root:
// tests and containers rely on it.

// KeyringDir is where local keys lie: $KMSFS_KEYRING, else the configuration's
// keyring, else $XDG_CONFIG_HOME/kmsfs/keys.
func (c *Config) KeyringDir() (string, error) {
	if dir := os.Getenv("KMSFS_KEYRING"); dir != "" {
		return filepath.Abs(dir)
	}
	if c.Keyring != "" {
		return c.Keyring, nil
	}
	dir := home("XDG_CONFIG_HOME", ".config")
	if dir == "" {
		return "", fmt.Errorf("there is no place for local keys: set HOME, XDG_CONFIG_HOME or KMSFS_KEYRING")
	}
	return filepath.Join(dir, "kmsfs", "keys"), nil
}

// StateDir is where pins lie: $XDG_STATE_HOME/kmsfs; for root, whose HOME may be
// anybody's under sudo, /var/lib/kmsfs.
func StateDir() (string, error) {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kmsfs"), nil
	}
	if os.Geteuid() == 0 {
		return "/var/lib/kmsfs", nil
	}
	dir := home("XDG_STATE_HOME", ".local/state")
	if dir == "" {
		return "", fmt.Errorf("there is no place to remember volumes in: set HOME or XDG_STATE_HOME")
	}
	return filepath.Join(dir, "kmsfs"), nil
}

// RuntimeDir is where a mount keeps its control socket: $XDG_RUNTIME_DIR/kmsfs;
// for root /run/kmsfs; without either (cron, containers) a directory beside the
// pins.
func RuntimeDir() (string, error) {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kmsfs"), nil
	}
	if os.Geteuid() == 0 {
		return "/run/kmsfs", nil
	}
	dir, err := StateDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "run"), nil
}
