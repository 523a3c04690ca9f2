package kmstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"time"

	"tdx-agent/measure"
	"tdx-agent/remote/ratls"
)

func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	method, ok := strings.CutPrefix(r.URL.Path, "/prpc/")
	method = strings.TrimPrefix(method, "KMS.")
	s.mu.Lock()
	s.requests = append(s.requests, method)
	s.mu.Unlock()
	if s.cfg.Delay != nil {
		s.cfg.Delay(r)
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 10<<20))
	if err == nil && (!ok || !r.URL.Query().Has("json")) {
		err = errors.New("want /prpc/<Method>?json")
	}
	var answer any
	if err == nil {
		answer, err = s.call(r, method, body)
	}
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		answer = map[string]string{"error": err.Error()}
	}
	text, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	if s.cfg.Answer != nil {
		text = s.cfg.Answer(method, text)
	}
	w.Write(text)
}

func (s *Server) call(r *http.Request, method string, body []byte) (any, error) {
	switch method {
	case "GetTempCaCert":
		key, err := s.temp.keyPEM()
		return map[string]string{"temp_ca_cert": s.temp.pem(), "temp_ca_key": key, "ca_cert": s.root.pem()}, err
	case "GetAppKey":
		return s.getAppKey(r, body)
	case "SignCert":
		return s.signCert(r, body)
	}
	return nil, fmt.Errorf("service not found: %s", method)
}

func (s *Server) getAppKey(r *http.Request, body []byte) (any, error) {
	var request struct {
		APIVersion int     `json:"api_version"`
		VMConfig   *string `json:"vm_config"`
	}
	if err := json.Unmarshal(body, &request); err != nil || request.APIVersion > 1 || request.VMConfig == nil {
		return nil, fmt.Errorf("request %s (%v)", body, err)
	}
	if len(r.TLS.PeerCertificates) == 0 {
		return nil, errors.New("no attestation provided")
	}
	cert := r.TLS.PeerCertificates[0]
	attested, err := ratls.Parse(cert)
	if err != nil {
		return nil, err
	}
	id, err := s.guest(r.Context(), attested.Evidence, attested.ReportData)
	if err != nil {
		return nil, err
	}
	disk, err := s.dhSecret(string(id.AppID) + string(id.InstanceID) + "app-disk-crypt-key")
	if err != nil {
		return nil, err
	}
	env, err := s.dhSecret(string(id.AppID) + "env-encrypt-key")
	if err != nil {
		return nil, err
	}
	key, signature, err := s.AppKey(id.AppID)
	return map[string]string{"ca_cert": s.root.pem(), "disk_crypt_key": disk, "env_crypt_key": env, "k256_key": hex.EncodeToString(key),
		"k256_signature": hex.EncodeToString(signature), "tproxy_app_id": "", "gateway_app_id": "", "os_image_hash": hex.EncodeToString(measure.OSImageHash(*request.VMConfig))}, err
}

func (s *Server) signCert(r *http.Request, body []byte) (any, error) {
	var request struct {
		APIVersion int `json:"api_version"`
		CSR        string
		Signature  string
		VMConfig   *string `json:"vm_config"`
	}
	if err := json.Unmarshal(body, &request); err != nil || request.APIVersion != 2 || request.VMConfig == nil {
		return nil, fmt.Errorf("request %.200s (%v)", body, err)
	}
	encoded, err := hex.DecodeString(request.CSR)
	if err != nil {
		return nil, err
	}
	signature, err := hex.DecodeString(request.Signature)
	if err != nil {
		return nil, err
	}
	csr, err := parseCSR(encoded)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(encoded)
	if !ecdsa.VerifyASN1(csr.key, digest[:], signature) {
		return nil, errors.New("invalid signature")
	}
	chain, err := s.issue(r.Context(), csr)
	return map[string][]string{"certificate_chain": chain}, err
}

