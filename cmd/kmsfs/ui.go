package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"kmsfs/crypt"
	"kmsfs/keys"
	"kmsfs/rekey"
	"kmsfs/volume"
)

// The voice of the program. It speaks in one sentence on one line: what failed,
// on what, why, and after a semicolon what to do next. It starts with "kmsfs: ",
// in lower case, without an exclamation mark, without "please" and "sorry",
// without a stack trace and without jargon of the code. It names keys by their
// whole ARN, and with KMS the region, the operation and the IAM action that is
// missing. What worked is said on stdout, in as few lines as help; a command that
// has nothing to tell is silent. Questions go to the terminal, and default to no.

// Exit statuses (DESIGN section 8); scripts depend on them.
const (
	exitDone        = 0
	exitUsage       = 1
	exitDamaged     = 2
	exitRefused     = 3
	exitUnavailable = 4
	exitPartial     = 5
	exitMount       = 6
)

// statusHelp are the statuses in the words of each command's help.
var statusHelp = map[int]string{
	exitDone:        "0  done",
	exitUsage:       "1  usage, configuration or trust",
	exitDamaged:     "2  the volume or a file is damaged",
	exitRefused:     "3  KMS refused (denied, disabled, not found)",
	exitUnavailable: "4  KMS is unavailable",
	exitPartial:     "5  done in part (some files failed; running it again resumes)",
	exitMount:       "6  FUSE or the mountpoint failed",
}

// statuses is the paragraph of a command's help that lists its exit statuses.
func statuses(codes ...int) string {
	var b strings.Builder
	b.WriteString("\n\nExit status:")
	for _, c := range codes {
		b.WriteString("\n  " + statusHelp[c])
	}
	return b.String()
}

