"""Fixtures optimizers.npz and schedules.json: parameters after each of 20 steps with given gradients, learning rates and alphas."""

import json
import math

import numpy as np
import torch

from common import FIXTURES, SEED, save, text

STEPS, SIZE = 20, 19

# every case lists all its hyperparameters: the Rust test passes them on as they are
CASES = {
    "sgd": ("sgd", dict(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)),
    "sgd_momentum": ("sgd", dict(lr=0.05, momentum=0.9, nesterov=False, weight_decay=0.0)),
    "sgd_nesterov": ("sgd", dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.0)),
    "sgd_decay": ("sgd", dict(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.01)),
    "sgd_all": ("sgd", dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "adam": ("adam", dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False)),
    "adam_decay": ("adam", dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, amsgrad=False)),
    "adam_amsgrad": ("adam", dict(lr=1e-2, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0, amsgrad=True)),
    "adamw": ("adamw", dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, amsgrad=False)),
    "ademamix": ("ademamix", dict(lr=1e-2, betas=(0.9, 0.999, 0.9999), eps=1e-8, alpha=5.0, weight_decay=0.0)),
    "ademamix_decay": ("ademamix", dict(lr=1e-2, betas=(0.9, 0.999, 0.9999), eps=1e-8, alpha=5.0, weight_decay=0.01)),
}


class AdEMAMix(torch.optim.Optimizer):
    """Pagliardini et al. 2024 (arXiv 2409.03137), without its alpha and beta3 schedulers.

    m1 = b1 m1 + (1-b1) g;  m2 = b3 m2 + (1-b3) g;  v = b2 v + (1-b2) g^2
    p -= lr wd p;  p -= lr (m1 / (1-b1^t) + alpha m2) / (sqrt(v / (1-b2^t)) + eps)
    """

    def __init__(self, params, lr, betas, eps, alpha, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, alpha=alpha, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2, b3), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m1=torch.zeros_like(p), m2=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                state["m1"] = b1 * state["m1"] + (1 - b1) * p.grad
                state["m2"] = b3 * state["m2"] + (1 - b3) * p.grad
                state["v"] = b2 * state["v"] + (1 - b2) * p.grad**2
                m1 = state["m1"] / (1 - b1 ** state["t"])
                v = state["v"] / (1 - b2 ** state["t"])
                p -= lr * group["weight_decay"] * p
                p -= lr * (m1 + group["alpha"] * state["m2"]) / (v.sqrt() + group["eps"])


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "ademamix": AdEMAMix}


def run(kind, options, p0, grads, dtype):
    p = torch.tensor(p0, dtype=dtype, requires_grad=True)
    optimizer = OPTIMIZERS[kind]([p], **options)
    rows = []
    for g in grads:
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        rows.append(p.detach().numpy().copy())
    return np.stack(rows)


def optimizers():
    out = {"cases": text({name: kind for name, (kind, _) in CASES.items()})}
    for number, (name, (kind, options)) in enumerate(CASES.items()):
        rng = np.random.default_rng([SEED, number])
        p0 = rng.standard_normal(SIZE).astype(np.float32)
        # magnitudes from 1e-4 to 10, falling over the steps (so that AMSGrad's maximum is felt); one element never gets a gradient
        scale = 10.0 ** rng.uniform(-4, 1, SIZE) * np.linspace(1.5, 0.2, STEPS)[:, None]
        grads = (rng.standard_normal((STEPS, SIZE)) * scale).astype(np.float32)
        grads[:, 5] = 0
        single, double = (run(kind, options, p0, grads, dtype) for dtype in (torch.float32, torch.float64))
        assert np.abs(single - double).max() < 1e-4 * np.abs(double - p0).max(), name
        out |= {f"{name}.p0": p0, f"{name}.grads": grads, f"{name}.p": single}
        for key, value in options.items():
            out[f"{name}.{key}"] = np.asarray(value, np.bool_ if isinstance(value, bool) else np.float64)
    save(FIXTURES / "optimizers.npz", out)


def schedule(kind, lr, total, warmup, step_size=None, gamma=None):
    """The rate of each 0-based step: (t+1)/warmup of `lr` while t < warmup, then `kind`, counted from the end of the warm-up."""
    rates = []
    for t in range(total):
        if t < warmup:
            rates.append(lr * (t + 1) / warmup)
        elif kind == "constant":
            rates.append(lr)
        elif kind == "cosine":
            rates.append(lr * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup))))
        else:
            rates.append(lr * gamma ** ((t - warmup) // step_size))
    return rates


def torch_schedule(kind, lr, total, warmup, step_size=None, gamma=None):
    """The same by PyTorch's own schedulers."""
    from torch.optim import lr_scheduler as s

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    parts = {
        "constant": lambda: s.ConstantLR(optimizer, 1.0, 0),
        "cosine": lambda: s.CosineAnnealingLR(optimizer, total - warmup),
        "step": lambda: s.StepLR(optimizer, step_size, gamma),
    }
    if warmup > 1:
        warm = s.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
        scheduler = s.SequentialLR(optimizer, [warm, parts[kind]()], [warmup])
    else:
        scheduler = parts[kind]()
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def alphas(epochs, fraction):
    """ICP's alpha per epoch; null where the warm-up trains plainly."""
    w = math.floor(fraction * epochs)
    return [None if e < w else math.cos(math.pi * (e - w) / (2 * (epochs - w))) for e in range(epochs)]


def schedules():
    cases = []
    for kind, extra in (("constant", {}), ("cosine", {}), ("step", dict(step_size=6, gamma=0.1))):
        for warmup in (0, 5):
            options = dict(kind=kind, lr=3e-4, total=20, warmup=warmup, **extra)
            rates = schedule(**options)
            np.testing.assert_allclose(rates, torch_schedule(**options), rtol=1e-9, atol=1e-15)
            cases.append(options | {"rates": rates})
    alpha = [
        {"epochs": epochs, "warmup_fraction": fraction, "alphas": alphas(epochs, fraction)}
        for epochs, fraction in ((10, 0.0), (10, 0.25), (10, 0.5), (8, 0.75), (4, 1.0), (1, 0.0))
    ]
    weights = [{"taps": n, "cosine": [1.0] if n == 1 else [math.cos(i / (n - 1) * math.pi / 4) for i in range(n)]} for n in (1, 2, 3, 4, 8)]
    path = FIXTURES / "schedules.json"
    path.write_text(json.dumps({"learning_rate": cases, "icp_alpha": alpha, "icp_weights": weights}, indent=1) + "\n")
    print(f"tests/fixtures/{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    optimizers()
    schedules()
