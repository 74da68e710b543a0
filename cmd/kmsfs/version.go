package main

import (
	"crypto/fips140"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show versions",
		Long:  "Show the versions of this program, of Go and of the modules it is built of, and the state of the FIPS 140-3 module." + statuses(0),
		Args:  exactly(0, ""),
		RunE:  func(*cobra.Command, []string) error { return p.version() },
	}
}

func (p *program) version() error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	p.say("kmsfs %s%s", orUnknown(info.Main.Version), revision(info))
	p.say("%s %s/%s", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	p.say("FIPS 140-3 module: %s", fipsState())
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		p.say("%s %s", m.Path, m.Version)
	}
	return nil
}

// programVersion is the version alone.
func programVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return orUnknown("")
	}
	return orUnknown(info.Main.Version)
}

func orUnknown(version string) string {
	if version == "" {
		return "(unknown version)"
	}
	return version
}

// revision is the commit that was built, as the go command recorded it.
func revision(info *debug.BuildInfo) string {
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return " (" + s.Value + ")"
		}
	}
	return ""
}

func fipsState() string {
	state := "off"
	switch {
	case fips140.Enforced():
		state = "on, enforced (GODEBUG=fips140=only)"
	case fips140.Enabled():
		state = "on"
	}
	return state + ", version " + fips140.Version()
}
