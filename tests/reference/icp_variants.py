"""Fixture icp_variants.npz: two steps of each variant of ICP on ResNet-20, on the images of icp_images.npz.

Written from the definitions in `src/icp/settings.rs`, in float64; what is stored are losses, gradient norms and how far
each sample is moved, of both steps: the second shows what a variant carries over from the first.
"""

import copy
import math

import numpy as np
import torch
from torch import nn

from common import FIXTURES, save, sha256, text
from icp import cosine_weights, moves, taps
from nets import RESNET20, twin

LR, ALPHA = 0.01, 0.5
TINY = 1e-6


def cross_entropy(net, x, y):
    return nn.functional.cross_entropy(net(x), y)


def each(t):
    """[N] to [N,1,1,1]."""
    return t.reshape(-1, 1, 1, 1)


def by_rms(g):
    top = each(g.abs().flatten(1).amax(1)).clamp_min(float(np.finfo(np.float32).tiny))
    g = g / top
    return g / (each(g.square().flatten(1).mean(1)) + TINY).sqrt()


def distance(kind, a, b):
    if kind == "channel":
        deviation = (b.var((0, 2, 3), unbiased=False, keepdim=True) + TINY).sqrt()
        return nn.functional.mse_loss(a / deviation, b / deviation)
    if kind == "cosine":
        unit = lambda t: t.flatten(1) / (t.flatten(1).square().sum(1, keepdim=True) + TINY).sqrt()
        return 0.5 * (unit(a) - unit(b)).square().sum(1).mean()
    return nn.functional.mse_loss(a, b)


class Variant:
    """A run of two steps. `at`: perturb the output of layer2, only what follows trains, and no statistics move."""

    def __init__(self, net, x, y, rule="adam", epsilon=0.002, steps=3, sign=False, up=False, unit="input", ball=None, range=None, which="all", reuse="fresh", at=False, features="mse", weights=True, ema=None, taps=None):
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})
        self.net = copy.deepcopy(net)
        self.kept = None
        self.average = copy.deepcopy(self.net) if ema else None
        if at:
            for name, p in self.net.named_parameters():
                p.requires_grad_(name.startswith(("layer3", "fc")))

    def tail(self, net, h):
        return net.fc(net.pool(net.layer3(h)).flatten(1)) if hasattr(net, "pool") else net.fc(net.layer3(h).mean((2, 3)))

    def loss_of(self, z):
        logits = self.tail(self.net, z) if self.at else self.net(z)
        return logits, nn.functional.cross_entropy(logits, self.y)

    def mask(self, logits):
        if self.which == "wrong":
            return each((logits.argmax(1) != self.y).double())
        if self.which != "all":
            return each((logits.softmax(1).amax(1) < self.which).double())
        return 1.0

    def perturb(self, x):
        """x^K and the losses before each step."""
        self.net.eval()
        clean, losses = x.clone(), []
        if self.reuse == "warm" and self.kept is not None:
            x = x + self.kept
        epsilon = self.epsilon * (clean.std(unbiased=False).item() if self.unit == "std" else 1.0)
        move = moves(self.rule, -epsilon if self.up else epsilon)
        for k in range(self.steps):
            if self.reuse == "free":
                g = self.kept if self.kept is not None else torch.zeros_like(x)
            else:
                x = x.detach().requires_grad_()
                logits, loss = self.loss_of(x)
                (g,) = torch.autograd.grad(loss, x)
                g = g * self.mask(logits.detach())
                losses.append(loss.item())
            if self.unit == "gradient":
                g = by_rms(g)
            if self.sign:
                g = g.sign()
            x = x.detach() - move(g, k)
            if self.ball and self.ball[0] == "linf":
                x = clean + (x - clean).clamp(-self.ball[1], self.ball[1])
            if self.ball and self.ball[0] == "l2":
                norm = each((x - clean).flatten(1).norm(dim=1))
                x = clean + (x - clean) * (self.ball[1] / norm).clamp_max(1.0)
            if self.range:
                x = x.clamp(*self.range)
        if self.reuse == "warm":
            self.kept = (x - clean).detach()
        return x.detach(), losses

    def step(self):
        net, clean = self.net, self.x
        if self.ema:
            with torch.no_grad():
                for a, p in zip(self.average.parameters(), net.parameters(), strict=True):
                    a += (1 - self.ema) * (p - a)
        with torch.no_grad():
            if self.at:
                net.eval()
                stem = nn.Sequential(*[m for name, m in net.named_children() if name not in ("layer3", "pool", "fc")])
                clean = stem(self.x)
        z, losses = self.perturb(clean)
        net.train(not self.at)
        with torch.no_grad():
            if self.at:
                teacher = [net.layer3(z)]
            elif self.ema:
                self.average.train()
                teacher = taps(self.average, z)[1]
            elif self.features is not None:
                teacher = taps(net, z)[1]
        x = self.x.clone().requires_grad_()
        logits, student = taps(net, x)
        task = nn.functional.cross_entropy(logits, self.y)
        feat = torch.zeros((), dtype=torch.float64)
        if self.features is not None:
            student = student[-len(teacher):]
            if self.taps:
                teacher, student = teacher[self.taps], student[self.taps]
            ws = cosine_weights(len(teacher)) if self.weights else [1.0] * len(teacher)
            feat = sum(w * distance(self.features, a, b) for w, a, b in zip(ws, student, teacher, strict=True))
        loss = ALPHA * task + (1 - ALPHA) * feat if self.features is not None else ALPHA * task
        trained = [p for p in net.parameters() if p.requires_grad]
        net.zero_grad()
        loss.backward()
        if self.reuse == "free":
            self.kept = (x.grad * self.mask(logits.detach())).detach()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in trained))
        torch.optim.SGD(trained, lr=LR).step()
        return {
            "losses": np.array(losses),
            "moved": (z - clean).flatten(1).norm(dim=1).numpy(),
            "values": np.array([task.item(), feat.item(), loss.item(), norm.item()]),
        }


