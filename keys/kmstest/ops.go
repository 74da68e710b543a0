package kmstest

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// operations are the calls that are understood. Each runs with the server locked.
var operations map[string]func(*request) (any, *apiError)

func init() {
	operations = map[string]func(*request) (any, *apiError){
		"CreateKey":                       (*request).createKey,
		"ReplicateKey":                    (*request).replicateKey,
		"DescribeKey":                     (*request).describeKey,
		"ListKeys":                        (*request).listKeys,
		"CreateAlias":                     (*request).createAlias,
		"ListAliases":                     (*request).listAliases,
		"EnableKey":                       (*request).enableKey,
		"DisableKey":                      (*request).disableKey,
		"ScheduleKeyDeletion":             (*request).scheduleKeyDeletion,
		"CancelKeyDeletion":               (*request).cancelKeyDeletion,
		"RotateKeyOnDemand":               (*request).rotateKeyOnDemand,
		"GenerateDataKey":                 (*request).generateDataKey,
		"GenerateDataKeyWithoutPlaintext": (*request).generateDataKeyWithoutPlaintext,
		"Encrypt":                         (*request).encrypt,
		"Decrypt":                         (*request).decrypt,
		"ReEncrypt":                       (*request).reEncrypt,
	}
}

// Limits that AWS documents.
const (
	maxPlaintext    = 4096
	maxCiphertext   = 6144
	maxRotations    = 25
	defaultDeletion = 30 // days
)

// cryptoIn is the union of what the cryptographic operations take.
type cryptoIn struct {
	KeyID             string            `json:"KeyId"`
	EncryptionContext map[string]string `json:"EncryptionContext"`
	KeySpec           string            `json:"KeySpec"`
	NumberOfBytes     *int              `json:"NumberOfBytes"`
	Plaintext         []byte            `json:"Plaintext"`
	CiphertextBlob    []byte            `json:"CiphertextBlob"`
	DryRun            bool              `json:"DryRun"`
	DryRunModifiers   []string          `json:"DryRunModifiers"`

	SourceKeyID                  string            `json:"SourceKeyId"`
	DestinationKeyID             string            `json:"DestinationKeyId"`
	SourceEncryptionContext      map[string]string `json:"SourceEncryptionContext"`
	DestinationEncryptionContext map[string]string `json:"DestinationEncryptionContext"`
}

func (in *cryptoIn) ignoresCiphertext() bool {
	return in.DryRun && slices.Contains(in.DryRunModifiers, "IGNORE_CIPHERTEXT")
}

type cryptoOut struct {
	KeyID          string `json:"KeyId"`
	SourceKeyID    string `json:"SourceKeyId,omitempty"`
	Plaintext      []byte `json:"Plaintext,omitempty"`
	CiphertextBlob []byte `json:"CiphertextBlob,omitempty"`

	KeyMaterialID            string `json:"KeyMaterialId,omitempty"`
	SourceKeyMaterialID      string `json:"SourceKeyMaterialId,omitempty"`
	DestinationKeyMaterialID string `json:"DestinationKeyMaterialId,omitempty"`

	EncryptionAlgorithm            string `json:"EncryptionAlgorithm,omitempty"`
	SourceEncryptionAlgorithm      string `json:"SourceEncryptionAlgorithm,omitempty"`
	DestinationEncryptionAlgorithm string `json:"DestinationEncryptionAlgorithm,omitempty"`
}

const symmetric = "SYMMETRIC_DEFAULT"

// begin decodes a cryptographic request and notes it in the log.
func (q *request) begin() (in cryptoIn, fail *apiError) {
	if fail := q.decode(&in); fail != nil {
		return in, fail
	}
	q.call.Key, q.call.Context, q.call.DryRun = in.KeyID, in.EncryptionContext, in.DryRun
	if len(in.CiphertextBlob) > maxCiphertext {
		return in, failure("ValidationException", "1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint: Member must have length less than or equal to %d", maxCiphertext)
	}
	return in, nil
}

// use finds a key, checks the permission and then the state, in AWS's order.
func (q *request) use(name, action string) (*key, *apiError) {
	k, fail := q.find(name)
	if fail != nil {
		return nil, fail
	}
	if fail := q.allow(action, k.arn); fail != nil {
		return nil, fail
	}
	return k, k.usable(q.op)
}

func dryRun() *apiError {
	return failure("DryRunOperationException", "The request would have succeeded, but the DryRun option is set.")
}

