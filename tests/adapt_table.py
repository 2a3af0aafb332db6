"""The tables of docs/adapt.md: a deployed network, cameras that shift its images, and each way to adapt without labels.

    python tests/adapt_table.py target/release/retune [--shifts dim,blur] [--seeds 0,1,2] [--methods "stats;infomax"]
                                [--stream sorted|class-5] [--samples 2000] [--test 5000] [--model models/resnet20.onnx]

Needs numpy and Fashion-MNIST (tests/fetch.sh). By seed, `samples` images of the test split to adapt to and `test` others
to measure on; the shifts are those of `retune::train::data::SHIFTS`. A method is options of `retune adapt` after its name
("icp --lr 1e-3 --no-guard"), or `deployed`. One line a run.
"""

import argparse
import gzip
import json
import pathlib
import subprocess
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
# blurs, gain, offset, noise: as in src/train/data/degrade.rs
SHIFTS = {
    "dim": (0, 0.5, 0.0, 0.0),
    "dim+noise": (0, 0.5, 0.0, 0.05),
    "noise": (0, 1.0, 0.0, 0.15),
    "blur": (2, 1.0, 0.0, 0.0),
    "worn": (2, 0.7, 0.05, 0.15),
}


def load(folder):
    def read(name, offset):
        return np.frombuffer(gzip.open(folder / name).read(), np.uint8, offset=offset)

    x = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    return x, read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64)


def blur(x):
    """5x5 binomial, edges repeated."""
    kernel = np.array([1, 4, 6, 4, 1], np.float32) / 16
    for axis in (2, 3):
        pads = [(2, 2) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(x, pads, mode="edge")
        n = x.shape[axis]
        x = sum(k * np.take(padded, range(i, i + n), axis) for i, k in enumerate(kernel))
    return x


def shifted(x, shift, seed):
    blurs, gain, offset, noise = SHIFTS[shift]
    for _ in range(blurs):
        x = blur(x)
    rng = np.random.default_rng([seed, len(x)])
    return np.clip(x * gain + offset + noise * rng.standard_normal(x.shape, np.float32), 0, 1).astype(np.float32)


def retune(binary, *args, codes=(0,)):
    done = subprocess.run([binary, *map(str, args), "--threads", "1", "--json"], capture_output=True, text=True)
    if done.returncode not in codes:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--shifts", default=",".join(SHIFTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="deployed;stats;infomax")
    parser.add_argument("--stream", default="")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/resnet20.onnx")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "target/fetched/fashion")
    args = parser.parse_args()
    x, y = load(args.data)
    with tempfile.TemporaryDirectory() as folder:
        train, test, new = (pathlib.Path(folder) / name for name in ("train.npz", "test.npz", "new.onnx"))
        for seed in map(int, args.seeds.split(",")):
            order = np.random.default_rng(seed).permutation(len(x))
            own, other = order[: args.samples], order[args.samples : args.samples + args.test]
            if args.stream == "sorted":
                own = own[np.argsort(y[own], kind="stable")]
            elif args.stream.startswith("class-"):
                own = own[y[own] == int(args.stream[6:])]
            for shift in args.shifts.split(","):
                np.savez(train, x=shifted(x[own], shift, 2 * seed))
                np.savez(test, x=shifted(x[other], shift, 2 * seed + 1), y=y[other])
                for method in args.methods.split(";"):
                    model, note = args.model, ""
                    if method != "deployed":
                        stream = ["--stream"] if args.stream else []
                        options = ["--method", *method.split(), *stream, "--seed", seed]
                        done = retune(args.binary, "adapt", model, "--data", train, "--output", new, *options, codes=(0, 3))
                        model, note = new, f"{args.stream} {done['ended']}, {done['resets']} resets, {done['seconds']:.0f} s"
                    accuracy = retune(args.binary, "eval", model, "--data", test)["accuracy"]
                    print(f"{shift:10} {seed} {method:30} {accuracy:.4f}  {note}", flush=True)


if __name__ == "__main__":
    main()
