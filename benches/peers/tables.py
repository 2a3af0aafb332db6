"""The tables of peers.py, as Markdown that is aligned enough to read."""

import re

NAMES = {"resnet20": "ResNet-20 3×32×32", "mobilenetv2": "MobileNetV2 224²", "resnet18": "ResNet-18 224²", "encoder": "encoder, 128 tokens"}
F32 = ("eager", "tuned", "channels_last")


def times(case):
    """Milliseconds by column."""
    ms = {name: peer["ms"] for name, peer in case["peers"].items()}
    f32 = [ms[name] for name in F32 if name in ms]
    return ms | ({"best": min(f32)} if f32 else {})


def number(ms):
    return "–" if ms is None else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def ratio(ms, peer, own):
    """How many times as fast as the peer retune is."""
    return f"{ms[peer] / ms[own]:.2f}×" if peer in ms and own in ms else "–"


def table(head, rows):
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |"  # noqa: E731
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]) + "\n"


def label(case):
    what = "ICP step, K = 5, " if case["mode"] == "icp" else ""
    return f"{what}{NAMES[case['model']]}, batch {case['batch']}"


def compared(title, cases, columns, against):
    """`columns` and `against`: heading by peer, or by peer and retune's form; the first in milliseconds, the second as ratios."""
    head = [title, "threads", *columns.values(), *against.values()]
    rows = []
    for case in cases:
        ms = times(case)
        row = [label(case), str(case["threads"]), *(number(ms.get(name)) for name in columns)]
        rows.append(row + [ratio(ms, *pair) for pair in against])
    return table(head, rows)


def training(cases):
    columns = {
        "eager": "PyTorch eager", "best": "its best f32", "bf16": "its bf16",
        "onnxruntime-training": "onnxruntime-training", "retune": "retune", "retune-bf16": "retune bf16",
    }  # fmt: skip
    against = {
        ("eager", "retune"): "retune to eager", ("best", "retune"): "to best f32", ("bf16", "retune-bf16"): "bf16 to bf16",
        ("retune", "retune-bf16"): "bf16 to own f32",
    }  # fmt: skip
    return compared("training step, ms", [c for c in cases if c["mode"] != "forward"], columns, against)


def forward(cases):
    columns = {
        "onnxruntime": "onnxruntime", "eager": "PyTorch eager", "best": "its best f32", "bf16": "its bf16",
        "tract": "tract", "retune": "retune",
    }  # fmt: skip
    against = {("onnxruntime", "retune"): "retune to onnxruntime", ("best", "retune"): "to best f32", ("tract", "retune"): "to tract"}
    return compared("forward, ms", [c for c in cases if c["mode"] == "forward"], columns, against)


def costs(cases):
    """What a training step costs in forward passes, and an ICP step in training steps."""
    ms = {(c["model"], c["batch"], c["threads"], c["mode"]): times(c) for c in cases}
    head = ["cost within one engine", "threads", "retune", "PyTorch best f32", "retune's step in onnxruntime's forward passes"]
    rows = []
    for case in cases:
        whole, part = {"train": ("train", "forward"), "icp": ("icp", "train")}.get(case["mode"], (None, None))
        key = case["model"], case["batch"], case["threads"]
        a, b = ms.get((*key, whole)), ms.get((*key, part))
        if not a or not b:
            continue
        over = lambda x, y: "–" if x is None or y is None else f"{x / y:.2f}"  # noqa: E731
        what = f"{label(case)}, in " + ("forward passes" if part == "forward" else "training steps")
        cells = [over(a.get(name), b.get(name)) for name in ("retune", "best")]
        rows.append([what, str(case["threads"]), *cells, over(a.get("retune"), b.get("onnxruntime"))])
    return table(head, rows)


def memory(rows):
    megabytes = lambda n: f"{n / 1e6:.0f}"  # noqa: E731
    head = ["peak anonymous memory of a training step, MB", "retune, whole process", "PyTorch eager, above its import", "the import"]
    cells = ([megabytes(r[name]) for name in ("retune", "torch", "torch_imported")] for r in rows)
    return table(head, [[label(r), *c] for r, c in zip(rows, cells)])


def machine(m):
    forced = f", all held to {m['forced'].upper()}" if m["forced"] else ""
    cpu = f"{m['cpu']}, {m['cores']} cores ({', '.join(m['flags'])}){forced}, {m['memory_gib']} GiB"
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "torchvision", "onnxruntime", "numpy") if m[name])
    return f"{cpu}. {m['retune']}; {versions}; Python {m['python']}. {m['date']}.\n"


def disturbance(cases):
    worst = max((c["others"] for c in cases), default=0)
    if worst <= 0.1:
        return ""
    return f"**Other programs were running** (with up to {worst:.0%} of the processors in a turn): rough figures.\n"


def render(results):
    cases = results["cases"]
    parts = [
        machine(results["machine"]), disturbance(cases), training(cases), forward(cases), costs(cases),
        memory(results["memory"]), cold_start(results.get("cold_start_ms")),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def cold_start(ms):
    return f"Cold start, ResNet-20 batch 1, from exec to the first finished training step: {ms:.1f} ms.\n" if ms else ""


def replace(path, text, mark):
    """Puts `text`, its tables without what aligns them, between the lines <!-- MARK --> and <!-- /MARK --> of a file."""
    text = re.sub(r" +\|", " |", re.sub(r"\|-+(?=\|)", "|--", text))
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
    whole = path.read_text()
    before, _, rest = whole.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no lines {start.strip()} and {end.strip()}")
    path.write_text(before + start + text + end + after)
