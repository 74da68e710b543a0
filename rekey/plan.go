package rekey

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"kmsfs/crypt"
	"kmsfs/volume"
)

// plan counts what is to be done. It changes nothing and calls no key service.
func (j *job) plan(ctx context.Context) (Plan, error) {
	t, links := newTally(), new(linksSeen)
	var mu sync.Mutex
	from := map[string]int{} // headers to change, by the key that is worked from
	change := newDistinct()  // what their copies hold, by that key
	verify := newDistinct()  // what is only verified
	err := j.each(ctx, j.walk, func(_ context.Context, it *volume.Item) error {
		f := find(j.tree, links, it, false)
		if f.out == "" {
			var e edit
			e, f.out, f.err = j.edit(f.h)
			mu.Lock()
			switch {
			case f.again:
			case f.out == "":
				from[j.way(e)]++
				change.add(j.way(e), f.h, e.from[0].label)
			case f.out == Already && j.verifies(f.h):
				verify.add(j.o.Key, f.h, j.o.Key)
			}
			mu.Unlock()
			if f.empty && f.out != "" {
				f.out, f.err = Empty, nil
			}
		}
		t.add(it, f.out, f.err, f.h, f.again)
		return nil
	})
	p := Plan{Action: j.o.Action, Key: j.o.Key, From: j.old, Census: t.now}
	p.Bad, p.Strange, p.Failed = t.of(Bad), t.of(Strange), t.of(Failed)
	if err != nil {
		return p, err
	}
	p.Calls = verify.n[j.o.Key] * billed(j.o.Key)
	return p, j.price(&p, from, change.n)
}

// way names the key that an edit works from: the client's name, or the label of a
// replica of the new key, from which there is a way of its own.
func (j *job) way(e edit) string {
	if s := e.from[0]; j.relabels(s) {
		return s.label
	}
	return e.from[0].key
}

// verifies reports whether a header with nothing to be done has a copy to verify.
func (j *job) verifies(h *crypt.Header) bool {
	return j.o.Verify && j.o.Action != Remove && exact(h, j.o.Key) != nil
}

// price fills in routes, calls and price.
func (j *job) price(p *Plan, from, keys map[string]int) error {
	for _, key := range slices.Sorted(maps.Keys(from)) {
		route, err := j.route(key)
		if err != nil {
			return fmt.Errorf("moving from %s to %s: %w", key, j.o.Key, err)
		}
		p.Routes = append(p.Routes, PlanRoute{From: key, Route: route, Files: from[key], Keys: keys[key]})
		p.Change += from[key]
		p.Calls += keys[key] * route.Calls
	}
	if j.o.Shard.whole() {
		p.Calls += j.volumeCalls()
	}
	p.Price = float64(p.Calls) * pricePerCall
	return nil
}

// route is the way to a changed header, from a copy under key.
func (j *job) route(key string) (Route, error) {
	if j.o.Action == Remove {
		return Route{Name: "prove this copy, drop the other", Calls: billed(key), Plaintext: true}, nil
	}
	route, err := j.rw.Route(key, j.o.Key)
	if j.o.Verify {
		route.Calls += billed(j.o.Key)
		route.Name += ", verified by a decrypt"
		route.Plaintext = true
	}
	return route, err
}

// volumeCalls is what the volume key's own header costs.
func (j *job) volumeCalls() int {
	h := j.tree.Header()
	if j.o.Action == Remove {
		if from := j.sources(h); len(from) > 0 {
			return billed(from[0].key)
		}
		return 0
	}
	from := j.volumeSources(h)
	if len(from) == 0 {
		return 0
	}
	route, err := j.rw.Route(from[0].key, j.o.Key)
	if err != nil {
		return 0
	}
	if route.Calls == 0 { // proven then
		return billed(j.o.Key)
	}
	return route.Calls
}
