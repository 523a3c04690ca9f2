package cache_test

import (
	"testing"

	"tdx-agent/remote/cache"
)

func TestBoundAndOrder(t *testing.T) {
	c := cache.New[int, int](4)
	for i := range 100 {
		c.Add(i, i)
		if _, ok := c.Get(0); i < 4 && !ok {
			t.Fatalf("entry 0 is gone after %d", i)
		}
		if n := c.Len(); n > 8 {
			t.Fatalf("%d entries, want at most 8", n)
		}
		c.Get(1) // in use, so it stays
	}
	if v, ok := c.Get(1); !ok || v != 1 {
		t.Errorf("the entry in use is gone: %d %v", v, ok)
	}
	if _, ok := c.Get(2); ok {
		t.Error("an entry that nobody used is still there")
	}
	if v, ok := c.Get(99); !ok || v != 99 {
		t.Errorf("the newest entry is %d, %v", v, ok)
	}
	if n := c.Counts(); n != (cache.Counts{Hits: 201, Misses: 2}) {
		t.Errorf("counted %+v", n)
	}
	c.Clear()
	if _, ok := c.Get(1); ok || c.Len() != 0 {
		t.Error("Clear has left something")
	}
}

func TestZero(t *testing.T) {
	var c cache.Cache[string, int]
	c.Add("a", 1)
	if _, ok := c.Get("a"); ok {
		t.Error("the zero value remembers")
	}
}
