package main

import (
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"tdx-agent/measure/image"
)

// firmwareReply is image firmware's JSON form.
type firmwareReply struct {
	Schema     string            `json:"schema"`
	SinglePass string            `json:"mrtd_single_pass"`
	TwoPass    string            `json:"mrtd_two_pass"`
	CFV        string            `json:"cfv"`
	Witness    string            `json:"td_hob_witness"`
	Keys       bool              `json:"secure_boot_keys"`
	SecureBoot string            `json:"secure_boot"`      // "built-in", "absent", or "unknown"
	Profile    string            `json:"firmware_profile"` // "unknown" where the drivers cannot be read
	Sections   []firmwareSection `json:"sections"`
}

type firmwareSection struct {
	Type       string `json:"type"`
	Offset     uint32 `json:"data_offset"`
	RawSize    uint32 `json:"raw_data_size"`
	Address    uint64 `json:"memory_address"`
	MemorySize uint64 `json:"memory_size"`
	Attributes uint32 `json:"attributes"`
}

func newImageFirmware() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "firmware FILE",
		Short:   "Show a firmware's TDVF metadata and its MRTD in both page orders",
		Example: "  tdx-agent image firmware OVMF.fd",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readCapped(args[0], image.MaxFirmware)
			if err != nil {
				return err
			}
			r, err := firmwareOf(b)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			out := cmd.OutOrStdout()
			if wantJSON(cmd) {
				return json.NewEncoder(out).Encode(r)
			}
			fmt.Fprintf(out, "mrtd two-pass     %s\nmrtd single-pass  %s\ncfv               %s\ntd_hob witness    %s\nsecure boot       %s, keys enrolled: %v\nprofile           %s\n",
				r.TwoPass, r.SinglePass, r.CFV, r.Witness, r.SecureBoot, r.Keys, r.Profile)
			for _, s := range r.Sections {
				fmt.Fprintf(out, "%-9s file %#x+%#x, memory %#x+%#x, attributes %d\n", s.Type, s.Offset, s.RawSize, s.Address, s.MemorySize, s.Attributes)
			}
			return nil
		},
	}
	jsonFlag(cmd)
	return cmd
}

func firmwareOf(b []byte) (*firmwareReply, error) {
	fw, err := image.ParseTDVF(b)
	if err != nil {
		return nil, err
	}
	one, err := fw.MRTD(image.SinglePass)
	if err != nil {
		return nil, err
	}
	two, err := fw.MRTD(image.TwoPass)
	if err != nil {
		return nil, err
	}
	r := &firmwareReply{Schema: "tdx-agent/image-firmware/v1", SinglePass: one.String(), TwoPass: two.String(), CFV: fw.CFV().String(), Witness: hex.EncodeToString(fw.Layout().Witness()), SecureBoot: "unknown", Profile: "unknown"}
	if c, err := fw.Inspect(); err == nil {
		r.SecureBoot, r.Profile = "absent", string(c.Profile())
		if c.SecureBoot {
			r.SecureBoot = "built-in"
		}
	}
	for _, v := range fw.SecureBootVariables() {
		r.Keys = r.Keys || len(v) > 0
	}
	for _, s := range fw.Sections {
		r.Sections = append(r.Sections, firmwareSection{s.Type.String(), s.DataOffset, s.RawDataSize, s.Address, s.MemorySize, s.Attributes})
	}
	return r, nil
}

func newImageACPI() *cobra.Command {
	var machine machineFlags
	var dir string
	cmd := &cobra.Command{
		Use:     "acpi",
		Short:   "Write the ACPI tables that QEMU gives the firmware",
		Long:    "Write tables.bin, rsdp.bin and loader.bin, the fw_cfg files that are measured into RTMR0, and print their SHA-384.",
		Example: "  tdx-agent image acpi --cpu 4 --memory 4G --qemu 8.2.2 --out acpi",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return exitf(exitUsage, "want --out")
			}
			m, _, err := machine.machine()
			if err != nil {
				return err
			}
			t, err := image.Tables(m)
			if err != nil {
				return usageIfUnmodelled(err)
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			for _, f := range []struct {
				name    string
				content []byte
			}{{"loader.bin", t.Loader}, {"rsdp.bin", t.RSDP}, {"tables.bin", t.Tables}} {
				if err := os.WriteFile(filepath.Join(dir, f.name), f.content, 0o644); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%x  %s\n", sha512.Sum384(f.content), f.name)
			}
			return nil
		},
	}
	machine.register(cmd)
	cmd.Flags().StringVar(&dir, "out", "", "folder to write to")
	return cmd
}

