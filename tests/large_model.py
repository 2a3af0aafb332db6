"""A network with megabytes of random weights in an external data file, and data to finetune it on.

    python large_model.py FOLDER MEGABYTES

Writes large.onnx, large.onnx.data and data.npz: residual layers of 2048 with ReLU, which hardly change what they are given,
and a head of 10 classes; the data's classes are directions of the input.
"""
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH, CLASSES = 2048, 10
folder, layers = Path(sys.argv[1]), int(sys.argv[2]) * 2**20 // (WIDTH * WIDTH * 4)
rng = np.random.default_rng(0)
nodes, weights, value = [], [], "x"

with open(folder / "large.onnx.data", "wb") as data:

    def weight(name, array):
        # As PyTorch's exporter has it: tensors begin at multiples of 4096.
        offset = -(-data.tell() // 4096) * 4096
        data.seek(offset)
        data.write(array.tobytes())
        t = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        t.data_location = TensorProto.EXTERNAL
        for key, text in [("location", "large.onnx.data"), ("offset", offset), ("length", array.nbytes)]:
            t.external_data.add(key=key, value=str(text))
        weights.append(t)
        return name

    for i in range(layers):
        w = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) * np.float32(0.1 * (2 / WIDTH) ** 0.5)
        b = np.zeros(WIDTH, np.float32)
        h = f"layers.{i}"
        nodes.append(helper.make_node("Gemm", [value, weight(f"{h}.weight", w), weight(f"{h}.bias", b)], [f"{h}.h"]))
        nodes.append(helper.make_node("Relu", [f"{h}.h"], [f"{h}.r"]))
        nodes.append(helper.make_node("Add", [value, f"{h}.r"], [f"{h}.y"]))
        value = f"{h}.y"
    w = rng.standard_normal((WIDTH, CLASSES), dtype=np.float32) * np.float32(WIDTH**-0.5)
    names = [weight("head.weight", w), weight("head.bias", np.zeros(CLASSES, np.float32))]
    nodes.append(helper.make_node("Gemm", [value, *names], ["logits"]))

info = helper.make_tensor_value_info
graph = helper.make_graph(
    nodes,
    "large",
    [info("x", TensorProto.FLOAT, ["N", WIDTH])],
    [info("logits", TensorProto.FLOAT, ["N", CLASSES])],
    weights,
)
opset = [helper.make_opsetid("", 17)]
(folder / "large.onnx").write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())

y = rng.integers(0, CLASSES, 64)
x = rng.standard_normal((64, WIDTH), dtype=np.float32)
x[np.arange(64), y] += 20
np.savez(folder / "data.npz", x=x, y=y)
