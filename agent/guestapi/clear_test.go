package guestapi

import (
	"bytes"
	"net/http/httptest"
	"testing"
)

// TestAnswersWithKeysAreCleared: their memory is used again for other callers.
func TestAnswersWithKeysAreCleared(t *testing.T) {
	for _, secret := range []bool{true, false} {
		body := []byte(`{"key":"5a5a"}`)
		kept := body[:len(body):len(body)]
		w := httptest.NewRecorder()
		(&response{status: 200, media: mediaJSON, body: body, secret: secret, buffer: new([]byte)}).write(w)
		if w.Body.String() != `{"key":"5a5a"}` {
			t.Errorf("secret %v: the answer is %q", secret, w.Body)
		}
		if cleared := bytes.Equal(kept, make([]byte, len(kept))); cleared != secret {
			t.Errorf("secret %v: %q is left", secret, kept)
		}
	}
}
