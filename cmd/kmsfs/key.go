package main

import (
	"errors"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/crypt"
	"kmsfs/keys"
)

func (p *program) keyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Make and list local keys",
		Long: `Local keys stand in for KMS where there is none: a file per key in $KMSFS_KEYRING,
else in $XDG_CONFIG_HOME/kmsfs/keys. Whoever can read the file can read the data.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "create NAME",
		Short: "Make a local key",
		Long:  "Make the local key local:NAME. A key that exists is never replaced." + statuses(0, 1),
		Args:  exactly(1, "NAME"),
		RunE:  func(_ *cobra.Command, args []string) error { return p.createKey(args[0]) },
	}, &cobra.Command{
		Use:   "list",
		Short: "List local keys",
		Long:  "List the local keys of this keyring, one a line: name, state, id, file." + statuses(0, 1),
		Args:  exactly(0, ""),
		RunE:  func(*cobra.Command, []string) error { return p.listKeys() },
	})
	return cmd
}

func (p *program) createKey(name string) error {
	if !strings.HasPrefix(name, crypt.LocalPrefix) {
		name = crypt.LocalPrefix + name
	}
	if err := crypt.CheckKeyName(name); err != nil {
		return &failure{status: exitUsage, err: err}
	}
	local, err := p.local()
	if err != nil {
		return err
	}
	err = local.Create(name)
	if errors.Is(err, fs.ErrExist) {
		return fail(exitUsage, "use it, or choose another name", "the key %s exists already, in %s", name, local.Path(name))
	}
	if err != nil {
		return err
	}
	p.say("made the key %s in %s; back that file up: losing it loses the data", name, local.Path(name))
	return nil
}

func (p *program) listKeys() error {
	local, err := p.local()
	if err != nil {
		return err
	}
	list, err := local.List()
	if err != nil {
		return err
	}
	var bad *keys.LocalKey
	for i, k := range list {
		if k.Err != nil {
			bad = &list[i]
			p.say("%s\tunusable\t-\t%s", k.Key, k.Path)
			continue
		}
		p.say("%s\t%s\t%s\t%s", k.Key, strings.ToLower(k.State), k.ID, k.Path)
	}
	if bad != nil {
		return &failure{status: exitUsage, err: bad.Err}
	}
	return nil
}
