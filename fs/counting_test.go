package fs

import (
	"reflect"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
)

// Every request that has an answer is counted, and handed on to the file system
// beneath: whatever go-fuse may add to its interface is missed here.
func TestEveryRequestIsCounted(t *testing.T) {
	quiet := map[string]bool{"String": true, "SetDebug": true, "Init": true, "OnUnmount": true}
	var a answers
	c := &countingFS{fuse.NewDefaultRawFileSystem(), &a}
	v := reflect.ValueOf(c)
	raw := reflect.TypeFor[fuse.RawFileSystem]()
	kinds := map[string]bool{}
	for i := range raw.NumMethod() {
		m := raw.Method(i)
		if quiet[m.Name] || m.Name == "Writev" {
			continue
		}
		var args []reflect.Value
		for j := range m.Type.NumIn() {
			p := m.Type.In(j)
			if p.Kind() == reflect.Pointer {
				args = append(args, reflect.New(p.Elem()))
			} else {
				args = append(args, reflect.Zero(p))
			}
		}
		before := counts(&a)
		v.MethodByName(m.Name).Call(args)
		after := counts(&a)
		require.Len(t, after, len(before)+1, "%s is not counted, or as another", m.Name)
		for k := range after {
			kinds[k] = true
		}
	}
	require.Len(t, kinds, int(requestKinds), "each kind under its own name")
}

func counts(a *answers) map[string]int64 {
	var s Stats
	a.addTo(&s)
	n := map[string]int64{}
	for _, r := range s.Requests {
		n[r.Op] += r.N
	}
	return n
}

// A WRITE in pieces counts once, by whoever answers it.
func TestAnswersByErrno(t *testing.T) {
	var a answers
	c := &countingFS{fuse.NewDefaultRawFileSystem(), &a}
	_, code := c.Writev(nil, &fuse.WriteIn{}, [][]byte{{1}, {2}})
	require.Equal(t, fuse.ENOSYS, code)
	require.Empty(t, counts(&a))
	a.note(reqRead, fuse.Status(syscall.EBADMSG))
	a.note(reqOpen, fuse.OK)
	a.note(reqOpen, fuse.Status(5000))
	var s Stats
	a.addTo(&s)
	require.Equal(t, []RequestCount{{"OPEN", "OK", 1}, {"OPEN", "other", 1}, {"READ", "EBADMSG", 1}}, s.Requests)
	require.EqualValues(t, 1, s.Damaged)
}
