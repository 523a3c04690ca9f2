package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"tdx-agent/remote"
	"tdx-agent/remote/dcap"
)

func newCollateral() *cobra.Command {
	cmd := &cobra.Command{Use: "collateral", Short: "Fetch or show what platforms are judged by", Args: cobra.NoArgs, RunE: needsSubcommand}
	cmd.AddCommand(newCollateralFetch(), newCollateralShow())
	return cmd
}

func newCollateralFetch() *cobra.Command {
	var f verifierFlags
	var quote, fmspc, ca, out string
	cmd := &cobra.Command{
		Use:   "fetch",
		Short: "Fetch the collateral of a platform as one file, for verify --collateral",
		Example: `  tdx-agent collateral fetch --quote quote.json -o collateral.json
  tdx-agent collateral fetch --fmspc 90c06f000000 --pccs https://pccs.example.org
  tdx-agent collateral fetch --sgx --quote quote.json -o sgx.json    (keys.local.collateral)`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, store, err := f.verifier(cmd.Context(), warnings(cmd.ErrOrStderr()))
			if err != nil {
				return err
			}
			id, authority, err := platformOf(v, quote, fmspc, ca)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), verifyTimeout)
			defer cancel()
			set, err := store.Fetch(ctx, id, authority)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "from %s, valid until %s\n", set.Source, set.Collateral.ValidUntil().UTC().Format(time.RFC3339))
			if out != "" {
				return os.WriteFile(out, set.Bundle, 0o644)
			}
			_, err = cmd.OutOrStdout().Write(set.Bundle)
			return err
		},
	}
	f.addSources(cmd)
	cmd.Flags().BoolVar(&f.enclaves, "sgx", false, "for quotes of SGX enclaves, as the local key provider's, in place of TDs'")
	cmd.Flags().StringVar(&quote, "quote", "", "file with a quote of a TD on the platform")
	cmd.Flags().StringVar(&fmspc, "fmspc", "", "FMSPC of the platform, 12 hexadecimal digits, instead of --quote")
	cmd.Flags().StringVar(&ca, "ca", dcap.CAPlatform, "with --fmspc: the CA of its PCK certificate, platform or processor")
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

// platformOf names the platform that collateral is wanted for. A quote must be genuine.
func platformOf(v *remote.Verifier, quote, fmspc, ca string) (id [6]byte, authority string, err error) {
	if (quote == "") == (fmspc == "") {
		return id, "", exitf(exitUsage, "give --quote or --fmspc, and not both")
	}
	if fmspc != "" {
		b, err := hex.DecodeString(fmspc)
		if err != nil || len(b) != len(id) {
			return id, "", exitf(exitUsage, "--fmspc is %q, want 12 hexadecimal digits", fmspc)
		}
		if ca != dcap.CAPlatform && ca != dcap.CAProcessor {
			return id, "", exitf(exitUsage, "--ca is %q, want platform or processor", ca)
		}
		return [6]byte(b), ca, nil
	}
	ev, err := (&evidenceFlags{quote: quote}).read()
	if err != nil {
		return id, "", err
	}
	id, authority, err = v.Platform(ev.Quote)
	return id, authority, withExit(exitEvidence, err)
}

// collateralShow is collateral show's JSON form.
type collateralShow struct {
	Schema    string               `json:"schema"`
	FMSPC     string               `json:"fmspc"`
	CA        string               `json:"ca"`
	SHA256    string               `json:"sha256"`
	From      time.Time            `json:"not_before"`
	Until     time.Time            `json:"not_after"`
	Documents []collateralDocument `json:"documents"`
}

type collateralDocument struct {
	Name   string    `json:"name"`
	Issued time.Time `json:"issued"`
	Until  time.Time `json:"next_update"`
	Number uint64    `json:"number"` // evaluation number, or number of the CRL
}

func newCollateralShow() *cobra.Command {
	var root string
	var enclaves bool
	cmd := &cobra.Command{
		Use:     "show FILE",
		Short:   "Check the signatures of a collateral file and show what it is about",
		Example: "  tdx-agent collateral show collateral.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			roots := dcap.IntelRoots()
			if root != "" {
				pin, err := readRoot(root)
				if err != nil {
					return err
				}
				if roots, err = dcap.PinnedRoots(pin); err != nil {
					return err
				}
			}
			b, err := readInput(args[0])
			if err != nil {
				return err
			}
			parse := dcap.ParseCollateral
			if enclaves {
				parse = dcap.ParseEnclaveCollateral
			}
			c, err := parse(b, roots)
			if err != nil {
				return withExit(exitEvidence, err)
			}
			show := describeCollateral(c)
			if wantJSON(cmd) {
				return printJSON(cmd, show)
			}
			writeCollateral(cmd.OutOrStdout(), show)
			return nil
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "PEM file of the root certificate to trust instead of Intel's")
	cmd.Flags().BoolVar(&enclaves, "sgx", false, "the file is for quotes of SGX enclaves")
	jsonFlag(cmd)
	return cmd
}

func describeCollateral(c *dcap.Collateral) *collateralShow {
	id, sum := c.FMSPC(), c.SHA256()
	show := &collateralShow{Schema: "tdx-agent/collateral/v1", FMSPC: hex.EncodeToString(id[:]), CA: c.CA(), SHA256: hex.EncodeToString(sum[:]),
		From: c.ValidFrom().UTC(), Until: c.ValidUntil().UTC()}
	for _, d := range c.Documents() {
		show.Documents = append(show.Documents, collateralDocument{d.Name, d.Issued.UTC(), d.Until.UTC(), d.Number})
	}
	return show
}

func writeCollateral(out io.Writer, c *collateralShow) {
	fmt.Fprintf(out, "FMSPC %s, PCK certificates of the %s CA, signatures hold\nvalid %s to %s\n", c.FMSPC, c.CA, c.From.Format(time.RFC3339), c.Until.Format(time.RFC3339))
	for _, d := range c.Documents {
		fmt.Fprintf(out, "  %-12s number %-6d issued %s, next update %s\n", d.Name, d.Number, d.Issued.Format(time.RFC3339), d.Until.Format(time.RFC3339))
	}
}