func (q *request) generateDataKey() (any, *apiError) {
	in, fail := q.begin()
	if fail != nil {
		return nil, fail
	}
	size, fail := in.size()
	if fail != nil {
		return nil, fail
	}
	k, fail := q.use(in.KeyID, q.op)
	if fail != nil {
		return nil, fail
	}
	q.call.Key = k.arn
	if in.DryRun {
		return nil, dryRun()
	}
	plain := randomBytes(size)
	return cryptoOut{KeyID: k.arn, Plaintext: plain, CiphertextBlob: k.seal(plain, in.EncryptionContext),
		KeyMaterialID: hexID(k.family.current.id)}, nil
}

func (q *request) generateDataKeyWithoutPlaintext() (any, *apiError) {
	out, fail := q.generateDataKey()
	if fail != nil {
		return nil, fail
	}
	o := out.(cryptoOut)
	o.Plaintext = nil
	return o, nil
}

// size is how many bytes GenerateDataKey should make.
func (in *cryptoIn) size() (int, *apiError) {
	if (in.KeySpec == "") == (in.NumberOfBytes == nil) {
		return 0, failure("ValidationException", "Please specify either number of bytes or key spec.")
	}
	switch {
	case in.KeySpec == "AES_256":
		return 32, nil
	case in.KeySpec == "AES_128":
		return 16, nil
	case in.KeySpec != "":
		return 0, failure("ValidationException", "1 validation error detected: Value '%s' at 'keySpec' failed to satisfy constraint: Member must satisfy enum value set: [AES_256, AES_128]", in.KeySpec)
	case *in.NumberOfBytes < 1 || *in.NumberOfBytes > 1024:
		return 0, failure("ValidationException", "1 validation error detected: Value '%d' at 'numberOfBytes' failed to satisfy constraint: Member must have value between 1 and 1024", *in.NumberOfBytes)
	}
	return *in.NumberOfBytes, nil
}

func (q *request) encrypt() (any, *apiError) {
	in, fail := q.begin()
	if fail != nil {
		return nil, fail
	}
	if len(in.Plaintext) == 0 || len(in.Plaintext) > maxPlaintext {
		return nil, failure("ValidationException", "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: Member must have length between 1 and %d", maxPlaintext)
	}
	k, fail := q.use(in.KeyID, q.op)
	if fail != nil {
		return nil, fail
	}
	q.call.Key = k.arn
	if in.DryRun {
		return nil, dryRun()
	}
	return cryptoOut{KeyID: k.arn, CiphertextBlob: k.seal(in.Plaintext, in.EncryptionContext), EncryptionAlgorithm: symmetric}, nil
}

func (q *request) decrypt() (any, *apiError) {
	in, fail := q.begin()
	if fail != nil {
		return nil, fail
	}
	k, fail := q.source(in.KeyID, "Decrypt", &in)
	if fail != nil {
		return nil, fail
	}
	q.call.Key = k.arn
	if in.ignoresCiphertext() {
		return nil, dryRun()
	}
	m := q.materialOf(in.CiphertextBlob)
	plain, fail := k.open(m, in.CiphertextBlob, in.EncryptionContext)
	if fail != nil {
		return nil, fail
	}
	if in.DryRun {
		return nil, dryRun()
	}
	return cryptoOut{KeyID: k.arn, Plaintext: plain, KeyMaterialID: hexID(m.id), EncryptionAlgorithm: symmetric}, nil
}

// source finds the key to open a blob with: the one named, else the one whose
// material the blob names, if it lives in this region.
func (q *request) source(name, action string, in *cryptoIn) (*key, *apiError) {
	if name == "" && !in.ignoresCiphertext() {
		m := q.materialOf(in.CiphertextBlob)
		if m == nil {
			return nil, failure("InvalidCiphertextException", "")
		}
		for _, k := range m.family.members {
			if k.region == q.region {
				name = k.arn
			}
		}
		if name == "" {
			return nil, failure("AccessDeniedException", "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or you are not allowed to access.")
		}
	}
	return q.use(name, action)
}