def byot(net, x, y, heads, temperature=3.0):
    """Two steps of SGD with auxiliary heads on layer1 and layer2."""
    net = copy.deepcopy(net).train()
    heads = [[w.clone().requires_grad_() for w in head] for head in heads]
    out = []
    for _ in range(2):
        logits, features = taps(net, x)
        task = total = nn.functional.cross_entropy(logits, y)
        taught = (logits.detach() / temperature).softmax(1)
        for (w, b), f in zip(heads, features[:2], strict=True):
            own = f.mean((2, 3)) @ w + b
            total = total + 0.7 * nn.functional.cross_entropy(own, y) + 0.3 * temperature**2 * nn.functional.cross_entropy(own / temperature, taught)
        params = list(net.parameters())
        net.zero_grad()
        for head in heads:
            for w in head:
                w.grad = None
        total.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in params))
        torch.optim.SGD([*params, *(w for head in heads for w in head)], lr=LR).step()
        out.append(np.array([task.item(), total.item(), norm.item()]))
    return out


VARIANTS = {
    "adversarial": {"rule": "sgd", "epsilon": 0.01, "sign": True, "up": True},
    "gradient": {"rule": "sgd", "epsilon": 0.05, "unit": "gradient", "ball": ("linf", 0.08), "range": (0.0, 1.0)},
    "std": {"rule": "sgd", "epsilon": 0.5, "unit": "std", "ball": ("l2", 0.2), "weights": False},
    "wrong": {"which": "wrong"},
    "uncertain": {"which": 0.6},
    "channel": {"features": "channel"},
    "cosine": {"features": "cosine"},
    "alone": {"features": None},
    "ema": {"ema": 0.75},
    "warm": {"reuse": "warm", "steps": 2, "rule": "sgd", "epsilon": 0.1},
    "free": {"reuse": "free", "rule": "sgd", "epsilon": 0.5},
    "first": {"at": True, "rule": "sgd", "epsilon": 10.0},
    "deep": {"taps": slice(2, 3)},
}


if __name__ == "__main__":
    arrays = np.load(FIXTURES / "icp_images.npz")
    net = twin("resnet20", RESNET20).double()
    x, y = torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["y"])
    out = {"model_sha256": sha256(RESNET20), "alpha": ALPHA, "lr": LR, "names": text(list(VARIANTS))}
    for name, options in VARIANTS.items():
        run = Variant(net, x, y, **options)
        for number in (1, 2):
            for key, value in run.step().items():
                out[f"{name}.{number}.{key}"] = value
        print(name, *(np.round(out[f"{name}.{n}.values"], 5) for n in (1, 2)), "moved", np.round(out[f"{name}.2.moved"], 4))
    generator = torch.Generator().manual_seed(1)
    heads = [[0.3 * torch.randn(c, 10, generator=generator, dtype=torch.float64).float().double(), 0.1 * torch.randn(10, generator=generator, dtype=torch.float64).float().double()] for c in (16, 32)]
    for i, head in enumerate(heads):
        out[f"byot.head{i}.weight"], out[f"byot.head{i}.bias"] = (w.float() for w in head)
    for number, values in enumerate(byot(net, x, y, heads), 1):
        out[f"byot.{number}.values"] = values
        print("byot", np.round(values, 5))
    save(FIXTURES / "icp_variants.npz", out)
