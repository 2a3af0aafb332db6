"""Compares the gradients of `retune grad` with PyTorch's for the networks of zoo.py, exported in every way.

    python matrix.py RETUNE_BINARY [--models bert,vit,…] [--opsets 13,17,…] [--exporters torchscript,dynamo] [--keep FOLDER]

Each network is exported with both of PyTorch's exporters at each opset, in these forms: `eval` (as for deployment: normalisations
folded where the exporter does it), `kept` (in evaluation form with normalisations kept: differentiated in both modes) and `train`
(exported in training form, differentiated in training mode). One line a case; exit code 1 when one fails.

The reference is PyTorch in float64, once for a network and a form. A file's tensors are traced back to parameters by their
elements, which are all distinct: the gradient of a parameter is the sum over its copies in the file. Where the exporter folded a
normalisation, the reference is the network with the same normalisation folded (torch.nn.utils.fusion), matched by shape and value.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import nn
from torch.nn.utils import fusion

import zoo
from common import SEED, errors, runs, to_numpy, worst, worst_errors
from nets import session

TOLERANCE = 1e-3
CLEAR = 2e-4
OPSETS = (13, 17, 18, 20, 23)
EXPORTERS = ("torchscript", "dynamo")


# PyTorch's side


def gradients(case, net, inputs, target, mode, convert):
    net = convert(copy.deepcopy(net)).train(mode == "train")
    inputs = {k: torch.from_numpy(v) for k, v in inputs.items()}
    inputs = {k: convert(v).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    target = torch.from_numpy(target)
    outputs = net(*inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = case.loss_of(outputs, convert(target) if target.is_floating_point() else target)
    loss.backward()
    return {
        "loss": {"loss": loss.detach()},
        "outputs": {name: o.detach() for name, o in zip(case.outputs, outputs, strict=True)},
        "parameters": {name: p.grad for name, p in net.named_parameters()},
        "inputs": {k: v.grad for k, v in inputs.items() if v.requires_grad},
    }


def exact(case, net, inputs, target, mode):
    """The float64 run, and how far PyTorch's own float32 runs are from it at most."""
    singles, double = runs(lambda convert: gradients(case, net, inputs, target, mode, convert))
    drift = worst_errors([s["parameters"] for s in singles], double["parameters"])
    return double, max(drift.values())


def clear_data(case, net):
    """The first batch whose gradients are well defined in both modes."""
    for seed in range(50):
        inputs, target = case.data(np.random.default_rng([SEED, seed]), case.batch)
        if all(exact(case, net, inputs, target, mode)[1] < CLEAR for mode in ("eval", "train")):
            return inputs, target
    raise SystemExit(f"{case.name}: no batch stays clear of the kinks")


def pairs(net):
    """(name of a layer, name of the normalisation behind it), by the order in the module tree."""
    named = [(k, m) for k, m in net.named_modules() if not list(m.children())]
    linear = (nn.modules.conv._ConvNd, nn.Linear)
    return [(a[0], b[0]) for a, b in itertools.pairwise(named) if isinstance(b[1], nn.modules.batchnorm._BatchNorm) and isinstance(a[1], linear)]


def folded(net, norms):
    """The network in evaluation form with the normalisations `norms` folded into the layers before them."""
    net = copy.deepcopy(net).eval()
    for layer, norm in pairs(net):
        if norm not in norms:
            continue
        a, b = net.get_submodule(layer), net.get_submodule(norm)
        if isinstance(a, nn.Linear):
            fused = fusion.fuse_linear_bn_eval(a, b)
        else:
            fused = fusion.fuse_conv_bn_eval(a, b, transpose=isinstance(a, nn.modules.conv._ConvTransposeNd))
        for name, module in ((layer, fused), (norm, nn.Identity())):
            parent, _, attribute = name.rpartition(".")
            setattr(net.get_submodule(parent), attribute, module)
    return net.requires_grad_()


