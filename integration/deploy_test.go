package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"kmsfs/integration/harness"
)

// sharded is a mounted volume under the first of two keys, with files to move.
func sharded(t *testing.T) (v *harness.Volume, first, second string, files int) {
	t.Helper()
	e := harness.New(t)
	kms := e.KMS()
	first, second = kms.NewKey(), kms.NewKey()
	v = e.Init("volume", "--key", first)
	v.Mount()
	e.Do("cp", "-a", filepath.Join(harness.GOROOT(t), "src", "encoding"), v.Path("tree"))
	return v, first, second, v.KeysOf()[first]
}

// TestShardScript runs the script that is shipped for one machine.
func TestShardScript(t *testing.T) {
	v, first, second, files := sharded(t)
	out := v.Env.Do("bash", deployed(t, "rekey-shards.sh"), "4", v.Dir, "--to", second)
	require.Contains(t, out, "no longer needs "+first)
	require.Equal(t, map[string]int{second: files}, v.KeysOf())
}

func deployed(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "deploy", name))
	require.NoError(t, err)
	return path
}

// TestIndexedJob runs the command of the Kubernetes manifest as its workers would:
// every index once, one of them twice.
func TestIndexedJob(t *testing.T) {
	raw, err := os.ReadFile(deployed(t, "rekey-job.yaml"))
	require.NoError(t, err)
	var job struct {
		Spec struct {
			CompletionMode string `yaml:"completionMode"`
			Completions    int
			Template       struct {
				Spec struct {
					Containers []struct {
						Command, Args []string
						Env           []struct{ Name, Value string }
					}
				}
			}
		}
	}
	require.NoError(t, yaml.Unmarshal(raw, &job))
	require.Equal(t, "Indexed", job.Spec.CompletionMode)
	require.Len(t, job.Spec.Template.Spec.Containers, 1)
	c := job.Spec.Template.Spec.Containers[0]
	require.Equal(t, []string{"/bin/sh", "-c"}, c.Command)
	require.Len(t, c.Args, 1)
	for _, env := range c.Env {
		if strings.HasSuffix(env.Name, "_KEY") {
			require.Contains(t, env.Value, "arn:aws:kms:")
			require.Contains(t, c.Args[0], "$"+env.Name)
		}
	}

	v, first, second, files := sharded(t)
	v.Env.Must("rekey", v.Dir, "--to", second, "--prepare", "--yes")
	for i := range job.Spec.Completions + 1 {
		worker := v.Env.Command(c.Command[0], c.Command[1], strings.ReplaceAll(c.Args[0], "/backing", v.Dir))
		worker.Env = append(worker.Env, "OLD_KEY="+first, "NEW_KEY="+second, fmt.Sprintf("JOB_COMPLETION_INDEX=%d", i%job.Spec.Completions),
			"XDG_STATE_HOME="+v.Env.Mkdir(fmt.Sprint("worker", i))) // a worker remembers nothing of the volume
		out, err := worker.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	require.Equal(t, map[string]int{second: files}, v.KeysOf())
	require.Contains(t, v.Env.Must("rekey", v.Dir, "--to", second, "--yes"), "no longer needs "+first)
}
