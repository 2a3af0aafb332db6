"""Compares every gradient of `retune grad` with PyTorch, made afresh.

    python parity.py RETUNE_BINARY [--full]

ResNet-20 (models/) and a MobileNetV2 of full width on 3x96x96, in evaluation and in training mode; with --full also
models/dsnet.onnx, the small MobileNetV2 and an odd batch. The reference is PyTorch in float64; the error of a tensor is
max|a - b| / max|b| over all its elements, and over the largest gradient of the model where the true one is zero (a shift
before a convolution and a BatchNormalization in training mode). Exit code 1 when one is above 1e-3.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from common import errors, worst
from grads import all_runs, clear_batch
from nets import DSNET, MOBILENETV2, RESNET20, check_twin, colour_images, export, new_mobilenetv2, real_mobilenetv2, twin, worn_fashion

TOLERANCE = 1e-3


def retune_gradients(binary, model, x, y, mode, folder):
    inputs, output = folder / "in.npz", folder / "out.npz"
    np.savez(inputs, image=x, target=y)
    output.unlink(missing_ok=True)
    command = [binary, "grad", model, "--inputs", inputs, "--loss", "cross-entropy", "--mode", mode, "--output", output]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    with np.load(output) as arrays:
        return dict(arrays)


def compare(binary, label, net, model, x, y, mode, folder):
    """One line; true if all is well."""
    title = f"{label} {mode}:"
    _, exact, drift = all_runs(net, x, y, mode)
    try:
        found = retune_gradients(binary, model, x, y, mode, folder)
    except (RuntimeError, OSError) as error:
        print(f"{title} FAILED: {error}")
        return False
    wanted = {"loss", "output.logits", *(f"grad.{name}" for name in (*exact["parameters"], "image"))}
    if found.keys() != wanted:
        print(f"{title} FAILED: missing {sorted(wanted - found.keys())}, not wanted {sorted(found.keys() - wanted)}")
        return False
    shapes = [name for name in exact["parameters"] if found[f"grad.{name}"].shape != tuple(exact["parameters"][name].shape)]
    if shapes:
        print(f"{title} FAILED: wrong shapes: {shapes}")
        return False
    result = errors({name: found[f"grad.{name}"] for name in exact["parameters"]}, exact["parameters"])
    result |= errors({"image": found["grad.image"]}, exact["input"])
    result |= errors({"loss": found["loss"].reshape(())}, {"loss": exact["loss"]})
    result |= errors({"output.logits": found["output.logits"]}, {"output.logits": exact["output"]})
    # written so that a NaN fails
    good = all(value <= TOLERANCE for value in result.values())
    over = [name for name, value in result.items() if not value <= TOLERANCE]
    print(f"{title} {'ok' if good else 'FAILED'}: {len(result) - 2} gradients, worst {worst(result)} (PyTorch's own float32 runs: {worst(drift)})"
          + (f"; {len(over)} above {TOLERANCE}: {', '.join(over[:8])}" if over else ""), flush=True)  # fmt: skip
    return good


def cases(full, folder):
    resnet20 = twin("resnet20")
    yield "ResNet-20, batch 8", resnet20, RESNET20, *clear_batch(resnet20, *worn_fashion(), 8)
    net, *batch = new_mobilenetv2(real_mobilenetv2, 96, 4)
    model = folder / "mobilenetv2_96.onnx"
    export(net, model, (3, 96, 96))
    yield "MobileNetV2 1.0 at 96x96, batch 4", net, model, *batch
    if full:
        yield "ResNet-20, batch 3", resnet20, RESNET20, *clear_batch(resnet20, *worn_fashion(), 3)
        dsnet = twin("dsnet")
        yield "DsNet, batch 8", dsnet, DSNET, *clear_batch(dsnet, *worn_fashion(), 8)
        yield "MobileNetV2 0.25 at 32x32, batch 8", twin("mobilenetv2"), MOBILENETV2, *colour_images(8, 32, seed=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        for label, net, model, x, y in cases(args.full, pathlib.Path(name)):
            check_twin(net, model, x)
            for mode in ("eval", "train"):
                good &= compare(args.binary.resolve(), label, net, model, x, y, mode, pathlib.Path(name))
    sys.exit(not good)
