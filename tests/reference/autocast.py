"""Fixture autocast_resnet20.npz: how far PyTorch's own bfloat16 autocast is from its float32, in training mode, on the batch of
grad_resnet20_train.npz: for each parameter the norm of the gradients' difference over the gradient's norm, and that of all
together. (Of the random MobileNetV2, rounding to bfloat16 changes gradients by as much as they are.)"""

import copy
import math

import numpy as np
import torch
from torch import nn

from common import FIXTURES, load, save, sha256
from nets import RESNET20, twin


def gradients(net, x, y, half):
    net = copy.deepcopy(net).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = net(x)
    loss = nn.functional.cross_entropy(logits.float(), y)
    loss.backward()
    return loss.detach(), {name: p.grad.double() for name, p in net.named_parameters()}


fixture = load(FIXTURES / "grad_resnet20_train.npz")
x, y = torch.from_numpy(fixture["in.image"]), torch.from_numpy(fixture["target"])
net = twin("resnet20")
(loss, single), (rounded, half) = (gradients(net, x, y, half) for half in (False, True))
assert abs(float(loss) - float(fixture["loss"])) < 1e-4 * abs(float(loss))
out = {"model_sha256": sha256(RESNET20), "loss": loss, "loss16": rounded}
out |= {f"error.{key}": np.float64((half[key] - g).norm() / g.norm()) for key, g in single.items()}
apart = math.sqrt(sum(float((half[key] - g).norm()) ** 2 for key, g in single.items()))
out["error"] = np.float64(apart / math.sqrt(sum(float(g.norm()) ** 2 for g in single.values())))
save(FIXTURES / "autocast_resnet20.npz", out)
print(f"  loss {float(loss):.5f}, bfloat16 {float(rounded):.5f}; gradients apart by {float(out['error']):.4f}")
