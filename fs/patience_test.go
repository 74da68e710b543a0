package fs

import (
	"context"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
)

// asked is a context that counts who waits for it.
type asked struct {
	context.Context
	done int
}

func (a *asked) Done() <-chan struct{} {
	a.done++
	return a.Context.Done()
}

// A request that does not wait costs no goroutine and no timer.
func TestPatienceStartsNothingUnlessSomebodyWaits(t *testing.T) {
	parent := &asked{Context: context.Background()}
	ctx, cancel := within(parent, time.Hour)
	require.NoError(t, ctx.Err())
	end, has := ctx.Deadline()
	require.True(t, has)
	require.WithinDuration(t, time.Now().Add(time.Hour), end, time.Minute)
	require.Nil(t, ctx.Value("key"))
	cancel()
	require.ErrorIs(t, ctx.Err(), context.Canceled)
	require.Zero(t, parent.done)
	require.Nil(t, ctx.(*patience).real)
}

// It ends with the signal that interrupts its request, with its deadline, or with its
// request, whether somebody waited before or not, and says by which.
func TestPatienceEnds(t *testing.T) {
	for _, waits := range []bool{false, true} {
		signal := make(chan struct{})
		request := &fuse.Context{Cancel: signal}
		ctx, cancel := within(request, time.Hour)
		if waits {
			_ = ctx.Done()
		}
		close(signal)
		<-ctx.Done()
		require.ErrorIs(t, ctx.Err(), context.Canceled)
		require.Equal(t, context.Canceled, context.Cause(ctx))
		cancel()

		late, cancel := within(&fuse.Context{}, time.Millisecond)
		if waits {
			<-late.Done()
		}
		for late.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		require.ErrorIs(t, late.Err(), context.DeadlineExceeded)
		<-late.Done()
		require.Equal(t, context.DeadlineExceeded, context.Cause(late))
		cancel()

		ctx, cancel = within(&fuse.Context{}, time.Hour)
		if waits {
			_ = ctx.Done()
		}
		cancel()
		<-ctx.Done()
		require.ErrorIs(t, ctx.Err(), context.Canceled)

		ctx, cancel = within(&fuse.Context{}, time.Hour)
		child, end := context.WithCancel(ctx)
		cancel()
		<-child.Done()
		end()
	}
}
