"""The benchmark's four networks in PyTorch and, with the same weights, as ONNX files.

    python models.py [FOLDER]          default: target/peers; writes NAME.onnx and NAME.pt

Weights are random (fixed seed). Files are opset 17 with a free batch size. BatchNormalization is kept, as finetuning needs it.
"""

import argparse
import functools
import importlib.util
import pathlib
import warnings

import numpy as np
import onnx
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from data import TOKENS, inputs

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "target" / "peers"
VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS = 30522, 384, 6, 1536, 6


@functools.cache
def models_make():
    """models/make.py as a module: ResNet-20 is defined there."""
    spec = importlib.util.spec_from_file_location("models_make", ROOT / "models" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet20():
    """That of models/, for three channels."""
    net = models_make().networks()["resnet20"]()
    net.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    return net


def mobilenetv2():
    return torchvision.models.mobilenet_v2(dropout=0.0)


def resnet18():
    return torchvision.models.resnet18()


class EncoderLayer(nn.Module):
    """BERT's layer: attention and feed-forward, each added to its input and then normalised."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def attention(self, x):
        q, k, v = (f(x).view(-1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.query, self.key, self.value))
        if torch.onnx.is_in_onnx_export():  # as deployed files have it
            scores = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(-1, TOKENS, WIDTH))

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """MiniLM's shape (6 layers of 384, 22 million weights) with a classifier over the mean of the tokens."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.register_buffer("positions", torch.zeros(TOKENS, WIDTH))  # fixed: retune does not train a bare table
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.Sequential(*[EncoderLayer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 10)
        for table in (self.words.weight, self.positions):
            nn.init.normal_(table, 0, 0.02)

    def forward(self, tokens):
        return self.head(self.layers(self.norm(self.words(tokens) + self.positions)).mean(1))


NETWORKS = {"resnet20": resnet20, "mobilenetv2": mobilenetv2, "resnet18": resnet18, "encoder": Encoder}


def make(name):
    """The network with distinct vectors (the exporter merges equal ones) and running statistics from one batch."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p += torch.empty_like(p).uniform_(-0.1, 0.1)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.momentum = None  # the plain average: of one pass, its own statistics
        net.train()(torch.from_numpy(inputs(name, 16)[0]))
    for m in norms:
        m.momentum = 0.1
        m.num_batches_tracked.zero_()
    return net.eval()


def load(name, folder=FOLDER):
    """The network as its file in `folder` has it."""
    net = NETWORKS[name]()
    net.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return net


def export(net, name, path):
    x = torch.from_numpy(inputs(name, 2)[0])
    # Training form keeps BatchNormalization. The encoder has none, and is deployed with its weights transposed once.
    encoder = name == "encoder"
    mode = torch.onnx.TrainingMode.EVAL if encoder else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        net, (x,), str(path), dynamo=False, opset_version=17, training=mode, do_constant_folding=encoder,
        input_names=["input"], output_names=["logits"], dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    weights = sum(int(np.prod(i.dims)) for i in model.graph.initializer if len(i.dims))
    expected = sum(t.numel() for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked"))
    assert expected <= weights < expected + 100, f"{name}: initializers merged or missing: {weights} of {expected}"


def check(net, name, path):
    """The file computes what the network does."""
    import onnxruntime

    x = inputs(name, 2)[0]
    (got,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": x})
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"{name}: ONNX and PyTorch differ by {error:.1e}"
    return error


def write(folder=FOLDER):
    folder.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        net, path = make(name), folder / f"{name}.onnx"
        torch.save(net.state_dict(), folder / f"{name}.pt")
        export(net, name, path)
        error = check(net, name, path)
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{name}: {parameters:,} parameters, {path.stat().st_size:,} bytes, error against PyTorch {error:.0e}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=FOLDER)
    write(parser.parse_args().folder)
