#!/usr/bin/env python3
"""Writes the node cases that the onnx package generates, as folders that `retune test` reads.

    onnx_node_cases.py FOLDER

FOLDER/NAME/model.onnx and FOLDER/NAME/test_data_set_N/{input,output}_N.pb, as in ONNX's own test data. Cases that the
package cannot make here are left out, with a line that says why. What is in FOLDER already is replaced.
"""

import pathlib
import shutil
import sys
import warnings

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case import node, test_case


def cases():
    """Every node case; one module of onnx's that fails does not take the others with it."""
    try:
        yield from node.collect_testcases(None)
    except Exception as error:  # a newer numpy than the package was written for, for instance
        print(f"some cases are missing: {error}", file=sys.stderr)
        yield from node._NodeTestCases


def proto(value, info):
    """An operand as the message its declared type asks for."""
    kind = info.type.WhichOneof("value")
    if kind == "sequence_type":
        return numpy_helper.from_list(value, info.name)
    if kind == "optional_type":
        return numpy_helper.from_optional(value, info.name)
    if isinstance(value, (onnx.TensorProto, onnx.SequenceProto, onnx.OptionalProto, onnx.MapProto)):
        return value
    if isinstance(value, dict):
        return numpy_helper.from_dict(value, info.name)
    return numpy_helper.from_array(np.asarray(value), info.name)


def write(case: test_case.TestCase, folder: pathlib.Path):
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(case.model.SerializeToString())
    for number, (inputs, outputs) in enumerate(case.data_sets):
        data = folder / f"test_data_set_{number}"
        data.mkdir()
        operands = [("input", case.model.graph.input, inputs), ("output", case.model.graph.output, outputs)]
        for prefix, infos, values in operands:
            for index, (info, value) in enumerate(zip(infos, values)):
                (data / f"{prefix}_{index}.pb").write_bytes(proto(value, info).SerializeToString())


def main():
    target = pathlib.Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    written = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases():
            if case.model is None or not case.data_sets:
                print(f"left out: {case.name} (no data)")
                continue
            try:
                write(case, target / case.name)
                written += 1
            except Exception as error:
                print(f"left out: {case.name} ({error})")
                shutil.rmtree(target / case.name, ignore_errors=True)
    print(f"{written} node cases of onnx {onnx.__version__}")


main()
