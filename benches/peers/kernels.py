"""Lists every convolution of the benchmark's networks with what its kernels reach in a training step.

    python kernels.py [--markdown docs/performance.md]

Reads `retune bench --profile`: dense kernels as a share of the processor's multiply-add peak (a convolution by Winograd's form, W,
needs fewer multiplications than are counted, so it may exceed it), sweeps as a share of the memory's bandwidth. Convolutions that normalise what they read do so in the same time. The input
gradient of a first layer is taken from an ICP step. Equal convolutions are averaged.
"""

import collections
import json
import pathlib
import re
import subprocess

import peers
import tables

DENSE = {"Conv": "forward", "ConvInputGrad": "input gradient", "ConvWeightGrad": "weight gradient", "ConvGrads": "both gradients"}
SWEEPS = re.compile(r"BatchNormalization|BatchNorm|Norm|Relu|Clip\b|Add")


def profile(args, model, mode, runs):
    command = [args.retune, "bench", args.models / f"{model}.onnx", *peers.mode(mode), "--batch", peers.MAIN_BATCHES[model][0]]
    command += ["--threads", args.threads, "--runs", runs, "--profile", "--json"]
    report = json.loads(subprocess.check_output([str(c) for c in command], text=True))
    for kernel in report["profile"]:  # a convolution that gathers statistics is one all the same
        kernel["op"] = kernel["op"].replace("ConvStatistics", "Conv")
    return report


def dims(operands):
    return [[int(n) for n in d.split(",") if n.strip()] for d in re.findall(r"\[([^\]]*)\]", operands)]


def geometry(op, operands):
    """(name, depthwise) of a convolution, from the dimensions of its operands, channels last."""
    shapes = [d for d in dims(operands) if len(d) == 4]
    if op == "ConvWeightGrad":
        y, x, w = shapes[0], shapes[1], shapes[-1]
    elif op == "ConvGrads":
        y, w, x = shapes[:3]
    else:
        first, w, last = shapes[0], shapes[1], shapes[-1]
        x, y = (first, last) if op == "Conv" else (last, first)
    depthwise = w[1] == 1 and w[0] > 1
    stride = round(x[1] / y[1])
    name = f"{x[3]} → {y[3]}, {x[1]}², {w[2]}×{w[3]}" + (f" / {stride}" if stride > 1 else "")
    return (x[1], x[3], y[3], w[2], stride), name + (", depthwise" if depthwise else ""), depthwise


def rows(args, model):
    """For each convolution: name and, by direction, the text of its cell."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    names, sweeps = {}, collections.defaultdict(list)
    report = profile(args, model, "train", args.runs)
    icp = [k for k in profile(args, model, "icp", 2)["profile"] if k["op"] == "ConvInputGrad"]
    peak, bandwidth = report["peak_gflops"], report["peak_gigabytes"]
    seen = {geometry(k["op"], k["operands"])[0] for k in report["profile"] if k["op"] in ("ConvInputGrad", "ConvGrads")}
    first = [k for k in icp if geometry(k["op"], k["operands"])[0] not in seen]
    for k in [*report["profile"], *first]:
        if k["op"] in DENSE:
            key, name, depthwise = geometry(k["op"], k["operands"])
            names[key] = name
            share = k["gigabytes_per_second"] / bandwidth if depthwise else k["gflops"] / peak
            found[key][k["op"]].append(share)
        elif SWEEPS.search(k["op"]):
            gigabytes = k["gigabytes_per_second"] * k["ms"] * 1e-3
            sweeps[k["op"]].append((gigabytes, k["ms"] * 1e-3))
    lines = []
    for key in sorted(found, reverse=True):
        cells = []
        for op in DENSE:
            values = found[key][op]
            mean = sum(values) / len(values) if values else None
            cells.append("–" if mean is None else f"{mean:.0%}")
        lines.append([f"{model} {names[key]}", *cells])
    for op, values in sorted(sweeps.items()):
        seconds = sum(s for _, s in values)
        if seconds > 0:
            lines.append([f"{model} {op}", f"{sum(g for g, _ in values) / seconds / bandwidth:.0%}", *[""] * (len(DENSE) - 1)])
    return peak, bandwidth, lines


def main():
    parser = peers.scripts_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--markdown", type=pathlib.Path, help="file in which to replace the table, between its marks")
    args = parser.parse_args()
    table = [["kernel", *DENSE.values()]]
    for model in ("resnet20", "mobilenetv2", "resnet18"):
        peak, bandwidth, lines = rows(args, model)
        table += lines
    text = f"{args.threads} threads; peak {peak:.0f} GFLOP/s, memory {bandwidth:.0f} GB/s. Of that: depthwise, sweeps.\n\n{tables.table(table[0], table[1:])}"
    print(text)
    if args.markdown:
        tables.replace(args.markdown, text, "kernels")


if __name__ == "__main__":
    main()
