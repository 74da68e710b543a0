package keys

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/stretchr/testify/require"
)

// moto is a running moto_server. Known gaps: it ignores that a key is disabled,
// it ignores SourceKeyId, and its multi-Region keys do not decrypt.
type moto struct{ url string }

// startMoto starts moto_server on a free port. Without it the test fails: a
// suite that silently tests less is worth less.
func startMoto(t *testing.T) moto {
	t.Helper()
	isolateAWS(t)
	path, err := exec.LookPath("moto_server")
	require.NoError(t, err, "moto_server is needed on PATH: pip install 'moto[server]'")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	require.NoError(t, l.Close())
	var out bytes.Buffer
	cmd := exec.Command(path, "-H", "127.0.0.1", "-p", fmt.Sprint(port))
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its own group: a launcher may have forked the server
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("moto_server said:\n%s", &out)
		}
	})
	m := moto{url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	require.Eventually(t, func() bool {
		r, err := http.Get(m.url + "/moto-api/data.json")
		if err != nil {
			return false
		}
		_ = r.Body.Close()
		return r.StatusCode == http.StatusOK
	}, 60*time.Second, 50*time.Millisecond, "moto_server did not start: %s", &out)
	return m
}

// motoCredentials are longer than moto needs: fips140=only can't sign with a
// short secret.
var motoCredentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
	return aws.Credentials{AccessKeyID: "moto", SecretAccessKey: "moto-secret-of-some-length"}, nil
})

func (m moto) createKey(t *testing.T) string {
	t.Helper()
	c := awskms.New(awskms.Options{Region: "us-east-1", BaseEndpoint: aws.String(m.url), Credentials: motoCredentials})
	out, err := c.CreateKey(context.Background(), &awskms.CreateKeyInput{})
	require.NoError(t, err)
	return aws.ToString(out.KeyMetadata.Arn)
}