// issue signs a certificate as dstack's KMS does: by an authority of the application,
// which is derived from the root key.
func (s *Server) issue(ctx context.Context, csr *request) ([]string, error) {
	rd := ratls.ReportData(csr.spki)
	attestation, err := measure.ParseAttestation(csr.attestation)
	if err != nil {
		return nil, err
	}
	ev, err := attestation.Evidence()
	if err != nil {
		return nil, err
	}
	id, err := s.guest(ctx, ev, rd)
	if err != nil {
		return nil, err
	}
	key, err := s.derive(string(id.AppID) + "app-ca")
	if err != nil {
		return nil, err
	}
	appID, err := appIDExtension(id.AppID)
	if err != nil {
		return nil, err
	}
	ca, err := newAuthority("Dstack App CA", key, 0, s.root, s.cfg.Now(), appID, ratls.UsageExtension(ratls.UsageAppCA))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: csr.subject}, NotBefore: csr.notBefore, NotAfter: csr.notAfter, SerialNumber: big.NewInt(9),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: []pkix.Extension{appID, ratls.UsageExtension(ratls.UsageApp)}}
	if csr.notAfter.IsZero() {
		template.NotAfter = s.cfg.Now().Add(3650 * 24 * time.Hour)
	}
	for _, name := range csr.altNames {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	for i, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if csr.flags[i] {
			template.ExtKeyUsage = append(template.ExtKeyUsage, usage)
		}
	}
	if csr.flags[2] {
		more, err := ratls.Extensions(ev, csr.spki)
		if err != nil {
			return nil, err
		}
		template.ExtraExtensions = append(template.ExtraExtensions, more...)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, csr.key, ca.key)
	return []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), ca.pem(), s.root.pem()}, err
}

// appIDExtension is the issuer's word of an application's id.
func appIDExtension(id []byte) (pkix.Extension, error) {
	if len(id) > 127 {
		return pkix.Extension{}, errors.New("the application's id is too long")
	}
	return pkix.Extension{Id: ratls.OIDAppID, Value: append([]byte{4, byte(len(id))}, id...)}, nil
}

// request is a certificate request.
type request struct {
	spki, attestation   []byte
	key                 *ecdsa.PublicKey
	subject             string
	altNames            []string
	flags               [4]bool // server, client, quote, application info
	notBefore, notAfter time.Time
}

// parseCSR reads dstack's certificate request of version 2.
func parseCSR(b []byte) (*request, error) {
	r := &scale{b: b}
	if words := r.bytes(); string(words) != "please sign cert:" {
		return nil, fmt.Errorf("invalid confirm word %.40q", words)
	}
	csr := &request{spki: r.bytes(), notBefore: firstDay}
	if r.byte() != 0 {
		return nil, errors.New("it has an organisation")
	}
	csr.subject = string(r.bytes())
	for range r.size() {
		if r.err != nil {
			break
		}
		csr.altNames = append(csr.altNames, string(r.bytes()))
	}
	for i := range csr.flags {
		csr.flags[i] = r.byte() == 1
	}
	for _, t := range []*time.Time{&csr.notBefore, &csr.notAfter} {
		if r.byte() == 1 {
			*t = time.Unix(int64(binary.LittleEndian.Uint64(r.take(8))), 0)
		}
	}
	csr.attestation = r.b
	if r.err != nil {
		return nil, r.err
	}
	public, err := x509.ParsePKIXPublicKey(csr.spki)
	if err != nil {
		return nil, err
	}
	var ok bool
	if csr.key, ok = public.(*ecdsa.PublicKey); !ok {
		return nil, errors.New("unsupported algorithm")
	}
	return csr, nil
}

// scale reads the SCALE codec.
type scale struct {
	b   []byte
	err error
}

func (r *scale) take(n int) []byte {
	if n > len(r.b) {
		r.err, r.b = errors.New("the request ends early"), nil
		return make([]byte, min(n, 8))
	}
	part := r.b[:n]
	r.b = r.b[n:]
	return part
}

func (r *scale) byte() byte { return r.take(1)[0] }

func (r *scale) size() int {
	first := r.byte()
	switch first & 3 {
	case 0:
		return int(first >> 2)
	case 1:
		return int(first)>>2 | int(r.byte())<<6
	case 2:
		rest := r.take(3)
		return int(first)>>2 | int(rest[0])<<6 | int(rest[1])<<14 | int(rest[2])<<22
	}
	r.err = errors.New("a size of more than 2^30")
	return 0
}

func (r *scale) bytes() []byte { return r.take(r.size()) }
