// Package keys knows the services that wrap data keys: AWS KMS and local keys.
//
// A Provider is one such service. NewAWS talks to KMS over the network, in the
// region that the key's ARN names; NewLocal reads key files from a directory
// and needs no network; NewRouter picks one of them by the key's name. A Ring
// is what the rest of the program uses for one volume: it opens the data key of
// a header and makes fresh ones, only ever under the keys that this client
// trusts. A Rewrapper moves a data key from one key to another.
//
// The network is needed when a file is opened whose data key is not cached, and
// when a file gets its first byte and no data key was fetched ahead; never for
// reading, writing, listing or deleting. Every call is bounded by a deadline
// and fails with an *Error, which names what was tried and on what; it unwraps
// to one of the sentinels of package crypt, from which the caller makes an
// errno or advice.
//
// Start with keys.go (the interface), ring.go (who may open what) and errors.go
// (what each failure means). The ring is built of decorators, one file each:
// flight.go makes concurrent calls for the same header one, cache.go remembers
// what was opened, ahead.go opens what is likely to be asked for next, pool.go
// fetches fresh keys ahead, counted.go counts. Where files share intermediate keys,
// mint.go makes data keys from one, and memo.go remembers them. pace.go finds how fast
// a job over a whole volume may call KMS. lease.go is what becomes of data keys when
// their KMS key is disabled or can't be reached, leases.go asks.
package keys
