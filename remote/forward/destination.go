package forward

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Destination is where an [Egress] may connect to: a host and a TCP port, in one
// spelling only, so that equal ones are the same string.
type Destination struct {
	host string // lower case; an address in its shortest form, without brackets
	port uint16
}

// ParseDestination reads HOST:PORT with a name or an IP address. There are no
// wildcards, no zones, and no names that some resolvers read as an address ("127.1").
func ParseDestination(s string) (Destination, error) {
	fail := func(want string) (Destination, error) {
		return Destination{}, fmt.Errorf("destination is %.300q, want %s", s, want)
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fail("HOST:PORT, an IPv6 address in brackets")
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] == '0' {
		return fail("a port from 1 to 65535")
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() || ip.Is4In6() {
			return fail("the address of one host, without a zone")
		}
		return Destination{ip.String(), uint16(n)}, nil
	}
	lower := strings.ToLower(host)
	if !isHostname(lower) || len(lower) != len(host) { // the Kelvin sign is a k in lower case, and longer
		return fail("a host's name of letters, digits, hyphens and dots, or its address: no wildcards")
	}
	return Destination{lower, uint16(n)}, nil
}

// isHostname knows what RFC 1123 2.1 allows, and the underscore that some have. The last
// label has a letter: a name cannot be taken for an address.
func isHostname(s string) bool {
	if len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return strings.ContainsAny(labels[len(labels)-1], "abcdefghijklmnopqrstuvwxyz")
}

// String is HOST:PORT.
func (d Destination) String() string { return net.JoinHostPort(d.host, strconv.Itoa(int(d.port))) }

// IsLocal reports that d is this machine by its own words, not by a resolver's.
func (d Destination) IsLocal() bool {
	ip, err := netip.ParseAddr(d.host)
	return err == nil && ip.IsLoopback() || d.host == localhost
}

// localhost is the one name that is not looked up: it is 127.0.0.1.
const localhost = "localhost"
