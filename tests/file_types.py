"""Files for magika (input int32 [N,2048]): five types it does not know, and files of those it does.

    python tests/file_types.py OUT_DIR --model target/fetched/magika/model.onnx --rmeta target/release/deps
    python tests/file_types.py OUT_DIR --measure NEW.onnx

The new types are Debian's md5sums and symbols, wheels' METADATA, pkg-config's .pc and rustc's .rmeta; the others are taken from
/usr and the Python that runs this, each labelled with what the deployed model says where it is sure (at least .9). Writes
train.npz and test.npz (`x`, `y`; new types after the old ones); no package is in both.
"""

import argparse
import hashlib
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

SIDE, BLOCK, PADDING = 1024, 4096, 256
NEW = "md5sums", "symbols", "metadata", "pc", "rmeta"
SPACE = b" \t\n\r\x0b\x0c"


def features(path):
    """The first and the last 1024 bytes, without white space around, as magika 1.0 reads them; None for short files."""
    data = path.read_bytes()
    if len(data) < 16:
        return None
    first, last = data[:BLOCK].lstrip(SPACE)[:SIDE], data[-BLOCK:].rstrip(SPACE)[-SIDE:]
    x = np.full(2 * SIDE, PADDING, np.int32)
    x[: len(first)] = np.frombuffer(first, np.uint8)
    if last:
        x[-len(last) :] = np.frombuffer(last, np.uint8)
    return x


def unseen(rmeta):
    """Type and files, each with its package."""
    info, site = Path("/var/lib/dpkg/info"), Path(sysconfig.get_paths()["purelib"])
    stem = lambda p: p.name.split(".")[0].split(":")[0]
    yield "md5sums", [(stem(p), p) for p in sorted(info.glob("*.md5sums"))]
    yield "symbols", [(stem(p), p) for p in sorted(info.glob("*.symbols"))]
    roots = {site, *Path("/").glob("root/.pyenv/versions/*/lib/python3*/site-packages"), Path("/usr/lib/python3/dist-packages")}
    metadata = [p for r in sorted(roots) for p in sorted(r.glob("*.dist-info/METADATA"))]
    yield "metadata", [(p.parent.name.split("-")[0], p) for p in metadata]
    yield "pc", [(stem(p), p) for p in sorted(Path("/usr").glob("lib/**/pkgconfig/*.pc")) + sorted(Path("/usr").glob("share/pkgconfig/*.pc"))]
    yield "rmeta", [(p.name.rsplit("-", 1)[0], p) for p in sorted(Path(rmeta).glob("*.rmeta"))]


def ordinary(limit):
    """Files of /usr and of Python's packages, thinned, with the folder that stands for their package."""
    found = defaultdict(list)
    for root, depth in ((Path("/usr/share"), 1), (Path("/usr/lib"), 2), (Path("/usr/include"), 1), (Path(sysconfig.get_paths()["purelib"]), 1), (Path("/usr/bin"), 1)):
        for p in root.glob("**/*"):
            if p.is_file() and not p.is_symlink() and p.stat().st_size < 4 << 20:
                if p.suffix not in (".md5sums", ".symbols", ".pc", ".rmeta") and p.name != "METADATA":
                    found[p.suffix.lower()].append(("/".join(p.relative_to(root).parts[:depth]), p))
    rng = np.random.default_rng(0)
    # Suffixes that are frequent enough to be a type.
    for suffix in sorted(s for s in found if len(found[s]) >= 8):
        files = sorted(found[suffix], key=lambda f: str(f[1]))
        for i in rng.permutation(len(files))[:limit]:
            yield files[i]


def scores(model, x):
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + 32]})[0] for i in range(0, len(x), 32)])


def held_out(package):
    """Whether a package is for the test."""
    return hashlib.sha256(package.encode()).digest()[0] < 77  # 30%


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rmeta", type=Path, help="a folder of .rmeta files")
    parser.add_argument("--per-class", type=int, default=20, help="files of a known type")
    parser.add_argument("--per-type", type=int, default=150, help="files of a new type")
    parser.add_argument("--per-suffix", type=int, default=15, help="files looked at of each suffix")
    parser.add_argument("--measure", type=Path)
    args = parser.parse_args()
    if args.measure:
        data = np.load(args.out / "test.npz")
        y, p = data["y"], scores(args.measure, data["x"])
        old = p.shape[1] - len(NEW)
        hit = p.argmax(1) == y
        for k, name in enumerate(NEW):
            print(f"{name}: {hit[y == old + k].mean():.4f} of {(y == old + k).sum()}")
        print(f"new: {hit[y >= old].mean():.4f}\nold: {hit[y < old].mean():.4f} of {(y < old).sum()}")
        return
    packages, xs = zip(*[(p, x) for p, f in ordinary(args.per_suffix) if (x := features(f)) is not None])
    p = scores(args.model, np.stack(xs))
    old, samples, seen = p.shape[1], [], Counter()
    for package, x, row in zip(packages, xs, p):
        if row.max() >= 0.9 and seen[row.argmax()] < args.per_class:
            seen[row.argmax()] += 1
            samples.append((package, x, int(row.argmax())))
    for k, (name, files) in enumerate(unseen(args.rmeta)):
        rng = np.random.default_rng(k)
        chosen = [(g, x) for i in rng.permutation(len(files))[: args.per_type] if (x := features(files[i][1])) is not None for g in [files[i][0]]]
        samples += [(g, x, old + k) for g, x in chosen]
        said = Counter(scores(args.model, np.stack([x for _, x in chosen])).argmax(1).tolist())
        print(f"{name}: {len(chosen)} files; the deployed model says class {said.most_common(3)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, test in (("train", False), ("test", True)):
        part = [(x, y) for g, x, y in samples if held_out(g) == test]
        x, y = np.stack([x for x, _ in part]), np.array([y for _, y in part])
        np.savez(args.out / f"{name}.npz", x=x, y=y)
        print(f"{name}: {len(y)} files, {(y >= old).sum()} of them new; {len(set(y[y < old]))} known types")


if __name__ == "__main__":
    main()
