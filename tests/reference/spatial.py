"""Fixtures spatial_*.{onnx,npz}: recurrent layers, transposed convolution, resizing, grid sampling.

Each model is one operator (or two layers of it) with its weights as initializers in ONNX's layout; loss is the mean squared error.
Gradients come from PyTorch's autograd, in float64, with respect to the very tensors that the file holds.
"""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from common import FIXTURES, SEED, save, sha256

torch.manual_seed(SEED)


def model(name, nodes, inputs, weights, shape, opset):
    values = [helper.make_tensor_value_info(k, TensorProto.FLOAT, list(v.shape)) for k, v in inputs.items()]
    initializers = [numpy_helper.from_array(v.detach().numpy().astype(np.float32), k) for k, v in weights.items()]
    constants = [numpy_helper.from_array(v, k) for k, v in CONSTANTS.items() if any(k in n.input for n in nodes)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))
    graph = helper.make_graph(nodes, name, values, [output], initializers + constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    path = FIXTURES / f"spatial_{name}.onnx"
    path.write_bytes(made.SerializeToString())
    return path


CONSTANTS = {
    "scales": np.array([1, 1, 1.5, 2], np.float32),
    "sizes": np.array([1, 4, 9, 5], np.int64),
    "joined": np.array([0, 0, -1], np.int64),
}


def fixture(name, nodes, inputs, weights, run, opset=17):
    """`inputs` and `weights`: float32 values by name; `run` gives y from them in PyTorch."""
    leaves = {k: v.detach().float().double().requires_grad_() for k, v in (inputs | weights).items()}
    y = run(**leaves)
    target = torch.randn(y.shape, dtype=torch.float32)
    loss = F.mse_loss(y, target.double())
    loss.backward()
    path = model(name, nodes, inputs, weights, y.shape, opset)
    out = {"model_sha256": sha256(path), "target": target, "loss": loss.detach(), "output.y": y.detach().float()}
    out |= {f"in.{k}": v.float() for k, v in inputs.items()}
    out |= {f"grad.{k}": v.grad.float() for k, v in leaves.items()}
    save(FIXTURES / f"spatial_{name}.npz", out)


# Gates in PyTorch's order, of ONNX's: i f g o of i o f c; r z n of z r n.
ORDER = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2]}


def recurrent(op, layers, width, hidden, **attributes):
    gates = len(ORDER[op])
    module = getattr(nn, op)(width, hidden, layers, bidirectional=True).double()
    weights, nodes, value = {}, [], "x"
    for layer in range(layers):
        size = width if layer == 0 else 2 * hidden
        scale = hidden**-0.5
        weights[f"w{layer}"] = torch.randn(2, gates * hidden, size) * scale
        weights[f"r{layer}"] = torch.randn(2, gates * hidden, hidden) * scale
        weights[f"b{layer}"] = torch.randn(2, 2 * gates * hidden) * scale
        names = [value, f"w{layer}", f"r{layer}", f"b{layer}"]
        attributes |= {"hidden_size": hidden, "direction": "bidirectional"}
        nodes.append(helper.make_node(op, names, [f"steps{layer}"], **attributes))
        nodes.append(helper.make_node("Transpose", [f"steps{layer}"], [f"moved{layer}"], perm=[0, 2, 1, 3]))
        value = "y" if layer + 1 == layers else f"layer{layer}"
        nodes.append(helper.make_node("Reshape", [f"moved{layer}", "joined"], [value]))

    def reordered(t, parts):
        return torch.cat([t.chunk(parts)[i] for i in ORDER[op]])

    def run(x, **leaves):
        parameters = {}
        for layer in range(layers):
            for d, suffix in enumerate(["", "_reverse"]):
                bias = leaves[f"b{layer}"][d].chunk(2)
                of = {"weight_ih": leaves[f"w{layer}"][d], "weight_hh": leaves[f"r{layer}"][d]}
                of |= {"bias_ih": bias[0], "bias_hh": bias[1]}
                parameters |= {f"{k}_l{layer}{suffix}": reordered(v, gates) for k, v in of.items()}
        return functional_call(module, parameters, (x,))[0]

    fixture(op.lower(), nodes, {"x": torch.randn(5, 3, width)}, weights, run)


def transposed():
    weights = {"w": torch.randn(4, 3, 3, 2) * 0.3, "b": torch.randn(6)}
    settings = {"strides": [2, 3], "pads": [1, 0, 1, 0], "output_padding": [1, 2], "group": 2}
    nodes = [helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **settings)]

    def run(x, w, b):
        return F.conv_transpose2d(x, w, b, stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2)

    fixture("conv_transpose", nodes, {"x": torch.randn(2, 4, 4, 3)}, weights, run)


def resize(name, last, mode, align, **to):
    weights = {"w": torch.randn(4, 2, 1, 1)}
    mode_of = {"bilinear": "linear", "bicubic": "cubic"}[mode]
    coordinates = "align_corners" if align else "half_pixel"
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["wide"]),
        helper.make_node("Resize", last, ["y"], mode=mode_of, coordinate_transformation_mode=coordinates),
    ]

    def run(x, w):
        return F.interpolate(F.conv2d(x, w), mode=mode, align_corners=align, **to)

    fixture(name, nodes, {"x": torch.randn(1, 2, 6, 4)}, weights, run)


def grid_sample(name, mode, padding, align, points=(4, 3), extents=(5, 4), opset=16):
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": int(align)}
    nodes = [helper.make_node("GridSample", ["x", "grid"], ["y"], **attributes)]
    inputs = {"x": torch.randn(2, 3, *extents), "grid": torch.rand(2, *points, len(points)) * 2.6 - 1.3}

    def run(x, grid):
        torch_mode = "bilinear" if mode == "linear" else mode
        return F.grid_sample(x, grid, torch_mode, padding, align)

    fixture(name, nodes, inputs, {}, run, opset)


if __name__ == "__main__":
    recurrent("LSTM", 2, 4, 5)
    recurrent("GRU", 1, 4, 5, linear_before_reset=1)
    transposed()
    resize("bilinear", ["wide", "", "scales"], "bilinear", False, scale_factor=(1.5, 2))
    resize("bilinear_corners", ["wide", "", "", "sizes"], "bilinear", True, size=(9, 5))
    resize("bicubic", ["wide", "", "", "sizes"], "bicubic", False, size=(9, 5))
    grid_sample("grid_bilinear", "bilinear", "zeros", False)
    grid_sample("grid_reflection", "bilinear", "reflection", True)
    grid_sample("grid_bicubic", "bicubic", "zeros", False)
    grid_sample("grid_volume", "linear", "border", False, (2, 3, 2), (3, 4, 2), 20)
