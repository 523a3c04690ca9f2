package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestVerifyServeLarge holds back large requests, and those that do not say how large
// they are, and has room for others meanwhile.
func TestVerifyServeLarge(t *testing.T) {
	server := httptest.NewServer(verifyHandler(nil))
	defer server.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// A body is asked for once its request has its place.
	client := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}}
	defer client.CloseIdleConnections()
	post := func(body io.Reader, length int64) int {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/verify", body)
		if err != nil {
			t.Error(err)
			return 0
		}
		r.ContentLength = length
		r.Header.Set("Expect", "100-continue")
		answer, err := client.Do(r)
		if err != nil {
			return 0
		}
		answer.Body.Close()
		return answer.StatusCode
	}
	var writers []*io.PipeWriter
	done := make(chan int)
	for i := range maxLargeVerifications {
		body, w := io.Pipe()
		writers = append(writers, w)
		length := int64(-1)
		if i == 0 {
			length = largeVerifyBody + 1
		}
		go func() { done <- post(body, length) }()
		if _, err := w.Write([]byte("{")); err != nil {
			t.Fatal(err)
		}
	}
	if status := post(strings.NewReader(strings.Repeat(" ", largeVerifyBody+1)), largeVerifyBody+1); status != http.StatusServiceUnavailable {
		t.Errorf("a large request beside as many as there may be: status %d, want 503", status)
	}
	if status := post(strings.NewReader("{}"), 2); status != http.StatusOK {
		t.Errorf("a small request beside large ones: status %d", status)
	}
	for _, w := range writers {
		w.CloseWithError(io.ErrUnexpectedEOF)
	}
	for range writers {
		<-done
	}
}
