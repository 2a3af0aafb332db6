"""Writes the losses of `losses/` as ONNX graphs, and checks them.

A loss for `--loss FILE.onnx` is a graph whose inputs are the model's outputs (by name) and `target`,
and whose only output is a scalar.

    python models/make_losses.py          writes, checks against NumPy, and against PyTorch where it is installed
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent / "losses"
OPSET = 17


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def label_smoothing(classes=10, smoothing=0.1):
    """Cross-entropy against (1 - s) * onehot(target) + s / C, mean over N."""
    constants = {
        "classes": np.arange(classes, dtype=np.int64)[None],  # (1, C)
        "axis": np.array([1], np.int64),
        "on_target": np.float32(1 - smoothing),
        "everywhere": np.float32(smoothing / classes),
    }
    nodes = [
        node("LogSoftmax", ["logits"], "log_probabilities", axis=1),
        node("Unsqueeze", ["target", "axis"], "column"),  # (N, 1)
        node("Equal", ["column", "classes"], "is_target"),  # (N, C)
        node("Cast", ["is_target"], "one_hot", to=TensorProto.FLOAT),
        node("Mul", ["one_hot", "on_target"], "sharp"),
        node("Add", ["sharp", "everywhere"], "smoothed"),
        node("Mul", ["smoothed", "log_probabilities"], "weighted"),
        node("ReduceSum", ["weighted", "axis"], "per_sample", keepdims=0),  # (N)
        node("ReduceMean", ["per_sample"], "mean", keepdims=0),
        node("Neg", ["mean"], "loss"),
    ]
    inputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]),
        helper.make_tensor_value_info("target", TensorProto.INT64, ["N"]),
    ]
    output = helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "label_smoothing", inputs, [output], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="retune")


def check(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    logits, target = rng.normal(0, 3, (64, 10)).astype(np.float32), rng.integers(0, 10, 64)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = float(session.run(None, {"logits": logits, "target": target})[0])

    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    q = 0.9 * np.eye(10)[target] + 0.01
    expected = {"NumPy": float(-(q * log_p).sum(1).mean())}
    try:
        import torch

        expected["PyTorch"] = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(target), label_smoothing=0.1).item()
    except ImportError:
        pass
    for who, value in expected.items():
        assert abs(got - value) <= 1e-6 * max(1, abs(value)), (who, got, value)
        print(f"{path.name}: {got:.7f}, {who} {value:.7f}")


def main():
    HERE.mkdir(exist_ok=True)
    path = HERE / "label_smoothing.onnx"
    onnx.save(label_smoothing(), path)
    check(path)


if __name__ == "__main__":
    main()
