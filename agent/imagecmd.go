package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"tdx-agent/measure/image"
)

func newImage() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Calculate and explain the Reference Values of an OS image",
		Long: `Calculate MRTD and RTMR0 to RTMR2 from the files of an OS image and the
configuration of a VM, and explain how a real event log differs. No TD, no QEMU and
no network is needed.

Exit status 1 when something differs, 2 when the configuration is not modelled.`,
		Args:                       unknownCommand,
		RunE:                       needsSubcommand,
		SuggestionsMinimumDistance: 2,
	}
	cmd.AddCommand(newImageMeasure(), newImageExplain(), newImageFirmware(), newImageACPI(), newImageMaterial())
	return cmd
}

// longDashes lets the image commands be called as older tools are, with one dash before
// a long name: no image command has flags of one letter that could be meant.
func longDashes(args []string) []string {
	if len(args) == 0 || args[0] != "image" {
		return args
	}
	out := append([]string(nil), args...)
	for i, a := range out {
		if len(a) > 2 && a[0] == '-' && a[1] != '-' && (a[1] < '0' || a[1] > '9') {
			out[i] = "-" + a
		}
	}
	return out
}

// imageFlags name an image: by its files or by its measurement document.
type imageFlags struct{ metadata, material string }

func (f *imageFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.metadata, "metadata", "", "metadata.json of the image, with its files beside it")
	cmd.Flags().StringVar(&f.material, "material", "", image.MaterialFile+" of the image, instead of its files")
	cmd.MarkFlagsMutuallyExclusive("metadata", "material")
}

// measurement measures the image, nil if none is named. One that c carries is used in
// its place, and note says so. modes are those of the kernel that will be asked for.
func (f *imageFlags) measurement(cmd *cobra.Command, c *image.VMConfig, modes ...image.KernelMode) (m *image.Measurement, note string, err error) {
	switch {
	case f.metadata != "":
		img, err := image.OpenImage(f.metadata)
		if err != nil {
			return nil, "", err
		}
		defer img.Close()
		m, err = img.Static(cmd.Context(), modes...)
		return m, "", err
	case f.material != "":
		m, err = image.ReadMaterial(f.material)
		return m, "", err
	case c == nil || c.Material == nil:
		return nil, "", nil
	}
	if m, err = image.ParseMaterial(c.Material); err != nil {
		return nil, "", err
	}
	if c.ChecksumFile == nil || len(c.OSImageHash) != 32 {
		return m, "the image is what the vm_config says; nothing binds that to its os_image_hash", nil
	}
	if err := image.VerifyMaterial([32]byte(c.OSImageHash), c.ChecksumFile, c.Material); err != nil {
		return nil, "", fmt.Errorf("vm_config: %w", err)
	}
	m.OSImageHash = c.OSImageHash
	return m, fmt.Sprintf("the image is what the vm_config says; accept it only if you know os_image_hash %x", c.OSImageHash), nil
}

