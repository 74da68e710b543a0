package kmstest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Key states, by AWS's names.
const (
	Enabled                = "Enabled"
	Disabled               = "Disabled"
	PendingDeletion        = "PendingDeletion"
	PendingReplicaDeletion = "PendingReplicaDeletion"
	PendingImport          = "PendingImport"
	Creating               = "Creating"
	Updating               = "Updating"
	Unavailable            = "Unavailable"
)

// A blob is, as AWS's, opaque and 152 bytes longer than its plaintext:
//
//	prefix (5) | key material id (32) | filler (87) | nonce (12) | ciphertext | tag (16)
//
// Everything before the nonce, and the encryption context, are authenticated.
const (
	materialIDSize = 32
	fillerSize     = 87
	blobPrefixSize = len(blobPrefix) + materialIDSize + fillerSize
	blobPrefix     = "\x01\x02\x02\x00\x78"
	// BlobOverhead is how much longer a blob is than its plaintext.
	BlobOverhead = blobPrefixSize + 12 + 16
)

// A family is the key material that a multi-Region key shares with its
// replicas. Older material goes on opening what it wrapped.
type family struct {
	current *material
	primary *key
	members []*key
	rotated int
}

type material struct {
	id     [materialIDSize]byte
	secret []byte
	family *family
}

type key struct {
	region, account, id, arn string
	family                   *family
	state                    string
	multi                    bool
	usage                    string
	description              string
	created, deletion        time.Time
}

// A KeySpec says what kind of key to create. The zero value of each field is
// the usual kind.
type KeySpec struct {
	Region      string // us-east-1
	Account     string // the server's
	MultiRegion bool
	Usage       string // ENCRYPT_DECRYPT; another makes it useless for us
	State       string // Enabled
	Description string
}

// CreateKey makes an enabled key in a region and returns its ARN.
func (s *Server) CreateKey(region string) string { return s.Create(KeySpec{Region: region}) }

// Create makes a key and returns its ARN.
func (s *Server) Create(spec KeySpec) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.createLocked(spec).arn
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

func (s *Server) createLocked(spec KeySpec) *key {
	id := newUUID()
	if spec.MultiRegion {
		id = "mrk-" + strings.ReplaceAll(id, "-", "")
	}
	k := &key{region: or(spec.Region, "us-east-1"), account: or(spec.Account, s.opts.Account), id: id,
		state: or(spec.State, Enabled), multi: spec.MultiRegion, usage: or(spec.Usage, "ENCRYPT_DECRYPT"),
		description: spec.Description, created: time.Now(), family: new(family)}
	k.family.primary = k
	s.newMaterialLocked(k.family)
	s.insertLocked(k)
	return k
}

func (s *Server) insertLocked(k *key) {
	k.arn = s.arn(k.region, k.account, "key/"+k.id)
	k.family.members = append(k.family.members, k)
	if s.keys[k.region] == nil {
		s.keys[k.region] = map[string]*key{}
	}
	s.keys[k.region][k.id] = k
}

func (s *Server) newMaterialLocked(f *family) {
	m := &material{secret: make([]byte, 32), family: f}
	_, _ = rand.Read(m.secret) // never fails (crypto/rand)
	_, _ = rand.Read(m.id[:])
	s.materials[m.id], f.current = m, m
}

func (s *Server) arn(region, account, resource string) string {
	return fmt.Sprintf("arn:%s:kms:%s:%s:%s", s.opts.Partition, region, account, resource)
}

// Replicate makes a replica of a multi-Region key in another region and returns
// its ARN.
func (s *Server) Replicate(arn, region string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.mustLocked(arn)
	if !k.multi || s.keys[region][k.id] != nil {
		panic("kmstest: " + arn + " can have no replica in " + region)
	}
	return s.replicateLocked(k, region).arn
}

func (s *Server) replicateLocked(of *key, region string) *key {
	k := *of
	k.region, k.state, k.created = region, Enabled, time.Now()
	s.insertLocked(&k)
	return &k
}

// CreateAlias gives a key another name ("alias/NAME") and returns the alias's ARN.
func (s *Server) CreateAlias(name, arn string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.mustLocked(arn)
	alias := s.arn(k.region, k.account, name)
	s.aliases[alias] = k.arn
	return alias
}

// SetState puts a key into any state.
func (s *Server) SetState(arn, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mustLocked(arn).state = state
}

// State is the state that a key is in.
func (s *Server) State(arn string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mustLocked(arn).state
}

// Rotate gives a key new material; what the old wrapped still opens.
func (s *Server) Rotate(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newMaterialLocked(s.mustLocked(arn).family)
}

// CurrentMaterial is the id of the key material that a key, and every replica of
// it, wraps with now; DescribeKey tells it as CurrentKeyMaterialId.
func (s *Server) CurrentMaterial(arn string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return hexID(s.mustLocked(arn).family.current.id)
}

// MaterialOf is the id of the key material that a blob was wrapped with, "" if
// it is not one of this server's.
func (s *Server) MaterialOf(blob []byte) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.materialOf(blob); m != nil {
		return hexID(m.id)
	}
	return ""
}

