package guestapi

import (
	"context"

	"tdx-agent/measure"
)

// Guest is what the API asks of the agent. Its methods are called concurrently and
// must return soon after ctx ends. Errors reach the caller as text; which status and
// exit status they get is decided in one place, see [ExitHeader].
type Guest interface {
	// Evidence makes a quote that carries rd, with the log that explains it.
	Evidence(ctx context.Context, rd measure.ReportData, caller Caller) (*measure.Evidence, error)
	// Info describes this VM. SDKs allow it 500 ms, so it never takes a quote.
	Info(ctx context.Context) (Info, error)
	// Emit records an event in RTMR3. The name and payload have passed
	// [CheckEvent].
	Emit(ctx context.Context, name string, payload []byte, caller Caller) error
	// GPU returns the NVIDIA attestation of this boot as nvattest wrote it, or ""
	// when there is none.
	GPU() string
}

// Info is the answer to the Info method. Empty fields are legal and are sent as
// empty strings, except TCBInfo: SDKs parse it, so it must be a JSON object.
type Info struct {
	AppID           []byte // 20 bytes
	InstanceID      []byte // 20 bytes, or empty when the app-compose asks for none
	AppCert         string // PEM chain, or "" while there is none
	TCBInfo         string // from [TCBInfo.Format]
	AppName         string
	DeviceID        []byte // 32 bytes
	MRAggregated    []byte // 32 bytes
	OSImageHash     []byte // 32 bytes; a claim of the host until a verifier proves it
	KeyProviderInfo string // payload of the key-provider event
	ComposeHash     []byte // 32 bytes
	VMConfig        string // as the host gave it
	CloudVendor     string
	CloudProduct    string
}

func (i *Info) fields() message {
	return message{
		{"app_id", 1, &i.AppID},
		{"instance_id", 2, &i.InstanceID},
		{"app_cert", 3, &i.AppCert},
		{"tcb_info", 4, &i.TCBInfo},
		{"app_name", 5, &i.AppName},
		{"device_id", 8, &i.DeviceID},
		{"mr_aggregated", 9, &i.MRAggregated},
		{"os_image_hash", 10, &i.OSImageHash},
		{"key_provider_info", 12, &i.KeyProviderInfo},
		{"compose_hash", 13, &i.ComposeHash},
		{"vm_config", 14, &i.VMConfig},
		{"cloud_vendor", 15, &i.CloudVendor},
		{"cloud_product", 16, &i.CloudProduct},
	}
}

// Surface is which of dstack's services a socket speaks.
type Surface int

// The surfaces. The zero Surface has no methods.
const (
	Dstack Surface = iota + 1 // service DstackGuest, at /<Method>
	Tappd                     // service Tappd, at /prpc/[Tappd.]<Method>
	// Worker is the external service of the same name, at /prpc/[Worker.]<Method>, for
	// callers who may be anybody.
	Worker
)

// String returns the name of the service in dstack's protocol.
func (s Surface) String() string {
	switch s {
	case Dstack:
		return "DstackGuest"
	case Tappd:
		return "Tappd"
	case Worker:
		return "Worker"
	}
	return "no service"
}
