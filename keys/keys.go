package keys

import (
	"context"
	"strings"

	"kmsfs/crypt"
)

// An EncryptionContext is bound to a wrapped key: only who presents the same
// pairs can unwrap it. KMS logs it in clear.
type EncryptionContext = map[string]string

// A Provider wraps and unwraps data keys under keys that never leave it. Key is
// the ARN of a KMS key (not an alias, but for Describe) or "local:NAME". Every
// error is an *Error. The caller owns, and wipes, the keys it is given. Every
// call ends by itself, also under a context without a deadline.
type Provider interface {
	// GenerateDataKey makes a data key and wraps it.
	GenerateDataKey(ctx context.Context, key string, ec EncryptionContext) (*crypt.Key, []byte, error)
	// Decrypt unwraps a blob, which must have been wrapped by key under ec.
	Decrypt(ctx context.Context, key string, ec EncryptionContext, blob []byte) (*crypt.Key, error)
	// Encrypt wraps a data key. k stays the caller's.
	Encrypt(ctx context.Context, key string, ec EncryptionContext, k *crypt.Key) ([]byte, error)
	// ReEncrypt unwraps a blob with from and wraps it with to inside the
	// service, under the same context. Both keys are in one region of one service.
	ReEncrypt(ctx context.Context, from, to string, ec EncryptionContext, blob []byte) ([]byte, error)
	// Describe resolves an alias and tells a key's state.
	Describe(ctx context.Context, key string) (Description, error)
}

// A Prober finds out whether an operation would be allowed, without doing it.
// Providers that can are found by assertion.
type Prober interface {
	// Probe tries op ("Decrypt", "GenerateDataKey", ...) on key; nil means that
	// it would have succeeded.
	Probe(ctx context.Context, key, op string) error
}

// A Description is what a service tells of a key.
type Description struct {
	Key         string // ARN of the key itself, never of an alias; or "local:NAME"
	State       string // "Enabled", "Disabled", "PendingDeletion", ...
	MultiRegion bool
	Primary     string   // ARN of a multi-Region key's primary
	Replicas    []string // ARNs of a multi-Region key's other replicas
}

// Enabled reports whether the key can be used now.
func (d Description) Enabled() bool { return d.State == stateEnabled }

// States of a key that decide what a refusal means. AWS names them so.
const (
	stateEnabled                = "Enabled"
	stateDisabled               = "Disabled"
	statePendingDeletion        = "PendingDeletion"
	statePendingReplicaDeletion = "PendingReplicaDeletion"
	statePendingImport          = "PendingImport"
)

// Operations, by AWS's names. Local keys have the same.
const (
	opGenerate  = "GenerateDataKey"
	opDecrypt   = "Decrypt"
	opEncrypt   = "Encrypt"
	opReEncrypt = "ReEncrypt"
	opDescribe  = "DescribeKey"
)

// IsLocal reports whether a key name means a local key, not one of KMS.
func IsLocal(key string) bool { return strings.HasPrefix(key, crypt.LocalPrefix) }

// regionOf is the region in an ARN, "" for other names.
func regionOf(key string) string {
	a, err := crypt.ParseARN(key)
	if err != nil {
		return ""
	}
	return a.Region
}