// Delete removes a key at once, which AWS does only after its waiting period.
func (s *Server) Delete(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.mustLocked(arn)
	delete(s.keys[k.region], k.id)
	k.family.members = slices.DeleteFunc(k.family.members, func(m *key) bool { return m == k })
}

// mustLocked finds a key for the Go API: a wrong ARN there is a bug in a test.
func (s *Server) mustLocked(arn string) *key {
	f := strings.SplitN(arn, ":", 6)
	if len(f) == 6 {
		if k := s.keys[f[3]][strings.TrimPrefix(f[5], "key/")]; k != nil {
			return k
		}
	}
	panic("kmstest: there is no key " + arn)
}

// find resolves what a caller names a key by: id, key ARN, alias, alias ARN.
func (q *request) find(name string) (*key, *apiError) {
	if name == "" {
		return nil, failure("ValidationException", "1 validation error detected: Value null at 'keyId' failed to satisfy constraint: Member must not be null")
	}
	region, account, resource := q.region, q.opts.Account, name
	if strings.HasPrefix(name, "arn:") {
		f := strings.SplitN(name, ":", 6)
		if len(f) != 6 || f[2] != "kms" {
			return nil, failure("InvalidArnException", "Invalid arn %s", name)
		}
		region, account, resource = f[3], f[4], f[5]
		if region != q.region || f[1] != q.opts.Partition {
			return nil, failure("NotFoundException", "Invalid arn %s", region)
		}
	}
	if strings.HasPrefix(resource, "alias/") {
		alias := q.arn(region, account, resource)
		arn, ok := q.aliases[alias]
		if !ok {
			return nil, failure("NotFoundException", "Alias %s is not found.", alias)
		}
		resource = arn[strings.Index(arn, "key/"):]
	}
	id := strings.TrimPrefix(resource, "key/")
	k := q.keys[region][id]
	if k == nil || k.account != account && strings.HasPrefix(name, "arn:") {
		return nil, failure("NotFoundException", "Key '%s' does not exist", q.arn(region, account, "key/"+id))
	}
	return k, nil
}

// usable checks that a key can be used for a cryptographic operation now.
func (k *key) usable(op string) *apiError {
	if k.usage != "ENCRYPT_DECRYPT" {
		return failure("InvalidKeyUsageException", "%s key usage is %s which is not valid for %s.", k.arn, k.usage, op)
	}
	words := map[string]string{
		PendingDeletion: "is pending deletion.", PendingReplicaDeletion: "is pending replica deletion.",
		PendingImport: "is pending import.", Creating: "is creating.", Updating: "is updating.", Unavailable: "is unavailable.",
	}
	switch k.state {
	case Enabled:
		return nil
	case Disabled:
		return failure("DisabledException", "%s is disabled.", k.arn)
	}
	return failure("KMSInvalidStateException", "%s %s", k.arn, or(words[k.state], "is in state "+k.state))
}

// seal makes a blob with the newest material.
func (k *key) seal(plain []byte, ec map[string]string) []byte {
	m := k.family.current
	blob := append(make([]byte, 0, BlobOverhead+len(plain)), blobPrefix...)
	blob = append(blob, m.id[:]...)
	blob = blob[:blobPrefixSize]
	_, _ = rand.Read(blob[blobPrefixSize-fillerSize:]) // never fails (crypto/rand)
	return m.aead().Seal(blob, nil, plain, blobAAD(blob, ec))
}

func (m *material) aead() cipher.AEAD {
	b, err := aes.NewCipher(m.secret)
	if err != nil {
		panic(err) // the secret has 32 bytes
	}
	a, err := cipher.NewGCMWithRandomNonce(b)
	if err != nil {
		panic(err)
	}
	return a
}

func blobAAD(prefix []byte, ec map[string]string) []byte {
	aad := append([]byte(nil), prefix...)
	for _, n := range slices.Sorted(maps.Keys(ec)) {
		for _, v := range []string{n, ec[n]} {
			aad = append(binary.BigEndian.AppendUint32(aad, uint32(len(v))), v...)
		}
	}
	return aad
}

// materialOf finds what a blob was sealed with, or nil.
func (s *Server) materialOf(blob []byte) *material {
	if len(blob) < BlobOverhead || string(blob[:len(blobPrefix)]) != blobPrefix {
		return nil
	}
	return s.materials[[materialIDSize]byte(blob[len(blobPrefix):])]
}

// open opens a blob with a key, or says as AWS does why not.
func (k *key) open(m *material, blob []byte, ec map[string]string) ([]byte, *apiError) {
	if m == nil {
		return nil, failure("InvalidCiphertextException", "")
	}
	if m.family != k.family {
		return nil, failure("IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
	}
	plain, err := m.aead().Open(nil, nil, blob[blobPrefixSize:], blobAAD(blob[:blobPrefixSize], ec))
	if err != nil {
		return nil, failure("InvalidCiphertextException", "")
	}
	return plain, nil
}