func newImageMaterial() *cobra.Command {
	cmd := &cobra.Command{Use: "material", Short: "Write or read " + image.MaterialFile, Args: unknownCommand, RunE: needsSubcommand}
	cmd.AddCommand(newMaterialEncode(), newMaterialInspect())
	return cmd
}

func newMaterialEncode() *cobra.Command {
	var metadata, out string
	cmd := &cobra.Command{
		Use:     "encode",
		Short:   "Measure an image's files and write the measurement document, version 3",
		Example: "  tdx-agent image material encode --metadata metadata.json --output measurement.tdx.cbor",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if metadata == "" {
				return exitf(exitUsage, "want --metadata")
			}
			files := imageFlags{metadata: metadata}
			m, _, err := files.measurement(cmd, nil)
			if err != nil {
				return usageIfUnmodelled(err)
			}
			b, err := m.Material()
			if err != nil {
				return usageIfUnmodelled(err)
			}
			if out == "" {
				_, err = cmd.OutOrStdout().Write(b)
				return err
			}
			return os.WriteFile(out, b, 0o644)
		},
	}
	cmd.Flags().StringVar(&metadata, "metadata", "", "metadata.json of the image, with its files beside it")
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

// materialReply is image material inspect's JSON form.
type materialReply struct {
	Schema      string `json:"schema"`
	SinglePass  string `json:"mrtd_single_pass"`
	TwoPass     string `json:"mrtd_two_pass"`
	Kernel      string `json:"kernel_authenticode"`
	CommandLine string `json:"cmdline_sha384"`
	Initrd      string `json:"initrd_sha384"`
	Firmware    string `json:"ovmf"`
	Witness     string `json:"td_hob_witness"`
	OSImageHash string `json:"os_image_hash,omitempty"` // of the checksum file, which lists the document
}

func newMaterialInspect() *cobra.Command {
	var sums string
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Show a measurement document, and check it against its checksum file",
		Long: `Show a measurement document. With --checksum-file, check that the file lists the
document and print the os_image_hash that follows. That the image is one you accept
is known only when you compare this hash with a list of your own.`,
		Example: "  tdx-agent image material inspect measurement.tdx.cbor --checksum-file sha256sum.txt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readCapped(args[0], 1<<20)
			if err != nil {
				return err
			}
			m, err := image.ParseMaterial(b)
			if err != nil {
				return withExit(exitEvidence, fmt.Errorf("%s: %w", args[0], err))
			}
			r := materialReply{"tdx-agent/image-material/v1", m.MRTDSinglePass.String(), m.MRTDTwoPass.String(), m.Kernel.String(), m.CommandLine.String(),
				m.Initrd.String(), string(m.Firmware), hex.EncodeToString(m.Layout.Witness()), ""}
			if sums != "" {
				s, err := readCapped(sums, 1<<20)
				if err != nil {
					return err
				}
				hash := image.OSImageHash(s)
				if err := image.VerifyMaterial(hash, s, b); err != nil {
					return withExit(exitEvidence, err)
				}
				r.OSImageHash = hex.EncodeToString(hash[:])
			}
			return printMaterial(cmd, &r)
		},
	}
	cmd.Flags().StringVar(&sums, "checksum-file", "", "sha256sum.txt of the image")
	jsonFlag(cmd)
	return cmd
}

func printMaterial(cmd *cobra.Command, r *materialReply) error {
	out := cmd.OutOrStdout()
	if wantJSON(cmd) {
		return json.NewEncoder(out).Encode(r)
	}
	for _, v := range [][2]string{{"mrtd two-pass", r.TwoPass}, {"mrtd single-pass", r.SinglePass}, {"kernel", r.Kernel}, {"cmdline", r.CommandLine},
		{"initrd", r.Initrd}, {"ovmf", r.Firmware}, {"td_hob witness", r.Witness}, {"os_image_hash", r.OSImageHash}} {
		if v[1] != "" {
			fmt.Fprintf(out, "%-17s %s\n", v[0], v[1])
		}
	}
	return nil
}
