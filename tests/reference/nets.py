"""PyTorch twins of the ONNX networks, filled from a file's initializers by name.

    python nets.py        writes tests/fixtures/mobilenetv2.onnx
"""

import importlib.util
import pathlib

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import torch
from torch import nn

from common import FIXTURES, MODELS, SEED, to_numpy

RESNET20 = MODELS / "resnet20.onnx"
DSNET = MODELS / "dsnet.onnx"
MOBILENETV2 = FIXTURES / "mobilenetv2.onnx"


def models_make():
    """models/make.py as a module: the networks, the data and the worn camera are defined there."""
    spec = importlib.util.spec_from_file_location("models_make", MODELS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fashion():
    """The 2,000 committed test images, [N,1,28,28] in 0..1, and their labels."""
    return models_make().load(MODELS, "fashion")


def worn_fashion():
    """The same degraded: a trained network is unsure of them, so that no gradient is next to nothing."""
    x, y = fashion()
    return models_make().worn_camera(x), y


def colour_images(count, size, seed):
    """Real-looking colour images: Fashion-MNIST shapes, each in a colour of its own on another, with noise; about zero mean, unit variance."""
    x, y = fashion()
    rng = np.random.default_rng([SEED, seed])
    pick = rng.permutation(len(x))[:count]
    shape = torch.nn.functional.interpolate(torch.from_numpy(x[pick]), (size, size), mode="bilinear", align_corners=False).numpy()
    ink, paper = rng.random((2, count, 3, 1, 1), np.float32)
    image = paper + (ink - paper) * shape + rng.normal(0, 0.1, (count, 3, size, size))
    return ((image - 0.5) / 0.28).astype(np.float32), y[pick]


def channels(width, value):
    """A channel count times the width multiplier, to the nearest multiple of 8 but not under nine tenths."""
    scaled = max(8, int(value * width + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * value * width else scaled


def conv_bn(cin, cout, size, stride=1, groups=1, act=True):
    layers = [nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    def __init__(self, cin, cout, stride, expansion):
        super().__init__()
        wide = cin * expansion
        self.expand = conv_bn(cin, wide, 1) if expansion != 1 else nn.Identity()
        self.depthwise = conv_bn(wide, wide, 3, stride, groups=wide)
        self.project = conv_bn(wide, cout, 1, act=False)
        self.residual = stride == 1 and cin == cout

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2. `strides` is that of the stem and of the first block of each of the seven stages."""

    STAGES = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]

    def __init__(self, width, strides, last, classes=10):
        super().__init__()
        cin = channels(width, 32)
        self.stem = conv_bn(3, cin, 3, strides[0])
        blocks = []
        for (expansion, out, count), stride in zip(self.STAGES, strides[1:], strict=True):
            for i in range(count):
                cout = channels(width, out)
                blocks.append(InvertedResidual(cin, cout, stride if i == 0 else 1, expansion))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(cin, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x):
        x = self.pool(self.head(self.blocks(self.stem(x))))
        return self.classifier(self.dropout(torch.flatten(x, 1)))


def small_mobilenetv2():
    """For 3x32x32."""
    return MobileNetV2(0.25, (1, 1, 1, 2, 2, 1, 2, 1), last=128)


def real_mobilenetv2():
    """Full width, for 3x96x96 and larger."""
    return MobileNetV2(1.0, (2, 1, 2, 2, 2, 1, 2, 1), last=1280)


def randomise(net, images):
    """Random weights, scales and shifts; running statistics from one pass over `images`."""
    generator = torch.Generator().manual_seed(SEED)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                inputs = m.weight[0].numel()
                m.weight.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            elif isinstance(m, nn.Linear):
                m.weight.normal_(0, m.in_features**-0.5, generator=generator)
                m.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 2.0, generator=generator)
                m.bias.normal_(0, 0.2, generator=generator)
                m.momentum = None  # the plain average: of one pass, its own statistics
        net.train()(torch.from_numpy(images))
    for m in norms:
        m.momentum = 0.1
    return net.eval()


def clear_kinks(net, x, reach=0.1):
    """Moves the shifts before each ReLU6 a little, so that for the batch `x` no input of it lies near a kink, in either mode.

    A random network has no batch of its own that does (see grads.clear_batch). Returns the smallest distance left, and
    how many inputs lie above 6.
    """
    net = net.double()
    pairs = [(m[1], m[2]) for m in net.modules() if isinstance(m, nn.Sequential) and len(m) == 3 and isinstance(m[2], nn.ReLU6)]
    x = torch.tensor(x, dtype=torch.float64)
    statistics = {name: b.clone() for name, b in net.named_buffers()}
    margin, above = np.inf, 0
    moves = np.linspace(-reach, reach, 4001)
    for norm, act in pairs:  # in the order of execution: each sees the shifts of those before it
        seen = []
        hook = act.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1)))
        with torch.no_grad():
            for training in (False, True):
                net.train(training)(x)
                net.load_state_dict(statistics, strict=False)
        hook.remove()
        values = torch.cat(seen, 1).sort(1).values.numpy()
        for channel, row in enumerate(values):
            points = np.stack([-moves, 6 - moves])  # where the two kinks lie among the values as they are
            right = np.searchsorted(row, points)
            below, beyond = row[np.maximum(right - 1, 0)], row[np.minimum(right, len(row) - 1)]
            distance = np.minimum(abs(points - below), abs(points - beyond)).min(0)
            best = distance.argmax()
            with torch.no_grad():
                norm.bias[channel] = float(np.float32(norm.bias[channel].item() + moves[best]))
            margin = min(margin, distance[best])
            above += int((row + moves[best] > 6).sum())
    net.float().eval()
    return margin, above


def export(net, path, shape):
    """As models/make.py exports: opset 17, BatchNormalization kept, initializers named as in the state dict."""
    net.eval()
    torch.onnx.export(
        net, (torch.zeros(2, *shape),), str(path), dynamo=False, opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        input_names=["image"], output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
    )
    onnx.checker.check_model(str(path), full_check=True)


def fill(net, path):
    """Copies the file's initializers into the twin.

    Where the exporter merged equal ones (one initializer, its other uses behind an Identity) the twin shares the parameter
    too: its gradient is that of the file's one tensor, the sum over its uses.
    """
    graph = onnx.load(str(path)).graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    merged = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}
    state = {name: torch.from_numpy(values[merged.get(name, name)].copy()) for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    net.load_state_dict(state, strict=False)
    for name, source in merged.items():
        module, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(module), attribute, net.get_parameter(source))
    twins = {name for name, _ in net.named_parameters()} | {name for name, _ in net.named_buffers() if "running" in name}
    assert twins == set(values), f"the twin and the file differ in {twins ^ set(values)}"
    return net.eval()


def check_twin(net, path, x):
    """The twin's output in evaluation mode against onnxruntime's."""
    expected = session(path).run(None, {"image": x})[0]
    with torch.no_grad():
        found = net.eval()(torch.from_numpy(x)).numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"{path}: the twin differs from onnxruntime by {error:.1e}"


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, pathlib.Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def value_names(path, x, tensors):
    """The ONNX names of the Relu outputs that equal each of `tensors`."""
    model = onnx.load(str(path))
    names = [n.output[0] for n in model.graph.node if n.op_type == "Relu"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = dict(zip(names, session(model).run(None, {"image": x}), strict=True))
    found = []
    for tensor in map(to_numpy, tensors):
        match = [n for n, v in values.items() if v.shape == tensor.shape and np.allclose(v, tensor, atol=1e-4 * np.abs(tensor).max())]
        assert len(match) == 1, match
        found += match
    return found


def twin(name, path=None):
    """The filled twin of a network by the name of its file."""
    trained = models_make().networks()
    known = {"resnet20": (RESNET20, trained["resnet20"]), "dsnet": (DSNET, trained["dsnet"]), "mobilenetv2": (MOBILENETV2, small_mobilenetv2)}
    default, make = known[name]
    return fill(make(), path or default)


def new_mobilenetv2(make, size, batch):
    """A random network, its running statistics from real-looking images, and a batch that stays clear of its kinks."""
    net = randomise(make(), colour_images(256, size, seed=1)[0])
    x, y = colour_images(batch, size, seed=2)
    margin, above = clear_kinks(net, x)
    print(f"mobilenetv2 at {size}x{size}: kinks at least {margin:.1e} away, {above} inputs of ReLU6 above 6")
    return net, x, y


if __name__ == "__main__":
    net, _, _ = new_mobilenetv2(small_mobilenetv2, 32, 8)
    export(net, MOBILENETV2, (3, 32, 32))
    print(f"tests/fixtures/{MOBILENETV2.name}: {MOBILENETV2.stat().st_size} bytes, {sum(p.numel() for p in net.parameters())} parameters")
