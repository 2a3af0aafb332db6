#!/usr/bin/env bash
# Fetches what the tests need and runs them all.
#
#     ./test.sh          the tests that every change must pass
#     ./test.sh --all    and the long ones: gradients against PyTorch made afresh, adaptation of real models,
#                        the kernels of aarch64
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

all=0
for arg in "$@"; do
    case $arg in
        --all) all=1 ;;
        *) echo "usage: ./test.sh [--all]" >&2; exit 2 ;;
    esac
done

failed=()
step() { # step NAME COMMAND…
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

step "fetch" tests/fetch.sh
step "build" cargo build --release
step "library without features builds" cargo check --release --no-default-features --lib
RETUNE_TEST_ALL=$all step "tests" cargo test --release
if [ "$all" = 1 ]; then
    step "parity with PyTorch" tests/parity.sh
    step "aarch64" tests/aarch64.sh
fi

echo
if [ ${#failed[@]} = 0 ]; then
    echo "PASSED"
else
    echo "FAILED: ${failed[*]}"
    exit 1
fi
