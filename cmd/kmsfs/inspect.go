package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/crypt"
	"kmsfs/volume"
)

func (p *program) inspectCommand() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "inspect FILE...",
		Short: "Show the header of backing files; needs no key",
		Long: `Show what stands in the header of each FILE: volume, file id, commitment, and
under which keys there is a copy of the data key. FILE lies in the backing
directory, not on the mount; for DIR/kmsfs.toml the header of the volume key is
shown. No key is needed and no service is asked, so nothing shown is proven. With
--json each FILE gives one line.` + statuses(0, 1, 2, 6),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("kmsfs inspect wants FILE...")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return p.inspectAll(args, asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object a line")
	return cmd
}

// inspectAll goes on after a file that can't be shown; the first failure decides
// the status.
func (p *program) inspectAll(files []string, asJSON bool) error {
	var first error
	for _, file := range files {
		err := p.inspect(file, asJSON)
		if err == nil {
			continue
		}
		p.complain(err)
		if first == nil {
			first = reported{err}
		}
	}
	return first
}

// An inspection is one header, as shown.
type inspection struct {
	File       string           `json:"file"`
	Use        string           `json:"use"`
	Format     int              `json:"format"`
	Suite      int              `json:"suite"`
	BlockSize  int              `json:"block_size"`
	Volume     string           `json:"volume"`
	FileID     string           `json:"file_id"`
	Envelope   volume.Envelope  `json:"envelope"`
	Shared     string           `json:"intermediate_id,omitempty"` // of a shared envelope
	Commitment string           `json:"commitment"`
	Copies     []inspectionCopy `json:"copies"`
	Header     int              `json:"header_bytes"`
	Stored     *int64           `json:"stored_bytes,omitempty"`
	Plain      *int64           `json:"plain_bytes,omitempty"`
}

type inspectionCopy struct {
	Key   string `json:"key"`
	Bytes int    `json:"bytes"`
}

func (p *program) inspect(file string, asJSON bool) error {
	in, err := inspectFile(file)
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(p.out).Encode(in)
	}
	p.say("%s", in)
	return nil
}

func inspectFile(file string) (*inspection, error) {
	if filepath.Base(file) == volume.SettingsFile {
		return inspectVolume(file)
	}
	// O_PATH opens nothing: a FIFO can't make us wait, and no permission of the
	// file is needed.
	fd, err := unix.Open(file, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: file, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.Join(err, usage("%s is not a regular file; only those have headers", file))
	}
	raw, err := volume.ReadHeader(fd)
	if err != nil {
		return nil, fmt.Errorf("reading the header of %s: %w", file, err)
	}
	if len(raw) == 0 {
		return nil, noHeader(file, st.Size)
	}
	h, err := crypt.ParseHeader(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	in := show(file, h, len(raw))
	plain := crypt.PlainSize(st.Size, h.BlockSize())
	in.Stored, in.Plain = &st.Size, &plain
	return in, nil
}

func noHeader(file string, size int64) error {
	if m, err := mountOf(file); err == nil && m.isKmsfs() {
		return usage("%s lies on a kmsfs mount, which hides headers; inspect the file in the backing directory %s", file, m.source)
	}
	if size == 0 {
		return fail(exitDone, "", "%s is empty and has no header; it gets one with its first byte", file)
	}
	return fmt.Errorf("%s: %w", file, crypt.ErrNoHeader)
}

func inspectVolume(file string) (*inspection, error) {
	v, err := volume.Open(filepath.Dir(file))
	if err != nil {
		return nil, err
	}
	defer v.Close()
	return show(file, v.Header(), len(v.Settings().Header)), nil
}

func show(file string, h *crypt.Header, size int) *inspection {
	in := &inspection{
		File: file, Use: h.Use.String(), Format: crypt.FormatVersion, Suite: crypt.SuiteAES256, BlockSize: h.BlockSize(),
		Volume: h.Volume.String(), FileID: h.File.String(), Commitment: hex.EncodeToString(h.Commitment[:]), Header: size,
	}
	in.Envelope = volume.EnvelopePerFile
	if h.Shared {
		in.Envelope, in.Shared = volume.EnvelopeShared, h.Wrapped().File.String()
	}
	for _, c := range h.Copies {
		in.Copies = append(in.Copies, inspectionCopy{Key: c.Key, Bytes: len(c.Blob)})
	}
	return in
}

// String is the form for people.
func (in *inspection) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", printable(in.File))
	fmt.Fprintf(&b, "  header      %d bytes, format %d, suite %d (AES-256-GCM), for a %s\n", in.Header, in.Format, in.Suite, in.Use)
	fmt.Fprintf(&b, "  volume      %s\n", in.Volume)
	fmt.Fprintf(&b, "  file id     %s\n", in.FileID)
	if in.Shared != "" {
		fmt.Fprintf(&b, "  envelope    shared, by the intermediate key %s\n", in.Shared)
	}
	fmt.Fprintf(&b, "  commitment  %s\n", in.Commitment)
	fmt.Fprintf(&b, "  block size  %d\n", in.BlockSize)
	if in.Plain != nil {
		fmt.Fprintf(&b, "  contents    %d bytes, stored in %d\n", *in.Plain, *in.Stored)
	}
	for i, c := range in.Copies {
		fmt.Fprintf(&b, "  copy %d      %d bytes under %s\n", i+1, c.Bytes, c.Key)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// exactly is cobra.ExactArgs in this program's voice.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == n:
			return nil
		case n == 0:
			return usage("%s wants no arguments, not %q", cmd.CommandPath(), args[0])
		}
		return usage("%s wants %s; run \"%s --help\"", cmd.CommandPath(), what, cmd.CommandPath())
	}
}
