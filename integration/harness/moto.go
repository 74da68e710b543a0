package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/stretchr/testify/require"
)

// Region is where tests make keys unless they say otherwise.
const Region = "us-east-1"

// SetAWS points the AWS client of this world at an endpoint on loopback. The
// secret has more than the ten characters that fips140=only asks for.
func (e *Env) SetAWS(endpoint, accessKey string) {
	e.Set("AWS_ENDPOINT_URL_KMS", endpoint)
	e.Set("AWS_ACCESS_KEY_ID", accessKey)
	e.Set("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-integration-tests")
	e.Set("AWS_REGION", Region)
}

// moto is the one moto_server of this test binary; it takes seconds to start.
var moto struct {
	once     sync.Once
	endpoint string
	err      error
	cmd      *exec.Cmd
}

// Moto points this world at a moto_server, a KMS that was not written by the
// authors of kmsfs, and returns the function that makes a key, in the usual region
// or in the one given.
func (e *Env) Moto() (newKey func(region ...string) string) {
	e.T.Helper()
	moto.once.Do(func() { moto.endpoint, moto.err = startMoto() })
	require.NoError(e.T, moto.err, "these tests need moto_server")
	e.SetAWS(moto.endpoint, "AKIAINTEGRATIONTESTS")
	client := awskms.New(awskms.Options{
		Region: Region, BaseEndpoint: aws.String(moto.endpoint),
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: e.Var("AWS_ACCESS_KEY_ID"), SecretAccessKey: e.Var("AWS_SECRET_ACCESS_KEY")}, nil
		}),
	})
	return func(region ...string) string {
		e.T.Helper()
		out, err := client.CreateKey(context.Background(), &awskms.CreateKeyInput{}, func(o *awskms.Options) {
			if len(region) > 0 {
				o.Region = region[0]
			}
		})
		require.NoError(e.T, err)
		return aws.ToString(out.KeyMetadata.Arn)
	}
}

func startMoto() (string, error) {
	program, err := findMoto()
	if err != nil {
		return "", err
	}
	port, err := freePort()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(program, "-H", "127.0.0.1", "-p", port)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	moto.cmd = cmd
	endpoint := "http://127.0.0.1:" + port
	up := Eventually(60*time.Second, func() bool {
		resp, err := http.Get(endpoint + "/moto-api/")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
	if !up {
		return "", fmt.Errorf("%s does not answer on %s", program, endpoint)
	}
	return endpoint, nil
}

func stopMoto() {
	if moto.cmd != nil {
		_ = syscall.Kill(-moto.cmd.Process.Pid, syscall.SIGKILL)
		_ = moto.cmd.Wait()
	}
}

// findMoto takes moto_server from PATH or from the repository's virtual
// environment, which it makes if need be.
func findMoto() (string, error) {
	if program, err := exec.LookPath("moto_server"); err == nil {
		return program, nil
	}
	top, err := repository()
	if err != nil {
		return "", err
	}
	program := filepath.Join(top, ".venv", "bin", "moto_server")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	setup := exec.Command(filepath.Join(top, "scripts", "setup.sh"), "test")
	if out, err := setup.CombinedOutput(); err != nil {
		return "", fmt.Errorf("installing moto_server: %w\n%s", err, out)
	}
	if _, err := os.Stat(program); err != nil {
		return "", errors.New("scripts/setup.sh test left no moto_server")
	}
	return program, nil
}

// repository is the directory of go.mod.
func repository() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	return filepath.Dir(strings.TrimSpace(string(out))), err
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
