#!/usr/bin/env bash
# The library's tests on aarch64 (NEON kernels) under qemu, with Debian's cross compiler and its prebuilt standard
# library, unpacked into target/aarch64 and never installed over the host's. What is missing is one line "skipped: …".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

skip() { echo "skipped: aarch64 ($1)"; exit 0; }
to=$PWD/target/aarch64
mkdir -p "$to/packages" "$to/root" || exit 1
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

[ "$(uname -m)" = x86_64 ] && command -v apt-get >/dev/null || skip "needs a Debian machine of x86-64"
if ! command -v qemu-aarch64-static >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static >"$to/apt.log" 2>&1 || skip "see target/aarch64/apt.log"
fi

# The compiler and both standard libraries, of one version.
unpack() {
    local version std llvm state
    version=$(apt-cache policy rustc-web | awk '/Candidate/ { print $2 }')
    [ -n "$version" ] && [ "$version" != "(none)" ] || { echo "there is no rustc-web"; return 1; }
    std=$(apt-cache search --names-only '^libstd-rust-web-[0-9.]*$' | awk -v v="${version%%+*}" 'index(v, substr($1, 17)) == 1 { print $1 }')
    llvm=$(apt-cache depends "$std" | grep -o 'libllvm[0-9]*' | head -n 1)
    cd "$to/packages" || return 1
    apt-get download "rustc-web=$version" "libstd-rust-web-dev=$version" "$std=$version" "$llvm" || return 1
    # apt's state for another architecture, beside the host's.
    mkdir -p lists/partial cache/archives/partial && : >status
    state=(-o APT::Architecture=arm64 -o APT::Architectures=arm64
        -o "Dir::State::lists=$PWD/lists" -o "Dir::State::status=$PWD/status" -o "Dir::Cache=$PWD/cache")
    apt-get "${state[@]}" update || return 1
    apt-get "${state[@]}" download "libstd-rust-web-dev:arm64=$version" || { echo "arm64 is out of step with the host"; return 1; }
    for package in *.deb; do dpkg -x "$package" "$to/root" || return 1; done
    touch "$to/unpacked"
}
[ -e "$to/unpacked" ] || (unpack) >"$to/unpack.log" 2>&1 || skip "$(tail -n 1 "$to/unpack.log")"

cat >"$to/rustc" <<EOF
#!/bin/sh
LD_LIBRARY_PATH=$to/root/usr/lib/x86_64-linux-gnu exec $to/root/usr/bin/rustc "\$@"
EOF
chmod +x "$to/rustc"
export RUSTC=$to/rustc
export CARGO_TARGET_DIR=$to/target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu"
cargo test --release --lib --no-default-features --target aarch64-unknown-linux-gnu
