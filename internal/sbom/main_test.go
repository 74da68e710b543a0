package main

import (
	"encoding/json"
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"
)

// The document names every module once, by the version that was linked.
func TestDescribe(t *testing.T) {
	d := describe(&debug.BuildInfo{
		GoVersion: "go1.26.0", Main: debug.Module{Path: "kmsfs", Version: "v1.0.0"},
		Settings: []debug.BuildSetting{{Key: "-trimpath", Value: "true"}},
		Deps: []*debug.Module{
			{Path: "example.org/a", Version: "v1.2.3", Sum: "h1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="},
			{Path: "example.org/old", Version: "v1.0.0", Replace: &debug.Module{Path: "example.org/new", Version: "v2.0.0"}},
		},
	})
	require.Equal(t, "pkg:golang/kmsfs@v1.0.0", d.Metadata.Component.PURL)
	require.Equal(t, []property{{"go:-trimpath", "true"}}, d.Metadata.Component.Properties)
	require.Len(t, d.Components, 3)
	require.Equal(t, "pkg:golang/std@1.26.0", d.Components[0].PURL)
	require.Equal(t, []hash{{"SHA-256", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}}, d.Components[1].Hashes)
	require.Equal(t, "pkg:golang/example.org/new@v2.0.0", d.Components[2].PURL)
	raw, err := json.Marshal(d)
	require.NoError(t, err)
	require.Contains(t, string(raw), `"bomFormat":"CycloneDX","specVersion":"1.5"`)
}
