"""Fixtures zoo_*.{onnx,npz}: a few of the exports that matrix.py compares, with PyTorch's gradients by the file's tensors."""

import dataclasses

import numpy as np
import onnx
import torch

import zoo
from common import FIXTURES, runs, save, sha256, stored, text, to_numpy, worst, worst_errors
from matrix import CLEAR, clear_data, export, gradients, origins, tensors, write

# network, exporter, opset, form, mode
PICKED = [
    ("bert", "torchscript", 13, "eval", "eval"),
    ("vit", "dynamo", 23, "eval", "eval"),
    ("unet", "dynamo", 20, "kept", "train"),
    ("bilstm", "torchscript", 17, "eval", "eval"),
    ("gru_tagger", "torchscript", 18, "train", "train"),
    ("vae", "dynamo", 18, "kept", "train"),
]


# Fewer layers than in the matrix, for the size of the files.
SHALLOW = {"bert": lambda: zoo.Bert(layers=1), "vit": lambda: zoo.Vit(layers=1)}


def plain(path):
    """Takes out what an exporter writes of the machine it ran on."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    path.write_bytes(model.SerializeToString(deterministic=True))


def by_tensor(net, file, gradient):
    """Gradients of the file's tensors, each element of which is an element of one parameter."""
    names, values, owner, index = origins(net)
    found = {}
    for name, array in file.items():
        flat = array.reshape(-1)
        at = np.minimum(np.searchsorted(values, flat), len(values) - 1)
        if flat.size and (values[at] == flat).all():
            parts = [to_numpy(gradient[n]).reshape(-1) for n in names]
            picked = [parts[owner[i]][index[i]] for i in at]
            found[name] = np.array(picked, parts[0].dtype).reshape(array.shape)
    return found


def fixture(name, exporter, opset, form, mode):
    case = next(c for c in zoo.CASES if c.name == name)
    if name in SHALLOW:
        case = dataclasses.replace(case, make=SHALLOW[name])
    net = zoo.filled(case)
    inputs, target = clear_data(case, net)
    path = FIXTURES / f"zoo_{name}.onnx"
    export(case, net, inputs, exporter, opset, form, path)
    plain(path)
    singles, double = runs(lambda convert: gradients(case, net, inputs, target, mode, convert))
    out = {f"in.{k}": v for k, v in inputs.items()}
    out |= {"target": target, "model_sha256": sha256(path), "mode": text(mode), "loss": double["loss"]["loss"]}
    out |= {f"output.{k}": v for k, v in singles[0]["outputs"].items()}
    if case.loss_module is not None:
        loss = FIXTURES / f"zoo_{name}_loss.onnx"
        example = (*singles[0]["outputs"].values(), torch.from_numpy(target))
        names = [*case.outputs, "target"]
        write(case.loss_module(), example, names, ["loss"], {k: {0: "batch"} for k in names}, exporter, opset, "eval", loss)
        plain(loss)
    file = tensors(onnx.load(str(path)))
    all_of = [by_tensor(net, file, r["parameters"]) | {k: to_numpy(v) for k, v in r["inputs"].items()} for r in (*singles, double)]
    drift = worst_errors(all_of[:-1], all_of[-1])
    assert max(drift.values()) < CLEAR, f"{name}: {worst(drift)}"
    kept = stored("grad", all_of[:-1], all_of[-1], whole=96, samples=48)
    out |= {k: v for k, v in kept.items() if not k.startswith("drift.")}
    save(FIXTURES / f"zoo_{name}.npz", out)
    print(f"  zoo_{name}.onnx: {path.stat().st_size} bytes, {len(all_of[-1])} tensors, float32 against float64: worst {worst(drift)}")


if __name__ == "__main__":
    for picked in PICKED:
        fixture(*picked)
