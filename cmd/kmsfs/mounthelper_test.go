package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestAsked goes through what mount(8) and umount(8) call their helpers with.
func TestAsked(t *testing.T) {
	for argv, want := range map[string]string{
		"kmsfs mount a b":                    "mount a b",
		"/usr/bin/kmsfs":                     "",
		"/sbin/mount.fuse.kmsfs /c /m -o rw": "mount -o rw -- /c /m",
		"/sbin/mount.fuse.kmsfs /c /m -s -n -v -o ro,suid -t fuse.kmsfs":                                           "mount -o ro,suid -- /c /m",
		"mount.fuse.kmsfs /c /m -o rw -o noatime":                                                                  "mount -o rw,noatime -- /c /m",
		"mount.fuse.kmsfs /c /m -o rw,nosuid,allow_suid,allow_dev":                                                 "mount -o rw,nosuid,allow_dev -- /c /m",
		"mount.fuse.kmsfs /c /m -o rw,remount":                                                                     "mount -o exec,rw,remount -- /c /m",
		"mount.fuse.kmsfs /c /m -o rw,noexec,remount":                                                              "mount -o rw,noexec,remount -- /c /m",
		"mount.fuse.kmsfs -- -c -m":                                                                                "mount -o  -- -c -m",
		"mount.fuse.kmsfs /c /m -o key=local:a,rw,key=local:b,accept_new,accept_key=local:c,config=/f,log_file=/l": "mount --key=local:a --key=local:b --accept-new --accept-key=local:c --config=/f --log-file=/l -o rw -- /c /m",
		"umount.fuse.kmsfs /m":                                                                                     "umount -- /m",
		"umount.fuse.kmsfs /m -n -v -r -t fuse.kmsfs":                                                              "umount -- /m",
		"umount.fuse.kmsfs /m -l":                                                                                  "umount --lazy -- /m",
	} {
		got, err := asked(strings.Fields(argv))
		require.NoError(t, err, argv)
		require.Equal(t, want, strings.Join(got, " "), argv)
		require.NotNil(t, got, argv)
	}
	got, err := asked([]string{"mount.fuse.kmsfs", "/c", "/m", "-f"})
	require.NoError(t, err)
	require.Nil(t, got, "mount --fake mounts nothing")
}

// TestAskedWrongly: no option of a helper is guessed at.
func TestAskedWrongly(t *testing.T) {
	for argv, words := range map[string]string{
		"mount.fuse.kmsfs /c":                      "wants DIR and MOUNTPOINT",
		"mount.fuse.kmsfs /c /m -z":                "unknown shorthand flag",
		"mount.fuse.kmsfs /c /m -N /proc/1/ns/mnt": "nsenter --mount=/proc/1/ns/mnt",
		"mount.fuse.kmsfs /c /m -o key":            "unknown mount option",
		"mount.fuse.kmsfs /c /m -o suid,boo":       "unknown mount option",
		"umount.fuse.kmsfs":                        "wants a MOUNTPOINT",
		"umount.fuse.kmsfs /m -f":                  "umount -i -f /m",
		"umount.fuse.kmsfs /m --all":               "unknown flag",
	} {
		t.Setenv("XDG_CONFIG_HOME", t.TempDir())
		var said bytes.Buffer
		require.Equal(t, exitUsage, start(strings.Fields(argv), strings.NewReader(""), &said, &said), argv)
		require.Contains(t, said.String(), words, argv)
		require.Equal(t, 1, strings.Count(said.String(), "\n"), "one sentence: %s", &said)
	}
}
