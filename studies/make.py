"""Makes the networks of the studies that models/ does not have.

    python studies/make.py        needs numpy, onnx and torch

resnet20-untrained.onnx (not committed): models/resnet20.onnx with the weights that PyTorch would begin with.
vae.onnx, vae_loss.onnx: a small convolutional variational autoencoder (Kingma and Welling 2014) of 28x28 images, untrained,
and its loss: squared error a pixel plus half the divergence from the standard normal a pixel.
"""

import pathlib

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20505


def fresh(name, value, rng):
    if "running_mean" in name or name.endswith(("bn1.bias", "bn2.bias", "downsample.1.bias")):
        return np.zeros_like(value)
    if value.ndim == 1 and not name.startswith("fc."):  # scales and running variances
        return np.ones_like(value)
    # nn.Conv2d and nn.Linear: uniform in +-1/sqrt(fan in)
    fan = value[0].size if value.ndim > 1 else 64
    return rng.uniform(-(fan**-0.5), fan**-0.5, value.shape).astype(value.dtype)


def untrained():
    model = onnx.load(HERE.parent / "models" / "resnet20.onnx")
    rng = np.random.default_rng(SEED)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(fresh(tensor.name, value, rng), tensor.name))
    onnx.checker.check_model(model)
    onnx.save(model, HERE / "resnet20-untrained.onnx")


class Vae(nn.Module):
    def __init__(self, latent=16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.mean, self.spread = nn.Linear(1568, latent), nn.Linear(1568, latent)
        self.grow = nn.Linear(latent, 1568)
        self.decoder = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, image):
        h = self.encoder(image).flatten(1)
        mean, log_var = self.mean(h), self.spread(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return self.decoder(self.grow(z).reshape(-1, 32, 7, 7)), mean, log_var


class VaeLoss(nn.Module):
    def forward(self, reconstruction, mean, log_var, target):
        divergence = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1).mean()
        return (reconstruction - target).pow(2).mean() + 0.5 * divergence / 784


def export(module, inputs, names, outputs, path):
    axes = {name: {0: "N"} for name in [*names, *(o for o in outputs if o != "loss")]}
    torch.onnx.export(
        module, inputs, path, input_names=names, output_names=outputs, dynamic_axes=axes, opset_version=17, dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    onnx.checker.check_model(onnx.load(path))


if __name__ == "__main__":
    untrained()
    torch.manual_seed(SEED)
    vae = Vae().eval()
    image = torch.rand(2, 1, 28, 28)
    outputs = vae(image)
    names = ["reconstruction", "mean", "log_var"]
    export(vae, (image,), ["image"], names, HERE / "vae.onnx")
    export(VaeLoss(), (*outputs, image), [*names, "target"], ["loss"], HERE / "vae_loss.onnx")
