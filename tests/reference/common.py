"""What the reference scripts share: paths, npz files and the sampled form of large tensors."""

import hashlib
import json
import pathlib
import warnings
import zipfile

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
FIXTURES = ROOT / "tests" / "fixtures"
SEED = 20505
WHOLE = 512  # tensors up to this many elements are stored whole, larger ones by SAMPLES of their elements
SAMPLES = 256
ZERO = 1e-6  # a tensor whose largest gradient is below this part of the whole model's is taken as analytically zero

warnings.filterwarnings("ignore", "You are using the legacy TorchScript")
warnings.filterwarnings("ignore", module="torch")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def text(value) -> np.ndarray:
    """A JSON document as an array that any npz reader can hold."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def sha256(path) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(pathlib.Path(path).read_bytes()).digest(), np.uint8)


def to_numpy(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, order="C")


def save(path: pathlib.Path, arrays: dict) -> None:
    """Writes an npz whose bytes depend on the arrays alone (entries carry no time of day).

    Numbers are together in `numbers`, their names, a line each, in `numbers.names`: an entry takes 200 bytes besides what it holds.
    """
    arrays = {name: to_numpy(value) for name, value in arrays.items()}
    numbers = sorted(name for name, value in arrays.items() if value.ndim == 0 and value.dtype == np.float64)
    if numbers:
        together = np.array([arrays.pop(name) for name in numbers])
        names = np.frombuffer("\n".join(numbers).encode(), np.uint8)
        arrays |= {"numbers": together, "numbers.names": names}
    with zipfile.ZipFile(path, "w") as archive:
        for key in sorted(arrays):
            entry = zipfile.ZipInfo(key + ".npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, arrays[key], version=(1, 0), allow_pickle=False)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"{shown}: {len(arrays)} arrays, {path.stat().st_size} bytes")


def load(path: pathlib.Path) -> dict:
    """The arrays that `save` was given."""
    with np.load(path) as archive:
        arrays = dict(archive)
    numbers, names = arrays.pop("numbers", np.array([])), arrays.pop("numbers.names", np.array([], np.uint8))
    return arrays | dict(zip(names.tobytes().decode().splitlines(), numbers, strict=True))


def jittered(t):
    """Float64, with a network's parameters off by a few float32 roundings."""
    t = t.double()
    if isinstance(t, torch.nn.Module):
        generator = torch.Generator().manual_seed(SEED)
        for p in t.parameters():
            p.data *= 1 + 2.0**-22 * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1)
    return t


def runs(run):
    """`run(convert)`, which converts networks and images: three runs with float32 rounding of different kinds, and the exact one.

    The first is the reference; how far any of the three is from the exact one tells how well defined the result is.
    """
    rounded = [run(lambda t: t.float())]
    with torch.backends.mkldnn.flags(enabled=False):
        rounded.append(run(lambda t: t.float()))
    rounded.append(run(jittered))
    return rounded, run(lambda t: t.double())


def scales(exact: dict) -> dict:
    """What an error in each tensor is divided by: its largest magnitude, or the whole set's where it is analytically zero."""
    largest = {name: float(np.abs(to_numpy(value)).max()) for name, value in exact.items()}
    top = max(largest.values())
    return {name: (value if value > ZERO * top else top) for name, value in largest.items()}


def errors(values: dict, exact: dict) -> dict:
    """max|a - b| / scale for each tensor."""
    return {
        name: float(np.abs(to_numpy(values[name]).astype(np.float64) - to_numpy(exact[name])).max() / max(scale, 1e-300))
        for name, scale in scales(exact).items()
    }


def worst_errors(singles: list, exact: dict) -> dict:
    """The same, the worst of several runs."""
    found = [errors(values, exact) for values in singles]
    return {name: max(f[name] for f in found) for name in exact}


def worst(found: dict) -> str:
    name = max(found, key=found.get)
    return f"{found[name]:.1e} at {name}"


def steps(index):
    """Ascending indices, each as its distance from the one before (the first from 0): small numbers take little room."""
    distance = np.diff(index, prepend=0)
    return distance.astype(np.min_scalar_type(int(distance.max())))


def stored(kind: str, singles: list, exact: dict, whole=WHOLE, samples=SAMPLES) -> dict:
    """Each tensor as `<kind>.<name>` if small, else as `index.`, `value.` and `norm.`; always with `scale.` and `drift.`.

    `singles` and `exact` come from `runs`; the first of the former is stored. `scale` is what an error is divided by (it
    cannot be seen from samples), `drift` the worst error of PyTorch's own runs.
    """
    out, scale, drift = {}, scales(exact), worst_errors(singles, exact)
    for name in exact:
        value = to_numpy(singles[0][name]).astype(np.float32)
        out[f"scale.{name}"], out[f"drift.{name}"] = scale[name], drift[name]
        if value.size <= whole:
            out[f"{kind}.{name}"] = value
            continue
        # the largest element is always among the samples
        top = int(np.abs(to_numpy(exact[name])).argmax())
        others = np.random.default_rng([SEED, *name.encode()]).choice(value.size - 1, samples - 1, replace=False)
        index = np.sort(np.append(others + (others >= top), top))
        out[f"index.{name}"] = steps(index)
        out[f"value.{name}"] = value.reshape(-1)[index]
        out[f"norm.{name}"] = np.linalg.norm(value.astype(np.float64))
    return out