func (q *request) reEncrypt() (any, *apiError) {
	in, fail := q.begin()
	if fail != nil {
		return nil, fail
	}
	q.call.Key, q.call.Source, q.call.Context = in.DestinationKeyID, in.SourceKeyID, in.SourceEncryptionContext
	q.call.DestinationContext = in.DestinationEncryptionContext
	from, fail := q.source(in.SourceKeyID, "ReEncryptFrom", &in)
	if fail != nil {
		return nil, fail
	}
	to, fail := q.use(in.DestinationKeyID, "ReEncryptTo")
	if fail != nil {
		return nil, fail
	}
	q.call.Key, q.call.Source = to.arn, from.arn
	if in.ignoresCiphertext() {
		return nil, dryRun()
	}
	m := q.materialOf(in.CiphertextBlob)
	plain, fail := from.open(m, in.CiphertextBlob, in.SourceEncryptionContext)
	if fail != nil {
		return nil, fail
	}
	if in.DryRun {
		return nil, dryRun()
	}
	return cryptoOut{KeyID: to.arn, SourceKeyID: from.arn, CiphertextBlob: to.seal(plain, in.DestinationEncryptionContext),
		SourceKeyMaterialID: hexID(m.id), DestinationKeyMaterialID: hexID(to.family.current.id),
		SourceEncryptionAlgorithm: symmetric, DestinationEncryptionAlgorithm: symmetric}, nil
}

// adminIn is the union of what the other operations take.
type adminIn struct {
	KeyID               string `json:"KeyId"`
	Description         string `json:"Description"`
	MultiRegion         bool   `json:"MultiRegion"`
	KeyUsage            string `json:"KeyUsage"`
	Origin              string `json:"Origin"`
	ReplicaRegion       string `json:"ReplicaRegion"`
	AliasName           string `json:"AliasName"`
	TargetKeyID         string `json:"TargetKeyId"`
	PendingWindowInDays int    `json:"PendingWindowInDays"`
}

// manage decodes a request about one key and checks the permission.
func (q *request) manage() (in adminIn, k *key, fail *apiError) {
	if fail := q.decode(&in); fail != nil {
		return in, nil, fail
	}
	name := or(in.TargetKeyID, in.KeyID)
	q.call.Key = name
	if k, fail = q.find(name); fail != nil {
		return in, nil, fail
	}
	q.call.Key = k.arn
	return in, k, q.allow(q.op, k.arn)
}

type keyRef struct {
	Arn    string `json:"Arn"`
	Region string `json:"Region"`
}

func (k *key) metadata() map[string]any {
	m := map[string]any{
		"AWSAccountId": k.account, "KeyId": k.id, "Arn": k.arn, "CreationDate": seconds(k.created),
		"Enabled": k.state == Enabled, "Description": k.description, "KeyUsage": k.usage, "KeyState": k.state,
		"Origin": "AWS_KMS", "KeyManager": "CUSTOMER", "KeySpec": symmetric, "CustomerMasterKeySpec": symmetric,
		"EncryptionAlgorithms": []string{symmetric}, "MultiRegion": k.multi,
		"CurrentKeyMaterialId": hexID(k.family.current.id),
	}
	if k.state == PendingDeletion {
		m["DeletionDate"] = seconds(k.deletion)
	}
	if k.multi {
		m["MultiRegionConfiguration"] = k.regions()
	}
	return m
}

func (k *key) regions() map[string]any {
	kind, replicas := "REPLICA", []keyRef{}
	if k == k.family.primary {
		kind = "PRIMARY"
	}
	for _, r := range k.family.members {
		if r != k.family.primary {
			replicas = append(replicas, keyRef{r.arn, r.region})
		}
	}
	p := k.family.primary
	return map[string]any{"MultiRegionKeyType": kind, "PrimaryKey": keyRef{p.arn, p.region}, "ReplicaKeys": replicas}
}

func (q *request) createKey() (any, *apiError) {
	var in adminIn
	if fail := q.decode(&in); fail != nil {
		return nil, fail
	}
	if fail := q.allow(q.op, "*"); fail != nil {
		return nil, fail
	}
	spec := KeySpec{Region: q.region, MultiRegion: in.MultiRegion, Usage: in.KeyUsage, Description: in.Description}
	if in.Origin == "EXTERNAL" {
		spec.State = PendingImport
	}
	k := q.createLocked(spec)
	q.call.Key = k.arn
	return map[string]any{"KeyMetadata": k.metadata()}, nil
}

func (q *request) replicateKey() (any, *apiError) {
	in, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	switch {
	case !k.multi:
		return nil, failure("UnsupportedOperationException", "%s is not a multi-Region key.", k.arn)
	case k != k.family.primary:
		return nil, failure("UnsupportedOperationException", "%s is not a multi-Region primary key.", k.arn)
	case q.keys[in.ReplicaRegion][k.id] != nil:
		return nil, failure("AlreadyExistsException", "Replica key already exists in %s region", in.ReplicaRegion)
	case in.ReplicaRegion == "":
		return nil, failure("ValidationException", "1 validation error detected: Value null at 'replicaRegion' failed to satisfy constraint: Member must not be null")
	}
	if fail := k.usable(q.op); fail != nil {
		return nil, fail
	}
	return map[string]any{"ReplicaKeyMetadata": q.replicateLocked(k, in.ReplicaRegion).metadata()}, nil
}

