package crypt

import "errors"

// What is wrong with stored bytes. Failed authentication is opaque on purpose:
// which check failed helps an attacker more than a reader.
var (
	// ErrDamaged says that stored bytes do not authenticate or are malformed.
	ErrDamaged = errors.New("stored data is damaged or was tampered with")
	// ErrNoHeader says that a file holds bytes but no header to open them with.
	ErrNoHeader = errors.New("the file has contents but no kmsfs header")
	// ErrForeign says that a header belongs to another volume.
	ErrForeign = errors.New("the header belongs to another volume")
	// ErrTooLarge says that an offset or a size is beyond what the format can store.
	ErrTooLarge = errors.New("the size is beyond what a kmsfs file can hold")
)

// What can go wrong while a data key is being asked for. Package keys wraps
// these with the KMS key, the operation and the cause; package fs turns them
// into an errno (DESIGN section 5).
var (
	// ErrKeyDenied: the principal may not use the KMS key, or has no credentials.
	ErrKeyDenied = errors.New("access to the KMS key was denied")
	// ErrKeyDisabled: the KMS key is disabled, pending deletion or pending import.
	ErrKeyDisabled = errors.New("the KMS key is disabled or pending deletion")
	// ErrKeyNotFound: there is no such KMS key, or no such region.
	ErrKeyNotFound = errors.New("the KMS key does not exist")
	// ErrKeyRejected: the key is not trusted, or cannot do what was asked.
	ErrKeyRejected = errors.New("the KMS key was rejected")
	// ErrKeyUnavailable: KMS throttled, failed or limited the call; try again.
	ErrKeyUnavailable = errors.New("KMS is unavailable")
	// ErrKeyTimeout: nothing answered within the deadline.
	ErrKeyTimeout = errors.New("KMS did not answer in time")
	// ErrInterrupted: the caller was interrupted while it waited for KMS.
	ErrInterrupted = errors.New("interrupted while waiting for KMS")
)
