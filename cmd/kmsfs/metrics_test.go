package main

import (
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestMetricsConnectionsAreFew: whoever connects and says nothing takes few of the
// daemon's descriptors, and nothing once he is gone.
func TestMetricsConnectionsAreFew(t *testing.T) {
	server := metricsServer(http.NotFoundHandler())
	server.ReadTimeout = 0 // which would close them all
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	url := "http://" + l.Addr().String() + "/"
	go server.Serve(l)
	defer server.Close()
	var refused atomic.Int64
	var conns []net.Conn
	for range 3 * metricsConns {
		c, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		conns = append(conns, c)
		go func() {
			if _, err := c.Read(make([]byte, 1)); err == io.EOF {
				refused.Add(1)
			}
		}()
	}
	eventually(t, "only a few are kept", func() bool { return refused.Load() == 2*metricsConns })
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "others are let in again", func() bool {
		r, err := (&http.Client{Timeout: time.Second}).Get(url)
		if err != nil {
			return false
		}
		defer r.Body.Close()
		return r.StatusCode == http.StatusNotFound
	})
}