# The files


class NotExported(Exception):
    pass


def export(case, net, inputs, exporter, opset, form, path):
    """Writes the file, or raises `NotExported` with the exporter's reason."""
    net = copy.deepcopy(net).train(form == "train")
    names, batch = list(inputs), "batch"
    axes = {k: {0: batch} | case.open_axes.get(k, {}) for k in names}
    example = tuple(torch.from_numpy(v) for v in inputs.values())
    write(net, example, names, list(case.outputs), axes, exporter, opset, form, path, case.multiple)


@contextlib.contextmanager
def quiet():
    """Exporters talk, also below Python's streams."""
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        sys.stdout.flush()
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            for to, fd in enumerate(kept, 1):
                os.dup2(fd, to), os.close(fd)


@functools.cache
def programs():
    """What torch.export made, by network: it takes longer than writing the file."""
    return {}


def exported(net, example, inputs, axes, multiple):
    key = net.__class__, net.training
    if key not in programs():
        names = {name for of in axes.values() for name in of.values()}
        dims = {name: torch.export.Dim(name, min=2, max=4096) * (1 if name == "batch" else multiple) for name in names}
        # What the exporter cannot leave open it fixes: all but the batch, then all.
        for left in (names, {"batch"}, set()):
            shapes = tuple({axis: dims[name] for axis, name in axes.get(k, {}).items() if name in left} for k in inputs)
            try:
                programs()[key] = torch.export.export(net, example, dynamic_shapes=shapes, strict=False)
                break
            except Exception:
                if not left:
                    raise
    return copy.deepcopy(programs()[key])


def write(net, example, inputs, outputs, axes, exporter, opset, form, path, multiple=1):
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            common = {"opset_version": opset, "input_names": inputs, "output_names": outputs}
            if exporter == "dynamo":
                program = exported(net, example, inputs, axes, multiple)
                torch.onnx.export(program, f=str(path), dynamo=True, optimize=form == "eval", external_data=False, **common)
            else:
                mode = torch.onnx.TrainingMode
                training = {"eval": mode.EVAL, "kept": mode.PRESERVE, "train": mode.TRAINING}[form]
                folding = form == "eval"
                torch.onnx.export(
                    net, example, str(path), dynamo=False, dynamic_axes=axes, training=training, do_constant_folding=folding, **common
                )  # fmt: skip
    except Exception as error:  # whatever an exporter raises is its reason
        reason = str(error.__cause__ or error).strip() or repr(error)
        raise NotExported(" ".join(reason.split())[:160]) from error
    model = onnx.load(str(path))
    made = {o.domain: o.version for o in model.opset_import}.get("", 0)
    if made != opset:
        raise NotExported(f"the exporter wrote opset {made}")
    return model


def tensors(model):
    """Every float tensor of the file by name: initializers, and values of Constant nodes."""
    graph = model.graph
    found = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found |= {node.output[0]: a.t for a in node.attribute if a.name == "value"}
    arrays = {name: onnx.numpy_helper.to_array(t) for name, t in found.items()}
    return {name: a for name, a in arrays.items() if a.dtype == np.float32}


# The comparison


def retune_gradients(binary, model, inputs, target, loss, mode, folder):
    given, output = folder / "in.npz", folder / "out.npz"
    np.savez(given, **inputs, target=target)
    output.unlink(missing_ok=True)
    command = [binary, "grad", model, "--inputs", given, "--loss", loss, "--mode", mode, "--output", output]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    with np.load(output) as arrays:
        return dict(arrays)


def origins(net):
    """Parameters of the network: sorted magnitudes of all elements, and which parameter and element each one is."""
    names = [name for name, _ in net.named_parameters()]
    flat = [to_numpy(p).reshape(-1) for _, p in net.named_parameters()]
    owner = np.repeat(np.arange(len(names)), [len(f) for f in flat])
    index = np.concatenate([np.arange(len(f)) for f in flat])
    values = np.concatenate(flat)
    order = np.argsort(values)
    return names, values[order], owner[order], index[order]