func (q *request) describeKey() (any, *apiError) {
	_, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	return map[string]any{"KeyMetadata": k.metadata()}, nil
}

func (q *request) listKeys() (any, *apiError) {
	if fail := q.allow(q.op, "*"); fail != nil {
		return nil, fail
	}
	list := []map[string]string{}
	for _, id := range slices.Sorted(maps.Keys(q.keys[q.region])) {
		list = append(list, map[string]string{"KeyId": id, "KeyArn": q.keys[q.region][id].arn})
	}
	return map[string]any{"Keys": list, "Truncated": false}, nil
}

func (q *request) createAlias() (any, *apiError) {
	in, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	if !strings.HasPrefix(in.AliasName, "alias/") {
		return nil, failure("ValidationException", "Alias must start with the prefix \"alias/\". Please see https://docs.aws.amazon.com/kms/latest/developerguide/kms-alias.html")
	}
	alias := q.arn(q.region, k.account, in.AliasName)
	if _, taken := q.aliases[alias]; taken {
		return nil, failure("AlreadyExistsException", "An alias with the name %s already exists", alias)
	}
	q.aliases[alias] = k.arn
	return struct{}{}, nil
}

func (q *request) listAliases() (any, *apiError) {
	if fail := q.allow(q.op, "*"); fail != nil {
		return nil, fail
	}
	list := []map[string]string{}
	for _, alias := range slices.Sorted(maps.Keys(q.aliases)) {
		if f := strings.SplitN(alias, ":", 6); f[3] == q.region {
			target := q.aliases[alias]
			list = append(list, map[string]string{"AliasName": f[5], "AliasArn": alias, "TargetKeyId": target[strings.Index(target, "key/")+4:]})
		}
	}
	return map[string]any{"Aliases": list, "Truncated": false}, nil
}

// toggle enables or disables a key that is neither pending anything nor unavailable.
func (q *request) toggle(state string) (any, *apiError) {
	_, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	if fail := k.usable(q.op); fail != nil && fail.code == "KMSInvalidStateException" {
		return nil, fail
	}
	k.state = state
	return struct{}{}, nil
}

func (q *request) enableKey() (any, *apiError)  { return q.toggle(Enabled) }
func (q *request) disableKey() (any, *apiError) { return q.toggle(Disabled) }

func (q *request) scheduleKeyDeletion() (any, *apiError) {
	in, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	days := in.PendingWindowInDays
	if days == 0 {
		days = defaultDeletion
	}
	if days < 7 || days > defaultDeletion {
		return nil, failure("ValidationException", "1 validation error detected: Value '%d' at 'pendingWindowInDays' failed to satisfy constraint: Member must have value between 7 and 30", days)
	}
	if k.state == PendingDeletion || k.state == PendingReplicaDeletion {
		return nil, k.usable(q.op)
	}
	k.state, k.deletion = PendingDeletion, time.Now().AddDate(0, 0, days)
	if k == k.family.primary && len(k.family.members) > 1 {
		k.state = PendingReplicaDeletion // the primary waits until its replicas are gone
	}
	return map[string]any{"KeyId": k.arn, "DeletionDate": seconds(k.deletion), "KeyState": k.state, "PendingWindowInDays": days}, nil
}

func (q *request) cancelKeyDeletion() (any, *apiError) {
	_, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	if k.state != PendingDeletion && k.state != PendingReplicaDeletion {
		return nil, failure("KMSInvalidStateException", "%s is not pending deletion.", k.arn)
	}
	k.state = Disabled
	return map[string]any{"KeyId": k.arn}, nil
}

func (q *request) rotateKeyOnDemand() (any, *apiError) {
	_, k, fail := q.manage()
	if fail != nil {
		return nil, fail
	}
	if fail := k.usable(q.op); fail != nil {
		return nil, fail
	}
	if k.multi && k != k.family.primary {
		return nil, failure("UnsupportedOperationException", "%s is not a multi-Region primary key.", k.arn)
	}
	if k.family.rotated >= maxRotations {
		return nil, failure("LimitExceededException", "You have exceeded the number of on-demand rotations for %s.", k.arn)
	}
	k.family.rotated++
	q.newMaterialLocked(k.family)
	return map[string]any{"KeyId": k.arn}, nil
}
