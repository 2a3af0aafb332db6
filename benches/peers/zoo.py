"""A training step of torchvision's networks, by PyTorch and by retune, in turns.

    python zoo.py [--batch 1] [--only swin_t vgg11] [--markdown docs/performance.md]

Wider and less exact than peers.py: random weights, inputs of 3x224x224, cross entropy and AdamW; files as the exporter writes them for
training, with nothing folded. PyTorch runs with malloc tuned, plain and in channels_last; a figure is the least of the rounds' medians, as
what else the machine does disturbs some of them.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings

import tables
from peers import PAUSE, TUNED_MALLOC, scripts_parser

SIDE, STEPS = 224, 4
# Labels are of the first classes, which all networks have.
CLASSES = 21
# Networks and the batch of each where none is asked for.
BATCHES = {
    "alexnet": 8, "vgg11": 2, "squeezenet1_1": 8, "googlenet": 4, "resnet50": 4, "resnext50_32x4d": 2, "densenet121": 4, "shufflenet_v2_x1_0": 8,
    "mnasnet1_0": 4, "mobilenet_v3_small": 8, "mobilenet_v3_large": 8, "efficientnet_b0": 4, "regnet_x_400mf": 4, "regnet_y_400mf": 4,
    "resnet18 with GroupNorm": 8, "convnext_tiny": 2, "swin_t": 2, "vit of width 384": 4,
    "deeplabv3_resnet50": 2,
}  # fmt: skip


def network(name):
    import torch
    import torchvision
    from torch import nn

    models = torchvision.models
    torch.manual_seed(0)
    if name == "resnet18 with GroupNorm":
        net = models.resnet18(norm_layer=lambda channels: nn.GroupNorm(8, channels))
    elif name == "vit of width 384":
        net = models.VisionTransformer(SIDE, patch_size=16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536)
    elif name == "deeplabv3_resnet50":
        net = models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
        net = averaged(net)
    elif name == "googlenet":
        net = models.googlenet(aux_logits=False, init_weights=False)
    else:
        net = getattr(models, name)()
    # What draws random numbers is left out: PyTorch's and retune's differ.
    for module in net.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return net.train()


def averaged(segmentation):
    """Scores of an image: the means of its positions' scores."""
    import torch

    class Averaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = segmentation

        def forward(self, x):
            return self.net(x)["out"].flatten(2).mean(2)

    return Averaged()


def export(name, net, folder):
    import torch

    path = folder / f"{name.replace(' ', '_')}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # In training form the exporter takes no attention apart.
        attention = any(isinstance(m, torch.nn.MultiheadAttention) for m in net.modules())
        mode = torch.onnx.TrainingMode.EVAL if attention else torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            net.eval() if attention else net, (torch.randn(2, 3, SIDE, SIDE),), str(path), dynamo=False, opset_version=17, training=mode,
            do_constant_folding=attention, input_names=["input"], output_names=["logits"], dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        )  # fmt: skip
        net.train()
    return path


def torch_turn(net, batch, channels_last):
    """A function that times some steps."""
    import copy

    import torch

    net, x, y = copy.deepcopy(net), torch.randn(batch, 3, SIDE, SIDE), torch.randint(0, CLASSES, (batch,))
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-9, weight_decay=0, fused=True)

    def turn():
        times = []
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times[1:])

    return turn


def retune_turn(args, path, batch):
    command = [args.retune, "bench", path, "--batch", batch, "--threads", args.threads, "--runs", STEPS, "--json"]
    return lambda: json.loads(subprocess.check_output([str(c) for c in command], text=True))["median_ms"]


def rested(turn):
    """A turn once the threads of the one before have stopped spinning."""
    time.sleep(PAUSE)
    return turn()


def main():
    parser = scripts_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(BATCHES), default=list(BATCHES), metavar="NETWORK")
    parser.add_argument("--markdown", type=pathlib.Path, help="file in which to replace the table, between its marks")
    args = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in TUNED_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED_MALLOC)
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    for name in args.only:
        net, batch = network(name), args.batch or BATCHES[name]
        turns = [torch_turn(net, batch, False), torch_turn(net, batch, True), retune_turn(args, export(name, net, args.models / "zoo"), batch)]
        rounds = [[rested(turn) for turn in turns] for _ in range(args.rounds)]
        plain, last, own = map(min, zip(*rounds, strict=True))
        rows.append([name, str(batch), *map(tables.number, (plain, last, own)), f"{min(plain, last) / own:.2f}×"])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["training step, ms", "batch", "PyTorch", "channels_last", "retune", "retune to the better"]
    text = f"{args.threads} threads.\n\n{tables.table(head, rows)}"
    print(text)
    if args.markdown:
        tables.replace(args.markdown, text, "zoo")


if __name__ == "__main__":
    main()
