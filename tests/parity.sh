#!/usr/bin/env bash
# Every gradient against PyTorch, made afresh: parity.py on convolutional networks, matrix.py on networks of all kinds, from
# both of PyTorch's exporters at several opsets. Needs a Python with PyTorch and onnxscript: $PYTHON, or the fetched environment, into
# which they are installed. Arguments go to matrix.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-${RETUNE_FETCHED:-target/fetched}/venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "skipped: parity with PyTorch (no $python)"; exit 0; }
if ! "$python" -c 'import torch, onnxscript' 2>/dev/null; then
    "$python" -m pip install -q -r tests/reference/requirements.txt >/dev/null 2>&1
    "$python" -c 'import torch, onnxscript' 2>/dev/null || { echo "skipped: parity with PyTorch (it cannot be installed)"; exit 0; }
fi
failed=0
"$python" tests/reference/parity.py target/release/retune --full || failed=1
"$python" tests/reference/matrix.py target/release/retune "$@" || failed=1
exit $failed
