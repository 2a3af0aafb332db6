"""What a step of MobileNetV2 on one image of 224 x 224 takes where nothing but biases and shifts learns.

    python small.py [--retune target/release/retune]

Peak anonymous memory, plain and by ICP (with all taps, and with the last four), beside PyTorch's above what importing it takes,
measured in one run. retune is given 32 MiB where that does, else the smallest budget that it says would do.
"""

import json
import os
import re
import statistics
import subprocess

from peers import Case, peak_memory, scripts_parser, torch_memory

MIB = 1 << 20


def retune(args, mode, budget):
    """The peak, and the error where it is refused."""
    command = [args.retune, "bench", args.models / "mobilenetv2.onnx", "--batch", 1, "--train", "bias", "--mode", *mode]
    command += ["--threads", 1, "--runs", 3, "--memory-budget", budget, "--json"]
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with peak_memory(process.pid) as peak:
        out, errors = process.communicate()
    return peak[0], json.loads(out)["median_ms"] if process.returncode == 0 else errors.strip()


if __name__ == "__main__":
    parser = scripts_parser(__doc__)
    args = parser.parse_args()
    args.env = dict(os.environ)
    theirs, _, times = torch_memory(Case("mobilenetv2", "train", 1, 1), "bias", args)
    print(f"PyTorch, plain: {theirs / MIB:.1f} MiB above its import, {statistics.median(times):.0f} ms")
    for mode in (["train"], ["icp"], ["icp", "--icp-taps", "last:4"]):
        budget = "32MiB"
        peak, found = retune(args, mode, budget)
        if isinstance(found, str):
            print(f"retune, {' '.join(mode)}, {budget}: {found}")
            budget = re.search(r"at least ([0-9.]+ [KMG]iB)", found)
            if budget is None:
                continue
            budget = budget[1].replace(" ", "")
            peak, found = retune(args, mode, budget)
        if isinstance(found, str):
            raise SystemExit(found)
        print(f"retune, {' '.join(mode)}, {budget}: {peak / MIB:.1f} MiB, {found:.0f} ms: 1/{theirs / peak:.1f} of PyTorch's plain step")
