#!/usr/bin/env python3
"""Quantises a network of images for the tests, as onnxruntime's own quantiser does: QDQ, int8, per channel.

    quantise.py MODEL.onnx IMAGES-idx3-ubyte.gz LABELS-idx1-ubyte.gz FOLDER

FOLDER/qdq.onnx, and the images as a worn camera sees them (dimmed, with noise): FOLDER/train.npz and test.npz.
"""

import gzip
import pathlib
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Images(CalibrationDataReader):
    def __init__(self, name, images):
        self.batches = iter([{name: images[i : i + 32]} for i in range(0, len(images), 32)])

    def get_next(self):
        return next(self.batches, None)


def read(path, header):
    with gzip.open(path) as f:
        return np.frombuffer(f.read(), np.uint8, offset=header)


def main(model, images, labels, folder):
    folder = pathlib.Path(folder)
    pixels = read(images, 16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    with tempfile.TemporaryDirectory() as scratch:
        folded = str(pathlib.Path(scratch) / "folded.onnx")
        quant_pre_process(model, folded, skip_symbolic_shape=True)
        name = onnxruntime.InferenceSession(folded).get_inputs()[0].name
        quantize_static(
            folded,
            str(folder / "qdq.onnx"),
            Images(name, pixels[:128]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    onnx.checker.check_model(str(folder / "qdq.onnx"))
    random = np.random.default_rng(0)
    worn = np.clip(0.5 * pixels + random.normal(0, 0.08, pixels.shape), 0, 1).astype(np.float32)
    classes = read(labels, 8).astype(np.int64)
    half = len(worn) // 2
    np.savez(folder / "train.npz", x=worn[:half], y=classes[:half])
    np.savez(folder / "test.npz", x=worn[half:], y=classes[half:])


main(*sys.argv[1:])
