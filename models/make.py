"""Trains and exports the two networks of this folder and cuts the demo data.

    python models/make.py --untrained              both networks with random weights, in seconds
    python models/make.py                          trains both, exports them, measures them
    python models/make.py --only dsnet --epochs 8
    python models/make.py --export                 exports the state dicts in `--checkpoint` again
    python models/make.py --measure                accuracies of the files that are here
    python models/make.py --slice                  the 2,000 demo images

Reads the Fashion-MNIST IDX files from `--data`; `tests/fetch.sh` puts links to them there.
Only the training split trains; the demo images come from the test split.
"""

import argparse
import gzip
import struct
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CLASSES = 10


# ---------------------------------------------------------------- data

def read_idx(path):
    """An IDX file of unsigned bytes, gzipped or not, as an array."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    zero, kind, rank = struct.unpack(">HBB", raw[:4])
    assert zero == 0 and kind == 8, f"{path}: not an IDX file of bytes"
    dims = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(dims)


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    # mtime=0: the same bytes whenever it is made
    Path(path).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 9, mtime=0))


def load(folder, prefix):
    """Images [N,1,28,28] float32 in 0..1 and labels [N] int64."""
    x = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz")
    y = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz")
    return x[:, None].astype(np.float32) / 255, y.astype(np.int64)


def worn_camera(x, seed=0):
    """Blurred (5x5 binomial, twice), dimmed (x*0.7 + 0.05), noisy (sigma 0.15), clipped to 0..1."""
    kernel = np.array([1, 4, 6, 4, 1], np.float32) / 16
    for _ in range(2):
        for axis in (2, 3):
            pad = [(0, 0)] * 4
            pad[axis] = (2, 2)
            padded = np.pad(x, pad, mode="edge")
            n = x.shape[axis]
            x = sum(k * np.take(padded, range(i, i + n), axis) for i, k in enumerate(kernel))
    noise = np.random.default_rng(seed).normal(0, 0.15, x.shape).astype(np.float32)
    return np.clip(x * 0.7 + 0.05 + noise, 0, 1).astype(np.float32)


def make_slice(folder, count=2000, seed=0):
    """`count` test images, the same number of each class, in a seeded order."""
    x = read_idx(Path(folder) / "t10k-images-idx3-ubyte.gz")
    y = read_idx(Path(folder) / "t10k-labels-idx1-ubyte.gz")
    rng = np.random.default_rng(seed)
    picks = [rng.permutation(np.flatnonzero(y == c))[: count // CLASSES] for c in range(CLASSES)]
    order = rng.permutation(np.concatenate(picks))
    write_idx(HERE / "fashion-images-idx3-ubyte.gz", x[order])
    write_idx(HERE / "fashion-labels-idx1-ubyte.gz", y[order])


# ---------------------------------------------------------------- networks

def networks():
    import torch
    from torch import nn

    def conv(cin, cout, size, stride=1, groups=1):
        return nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False)

    class BasicBlock(nn.Module):
        def __init__(self, cin, cout, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(cin, cout, 3, stride), nn.BatchNorm2d(cout)
            self.conv2, self.bn2 = conv(cout, cout, 3), nn.BatchNorm2d(cout)
            self.downsample = None
            if stride != 1 or cin != cout:
                self.downsample = nn.Sequential(conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))
            self.relu = nn.ReLU()

        def forward(self, x):
            skip = x if self.downsample is None else self.downsample(x)
            x = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(x)) + skip)

    class ResNet20(nn.Module):
        """He et al. 2016, section 4.2, n = 3; projection shortcuts."""

        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.relu = conv(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
            self.layer1 = self.stage(16, 16, 1)
            self.layer2 = self.stage(16, 32, 2)
            self.layer3 = self.stage(32, 64, 2)
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, CLASSES)

        def stage(self, cin, cout, stride):
            blocks = [BasicBlock(cin, cout, stride)] + [BasicBlock(cout, cout, 1) for _ in range(2)]
            return nn.Sequential(*blocks)

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.fc(torch.flatten(self.pool(x), 1))

    class Separable(nn.Module):
        def __init__(self, cin, cout, stride):
            super().__init__()
            self.depthwise, self.bn1 = conv(cin, cin, 3, stride, groups=cin), nn.BatchNorm2d(cin)
            self.pointwise, self.bn2 = conv(cin, cout, 1), nn.BatchNorm2d(cout)
            self.act = nn.ReLU6()

        def forward(self, x):
            x = self.act(self.bn1(self.depthwise(x)))
            return self.act(self.bn2(self.pointwise(x)))

    class DsNet(nn.Module):
        """Depthwise-separable blocks as in MobileNet (Howard et al. 2017), sized for 28x28."""

        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.act = conv(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU6()
            plan = [(16, 32, 2), (32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1)]
            self.blocks = nn.Sequential(*[Separable(*p) for p in plan])
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(128, CLASSES)

        def forward(self, x):
            x = self.blocks(self.act(self.bn1(self.conv1(x))))
            return self.fc(torch.flatten(self.pool(x), 1))

    def initialised(make):
        net = make()
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        return net

    return {"resnet20": lambda: initialised(ResNet20), "dsnet": lambda: initialised(DsNet)}


# ---------------------------------------------------------------- training

def augment(x, generator):
    """Each image moved by up to 2 pixels, and mirrored with probability 1/2."""
    import torch
    import torch.nn.functional as F

    n, _, h, w = x.shape
    padded = F.pad(x, (2, 2, 2, 2))
    dy, dx = (torch.randint(0, 5, (n, 1), generator=generator) for _ in range(2))
    rows, cols = torch.arange(h)[None] + dy, torch.arange(w)[None] + dx
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    cols = torch.where(mirrored, cols.flip(1), cols)
    sample = torch.arange(n)[:, None, None]
    return padded[sample, 0, rows[:, :, None], cols[:, None, :]][:, None]


def train(name, net, data, epochs, lr, batch, seed, bf16, checkpoint):
    import torch
    import torch.nn.functional as F

    x, y = (torch.from_numpy(a) for a in load(data, "train"))
    generator = torch.Generator().manual_seed(seed)
    net.train().to(memory_format=torch.channels_last)
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    start = time.time()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        total = hits = seen = 0
        for i in range(0, len(x) - batch + 1, batch):
            pick = order[i : i + batch]
            inputs = augment(x[pick], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), y[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * batch
            hits += (logits.argmax(1) == y[pick]).sum().item()
            seen += batch
        print(f"{name} epoch {epoch + 1}/{epochs}: loss {total / seen:.4f} "
              f"accuracy {hits / seen:.4f} ({time.time() - start:.0f} s)", flush=True)
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), Path(checkpoint) / f"{name}.pt")


def warm_statistics(net, data):
    """Running statistics of a random network, from one pass, so that it computes with sane numbers."""
    import torch

    for p in net.parameters():
        if p.ndim == 1:  # all distinct: the exporter merges equal tensors
            p.data += torch.empty_like(p).uniform_(-0.1, 0.1)
    x = torch.from_numpy(load(data, "train")[0][:1024])
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        m.momentum = None
    with torch.no_grad():
        net.train()(x)
    for m in norms:
        m.momentum = 0.1
        m.num_batches_tracked.zero_()


# ---------------------------------------------------------------- export and measurement

def separate(graph):
    """Undoes the exporter's merging of equal tensors (it leaves Identity nodes). The shifts of the two branches
    that meet in a residual sum start equal, have equal gradients, and so stay equal through all of training."""
    weights = {w.name: w for w in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Identity" and n.input[0] in weights]:
        copy = graph.initializer.add()
        copy.CopyFrom(weights[node.input[0]])
        copy.name = node.output[0]
        graph.node.remove(node)


def export(net, path):
    """Opset 17, BatchNormalization kept apart from Conv: PRESERVE keeps the exporter from folding it."""
    import torch
    import onnx

    net = net.eval().to(memory_format=torch.contiguous_format)
    temporary = path.with_suffix(".tmp")
    torch.onnx.export(
        net, (torch.zeros(2, 1, 28, 28),), str(temporary), dynamo=False, opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        input_names=["image"], output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
    )
    model = onnx.load(temporary)
    separate(model.graph)
    onnx.save(model, temporary)
    onnx.checker.check_model(model, full_check=True)
    counts = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    assert counts.get("BatchNormalization"), "the exporter folded BatchNormalization away"
    expected = {n for n in net.state_dict() if not n.endswith("num_batches_tracked")}
    assert {n.name for n in model.graph.initializer} == expected, "initializers renamed or merged"
    temporary.replace(path)
    print(f"{path.name}: {path.stat().st_size:,} bytes, opset {model.opset_import[0].version}, {counts}")


def accuracy(path, x, y):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    hits = sum((session.run(None, {"image": x[i : i + 250]})[0].argmax(1) == y[i : i + 250]).sum()
               for i in range(0, len(x), 250))
    return hits / len(x)


def measure(data):
    sets = {}
    if (Path(data) / "t10k-images-idx3-ubyte.gz").exists():
        sets["10,000 test images, clean"] = load(data, "t10k")
    x, y = load(HERE, "fashion")
    sets["2,000 demo images, clean"] = (x, y)
    sets["2,000 demo images, worn camera"] = (worn_camera(x), y)
    for path in sorted(HERE.glob("*.onnx")):
        for name, (images, labels) in sets.items():
            print(f"{path.name}: {name}: {accuracy(path, images, labels):.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=HERE.parent / "target/fetched/fashion", help="folder of the four IDX files")
    parser.add_argument("--only", choices=["resnet20", "dsnet"])
    parser.add_argument("--untrained", action="store_true", help="random weights, no training")
    parser.add_argument("--export", action="store_true", help="no training, weights from the checkpoint folder")
    parser.add_argument("--measure", action="store_true", help="only measure")
    parser.add_argument("--slice", action="store_true", help="only write the demo images")
    parser.add_argument("--epochs", type=int, help="default 8 for both")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="the schedule's highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", default=HERE.parent / "target/checkpoints", help="folder for state dicts")
    args = parser.parse_args()

    if args.measure:
        return measure(args.data)
    if args.slice:
        return make_slice(args.data)

    import torch

    torch.set_num_threads(args.threads)
    for name, make in networks().items():
        if args.only not in (None, name):
            continue
        torch.manual_seed(args.seed)
        net = make()
        print(f"{name}: {sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
        if args.export:
            net.load_state_dict(torch.load(Path(args.checkpoint) / f"{name}.pt"))
        elif args.untrained:
            warm_statistics(net, args.data)
        else:
            # bfloat16 halves the time of full convolutions and slows depthwise ones
            train(name, net, args.data, args.epochs or 8, args.lr, args.batch, args.seed,
                  name == "resnet20", args.checkpoint)
        export(net, HERE / f"{name}.onnx")
    make_slice(args.data)
    measure(args.data)


if __name__ == "__main__":
    main()
