package guestapi

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"tdx-agent/measure"
)

// TCBInfo is the content of the tcb_info field of Info.
type TCBInfo struct {
	MRTD         measure.Digest
	RTMR         [4]measure.Digest
	MRAggregated []byte // 32 bytes
	OSImageHash  []byte // 32 bytes
	ComposeHash  []byte // 32 bytes
	DeviceID     []byte // 32 bytes
	Events       []measure.Event
	AppCompose   string // the text of app-compose.json, to the byte
}

// Format returns the tcb_info text: JSON with an indent of two spaces. The event
// log in it is not stripped.
func (t *TCBInfo) Format() (string, error) {
	log, err := measure.FormatEventLog(t.Events, false)
	if err != nil {
		return "", fmt.Errorf("tcb_info: %w", err)
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	err = enc.Encode(struct {
		MRTD         measure.Digest  `json:"mrtd"`
		RTMR0        measure.Digest  `json:"rtmr0"`
		RTMR1        measure.Digest  `json:"rtmr1"`
		RTMR2        measure.Digest  `json:"rtmr2"`
		RTMR3        measure.Digest  `json:"rtmr3"`
		MRAggregated string          `json:"mr_aggregated"`
		OSImageHash  string          `json:"os_image_hash"`
		ComposeHash  string          `json:"compose_hash"`
		DeviceID     string          `json:"device_id"`
		EventLog     json.RawMessage `json:"event_log"`
		AppCompose   string          `json:"app_compose"`
	}{
		t.MRTD, t.RTMR[0], t.RTMR[1], t.RTMR[2], t.RTMR[3],
		hex.EncodeToString(t.MRAggregated), hex.EncodeToString(t.OSImageHash),
		hex.EncodeToString(t.ComposeHash), hex.EncodeToString(t.DeviceID),
		log, t.AppCompose,
	})
	if err != nil {
		return "", fmt.Errorf("tcb_info: %w", err)
	}
	return string(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}
