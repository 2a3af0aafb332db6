"""Runs a model in onnxruntime: the second opinion of the tests.

    python tests/ort.py MODEL.onnx IN.npz OUT.npz          one array per output
    python tests/ort.py --randomise MODEL.onnx NEW.onnx    weights that are ConstantOfShape become random initializers
    python tests/ort.py --check MODEL.onnx                 onnx.checker with shape inference
"""

import sys

import numpy as np


def run(model, inputs, output):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    feeds = dict(np.load(inputs))
    np.savez(output, **dict(zip(names, session.run(names, feeds))))


def randomise(model, new):
    import onnx
    from onnx import numpy_helper

    m = onnx.load(model)
    shapes = {i.name: numpy_helper.to_array(i) for i in m.graph.initializer}
    rng = np.random.default_rng(0)
    nodes = []
    for node in m.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            nodes.append(node)
            continue
        dims = [int(d) for d in shapes[node.input[0]]]
        name = node.output[0]
        uses = [(n.op_type, list(n.input).index(name)) for n in m.graph.node if name in n.input]
        if any(op == "BatchNormalization" and slot in (1, 4) for op, slot in uses):
            values = rng.uniform(0.5, 1.5, dims)
        else:
            fan_in = max(1, int(np.prod(dims[1:])))
            values = rng.standard_normal(dims) * (2.0 / fan_in) ** 0.5 if len(dims) > 1 else rng.standard_normal(dims) * 0.1
        m.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    del m.graph.node[:]
    m.graph.node.extend(nodes)
    # A softmax of random logits is one at one place: what it reads tells more.
    for node in nodes:
        if node.op_type == "Softmax":
            m.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
            m.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(m, new)


def check(model):
    import onnx

    onnx.checker.check_model(model, full_check=True)


if sys.argv[1] == "--randomise":
    randomise(*sys.argv[2:])
elif sys.argv[1] == "--check":
    check(*sys.argv[2:])
else:
    run(*sys.argv[1:])
