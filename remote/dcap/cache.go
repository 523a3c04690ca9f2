package dcap

import "sync"

// cache keeps between size and 2*size of the entries used last, in two generations:
// when the young one is full it becomes the old one. The zero value keeps nothing.
// For many goroutines.
type cache[K comparable, V any] struct {
	size int // of a generation

	mu         sync.Mutex // guards what follows
	young, old map[K]V
}

func newCache[K comparable, V any](size int) *cache[K, V] {
	return &cache[K, V]{size: size}
}

func (c *cache[K, V]) get(key K) (value V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if value, ok = c.young[key]; ok {
		return value, true
	}
	if value, ok = c.old[key]; ok {
		c.put(key, value)
	}
	return value, ok
}

func (c *cache[K, V]) add(key K, value V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(key, value)
}

func (c *cache[K, V]) put(key K, value V) {
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
