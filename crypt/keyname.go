package crypt

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"sync"
)

// A KMS key is named by its ARN, a local key by "local:NAME". In a header an
// ARN is packed where it can be, so that one copy fits beside ext4's own fields
// in a 512-byte inode:
//
//	form (1) | partition (1) | region length (1) | region | account (5, big-endian) | key id (16)
//
// form 1 = an id in UUID form, form 2 = "mrk-" and 32 hexadecimal digits. Every
// other name is form 0 followed by the text. A name that would pack is refused
// in text form: each name has one encoding.

// LocalPrefix starts the name of a local key.
const LocalPrefix = "local:"

const (
	providerAWS   = 1
	providerLocal = 2

	formText = 0
	formUUID = 1
	formMRK  = 2

	maxKeyName = 250 // bytes of text
)

// partitions that pack; their index is stored. Append only.
var partitions = []string{"aws", "aws-cn", "aws-us-gov", "aws-iso", "aws-iso-b", "aws-iso-e", "aws-iso-f", "aws-eusc"}

// An ARN is a KMS key ARN taken apart:
// arn:PARTITION:kms:REGION:ACCOUNT:key/ID (AWS, "ARNs for KMS keys").
type ARN struct {
	Partition, Region, Account string
	Resource                   string // "key/ID" or "alias/NAME"
}

// ParseARN takes a KMS key or alias ARN apart.
func ParseARN(s string) (ARN, error) {
	f := strings.SplitN(s, ":", 6)
	if len(s) > maxKeyName || len(f) != 6 || f[0] != "arn" || f[2] != "kms" || !plainWord(f[1]) || !plainWord(f[3]) || !plainWord(f[4]) {
		return ARN{}, fmt.Errorf("%q is not the ARN of a KMS key (arn:aws:kms:REGION:ACCOUNT:key/ID)", s)
	}
	a := ARN{Partition: f[1], Region: f[3], Account: f[4], Resource: f[5]}
	kind, id, _ := strings.Cut(a.Resource, "/")
	if (kind != "key" && kind != "alias") || id == "" || !printable(id) {
		return ARN{}, fmt.Errorf("%q names no key: an ARN ends in key/ID or alias/NAME", s)
	}
	return a, nil
}

// String puts the ARN together again.
func (a ARN) String() string {
	return "arn:" + a.Partition + ":kms:" + a.Region + ":" + a.Account + ":" + a.Resource
}

// ID is the key id, or "" for an alias.
func (a ARN) ID() string {
	id, ok := strings.CutPrefix(a.Resource, "key/")
	if !ok {
		return ""
	}
	return id
}

// IsAlias reports whether the ARN names an alias and not a key.
func (a ARN) IsAlias() bool { return strings.HasPrefix(a.Resource, "alias/") }

// IsMultiRegion reports whether the key is a multi-Region key.
func (a ARN) IsMultiRegion() bool { return strings.HasPrefix(a.Resource, "key/mrk-") }

// SameKey reports whether two key names mean the same KMS key: equal, or two
// multi-Region keys that agree in partition, account and id (replicas share
// their key material, whatever the region).
func SameKey(a, b string) bool {
	if a == b {
		return true
	}
	x, errX := ParseARN(a)
	y, errY := ParseARN(b)
	return errX == nil && errY == nil && x.IsMultiRegion() &&
		x.Partition == y.Partition && x.Account == y.Account && x.Resource == y.Resource
}

// CheckKeyName says whether s can stand in a header: a key ARN (not an alias)
// or "local:NAME".
func CheckKeyName(s string) error {
	if name, ok := strings.CutPrefix(s, LocalPrefix); ok {
		if name == "" || len(s) > maxKeyName || !plainWord(name) {
			return fmt.Errorf("%q is not the name of a local key: after %q use letters, digits, '.', '_' and '-'", s, LocalPrefix)
		}
		return nil
	}
	a, err := ParseARN(s)
	if err == nil && a.IsAlias() {
		err = fmt.Errorf("%q is an alias, which can be pointed elsewhere: resolve it to its key ARN first", s)
	}
	return err
}

func plainWord(s string) bool {
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return s != "" && s[0] != '.'
}

func printable(s string) bool {
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}

