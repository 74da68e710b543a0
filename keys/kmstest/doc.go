// Package kmstest is a loopback AWS KMS for tests and for trying things out
// without an account. It speaks the JSON 1.1 protocol that SDKs speak, checks
// SigV4 signatures, and answers in AWS's words: exceptions, messages, key
// states, and blobs of AWS's size (184 bytes for a 32-byte plaintext). It needs
// no network beyond the loopback interface and keeps everything in memory.
//
//	srv := kmstest.New(t, nil)           // stopped by t.Cleanup
//	srv.Setenv(t)                        // what the AWS SDK reads
//	key := srv.CreateKey("us-east-1")    // an ARN
//	srv.SetState(key, kmstest.Disabled)  // now Decrypt fails as AWS's does
//	srv.Inject(kmstest.Fault{Op: "Decrypt", Code: "ThrottlingException", Times: 3})
//	require.Equal(t, 0, srv.Count("GenerateDataKey"))
//
// One server is every region: the region of a call is the one it was signed
// for. A single-region key exists in its own region only; replicas of a
// multi-Region key share its key material, so each opens the others' blobs.
//
// Where it is simpler than AWS: there are no key policies and grants, only
// rules per principal; key material is symmetric; deletion waits for ever; lists
// come in one page; every state but Enabled refuses cryptographic operations.
//
// server.go has the life of a server and the way of a request, ops.go the
// operations, store.go the keys, auth.go who may do what, fault.go what can be
// made to go wrong, log.go what was asked.
package kmstest
