// Package cache remembers what was verified. A [Cache] is bounded, and its users put
// only what they have verified into it, so that junk cannot push anything out.
package cache

import "sync"

// Cache keeps between size and 2*size of the entries used last, in two generations:
// when the young one is full it becomes the old one. The zero value keeps nothing.
// For many goroutines.
type Cache[K comparable, V any] struct {
	size int // of a generation

	mu         sync.Mutex // guards what follows
	young, old map[K]V
	counts     Counts
}

// Counts says how many look-ups found an entry, and how many did not.
type Counts struct{ Hits, Misses uint64 }

// New returns an empty cache of size entries a generation.
func New[K comparable, V any](size int) *Cache[K, V] {
	return &Cache[K, V]{size: size}
}

// Get returns the entry of key, and whether there is one.
func (c *Cache[K, V]) Get(key K) (value V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if value, ok = c.young[key]; ok {
		c.counts.Hits++
		return value, true
	}
	if value, ok = c.old[key]; ok {
		c.counts.Hits++
		c.put(key, value)
		return value, true
	}
	c.counts.Misses++
	return value, false
}

// Counts returns how well the cache has done so far.
func (c *Cache[K, V]) Counts() Counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts
}

// Add sets the entry of key.
func (c *Cache[K, V]) Add(key K, value V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(key, value)
}

// Clear forgets every entry.
func (c *Cache[K, V]) Clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.young, c.old = nil, nil
}

// Len returns how many entries are held, an entry of both generations counting twice.
func (c *Cache[K, V]) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.young) + len(c.old)
}

func (c *Cache[K, V]) put(key K, value V) {
	if c.size < 1 {
		return
	}
	if _, known := c.young[key]; !known && len(c.young) >= c.size {
		c.old, c.young = c.young, nil
	}
	if c.young == nil {
		c.young = make(map[K]V)
	}
	c.young[key] = value
}