func packKeyName(s string) (provider byte, name []byte, err error) {
	if err := CheckKeyName(s); err != nil {
		return 0, nil, err
	}
	if strings.HasPrefix(s, LocalPrefix) {
		return providerLocal, append([]byte{formText}, s[len(LocalPrefix):]...), nil
	}
	a, _ := ParseARN(s)
	if packed := a.pack(); packed != nil {
		return providerAWS, packed, nil
	}
	return providerAWS, append([]byte{formText}, s...), nil
}

// pack returns the packed form, or nil if the ARN has none.
func (a ARN) pack() []byte {
	form, digits := byte(formUUID), ""
	if id, ok := strings.CutPrefix(a.ID(), "mrk-"); ok {
		form, digits = formMRK, id
	} else if f := strings.Split(a.ID(), "-"); len(f) == 5 && len(f[0]) == 8 && len(f[1]) == 4 && len(f[2]) == 4 && len(f[3]) == 4 {
		digits = strings.Join(f, "")
	}
	id, err := hex.DecodeString(digits)
	if err != nil || len(id) != 16 || hex.EncodeToString(id) != digits {
		return nil
	}
	partition := index(partitions, a.Partition)
	account, err := strconv.ParseUint(a.Account, 10, 40)
	if partition < 0 || err != nil || len(a.Account) != 12 || a.Account[0] == '+' {
		return nil
	}
	out := append([]byte{form, byte(partition), byte(len(a.Region))}, a.Region...)
	out = append(out, byte(account>>32), byte(account>>24), byte(account>>16), byte(account>>8), byte(account))
	return append(out, id...)
}

func index(list []string, s string) int {
	for i, v := range list {
		if v == s {
			return i
		}
	}
	return -1
}

// unpacked remembers key names that were read before: a tree's headers name a few
// keys, over and over. It is bounded, for headers can name anything.
var unpacked struct {
	sync.RWMutex
	names map[string]string // guarded by the lock; by provider and packed form
}

const maxUnpacked = 64

func unpackKeyName(provider byte, name []byte) (string, error) {
	var buf [maxKeyName + 2]byte
	id := append(append(buf[:0], provider), name...)
	unpacked.RLock()
	s, known := unpacked.names[string(id)]
	unpacked.RUnlock()
	if known {
		return s, nil
	}
	s, err := unpackNewKeyName(provider, name)
	if err != nil {
		return "", err
	}
	unpacked.Lock()
	defer unpacked.Unlock()
	if len(unpacked.names) >= maxUnpacked || unpacked.names == nil {
		unpacked.names = make(map[string]string)
	}
	unpacked.names[string(id)] = s
	return s, nil
}

func unpackNewKeyName(provider byte, name []byte) (string, error) {
	if len(name) < 2 || len(name) > maxKeyName+1 {
		return "", fmt.Errorf("a key name of %d bytes", len(name))
	}
	var s string
	switch {
	case name[0] == formText && provider == providerLocal:
		s = LocalPrefix + string(name[1:])
	case name[0] == formText && provider == providerAWS:
		s = string(name[1:])
	case provider == providerAWS:
		a, err := unpackARN(name)
		if err != nil {
			return "", err
		}
		s = a.String()
	default:
		return "", fmt.Errorf("unknown provider %d or form %d", provider, name[0])
	}
	// One name, one encoding: what would be written differently was not
	// written by us.
	p, again, err := packKeyName(s)
	if err != nil || p != provider || string(again) != string(name) {
		return "", fmt.Errorf("key name in a form that is never written")
	}
	return s, nil
}

func unpackARN(b []byte) (a ARN, err error) {
	if len(b) < 3 || len(b) != 3+int(b[2])+5+16 || int(b[1]) >= len(partitions) {
		return a, fmt.Errorf("malformed packed key name")
	}
	form, partition, region, b := b[0], partitions[b[1]], string(b[3:3+int(b[2])]), b[3+int(b[2]):]
	account := uint64(b[0])<<32 | uint64(b[1])<<24 | uint64(b[2])<<16 | uint64(b[3])<<8 | uint64(b[4])
	id := hex.EncodeToString(b[5:])
	switch form {
	case formUUID:
		id = id[:8] + "-" + id[8:12] + "-" + id[12:16] + "-" + id[16:20] + "-" + id[20:]
	case formMRK:
		id = "mrk-" + id
	default:
		return a, fmt.Errorf("unknown key name form %d", form)
	}
	return ARN{Partition: partition, Region: region, Account: fmt.Sprintf("%012d", account), Resource: "key/" + id}, nil
}
