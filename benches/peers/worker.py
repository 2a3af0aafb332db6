"""A process of one peer that times steps of one case when asked: peers.py starts it.

    python worker.py ENGINE MODEL MODE BATCH THREADS FOLDER

Says "ready" once its libraries are loaded. Each line "VARIANT COUNT" it reads asks for one step that is not timed and
COUNT that are; the answer is a JSON list of milliseconds.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import tempfile
import time

from data import inputs

LR = 1e-9  # a learning rate of nothing keeps the weights, and so the work, the same
ICP_STEPS, EPSILON, ALPHA = 5, 0.002, math.cos(math.pi / 4)


class Torch:
    """PyTorch. `eager` is what one writes first; the other variants are to be run with malloc tuned."""

    VARIANTS = {  # channels_last, bf16, fused optimizer
        "eager": (False, False, False),
        "tuned": (False, False, True),
        "channels_last": (True, False, True),
        "bf16": (True, True, True),
        "bias": (False, False, False),  # nothing but biases and shifts learns
    }

    def __init__(self, args):
        import torch

        import models

        self.torch, self.models, self.args = torch, models, args
        torch.set_num_threads(args.threads)

    def step(self, variant):
        torch, args = self.torch, self.args
        channels_last, bf16, fused = self.VARIANTS[variant]
        net = self.models.load(args.model, args.folder)
        x, y = (torch.from_numpy(a) for a in inputs(args.model, args.batch))
        for name, p in net.named_parameters():
            p.requires_grad_(variant != "bias" or name.endswith("bias"))
        if channels_last and x.ndim == 4:
            net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        compute = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)  # noqa: E731
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0, fused=fused)
        return {"forward": self.forward, "train": self.train, "icp": self.icp}[args.mode](net, x, y, compute, optimizer)

    def forward(self, net, x, _y, compute, _optimizer):
        net.eval()

        def step():
            with self.torch.inference_mode(), compute():
                net(x)

        return step

    def train(self, net, x, y, compute, optimizer):
        cross_entropy = self.torch.nn.functional.cross_entropy
        net.train()

        def step():
            optimizer.zero_grad(set_to_none=True)
            with compute():
                loss = cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()

        return step

    def icp(self, net, x, y, compute, optimizer):
        """The step of tests/reference/icp.py with the Adam perturber."""
        torch, F = self.torch, self.torch.nn.functional
        features = []
        for stage in (net.layer1, net.layer2, net.layer3):
            stage.register_forward_hook(lambda _m, _i, out: features.append(out))

        def taps(x):
            features.clear()
            return net(x), list(features)

        def perturb(x):
            net.eval()
            m = v = 0
            for k in range(1, ICP_STEPS + 1):
                x = x.detach().requires_grad_()
                with compute():
                    loss = F.cross_entropy(net(x), y)
                (g,) = torch.autograd.grad(loss, x)
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                x = x.detach() - EPSILON * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
            return x

        def step():
            moved = perturb(x)
            net.train()
            with torch.no_grad(), compute():
                teacher = taps(moved)[1]
            optimizer.zero_grad(set_to_none=True)
            with compute():
                logits, student = taps(x)
                weights = [math.cos(i / (len(student) - 1) * math.pi / 4) for i in range(len(student))]
                distance = sum(w * F.mse_loss(f, t) for w, f, t in zip(weights, student, teacher, strict=True))
                loss = ALPHA * F.cross_entropy(logits, y) + (1 - ALPHA) * distance
            loss.backward()
            optimizer.step()

        return step


class OnnxRuntime:
    """onnxruntime's forward pass, with its default optimisations."""

    def __init__(self, args):
        import onnxruntime

        self.onnxruntime, self.args = onnxruntime, args

    def step(self, _variant):
        args, options = self.args, self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        path = args.folder / f"{args.model}.onnx"
        session = self.onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {"input": inputs(args.model, args.batch)[0]}
        return lambda: session.run(None, feed)


class OnnxRuntimeTraining:
    """onnxruntime's on-device training: the same graph in training mode, cross entropy, AdamW."""

    def __init__(self, args):
        from onnxruntime.training import api, artifacts

        self.api, self.artifacts, self.args = api, artifacts, args

    def training_graph(self):
        import onnx

        model = onnx.load(str(self.args.folder / f"{self.args.model}.onnx"))
        for node in model.graph.node:
            first = node.output[0]
            if node.op_type == "BatchNormalization":
                kept = [a for a in node.attribute if a.name != "training_mode"]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute("training_mode", 1)])
                node.output.extend([f"{first}.mean", f"{first}.var"])
            elif node.op_type == "LayerNormalization":  # its gradient reads these
                node.output.extend([f"{first}.mean", f"{first}.inv_std"])
        return model

    def step(self, _variant):
        import onnxruntime

        model, options = self.training_graph(), onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.args.threads
        fixed = ("running_mean", "running_var", "positions")
        floats = [i.name for i in model.graph.initializer if i.dims and i.data_type == 1]
        trained = [name for name in floats if not name.endswith(fixed)]
        with tempfile.TemporaryDirectory() as folder:
            self.artifacts.generate_artifacts(
                model, requires_grad=trained, frozen_params=[n for n in floats if n not in trained],
                loss=self.artifacts.LossType.CrossEntropyLoss, optimizer=self.artifacts.OptimType.AdamW, artifact_directory=folder,
            )  # fmt: skip
            state = self.api.CheckpointState.load_checkpoint(f"{folder}/checkpoint")
            module = self.api.Module(f"{folder}/training_model.onnx", state, session_options=options)
            optimizer = self.api.Optimizer(f"{folder}/optimizer_model.onnx", module)
        optimizer.set_learning_rate(LR)
        module.train()
        x, y = inputs(self.args.model, self.args.batch)

        def step():
            module(x, y)
            optimizer.step()
            module.lazy_reset_grad()

        return step


ENGINES = {"torch": Torch, "onnxruntime": OnnxRuntime, "onnxruntime-training": OnnxRuntimeTraining}


def timed(step, count):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def serve(engine, requests, out):
    steps = {}
    print("ready", file=out, flush=True)
    for line in requests:
        variant, count = line.split()
        if variant not in steps:
            steps[variant] = engine.step(variant)
        timed(steps[variant], 1)
        print(json.dumps(timed(steps[variant], int(count))), file=out, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("mode", choices=["forward", "train", "icp"])
    parser.add_argument("batch", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")  # what libraries print does not mix with the answers
    os.dup2(2, 1)
    serve(ENGINES[args.engine](args), sys.stdin, out)


if __name__ == "__main__":
    main()
