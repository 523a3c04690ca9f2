// Package sdktest has no code of its own. It makes dstack's Go SDK, with what the
// SDK's own tests need, part of this module, so that those tests can be run against
// an agent without a checkout of dstack:
//
//	DSTACK_SIMULATOR_ENDPOINT=D/dstack.sock TAPPD_SIMULATOR_ENDPOINT=D/tappd.sock \
//	  go test -count=1 github.com/Dstack-TEE/dstack/sdk/go/dstack github.com/Dstack-TEE/dstack/sdk/go/tappd
package sdktest

import (
	_ "github.com/Dstack-TEE/dstack/sdk/go/dstack"
	_ "github.com/Dstack-TEE/dstack/sdk/go/tappd"
)