func newImageMeasure() *cobra.Command {
	var machine machineFlags
	var files imageFlags
	var events bool
	cmd := &cobra.Command{
		Use:   "measure",
		Short: "Calculate MRTD and RTMR0 to RTMR2",
		Long: `Calculate MRTD and RTMR0 to RTMR2 of a TD that runs an image on a VM. State QEMU's
version: a wrong one is the usual reason why MRTD and RTMR0 differ. Long flags may
be written with one dash, as older tools have them.`,
		Example: `  tdx-agent image measure --metadata dstack-0.5.4/metadata.json --cpu 4 --memory 4G --qemu 8.2.2
  tdx-agent image measure --metadata metadata.json --vm-config vm_config.json --events
  tdx-agent image measure --material measurement.tdx.cbor --cpu 2 --memory 2048 --qemu 8.2.2 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, c, err := machine.machine()
			if err != nil {
				return err
			}
			img, note, err := files.measurement(cmd, c, image.KernelRaw)
			if err != nil {
				return usageIfUnmodelled(err)
			}
			if img == nil {
				return exitf(exitUsage, "want --metadata or --material, or a --vm-config that carries a measurement")
			}
			r, err := img.Measure(m)
			if err != nil {
				return usageIfUnmodelled(err)
			}
			for _, n := range []string{note, unknownMembers(c)} {
				if n != "" {
					fmt.Fprintln(cmd.ErrOrStderr(), "tdx-agent: "+n)
				}
			}
			return printMeasured(cmd.OutOrStdout(), r, candidatesOf(img, m.MemoryBytes), events, wantJSON(cmd))
		},
	}
	machine.register(cmd)
	files.register(cmd)
	cmd.Flags().BoolVar(&events, "events", false, "print the events of the registers too")
	jsonFlag(cmd)
	return cmd
}

// usageIfUnmodelled gives what is not modelled the status of usage.
func usageIfUnmodelled(err error) error {
	if errors.As(err, new(*image.UnmodelledError)) {
		return withExit(exitUsage, err)
	}
	return err
}

// measuredReply is image measure's JSON form. mr_enclave is mr_system's older name.
type measuredReply struct {
	Schema      string          `json:"schema"`
	MRTD        string          `json:"mrtd"`
	RTMR0       string          `json:"rtmr0"`
	RTMR1       string          `json:"rtmr1"`
	RTMR2       string          `json:"rtmr2"`
	MREnclave   string          `json:"mr_enclave"`
	MRSystem    string          `json:"mr_system"`
	MRImage     string          `json:"mr_image"`
	OSImageHash string          `json:"os_image_hash,omitempty"`
	Profile     measuredProfile `json:"profile"`

	// Assumed is what was taken for granted.
	Assumed []string `json:"assumed,omitempty"`

	// Candidates are the values under other choices of page order and kernel mode: a
	// help to see which one a host has made, not values to accept.
	Candidates []measuredCandidate `json:"candidates"`

	Events []measuredEvent `json:"events,omitempty"`
}

type measuredCandidate struct {
	Register string `json:"register"`
	Choice   string `json:"choice"`
	Value    string `json:"value"`
}

// candidatesOf leaves out what an image without its files does not tell.
func candidatesOf(img *image.Measurement, memory uint64) []measuredCandidate {
	list := []measuredCandidate{{"mrtd", image.TwoPass.String(), img.MRTDTwoPass.String()}, {"mrtd", image.SinglePass.String(), img.MRTDSinglePass.String()}}
	for _, mode := range []image.KernelMode{image.KernelPatched, image.KernelRaw} {
		if d, err := img.KernelDigest(mode, memory); err == nil {
			list = append(list, measuredCandidate{"rtmr1", mode.String(), image.RTMR1(d).String()})
		}
	}
	return list
}

type measuredProfile struct {
	QEMU      string `json:"qemu"`
	Proven    string `json:"proven"`
	PageOrder string `json:"page_order"`
	PIC       bool   `json:"pic"`
	Kernel    string `json:"kernel"`
	Firmware  string `json:"firmware"`
	Root      string `json:"root"`

	// What the other choices were proven against; Proven is about the ACPI tables.
	PageOrderProven string `json:"page_order_proven"`
	KernelProven    string `json:"kernel_proven"`
	FirmwareProven  string `json:"firmware_proven"`
}

type measuredEvent struct {
	IMR       int      `json:"imr"`
	Index     int      `json:"index"`
	Type      uint32   `json:"event_type"`
	Name      string   `json:"name"`
	Digest    string   `json:"digest"`
	Payload   string   `json:"event_payload,omitempty"`
	DependsOn []string `json:"depends_on,omitempty"`
	Opaque    bool     `json:"opaque,omitempty"`
}

func printMeasured(out io.Writer, r *image.Result, candidates []measuredCandidate, events, asJSON bool) error {
	system := fmt.Sprintf("%x", r.MRSystem(nil))
	reply := measuredReply{
		Schema: "tdx-agent/image-measure/v1", MRTD: r.MRTD.String(), RTMR0: r.RTMR[0].String(), RTMR1: r.RTMR[1].String(), RTMR2: r.RTMR[2].String(),
		MREnclave: system, MRSystem: system, MRImage: fmt.Sprintf("%x", r.MRImage()), OSImageHash: hex.EncodeToString(r.OSImageHash), Candidates: candidates, Assumed: r.Assumed,
		Profile: measuredProfile{r.QEMU, r.Proven, r.PageOrder.String(), r.PIC, r.Kernel.String(), string(r.Firmware), r.Root.String(),
			r.PageOrder.Proven(), r.Kernel.Proven(), r.Firmware.Proven()},
	}
	if events {
		var index [3]int
		for _, e := range r.Log {
			reply.Events = append(reply.Events, measuredEvent{e.IMR, index[e.IMR], e.Type, e.Name, e.Digest.String(), hex.EncodeToString(e.Payload), e.DependsOn, e.Opaque})
			index[e.IMR]++
		}
	}
	if asJSON {
		return json.NewEncoder(out).Encode(reply)
	}
	for _, v := range [][2]string{{"mrtd", reply.MRTD}, {"rtmr0", reply.RTMR0}, {"rtmr1", reply.RTMR1}, {"rtmr2", reply.RTMR2},
		{"mr_image", reply.MRImage}, {"mr_system", reply.MRSystem}, {"os_image_hash", reply.OSImageHash}} {
		if v[1] != "" {
			fmt.Fprintf(out, "%-14s %s\n", v[0], v[1])
		}
	}
	p := reply.Profile
	fmt.Fprintf(out, "%-14s QEMU %s, %s, pic %v, kernel %s, firmware %s, root %s\n", "profile", p.QEMU, p.PageOrder, p.PIC, p.Kernel, p.Firmware, p.Root)
	for _, v := range [][2]string{{"QEMU " + p.QEMU, p.Proven}, {p.PageOrder, p.PageOrderProven}, {"kernel " + p.Kernel, p.KernelProven}, {"firmware " + p.Firmware, p.FirmwareProven}} {
		fmt.Fprintf(out, "%-14s %s: %s\n", "proven", v[0], v[1])
	}
	for _, a := range reply.Assumed {
		fmt.Fprintf(out, "%-14s %s\n", "assumed", quoted(a))
	}
	for _, c := range reply.Candidates {
		if c.Value != reply.MRTD && c.Value != reply.RTMR1 {
			fmt.Fprintf(out, "if %-11s %s would be %s\n", c.Choice, c.Register, c.Value)
		}
	}
	for _, e := range reply.Events {
		fmt.Fprintf(out, "RTMR%d %2d  %s  %-20s %s\n", e.IMR, e.Index, e.Digest, e.Name, strings.Join(e.DependsOn, ", "))
	}
	return nil
}
