"""What the reference scripts share: paths, npz files and the sampled form of large tensors."""

import hashlib
import json
import pathlib
import zipfile

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
FIXTURES = ROOT / "tests" / "fixtures"
SEED = 20505
WHOLE = 512  # tensors up to this many elements are stored whole, larger ones by SAMPLES of their elements
SAMPLES = 256

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
    # ascontiguousarray alone would turn a scalar into a vector
    value = np.asarray(value)
    return np.ascontiguousarray(value).reshape(value.shape)


def save(path: pathlib.Path, arrays: dict) -> None:
    """Writes an npz whose bytes depend on the arrays alone (entries carry no time of day)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for key in sorted(arrays):
            entry = zipfile.ZipInfo(key + ".npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, to_numpy(arrays[key]), version=(1, 0), allow_pickle=False)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"{shown}: {len(arrays)} arrays, {path.stat().st_size} bytes")


def relative(a, b, scale=None) -> float:
    """max|a - b| / max|b|, or over `scale` where given."""
    a, b = to_numpy(a).astype(np.float64), to_numpy(b).astype(np.float64)
    scale = float(np.abs(b).max()) if scale is None else scale
    return float(np.abs(a - b).max() / max(scale, 1e-300))


class Sampled:
    """Collects tensors under `<kind>.<name>` if small, else `index.` / `value.` / `norm.`, each with `max.` and `drift.`.

    `max` is the largest magnitude of the whole tensor in the float64 run (for a sampled tensor it cannot be seen from
    the values), and `drift` the largest difference between the float32 and the float64 run divided by it.
    """

    def __init__(self, kind: str):
        self.kind, self.arrays, self.drift = kind, {}, {}
        self.rng = np.random.default_rng(SEED)

    def add(self, name: str, value, exact) -> None:
        value, exact = to_numpy(value), to_numpy(exact)
        largest = float(np.abs(exact).max())
        self.drift[name] = relative(value, exact)
        self.arrays[f"max.{name}"] = np.float64(largest)
        self.arrays[f"drift.{name}"] = np.float64(self.drift[name])
        if value.size <= WHOLE:
            self.arrays[f"{self.kind}.{name}"] = value.astype(np.float32)
            return
        # the largest element is always among the samples: a scaled or misplaced tensor cannot hide
        index = self.rng.choice(value.size, SAMPLES, replace=False)
        index = np.unique(np.append(index, np.abs(exact).argmax()))[-SAMPLES:].astype(np.int64)
        self.arrays[f"index.{name}"] = index
        self.arrays[f"value.{name}"] = value.reshape(-1)[index].astype(np.float32)
        self.arrays[f"norm.{name}"] = np.float64(np.linalg.norm(value.astype(np.float64)))
