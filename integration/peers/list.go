package peers

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Backing is the backing store, without any file system above it.
var Backing = Peer{Name: "backing store", Short: "backing",
	find:  func(*World) (string, error) { return "", nil },
	start: func(*World, *Mount) (*exec.Cmd, error) { return nil, nil },
}

// Kmsfs is ours, as it is in this tree.
var Kmsfs = Peer{Name: "kmsfs", Short: "kmsfs", ready: "msg=mounted ",
	find: func(*World) (string, error) { return "this tree", nil },
	start: func(w *World, m *Mount) (*exec.Cmd, error) {
		if !m.inited {
			args := append([]string{"init", m.Backing}, m.Options.Init...)
			if !slices.Contains(m.Options.Init, "--key") {
				args = append(args, "--key", w.Key)
			}
			if _, err := w.Run(w.Program, args...); err != nil {
				return nil, err
			}
		}
		args := append([]string{"mount", "-f", m.Backing, m.Dir}, m.Options.Mount...)
		if m.Options.AllowOther {
			args = append(args, "--allow-other", "-o", "suid,dev")
		}
		return w.Command(w.Program, args...), nil
	},
}

const goFUSE = "github.com/hanwen/go-fuse/v2"

// Loopback is go-fuse's example, of the version that kmsfs uses.
var Loopback = Peer{Name: "go-fuse loopback", Short: "loopback",
	find: func(w *World) (string, error) {
		version, err := w.Run("go", "list", "-m", "-f", "{{.Version}}", goFUSE)
		if err != nil {
			return "", err
		}
		return strings.TrimSpace(string(version)), w.Build("loopback", goFUSE+"/example/loopback")
	},
	start: func(w *World, m *Mount) (*exec.Cmd, error) {
		args := []string{"-q"}
		if m.Options.AllowOther {
			args = append(args, "-allow-other")
		}
		if m.Options.Daemon && os.Geteuid() == 0 {
			return m.withoutPassthrough(w.Path("bin", "loopback"), args)
		}
		return w.Command(w.Path("bin", "loopback"), append(args, m.Dir, m.Backing)...), nil
	},
}

// withoutPassthrough prepares go-fuse's loopback without the capability that
// passthrough takes, which mounting does, too: so it is handed a mount.
func (m *Mount) withoutPassthrough(program string, args []string) (*exec.Cmd, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/fuse: %w", err)
	}
	// What go-fuse asks for by default.
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=131072", fd)
	device := os.NewFile(uintptr(fd), "/dev/fuse")
	if err := unix.Mount(m.Backing, m.Dir, "fuse.loopback", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		device.Close()
		return nil, fmt.Errorf("mounting the loopback on %s: %w", m.Dir, err)
	}
	m.device = device
	args = append([]string{"--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", program}, args...)
	cmd := m.w.Command("setpriv", append(args, "/dev/fd/3", m.Backing)...)
	cmd.ExtraFiles = []*os.File{device}
	return cmd, nil
}

// Gocryptfs is the one that is installed.
var Gocryptfs = gocryptfs("gocryptfs, Debian's", "gocryptfs-old", func(*World) (string, error) {
	return installed("gocryptfs", "gocryptfs")
})

// NewestGocryptfs is the one at program, or if that is empty, the newest release as Go
// can build it: without OpenSSL, whose speed on CPUs with AES instructions is Go's.
func NewestGocryptfs(program string) Peer {
	return gocryptfs("gocryptfs, newest", "gocryptfs", func(w *World) (string, error) {
		if program != "" {
			return exec.LookPath(program)
		}
		cmd := exec.Command("go", "install", "-tags", "without_openssl", "github.com/rfjakob/gocryptfs/v2@latest")
		cmd.Env = append(os.Environ(), "GOBIN="+w.Path("bin"), "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
		cmd.Dir = w.Root
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", Absent{fmt.Sprintf("the newest gocryptfs can't be installed by Go (%s); build it and name it: -gocryptfs PROGRAM", firstLine(out))}
		}
		return w.Path("bin", "gocryptfs"), nil
	})
}

func firstLine(text []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	return line
}

