"""Fixtures grad_{resnet20,mobilenetv2}_{eval,train}.npz: gradients of the mean cross-entropy over a batch of 8, whose
images are in the file of training mode."""

import argparse
import copy
import pathlib

import torch
from torch import nn

from common import FIXTURES, runs, save, scales, sha256, stored, worst, worst_errors
from nets import MOBILENETV2, RESNET20, check_twin, colour_images, twin, worn_fashion

CLEAR = 2e-4  # float32 and float64 agree on every gradient to this


def gradients(net, x, y, mode, convert):
    """Loss, logits, the gradient of every parameter and of the input, and the running statistics after the one forward."""
    net = convert(copy.deepcopy(net)).train(mode == "train")
    x = convert(torch.from_numpy(x)).requires_grad_()
    logits = net(x)
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(y))
    loss.backward()
    return {
        "loss": loss.detach(),
        "output": logits.detach(),
        "parameters": {name: p.grad for name, p in net.named_parameters()},
        "input": {"image": x.grad},
        "running": {name: b for name, b in net.named_buffers() if "running" in name},
    }


def all_runs(net, x, y, mode):
    """The float32 runs, the float64 run, and for each parameter and the input how far they are apart."""
    singles, double = runs(lambda convert: gradients(net, x, y, mode, convert))
    drift = {}
    for part in ("parameters", "input"):
        drift |= worst_errors([s[part] for s in singles], double[part])
    return singles, double, drift


def clear_batch(net, x, y, size):
    """The first batch whose gradients are well defined in both modes.

    Where one of a million activations lies within rounding of a kink, two correct implementations come down on different
    sides of it, and their gradients differ by far more than rounding.
    """
    for i in range(0, len(x) - size + 1, size):
        images, labels = x[i : i + size], y[i : i + size]
        if all(max(all_runs(net, images, labels, mode)[2].values()) < CLEAR for mode in ("eval", "train")):
            return images, labels
    raise SystemExit("no batch stays clear of the kinks")


def fixture(name, path, net, x, y):
    check_twin(net, path, x)
    for mode in ("eval", "train"):
        singles, double, drift = all_runs(net, x, y, mode)
        assert max(drift.values()) < CLEAR, f"{name}: a kink lies too near: {worst(drift)}"
        out = {"target": y, "model_sha256": sha256(path)}
        out |= {"loss": singles[0]["loss"], "loss64": double["loss"], "output.logits": singles[0]["output"]}
        for part in ("parameters", "input"):
            out |= stored("grad", [s[part] for s in singles], double[part])
        if mode == "train":
            out |= {f"running.{key}": value for key, value in singles[0]["running"].items()} | {"in.image": x}
        save(FIXTURES / f"grad_{name}_{mode}.npz", out)
        exact = double["parameters"]
        zero = sum(scale > float(exact[key].abs().max()) for key, scale in scales(exact).items())
        print(f"  loss {out['loss']:.4f}, float32 against float64: worst {worst(drift)}; analytically zero: {zero} of {len(exact)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resnet20", type=pathlib.Path, default=RESNET20)
    args = parser.parse_args()
    net = twin("resnet20", args.resnet20)
    fixture("resnet20", args.resnet20, net, *clear_batch(net, *worn_fashion(), 8))
    fixture("mobilenetv2", MOBILENETV2, twin("mobilenetv2"), *colour_images(8, 32, seed=2))
