"""Fixture tent.npz: one step of TENT on ResNet-20, one with the diversity term of information maximisation, and one of
cross-entropy on the labelled half of a batch and half of that objective on the rest.

Wang et al. 2021 (ICLR): scales and shifts of the normalisations, which normalise by the batch, move down the mean entropy
of the predictions. Liang et al. 2020 (ICML) take the entropy of the mean prediction off it.
"""

import argparse
import copy
import pathlib

import torch
from torch import nn

from common import FIXTURES, runs, save, sha256, stored, worst, worst_errors
from grads import CLEAR
from nets import RESNET20, check_twin, twin, worn_fashion

IGNORED = -100


def entropy(logits, diversity):
    p, log = logits.softmax(1), logits.log_softmax(1)
    mean = p.mean(0)
    return -(p * log).sum(1).mean() + diversity * (mean * mean.log()).sum()


def beside(logits, labels):
    labelled = labels != IGNORED
    return nn.functional.cross_entropy(logits[labelled], labels[labelled]) + 0.5 * entropy(logits[~labelled], 1.0)


OBJECTIVES = {
    "tent": lambda logits, _: entropy(logits, 0.0),
    "infomax": lambda logits, _: entropy(logits, 1.0),
    "beside": beside,
}


def step(net, x, labels, objective, convert):
    """The loss, and its gradient: what a step of plain descent moves the trained tensors by."""
    net = convert(copy.deepcopy(net)).train()
    trained = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # PyTorch's TENT keeps no running statistics: the batch's own normalise.
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            trained |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    # One parameter may stand in for two that the exporter merged.
    unique = {id(p): (name, p) for name, p in reversed(trained.items())}
    trained = dict(sorted(unique.values()))
    net.requires_grad_(False)
    for p in trained.values():
        p.requires_grad_(True)
    loss = objective(net(convert(torch.from_numpy(x))), torch.from_numpy(labels))
    loss.backward()
    return {"loss": loss.detach(), "grad": {name: p.grad for name, p in trained.items()}}


def clear_batch(net, images, labels, size):
    """The first batch on whose gradients float32 and float64 agree (see grads.clear_batch), and labels for each other."""
    for i in range(0, len(images) - size + 1, size):
        x, y = images[i : i + size], labels[i : i + size].astype("int64")
        y[1::2] = IGNORED
        found = [runs(lambda convert, f=f: step(net, x, y, f, convert)) for f in OBJECTIVES.values()]
        drift = {name: e for singles, double in found for name, e in worst_errors([s["grad"] for s in singles], double["grad"]).items()}
        if max(drift.values()) < CLEAR / 4:
            print(f"images {i} to {i + size}: {worst(drift)}")
            return x, y, found
    raise SystemExit("no batch stays clear of the kinks")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resnet20", type=pathlib.Path, default=RESNET20)
    path = parser.parse_args().resnet20
    net = twin("resnet20", path)
    x, labels, found = clear_batch(net, *worn_fashion()[:2], 8)
    check_twin(net, path, x)
    out = {"x": x, "labels": labels, "model_sha256": sha256(path)}
    for name, (singles, double) in zip(OBJECTIVES, found, strict=True):
        out[f"{name}.loss"] = double["loss"]
        part = stored("grad", [s["grad"] for s in singles], double["grad"])
        out |= {f"{name}.{key}": value for key, value in part.items()}
    save(FIXTURES / "tent.npz", out)
