package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// holdsKeys marks a command whose process has private keys of its own, or of TLS
// connections with what peers have to hide: its memory is for nobody else.
func holdsKeys(cmd *cobra.Command) *cobra.Command {
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := forbidDumps(); err != nil {
			return err
		}
		return run(cmd, args)
	}
	return cmd
}

// forbidDumps keeps the process's memory, which holds keys, out of core files: a limit of
// zero does not, where the kernel hands cores to a program (core(5), core_pattern). It
// also keeps other processes of the same user from reading the memory (prctl(2),
// PR_SET_DUMPABLE).
func forbidDumps() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep the memory out of core files (PR_SET_DUMPABLE): %w", err)
	}
	return nil
}
