package main

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"kmsfs/config"
	"kmsfs/volume"
)

// A mount that has the lock and does not listen yet, or no longer, is waited for.
func TestReloadWaitsForAMountThatStartsOrEnds(t *testing.T) {
	c := newClient(t)
	dir, _ := c.volume()
	t.Setenv("XDG_RUNTIME_DIR", c.path("run"))
	id := volumeIDOf(t, dir)
	runtime := must(config.RuntimeDir())
	require.Equal(t, c.path("run"), filepath.Dir(runtime))
	starting := func() *volume.Volume {
		v, err := volume.Open(dir)
		require.NoError(t, err)
		require.NoError(t, v.Lock("mount on /mnt"))
		return v
	}
	reloading := func() <-chan error {
		done := make(chan error, 1)
		go func() { done <- reloadMounts(t.Context(), dir, id, nil) }()
		select {
		case err := <-done:
			require.Fail(t, "it did not wait", "%v", err)
		case <-time.After(300 * time.Millisecond):
		}
		return done
	}

	v := starting()
	done := reloading()
	asked := 0
	server, err := listenControl(runtime, id+".sock", func(context.Context, controlRequest) controlReply { asked++; return controlReply{OK: true} })
	require.NoError(t, err)
	require.NoError(t, <-done)
	require.Equal(t, 1, asked)
	server.Close()

	// It ends: nobody listens, then the lock is free.
	done = reloading()
	require.NoError(t, v.Close())
	require.NoError(t, <-done)

	// It ends in the middle of the answer.
	v = starting()
	server, err = listenControl(runtime, id+".sock", func(ctx context.Context, _ controlRequest) controlReply {
		<-ctx.Done()
		return controlReply{Error: "interrupted"}
	})
	require.NoError(t, err)
	done = reloading()
	server.Close()
	require.NoError(t, v.Close())
	require.NoError(t, <-done)

	// A refusal is final.
	v = starting()
	defer v.Close()
	server, err = listenControl(runtime, id+".sock", func(context.Context, controlRequest) controlReply { return controlReply{Error: "refused"} })
	require.NoError(t, err)
	defer server.Close()
	require.ErrorContains(t, reloadMounts(t.Context(), dir, id, nil), "refused")
}
