package keys

import (
	"container/list"
	"context"
	"sync"
	"time"

	"kmsfs/crypt"
)

// An ask is a request about an intermediate key, whole: who sends the same again gets
// the same intermediate key. The id alone would not do: whoever writes the backing
// directory can put any blob under it.
type ask struct {
	op, key, to string // to = "" but for what wraps
	id          crypt.Identity
	blob        string
}

// A memo remembers what the key service answered about intermediate keys. Files that
// share one then cost one request; who asks while that is under way waits for it. It is
// bounded by count (the least recently used goes first) and by age, counted from the
// answer. It never remembers a failure.
type memo[V any] struct {
	max   int
	age   time.Duration // 0 = as long as there is room
	clone func(V) (V, error)
	wipe  func(V)
	// refused is why what a key answered may not be remembered now, or nil. Whoever
	// changes that calls drop afterwards.
	refused func(key string) error

	mu      sync.Mutex
	entries map[ask]*list.Element // guarded by mu
	recent  *list.List            // guarded by mu; of *told[V], most recently used first
	calls   map[ask]*memoCall     // guarded by mu
	sweeper *time.Timer           // guarded by mu; nil while nothing is remembered
	era     uint64                // guarded by mu; counts drops, so that what was asked before one is not kept after it
	closed  bool                  // guarded by mu
	hits    int64                 // guarded by mu
}

type told[V any] struct {
	ask   ask
	value V
	born  time.Time
}

// A memoCall is a request under way, which those who want the same wait for.
type memoCall struct {
	done  chan struct{} // closed when err is set
	tries *attempts     // of the one who asks; may be nil
	err   error
	ended bool // err came of the asker's own end: his signal, or his deadline
}

// newKeyMemo remembers intermediate keys; whoever gets one wipes it.
func newKeyMemo(max int, age time.Duration) *memo[*crypt.Key] {
	return newMemo(max, age, (*crypt.Key).Clone, (*crypt.Key).Wipe)
}

// newBlobMemo remembers blobs, which nobody changes.
func newBlobMemo(max int) *memo[[]byte] {
	return newMemo(max, 0, func(b []byte) ([]byte, error) { return b, nil }, func([]byte) {})
}

func newMemo[V any](max int, age time.Duration, clone func(V) (V, error), wipe func(V)) *memo[V] {
	return &memo[V]{max: max, age: age, clone: clone, wipe: wipe, refused: func(string) error { return nil },
		entries: map[ask]*list.Element{}, recent: list.New(), calls: map[ask]*memoCall{}}
}

// get returns the answer to a, and when it was given. If it is not remembered, request
// is called with the caller's own context, unless somebody else's is under way; one that
// ended with its context is made again by who waited for it and has time left.
func (m *memo[V]) get(ctx context.Context, a ask, request func() (V, error)) (v V, born time.Time, err error) {
	for {
		v, born, call, mine := m.enter(ctx, a)
		switch {
		case call == nil:
			return v, born, nil
		case mine:
			return m.ask(ctx, a, call, request)
		}
		joinAttempts(ctx, call.tries)
		select {
		case <-call.done:
		case <-ctx.Done():
			return v, born, contextError(ctx, a.op, a.key)
		}
		if call.err != nil && (!call.ended || ctx.Err() != nil) {
			return v, born, call.err
		}
	}
}

// has reports whether the answer to a is remembered. It is not a use.
func (m *memo[V]) has(a ask) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[a]
	return e != nil && !m.agedLocked(e.Value.(*told[V]))
}

// enter finds what is remembered (then there is no call), or else the call to wait for,
// which is the caller's to make if mine.
func (m *memo[V]) enter(ctx context.Context, a ask) (v V, born time.Time, call *memoCall, mine bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.entries[a]; e != nil {
		t := e.Value.(*told[V])
		own, err := m.clone(t.value)
		if err == nil && !m.agedLocked(t) {
			m.recent.MoveToFront(e)
			m.hits++
			return own, t.born, nil, false
		}
		if err == nil {
			m.wipe(own)
		}
		m.removeLocked(e)
	}
	if call = m.calls[a]; call != nil {
		return v, born, call, false
	}
	call = &memoCall{done: make(chan struct{}), tries: attemptsOf(ctx)}
	m.calls[a] = call
	return v, born, call, true
}

func (m *memo[V]) agedLocked(t *told[V]) bool { return m.age > 0 && time.Since(t.born) >= m.age }

// ask sends the request that others wait for.
func (m *memo[V]) ask(ctx context.Context, a ask, call *memoCall, request func() (V, error)) (v V, born time.Time, err error) {
	m.mu.Lock()
	era := m.era
	m.mu.Unlock()
	v, err = request()
	born = time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.calls, a)
	call.err, call.ended = err, ctx.Err() != nil || kindOf(err) == KindInterrupted
	if err == nil && !m.closed && era == m.era && m.max > 0 && m.refused(a.key) == nil {
		m.putLocked(a, v, born)
	}
	close(call.done)
	return v, born, err
}

func (m *memo[V]) putLocked(a ask, v V, born time.Time) {
	own, err := m.clone(v)
	if err != nil {
		return // no memory for another key: go on without remembering
	}
	m.entries[a] = m.recent.PushFront(&told[V]{a, own, born})
	for len(m.entries) > m.max {
		m.removeLocked(m.recent.Back())
	}
	if m.sweeper == nil && m.age > 0 {
		m.sweeper = time.AfterFunc(m.age, m.sweep)
	}
}

func (m *memo[V]) removeLocked(e *list.Element) {
	t := m.recent.Remove(e).(*told[V])
	delete(m.entries, t.ask)
	m.wipe(t.value)
}

// drop forgets what drop says of each request, and whatever is on its way.
func (m *memo[V]) drop(drop func(ask) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.era++
	m.dropLocked(func(t *told[V]) bool { return drop(t.ask) })
}

func (m *memo[V]) dropLocked(drop func(*told[V]) bool) {
	for e := m.recent.Front(); e != nil; {
		next := e.Next()
		if drop(e.Value.(*told[V])) {
			m.removeLocked(e)
		}
		e = next
	}
}

// sweep wipes what is too old also when nobody asks for it any more.
func (m *memo[V]) sweep() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweeper = nil
	m.dropLocked(m.agedLocked)
	if len(m.entries) > 0 {
		// As often as data keys are swept: what was opened together expires together.
		m.sweeper = time.AfterFunc(m.age/10, m.sweep)
	}
}

// close forgets everything for good.
func (m *memo[V]) close() {
	m.drop(func(ask) bool { return true })
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	if m.sweeper != nil {
		m.sweeper.Stop()
	}
}

// keys are those that what is remembered was answered by, each once.
func (m *memo[V]) keys() (list []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := map[string]bool{}
	for e := m.recent.Front(); e != nil; e = e.Next() {
		if key := e.Value.(*told[V]).ask.key; !seen[key] {
			seen[key] = true
			list = append(list, key)
		}
	}
	return list
}

func (m *memo[V]) counts() (hits int64, remembered int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.hits, len(m.entries)
}