def gathered(net, file, found):
    """retune's gradients, brought into the shape of the network's parameters; those not in the file, and tensors that fit none."""
    names, values, owner, index = origins(net)
    parameters = dict(net.named_parameters())
    sums = {name: np.zeros(p.numel()) for name, p in parameters.items()}
    seen = {name: np.zeros(p.numel(), bool) for name, p in parameters.items()}
    strange = []
    for name, gradient in found.items():
        if name not in file:
            strange.append(name)
            continue
        flat, g = file[name].reshape(-1), gradient.astype(np.float64)
        at = np.minimum(np.searchsorted(values, flat), len(values) - 1)
        equal = (values[at] == flat).all()
        # As a whole first: elements of folded tensors may coincide. Where the exporter folded, its roundings are others than ours.
        roundings = 0.0 if equal else 1e-5
        whole = [(k, turned) for k, p in parameters.items() for turned in (False, True) if fits(to_numpy(p), file[name], roundings, turned)]
        if len(whole) == 1:
            [(k, turned)] = whole
            sums[k] += (g.T if turned else g).reshape(-1)
            seen[k][:] = True
        elif equal:
            g = g.reshape(-1)
            for k in np.unique(owner[at]):
                mine = owner[at] == k
                np.add.at(sums[names[k]], index[at][mine], g[mine])
                seen[names[k]][index[at][mine]] = True
        else:
            strange.append(name)
    return sums, seen, strange


def fits(a, b, roundings, turned):
    """Equal up to roundings, as they are or transposed."""
    if turned:
        b = b.T if b.ndim == 2 else b[..., None]
    return a.shape == b.shape and np.abs(a - b).max() <= roundings * np.abs(a).max()


def compare(case, net, reference, file, found):
    """(errors by tensor, number of tensors of the file, what else is wrong)"""
    prefix = "grad."
    given = {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}
    inputs = {k: given.pop(k) for k in reference["inputs"] if k in given}
    sums, seen, strange = gathered(net, file, given)
    wrong = [f"no gradient of input {k}" for k in reference["inputs"] if k not in inputs]
    wrong += [f"{name} is trained and is no parameter" for name in strange]
    wanted = {name: to_numpy(g).reshape(-1) for name, g in reference["parameters"].items()}
    top = max(np.abs(g).max() for g in wanted.values())
    for name, g in wanted.items():
        if (np.abs(g[~seen[name]]) > 1e-6 * top).any():
            wrong.append(f"{name} is not trained")
    result = errors(sums, wanted)
    result |= errors(inputs, {k: g for k, g in reference["inputs"].items() if k in inputs}) if inputs else {}
    outputs = {name: found.get(f"output.{name}") for name in case.outputs}
    for name, truth in reference["outputs"].items():
        truth = to_numpy(truth)
        if outputs[name] is None or outputs[name].shape != truth.shape:
            wrong.append(f"output {name} is missing or of another shape")
        else:
            result |= {f"output {name}": errors({name: outputs[name]}, {name: truth})[name]}
    result |= errors({"loss": found["loss"].reshape(())}, reference["loss"])
    return result, len(given) + len(inputs), wrong


def refused(path, inputs):
    """Why onnxruntime does not run the file, if it does not."""
    try:
        with quiet():
            session(path).run(None, inputs)
    except Exception as error:  # its errors have no common type
        return " ".join(str(error).split())[:160]
    return None


