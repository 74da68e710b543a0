package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"kmsfs/config"
	"kmsfs/keys/kmstest"
)

// TestProfilesReachTheProvider: kms.profiles of the configuration decides whose
// credentials a key is used with.
func TestProfilesReachTheProvider(t *testing.T) {
	here, china := kmstest.New(t, nil), kmstest.New(t, &kmstest.Options{Partition: "aws-cn"})
	here.Setenv(t)
	dir := t.TempDir()
	text := fmt.Sprintf("[profile china]\naws_access_key_id = %s\naws_secret_access_key = %s\nendpoint_url = %s\n",
		china.Admin().AccessKey, china.Admin().SecretKey, china.URL())
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config"), []byte(text), 0o600))
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(dir, "config"))
	p := &program{cfg: config.Default()}
	p.cfg.KMS.Profiles = map[string]string{"aws-cn": "china"}
	provider, err := p.provider()
	require.NoError(t, err)
	for _, key := range []string{here.CreateKey("us-east-1"), china.CreateKey("cn-north-1")} {
		d, err := provider.Describe(context.Background(), key)
		require.NoError(t, err)
		require.Equal(t, key, d.Key)
	}
	require.Equal(t, 1, here.Count())
	require.Equal(t, 1, china.Count())
}
