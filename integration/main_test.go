// Package integration tests the built program on real mounts with real KMS
// servers. It knows the command line and the formats of DESIGN, and nothing of
// the program's insides; harness has what all tests share.
//
// They run as root. "go test -short" leaves out the heavy ones.
package integration

import (
	"testing"

	"kmsfs/integration/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// heavy marks a test of more than a few seconds. CI runs them all.
func heavy(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("heavy; run without -short")
	}
}