class Matrix:
    def __init__(self, binary, folder):
        self.binary, self.folder = binary, folder
        self.done, self.failed, self.skipped = 0, 0, 0

    def line(self, title, text):
        print(f"{title} {text}", flush=True)

    def network(self, case, exporters, opsets):
        net = zoo.filled(case)
        inputs, target = clear_data(case, net)
        norms = [name for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        references = {}

        def reference(mode, without=()):
            key = (mode, *without)
            if key not in references:
                twin = folded(net, without) if without else net
                references[key] = twin, exact(case, twin, inputs, target, mode)
            return references[key]

        forms = {"eval": ("eval",), "train": ("train",)}
        if norms:
            forms["kept"] = ("eval", "train")
        for exporter, opset in itertools.product(exporters, opsets):
            for form, modes in forms.items():
                path = self.folder / f"{case.name}-{exporter}-{opset}-{form}.onnx"
                title = f"{case.name:10} {exporter:11} opset {opset} {form:5}"
                try:
                    loss = case.loss
                    export(case, net, inputs, exporter, opset, form, path)
                    if case.loss_module is not None:
                        loss = self.loss_graph(case, reference("eval")[1][0]["outputs"], target, exporter, opset)
                except NotExported as reason:
                    self.skipped += 1
                    self.line(title, f"skipped: {reason}")
                    continue
                file = tensors(onnx.load(str(path)))
                without = [n for n in norms if not kept(net.get_submodule(n), file)]
                for mode in modes:
                    twin, (truth, drift) = reference(mode, without)
                    self.one(case, f"{title} {mode}", twin, truth, drift, path, file, inputs, target, loss, mode, len(without))

    def loss_graph(self, case, outputs, target, exporter, opset):
        path = self.folder / f"{case.name}-loss-{exporter}-{opset}.onnx"
        if not path.exists():
            names = [*case.outputs, "target"]
            example = (*(o.float() for o in outputs.values()), torch.from_numpy(target))
            write(case.loss_module(), example, names, ["loss"], {k: {0: "batch"} for k in names}, exporter, opset, "eval", path)
        return path

    def one(self, case, title, twin, truth, drift, path, file, inputs, target, loss, mode, without):
        try:
            found = retune_gradients(self.binary, path, inputs, target, loss, mode, self.folder)
            result, count, wrong = compare(case, twin, truth, file, found)
        except (RuntimeError, OSError) as error:
            if refusal := refused(path, inputs):
                self.skipped += 1
                self.line(title, f"skipped: onnxruntime refuses the file too: {refusal}")
                return
            result, count, wrong = {}, 0, [str(error)]
        # written so that a NaN fails
        wrong += [f"{name} is off by {e:.1e}" for name, e in result.items() if not e <= TOLERANCE]
        told = f", {without} folded" if without else ""
        if wrong:
            self.failed += 1
            more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
            self.line(title, f"FAILED{told}: {'; '.join(wrong[:6])}{more}")
        else:
            self.done += 1
            self.line(title, f"ok: {count} tensors{told}, worst {worst(result)} (PyTorch's own float32 runs: {drift:.1e})")


def kept(norm, file):
    """Is the normalisation still in the file? Its scale is, then."""
    return any(a.shape == norm.weight.shape and (a == to_numpy(norm.weight)).all() for a in file.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--models", default=",".join(c.name for c in zoo.CASES))
    parser.add_argument("--opsets", default=",".join(map(str, OPSETS)))
    parser.add_argument("--exporters", default=",".join(EXPORTERS))
    parser.add_argument("--keep", type=pathlib.Path, help="leave the files in this folder")
    args = parser.parse_args()
    torch.set_grad_enabled(True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or pathlib.Path(name)
        folder.mkdir(exist_ok=True)
        matrix = Matrix(args.binary.resolve(), folder)
        for case in zoo.CASES:
            if case.name in args.models.split(","):
                matrix.network(case, args.exporters.split(","), [int(o) for o in args.opsets.split(",")])
    print(f"{matrix.done} equal PyTorch to {TOLERANCE}, {matrix.failed} failed, {matrix.skipped} not exported ({time.monotonic() - started:.0f} s)")
    sys.exit(matrix.failed > 0)
