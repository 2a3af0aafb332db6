#!/usr/bin/env bash
# Every gradient against PyTorch, made afresh. Needs a Python with PyTorch: $PYTHON, or the fetched
# environment, into which PyTorch is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-${RETUNE_FETCHED:-target/fetched}/venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "skipped: parity with PyTorch (no $python)"; exit 0; }
if ! "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m pip install -q -r models/requirements.txt >/dev/null 2>&1
    "$python" -c 'import torch' 2>/dev/null || { echo "skipped: parity with PyTorch (it cannot be installed)"; exit 0; }
fi
"$python" tests/reference/parity.py target/release/retune --full
