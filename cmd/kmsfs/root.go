package main

import (
	"context"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/config"
)

// start is the program but for the end of its process; argv[0] is the name that it
// was called by.
func start(argv []string, in io.Reader, out, err io.Writer) int {
	args, wrong := asked(argv)
	if wrong != nil {
		p := &program{console: newConsole(in, out, err)}
		return p.status(wrong)
	}
	if args == nil {
		return exitDone
	}
	return run(args, in, out, err)
}

// run runs one command.
func run(args []string, in io.Reader, out, err io.Writer) int {
	p := &program{console: newConsole(in, out, err), args: args}
	root := p.rootCommand()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(err)
	return p.status(root.ExecuteContext(context.Background()))
}

// status reports an error and says how the process ends.
func (p *program) status(err error) int {
	if err == nil {
		return exitDone
	}
	if _, told := err.(reported); !told {
		p.complain(err)
	}
	status, _ := diagnose(err)
	return status
}

// reported is an error that a person has read already.
type reported struct{ error }

func (r reported) Unwrap() error { return r.error }

// A program is one run of the command.
type program struct {
	*console
	args       []string
	configFile string
	cfg        *config.Config
}

func (p *program) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "kmsfs",
		Short: "An encrypting file system whose every file has its own KMS-wrapped key",
		Long: `kmsfs shows an encrypted directory in plaintext. Every file has a data key of its
own, wrapped by a key in AWS KMS (or a local key) and kept in an extended
attribute of the backing file. "kmsfs rekey" moves a tree to another KMS key
without touching contents.

DIR is the backing directory, which holds the ciphertext. KEY is the ARN of a KMS
key, the ARN of an alias (resolved once), or local:NAME.` + statuses(0, 1, 2, 3, 4, 5, 6),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cmd.Name() == "help" || strings.HasPrefix(cmd.CommandPath(), "kmsfs completion") || strings.HasPrefix(cmd.Name(), "__complete") {
				return nil
			}
			p.cfg, err = config.Load(p.configFile)
			return err
		},
	}
	root.PersistentFlags().StringVar(&p.configFile, "config", "", "read this `FILE` after the usual configuration files")
	root.AddCommand(p.initCommand(), p.mountCommand(), p.umountCommand(), p.lockCommand(), p.unlockCommand(),
		p.inspectCommand(),
		p.keyCommand(), p.rekeyCommand(), p.statusCommand(), p.fsckCommand(), p.headersCommand(), p.versionCommand())
	return root
}

// quote writes an argument so that a shell reads it back.
func quote(arg string) string {
	plain := strings.IndexFunc(arg, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:=@%+,", r))
	}) < 0
	if plain && arg != "" {
		return arg
	}
	return "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
}

// commandLine is an exact command for a person to run.
func commandLine(args ...string) string {
	for i, a := range args {
		args[i] = quote(a)
	}
	return strings.Join(args, " ")
}

// self is this program's file, for starting it again.
func self() (string, error) { return os.Executable() }
