package fs

import (
	"context"
	"errors"
	"syscall"

	"kmsfs/crypt"
)

// errnos is the one table from error to errno (DESIGN section 5). ENOENT is not
// in it: a key service that fails must never make a file look absent.
var errnos = []struct {
	err   error
	errno syscall.Errno
}{
	{crypt.ErrInterrupted, syscall.EINTR},
	{context.Canceled, syscall.EINTR},
	{crypt.ErrKeyDenied, syscall.EACCES},
	{crypt.ErrKeyDisabled, syscall.EKEYREVOKED},
	{crypt.ErrWiped, syscall.EKEYREVOKED}, // the lease ended in the middle of it
	{crypt.ErrKeyNotFound, syscall.ENOKEY},
	{crypt.ErrKeyRejected, syscall.EKEYREJECTED},
	{crypt.ErrKeyTimeout, syscall.ETIMEDOUT},
	{context.DeadlineExceeded, syscall.ETIMEDOUT},
	{crypt.ErrKeyUnavailable, syscall.EAGAIN},
	{crypt.ErrForeign, syscall.EBADMSG},
	{crypt.ErrNoHeader, syscall.EBADMSG},
	{crypt.ErrDamaged, syscall.EBADMSG},
	{crypt.ErrTooLarge, syscall.EFBIG},
	{errors.ErrUnsupported, syscall.EOPNOTSUPP},
}

// errnoOf finds the errno of an error; known is false if it had to make one up.
func errnoOf(err error) (errno syscall.Errno, known bool) {
	if err == nil {
		return 0, true
	}
	// A bare errno is the common case, and says most: EOPNOTSUPP is not to be
	// taken for something else that matches errors.ErrUnsupported.
	if e, ok := err.(syscall.Errno); ok {
		return e, true
	}
	for _, row := range errnos {
		if errors.Is(err, row.err) {
			return row.errno, true
		}
	}
	if errors.As(err, &errno) && errno != 0 {
		return errno, true
	}
	return syscall.EIO, false
}

// keyFailures are worth a line in the log though the caller gets an errno: only
// the log can name the KMS key, the IAM action and what to do next.
var keyFailures = []error{
	crypt.ErrKeyDenied, crypt.ErrKeyDisabled, crypt.ErrKeyNotFound, crypt.ErrKeyRejected,
	crypt.ErrKeyTimeout, crypt.ErrKeyUnavailable, crypt.ErrForeign, crypt.ErrNoHeader, crypt.ErrDamaged,
}

// errno turns an error of a request on n into its errno, and logs what a user
// could not find out otherwise.
func (n *node) errno(op string, err error) syscall.Errno {
	if err == nil {
		return 0
	}
	errno, known := errnoOf(err)
	if !known || isAny(err, keyFailures) {
		n.fs.log.failed(op, n, err)
	}
	n.fs.stats.failed(errno)
	return errno
}

func isAny(err error, list []error) bool {
	if _, bare := err.(syscall.Errno); bare {
		return false
	}
	for _, e := range list {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ok is success, as go-fuse wants it.
const ok = syscall.Errno(0)