func gocryptfs(name, short string, program func(*World) (string, error)) Peer {
	var at string
	return Peer{Name: name, Short: short,
		find: func(w *World) (version string, err error) {
			if at, err = program(w); err != nil {
				return "", err
			}
			return versionOf(w, at, "-version")
		},
		start: func(w *World, m *Mount) (*exec.Cmd, error) {
			secret, err := m.secret()
			if err == nil && !m.inited {
				_, err = w.Run(at, "-init", "-q", "-passfile", secret, m.Backing)
			}
			if err != nil {
				return nil, err
			}
			args := []string{"-q", "-fg", "-passfile", secret}
			if m.Options.AllowOther {
				args = append(args, "-allow_other", "-suid", "-dev")
			}
			return w.Command(at, append(args, m.Backing, m.Dir)...), nil
		},
	}
}

const password = "password"

// secret is a file with the password.
func (m *Mount) secret() (path string, err error) {
	path = filepath.Join(m.base, "secret")
	return path, os.WriteFile(path, []byte(password+"\n"), 0o600)
}

// installed finds a program of a Debian package.
func installed(program, pkg string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", Absent{"not installed (apt-get install " + pkg + ")"}
	}
	return path, nil
}

var number = regexp.MustCompile(`v?[0-9]+\.[0-9]+[0-9A-Za-z.+-]*`)

// versionOf asks a program for its version.
func versionOf(w *World, program string, args ...string) (string, error) {
	out, err := w.Run(program, args...)
	if err != nil {
		return "", err
	}
	if strings.Contains(string(out), "[GitVersion not set") {
		return "built from source; " + number.FindString(string(out[strings.Index(string(out), "go-fuse"):])) + " of go-fuse", nil
	}
	return number.FindString(string(out)), nil
}

// packaged finds a program of a Debian package of the same name and its version.
func packaged(program string, ask ...string) func(*World) (string, error) {
	return func(w *World) (string, error) {
		path, err := installed(program, program)
		if err != nil {
			return "", err
		}
		return versionOf(w, path, ask...)
	}
}

// Cryfs stores blocks, not files.
var Cryfs = Peer{Name: "CryFS", Short: "cryfs", find: packaged("cryfs", "--version"),
	start: func(w *World, m *Mount) (*exec.Cmd, error) {
		cmd := w.Command("cryfs", "-f", m.Backing, m.Dir)
		cmd.Stdin = strings.NewReader(password + "\n")
		return cmd, nil
	},
}

// Securefs is securefs in its default format.
var Securefs = Peer{Name: "securefs", Short: "securefs",
	find: func(w *World) (string, error) {
		if _, err := installed("securefs", "securefs"); err != nil {
			return "", err
		}
		// Debian's does not know its own version.
		out, err := w.Run("dpkg-query", "-W", "-f", "${Version}", "securefs")
		if err != nil {
			return "of unknown version", nil
		}
		return string(out), nil
	},
	start: func(w *World, m *Mount) (*exec.Cmd, error) {
		if !m.inited {
			if _, err := w.Run("securefs", "create", "--pass", password, m.Backing); err != nil {
				return nil, err
			}
		}
		return w.Command("securefs", "mount", "--pass", password, m.Backing, m.Dir), nil
	},
}

// Encfs is EncFS with its standard settings, which authenticate nothing.
var Encfs = Peer{Name: "EncFS", Short: "encfs", find: packaged("encfs", "--version"),
	start: func(w *World, m *Mount) (*exec.Cmd, error) {
		secret, err := m.secret()
		return w.Command("encfs", "-f", "--standard", "--extpass=cat "+secret, m.Backing, m.Dir), err
	},
}

// Rclone is rclone's crypt over a local directory. Its mount can write at random only
// by way of a cache of plaintext files on disk, written through at close here.
var Rclone = Peer{Name: "rclone crypt", Short: "rclone", find: packaged("rclone", "version"),
	start: func(w *World, m *Mount) (*exec.Cmd, error) {
		hidden, err := w.Run("rclone", "obscure", password)
		if err != nil {
			return nil, err
		}
		conf := filepath.Join(m.base, "rclone.conf")
		text := fmt.Sprintf("[crypt]\ntype = crypt\nremote = %s\npassword = %s\n", m.Backing, strings.TrimSpace(string(hidden)))
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			return nil, err
		}
		return w.Command("rclone", "mount", "crypt:", m.Dir, "--config", conf, "--cache-dir", filepath.Join(m.base, "cache"),
			"--vfs-cache-mode", "full", "--vfs-write-back", "0s"), nil
	},
}
