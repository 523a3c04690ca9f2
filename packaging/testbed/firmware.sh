#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# firmware.sh: OVMF of two Debian releases and a kernel, for the tests of measure/image.
# They are unpacked into $VMWORK/firmware, nothing is installed and root is not needed. The
# last line of output is what the tests want to be told:
#   eval "$(packaging/testbed/firmware.sh | tail -1)" && go test ./measure/image
# Each release is fetched once and kept; delete its folder to have it fetched again.
set -eu
. "$(dirname "$0")/common.sh"
F=$W/firmware
mkdir -p "$F"

# fetch SUITE PACKAGE...: unpack these packages into SUITE
fetch() {
  suite=$1; shift
  [ ! -d "$F/$suite" ] || return 0
  rm -rf "$F/apt" "$F/$suite.new"
  "$H/mkapt.sh" "$F/apt" "$suite"
  (
    APT_CONFIG=$F/apt/apt.conf; export APT_CONFIG
    apt-get update -qq -o APT::Sandbox::User=root
    cd "$F/apt/archives"
    apt-get download -qq -o APT::Sandbox::User=root "$@"
  )
  for d in "$F"/apt/archives/*.deb; do dpkg-deb -x "$d" "$F/$suite.new"; done
  rm -rf "$F/$suite.new/lib" "$F/$suite.new/usr/share/doc" "$F/apt"
  mv "$F/$suite.new" "$F/$suite"
}

fetch bookworm ovmf linux-image-6.1.0-50-cloud-amd64
fetch trixie ovmf
echo "export TDX_AGENT_DEBIAN=$F"
