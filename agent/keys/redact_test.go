package keys_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"tdx-agent/agent/keys"
)

// holder has secrets where fmt cannot call their methods.
type holder struct {
	app     *keys.App
	derived keys.Derived
	secret  keys.Secret
	tls     keys.TLSKey
}

// TestNothingPrintsSecrets prints every type that holds key bytes in every way there
// is, and looks for the bytes in all of them.
func TestNothingPrintsSecrets(t *testing.T) {
	app := vectorApp(t)
	evidence, _ := attest(t)
	derived, err := app.Derive("vms", "signing", "")
	if err != nil {
		t.Fatal(err)
	}
	tls, err := app.IssueDerived(t.Context(), "vms", keys.CertificateRequest{}, evidence)
	if err != nil {
		t.Fatal(err)
	}
	var secrets []string
	for _, b := range [][]byte{unhex(vectorKey), derived.Bytes()} {
		secrets = append(secrets, hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), string(b), fmt.Sprint(b), fmt.Sprint(b[:8])[1:20], base64.StdEncoding.EncodeToString(b)[:40])
	}
	secrets = append(secrets, "PRIVATE KEY", string(tls.KeyPEM()[40:80]))
	var out bytes.Buffer
	for _, v := range []any{app, derived, *derived, derived.Secret, *derived.Secret, tls, *tls,
		holder{app, *derived, *derived.Secret, *tls}, []any{derived}, map[string]any{"k": *derived}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%p", "%c"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		if b, err := json.Marshal(v); err == nil {
			out.Write(b)
		}
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).Info("log", "value", v, "error", fmt.Errorf("with %v", v))
		}
	}
	for _, s := range secrets {
		if strings.Contains(out.String(), s) {
			t.Errorf("a secret is printed: %q", s)
		}
	}
	if n := strings.Count(out.String(), "[redacted]"); n < 100 {
		t.Errorf("only %d redacted values in\n%s", n, &out)
	}
}
