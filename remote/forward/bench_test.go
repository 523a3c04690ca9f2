package forward_test

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"tdx-agent/remote/forward"
)

// BenchmarkEgress sends bytes to a TCP server that drops them, and opens connections to it:
// directly, which is the floor, and by way of an Egress in the same process.
func BenchmarkEgress(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(io.Discard, c)
				c.Write([]byte{1}) // all is here
			}()
		}
	}()
	address := l.Addr().String()
	d, err := forward.ParseDestination(address)
	if err != nil {
		b.Fatal(err)
	}
	socket := filepath.Join(b.TempDir(), "s")
	egress, err := net.Listen("unix", socket)
	if err != nil {
		b.Skip("the folder for temporary files has too long a path for a socket: ", err)
	}
	defer os.Remove(socket)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- forward.NewEgress(forward.EgressConfig{Allow: []forward.Destination{d}}).Serve(ctx, egress)
	}()
	defer func() { cancel(); <-done }()

	ways := []struct {
		name string
		dial func(context.Context, string, string) (net.Conn, error)
	}{{"direct", new(net.Dialer).DialContext}, {"egress", forward.Through(socket)}}
	for _, way := range ways {
		b.Run("bulk/"+way.name, func(b *testing.B) {
			chunk := make([]byte, 1<<20)
			b.SetBytes(int64(len(chunk)))
			c, err := way.dial(ctx, "tcp", address)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			for b.Loop() {
				if _, err := c.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
			c.(interface{ CloseWrite() error }).CloseWrite()
			io.ReadFull(c, chunk[:1])
		})
	}
	for _, way := range ways {
		b.Run("open/"+way.name, func(b *testing.B) {
			for b.Loop() {
				c, err := way.dial(ctx, "tcp", address)
				if err != nil {
					b.Fatal(err)
				}
				c.(interface{ CloseWrite() error }).CloseWrite()
				io.ReadFull(c, make([]byte, 1))
				c.Close()
			}
		})
	}
}