// A failure is an error whose status, and perhaps next step, the command knows
// better than the table below.
type failure struct {
	status int
	err    error
	next   string
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// fail makes a failure; next may be "".
func fail(status int, next, format string, args ...any) error {
	return &failure{status: status, err: fmt.Errorf(format, args...), next: next}
}

// usage is a failure of the person at the keyboard.
func usage(format string, args ...any) error {
	return &failure{status: exitUsage, err: fmt.Errorf(format, args...)}
}

// advice is the one place from an error to a status and to what to do next. The
// first row that matches counts.
var advice = []struct {
	is     error
	status int
	next   string
}{
	{rekey.ErrReload, exitMount, "unmount the volume, or mend what the mount says, and run the same command again"},
	{rekey.ErrUntrusted, exitUsage, "name it with --from if you trust it"},
	{rekey.ErrAmbiguous, exitUsage, ""},
	{rekey.ErrSameKey, exitUsage, ""},
	{rekey.ErrLastCopy, exitUsage, ""},
	{rekey.ErrNotListed, exitUsage, "\"kmsfs status\" shows its keys"},
	{rekey.ErrNotPrepared, exitUsage, ""},
	{rekey.ErrTooMany, exitUsage, "\"kmsfs rekey --remove\" takes one out"},
	{rekey.ErrOvertaken, exitPartial, ""},
	{context.Canceled, exitPartial, "run the same command again to go on"},
	{volume.ErrNotVolume, exitUsage, ""},
	{volume.ErrNotEmpty, exitUsage, ""},
	{volume.ErrNoXattrs, exitUsage, ""},
	{volume.ErrIsMount, exitUsage, ""},
	{volume.ErrBusy, exitUsage, ""},
	{crypt.ErrForeign, exitDamaged, ""},
	{crypt.ErrNoHeader, exitDamaged, "restore the file from a backup that keeps extended attributes"},
	{crypt.ErrDamaged, exitDamaged, "restore it from a backup"},
	{unix.ENOTCONN, exitMount, "a daemon that served it died: run \"kmsfs umount\" on the mountpoint"},
}

// keyAdvice is the same for failures of a key service.
func keyAdvice(e *keys.Error) (status int, next string) {
	switch e.Kind {
	case keys.KindDenied:
		if e.Action == "" {
			return exitRefused, "run kmsfs as the owner of the key file"
		}
		return exitRefused, fmt.Sprintf("allow %s on %s in region %s, in the key policy and in IAM", e.Action, e.Key, e.Region)
	case keys.KindCredentials:
		return exitRefused, "give kmsfs AWS credentials (AWS_PROFILE, \"aws sso login\", an instance role)"
	case keys.KindDisabled:
		if e.Action == "" {
			return exitRefused, "enable the key"
		}
		return exitRefused, fmt.Sprintf("enable the key in region %s, or cancel its deletion", e.Region)
	case keys.KindNotFound:
		if e.Action == "" {
			return exitRefused, "restore the key file from a backup, or set KMSFS_KEYRING to the keyring that has it (\"kmsfs key list\" shows this one)"
		}
		return exitRefused, fmt.Sprintf("check the ARN, the region %s and the AWS account of your credentials", e.Region)
	case keys.KindRejected, keys.KindIncorrectKey:
		return exitUsage, "name the right key"
	case keys.KindBadBlob:
		return exitDamaged, "restore it from a backup"
	case keys.KindInterrupted:
		return exitPartial, "run the same command again"
	}
	return exitUnavailable, "try again; if it stays so, check the network and the state of KMS" + inRegion(e.Region)
}

func inRegion(region string) string {
	if region == "" {
		return ""
	}
	return " in region " + region
}

// diagnose turns an error into a status and the next step.
func diagnose(err error) (status int, next string) {
	var f *failure
	var k *keys.Error
	var locked *volume.LockedError
	switch {
	case errors.As(err, &f):
		return f.status, f.next
	case errors.As(err, &k):
		return keyAdvice(k)
	case errors.As(err, &locked):
		return exitMount, ""
	}
	for _, row := range advice {
		if errors.Is(err, row.is) {
			return row.status, row.next
		}
	}
	return exitUsage, ""
}

// sentence is what a person reads about an error.
func sentence(err error) string {
	_, next := diagnose(err)
	text := oneLine(err.Error())
	var k *keys.Error
	if errors.As(err, &k) && k.Region != "" && !strings.Contains(text+next, "region "+k.Region) {
		text += " (region " + k.Region + ")"
	}
	if next != "" {
		text += "; " + next
	}
	return text
}

// oneLine joins the lines of an error.
func oneLine(text string) string {
	return harmless(strings.ReplaceAll(strings.TrimRight(text, "\n; "), "\n", "; "))
}

// harmless is a text without what would steer a terminal: whoever may make files, or write
// the backing directory, chooses names that are shown.
func harmless(text string) string {
	bad := func(r rune) bool {
		return r == unicode.ReplacementChar || !unicode.IsPrint(r) && r != '\n' && r != '\t'
	}
	if strings.IndexFunc(text, bad) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if bad(r) {
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// printable is a name on one line of a terminal.
func printable(name string) string {
	if strings.IndexFunc(name, func(r rune) bool { return r == unicode.ReplacementChar || !unicode.IsPrint(r) }) < 0 {
		return name
	}
	return strconv.Quote(name)
}

// A console is where the program speaks and listens.
type console struct {
	in       io.Reader
	out, err io.Writer
	tty      bool // a person can be asked
}

func newConsole(in io.Reader, out, err io.Writer) *console {
	c := &console{in: in, out: out, err: err}
	c.tty = isTerminal(in) && isTerminal(err)
	return c
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// say reports what was done.
func (c *console) say(format string, args ...any) {
	fmt.Fprint(c.out, harmless(fmt.Sprintf(format, args...))+"\n")
}

// warn reports what a person should know although the command goes on.
func (c *console) warn(format string, args ...any) {
	fmt.Fprint(c.err, "kmsfs: warning: "+oneLine(fmt.Sprintf(format, args...))+"\n")
}

// complain reports the error that ends the command.
func (c *console) complain(err error) { fmt.Fprintln(c.err, "kmsfs: "+sentence(err)) }

// confirm asks a question that wants "yes" written out.
func (c *console) confirm(question string) bool {
	fmt.Fprintf(c.err, "%s [yes/no] ", harmless(question))
	line, _ := bufio.NewReader(c.in).ReadString('\n')
	return strings.EqualFold(strings.TrimSpace(line), "yes")
}
