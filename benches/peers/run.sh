#!/usr/bin/env bash
# Makes the peers' environments and runs the comparison.
#
#     benches/peers/run.sh [--python PYTHON] --quick | --all [more options of peers.py]
#
# Without --python a virtual environment is made in target/peers/venv. PyPI's PyTorch brings CUDA libraries along;
# PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple avoids them.
# onnxruntime-training needs a numpy of its own, and so an environment of its own; where it cannot be had it is left out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
to=$here/../../target/peers
mkdir -p "$to"

python=
if [ "${1:-}" = --python ]; then
    python=${2:?usage: run.sh --python PYTHON …}
    shift 2
fi
if [ -z "$python" ]; then
    python=$to/venv/bin/python
    [ -x "$python" ] || python3 -m venv "$to/venv"
    "$python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt"
fi

training=$to/venv-training
if [ ! -d "$training" ]; then
    "$python" -m venv "$training"
    "$training/bin/python" -m pip install -q --disable-pip-version-check \
        onnxruntime-training-cpu==1.19.2 onnx==1.16.2 'numpy<2' >"$to/training.log" 2>&1 ||
        echo "onnxruntime-training: not installed (see target/peers/training.log)" >&2
    # It imports torch: that of the main environment.
    "$python" -c 'import site; print(site.getsitepackages()[0])' \
        >"$("$training/bin/python" -c 'import site; print(site.getsitepackages()[0])')/peers.pth"
fi

cargo build -q --release --manifest-path "$here/tract/Cargo.toml" --target-dir "$to/tract" || echo "tract: not built" >&2
[ -x "$here/../../target/release/retune" ] || cargo build --release --manifest-path "$here/../../Cargo.toml"
exec "$python" "$here/peers.py" "$@"
