#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# qemu.sh [SUITE...]: stock QEMUs of several Debian releases side by side, for the
# differential tests of measure/acpi. Each is unpacked with its own C library into
# $VMWORK/qemu/SUITE, so nothing is installed and root is not needed. The last line of
# output is what the tests want to be told:
#   eval "$(packaging/testbed/qemu.sh | tail -1)" && go test ./measure/acpi
# Default suites: bookworm (7.2), bookworm-backports and trixie (10.0), trixie-backports
# (the newest). Each is made once and kept; delete its folder to have it made again.
set -eu
. "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || set -- bookworm bookworm-backports trixie trixie-backports
Q=$W/qemu
mkdir -p "$Q"

# fetch SUITE: unpack qemu-system-x86 and all it depends on
fetch() {
  rm -rf "$Q/apt" "$Q/$1.new"
  "$H/mkapt.sh" "$Q/apt" "${1%-backports}" $([ "$1" = "${1%-backports}" ] || echo "$1")
  APT_CONFIG=$Q/apt/apt.conf; export APT_CONFIG
  apt-get update -qq -o APT::Sandbox::User=root
  # The status file is empty, so apt fetches the C library and everything above it.
  apt-get install -qq -y -d --no-install-recommends -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
    -t "$1" qemu-system-x86 >/dev/null
  unset APT_CONFIG
  mkdir "$Q/$1.new"
  # Older releases ship both /lib and /usr/lib: everything goes below /usr.
  mkdir -p "$Q/$1.new/usr/lib" "$Q/$1.new/usr/lib64" "$Q/$1.new/usr/bin" "$Q/$1.new/usr/sbin"
  for l in lib lib64 bin sbin; do ln -s usr/$l "$Q/$1.new/$l"; done
  for d in "$Q"/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$d" | tar -x -C "$Q/$1.new" --no-same-owner --keep-directory-symlink
  done
  # Paths of ld.so and of QEMU's modules are absolute in the programs: name these.
  cat > "$Q/$1.new/qemu" <<E2
#!/bin/sh
QEMU_MODULE_DIR="$Q/$1/usr/lib/x86_64-linux-gnu/qemu"; export QEMU_MODULE_DIR
exec "$Q/$1/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$Q/$1/usr/lib/x86_64-linux-gnu" \\
  "$Q/$1/usr/bin/qemu-system-x86_64" -L "$Q/$1/usr/share/qemu" -L "$Q/$1/usr/share/seabios" "\$@"
E2
  chmod +x "$Q/$1.new/qemu"
  mv "$Q/$1.new" "$Q/$1"; rm -rf "$Q/apt"
}

list=
for s in "$@"; do
  [ -d "$Q/$s" ] || fetch "$s"
  v=$("$Q/$s/qemu" --version | head -1) || die "$s: QEMU does not run"
  echo "qemu: $s: $v"
  list=$list${list:+:}$Q/$s/qemu
done
echo "export TDX_AGENT_QEMU=$list"
