#!/usr/bin/env python3
"""Quantises a network of images for the tests, as onnxruntime's own quantiser does: QDQ, int8, per channel.

    quantise.py MODEL.onnx IMAGES-idx3-ubyte.gz LABELS-idx1-ubyte.gz FOLDER
    quantise.py --worn IMAGES-idx3-ubyte.gz LABELS-idx1-ubyte.gz FROM COUNT OUT.npz
    quantise.py --tight MODEL.onnx IMAGES-idx3-ubyte.gz OUT.onnx

The first writes FOLDER/qdq.onnx, and the images as a worn camera sees them (dimmed, with noise): FOLDER/train.npz and
test.npz. The second writes images as an overdriven camera sees them (brighter, cut off at white, with much noise). The
third calibrates on 64 clean images, the last of the file, and cuts activations at the 96th percentile of those: ranges
that are too tight for such a camera. The input's levels are the bytes of the pixels.
"""

import gzip
import pathlib
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Images(CalibrationDataReader):
    def __init__(self, name, images):
        self.batches = iter([{name: images[i : i + 32]} for i in range(0, len(images), 32)])

    def get_next(self):
        return next(self.batches, None)


def read(path, header):
    with gzip.open(path) as f:
        return np.frombuffer(f.read(), np.uint8, offset=header)


def pixels(path):
    return read(path, 16).reshape(-1, 1, 28, 28).astype(np.float32) / 255


def quantise(model, new, calibration, **options):
    with tempfile.TemporaryDirectory() as scratch:
        folded = str(pathlib.Path(scratch) / "folded.onnx")
        quant_pre_process(model, folded, skip_symbolic_shape=True)
        name = onnxruntime.InferenceSession(folded).get_inputs()[0].name
        if "calibrate_method" in options:
            level = {"scale": np.array(1 / 255, np.float32), "zero_point": np.array(0, np.uint8)}
            options["extra_options"]["TensorQuantOverrides"] = {name: [level]}
        quantize_static(
            folded,
            str(new),
            Images(name, calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            **options,
        )
    onnx.checker.check_model(str(new))


def main(model, images, labels, folder):
    folder = pathlib.Path(folder)
    clean = pixels(images)
    quantise(model, folder / "qdq.onnx", clean[:128])
    random = np.random.default_rng(0)
    worn = np.clip(0.5 * clean + random.normal(0, 0.08, clean.shape), 0, 1).astype(np.float32)
    classes = read(labels, 8).astype(np.int64)
    half = len(worn) // 2
    np.savez(folder / "train.npz", x=worn[:half], y=classes[:half])
    np.savez(folder / "test.npz", x=worn[half:], y=classes[half:])


def overdriven(images, labels, start, count, out):
    part = slice(int(start), int(start) + int(count))
    clean = pixels(images)[part]
    random = np.random.default_rng(int(start) + 1)
    x = np.clip(1.3 * clean + 0.1 + random.normal(0, 0.2, clean.shape), 0, 1).astype(np.float32)
    np.savez(out, x=x, y=read(labels, 8)[part].astype(np.int64))


def tight(model, images, new):
    calibration = pixels(images)[-64:]
    options = {"calibrate_method": CalibrationMethod.Percentile, "extra_options": {"CalibPercentile": 96.0}}
    quantise(model, new, calibration, **options)


if sys.argv[1] == "--worn":
    overdriven(*sys.argv[2:])
elif sys.argv[1] == "--tight":
    tight(*sys.argv[2:])
else:
    main(*sys.argv[1:])
