#!/usr/bin/env bash
# Makes every fixture of tests/fixtures again. PYTHON names an interpreter with torch, onnx, onnxruntime and numpy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
for script in nets optimizers grads autocast icp tent icp_variants spatial zoo_fixtures; do
    PYTHONDONTWRITEBYTECODE=1 nice "${PYTHON:-python3}" "$script.py"
done
du -cb ../fixtures/*.{npz,onnx,json} | tail -n 1
