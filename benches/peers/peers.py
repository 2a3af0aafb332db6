"""Times retune and its peers on the same models, batches and threads, in turns, and prints how they compare.

    python peers.py --quick                        2 threads, one batch a model: a few minutes
    python peers.py --all --markdown docs/performance.md
    python peers.py --from-json target/peers/results.json

Each case starts one process a peer (retune: one a turn) and goes through them in rounds; the first round warms up and sets
how many steps a turn has. A figure is the median over rounds of a turn's median. "Best f32" of PyTorch is the best of
eager, eager with malloc tuned and a fused optimizer, and the latter in channels_last. Times are in milliseconds.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import threading
import time

import tables

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MAIN_BATCHES = {"resnet20": (32,), "mobilenetv2": (8,), "resnet18": (8,), "encoder": (8,)}
ALL_BATCHES = {"resnet20": (1, 32, 128), "mobilenetv2": (1, 8), "resnet18": (8,), "encoder": (8,)}
# Page faults cost PyTorch up to half its time; with these, malloc keeps what it once had.
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "RETUNE_ISA": "avx2"}
TICKS = os.sysconf("SC_CLK_TCK")
QUIET = 0.06  # the share of the processors that other programs may take
PAUSE = 0.1  # seconds in which the threads of the peer before stop spinning


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    mode: str
    batch: int
    threads: int

    def __str__(self):
        return f"{self.model} {self.mode} batch {self.batch}, {self.threads} threads"


class Failed(Exception):
    pass


class Worker:
    """A process of worker.py."""

    def __init__(self, engine, case, args, env=None, python=sys.executable):
        command = [python, HERE / "worker.py", engine, case.model, case.mode, case.batch, case.threads, args.models]
        self.log = open(args.models / "log.txt", "a")
        environment = args.env | {"OMP_NUM_THREADS": str(case.threads), "PYTHONDONTWRITEBYTECODE": "1"} | (env or {})
        self.process = subprocess.Popen(
            [str(c) for c in command], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.ready = False

    def wait_ready(self):
        if not self.ready:
            self.read()
            self.ready = True

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"the process ended: see {self.log.name}")
        return line

    def times(self, variant, count):
        self.wait_ready()
        print(variant, count, file=self.process.stdin, flush=True)
        return json.loads(self.read())

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.log.close()


def mode(name):
    """A mode of `retune bench`; ICP in the paper's form, which PyTorch's step is."""
    return ["--mode", name, *(["--icp-steps", 5, "--icp-epsilon", 0.002, "--icp-ema", 0] if name == "icp" else [])]


def bench(case, args, count, precision="f32"):
    """The command that times retune."""
    command = [args.retune, "bench", args.models / f"{case.model}.onnx", *mode(case.mode), "--batch", case.batch]
    return [*command, "--threads", case.threads, "--precision", precision, "--runs", count, "--json"]


def report(command, args):
    """The JSON that a program prints."""
    done = subprocess.run([str(c) for c in command], env=args.env, capture_output=True, text=True)
    if done.returncode:
        raise Failed(done.stderr.strip())
    return json.loads(done.stdout)


def peers(case, args, stack):
    """For each peer a function from a count of steps to their times; and the processes that stay."""
    workers = []

    def worker(*rest):
        workers.append(stack.enter_context(contextlib.closing(Worker(*rest))))
        return workers[-1]

    plain, tuned = worker("torch", case, args), worker("torch", case, args, TUNED_MALLOC)
    found = {"eager": lambda n: plain.times("eager", n)}
    # channels_last is a matter of images
    for variant in ("tuned", "bf16") if case.model == "encoder" else ("tuned", "channels_last", "bf16"):
        found[variant] = lambda n, v=variant: tuned.times(v, n)
    if case.mode == "forward" and not args.avx2:  # onnxruntime cannot be held to AVX2
        ort = worker("onnxruntime", case, args)
        found["onnxruntime"] = lambda n: ort.times("-", n)
    if case.mode == "train" and args.training_python and not args.avx2:
        training = worker("onnxruntime-training", case, args, {}, args.training_python)
        found["onnxruntime-training"] = lambda n: training.times("-", n)
    if case.mode == "forward" and args.tract:
        found["tract"] = lambda n: report([args.tract, args.models / f"{case.model}.onnx", case.batch, case.threads, n], args)
    found["retune"] = lambda n: [report(bench(case, args, n), args)["median_ms"]]
    if case.mode != "forward":
        found["retune-bf16"] = lambda n: [report(bench(case, args, n, "bf16"), args)["median_ms"]]
    for w in workers:  # none loads its libraries while another is timed
        with contextlib.suppress(Failed):
            w.wait_ready()
    return {name: turn for name, turn in found.items() if name not in args.without}, workers


def processor_seconds(workers):
    """What all processors together spent since the machine started, in all and for us."""
    with open("/proc/stat") as f:
        numbers = [int(n) for n in f.readline().split()[1:9]]
    ticks = sum(numbers) - numbers[3] - numbers[4]  # all but idle and waiting
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(u.ru_utime + u.ru_stime for u in usage)
    for w in workers:
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{w.process.pid}/stat").read_text().rpartition(")")[2].split()
            own += (int(fields[11]) + int(fields[12])) / TICKS
    return ticks / TICKS, own


def watched(turn, workers):
    """What `turn` gives, and the share of the processors that other programs took meanwhile."""
    start, (all_before, own_before) = time.monotonic(), processor_seconds(workers)
    value = turn()
    all_after, own_after = processor_seconds(workers)
    others = (all_after - all_before) - (own_after - own_before)
    others -= 2 / TICKS  # the clocks' resolution
    return value, max(0.0, others / (os.cpu_count() * (time.monotonic() - start)))


def undisturbed(turn, workers, deadline):
    """The same, repeated until nothing else runs or it is too late; the least disturbed."""
    best = watched(turn, workers)
    while best[1] > QUIET and time.monotonic() < deadline:
        time.sleep(1)
        best = min(best, watched(turn, workers), key=lambda found: found[1])
    return best


def measure(case, args):
    """The median time of each peer, and the largest share that other programs had in a turn."""
    deadline = time.monotonic() + args.patience
    with contextlib.ExitStack() as stack:
        found, workers = peers(case, args, stack)
        steps, medians, disturbed = {}, {name: [] for name in found}, 0.0
        for turn in range(args.rounds + 1):
            for name in list(found):
                time.sleep(PAUSE)
                try:
                    if turn == 0:
                        ms = statistics.median(found[name](1))
                        steps[name] = max(2, min(400, round(1e3 * args.seconds / ms)))
                        continue
                    times, others = undisturbed(lambda: found[name](steps[name]), workers, deadline)
                except Failed as e:
                    print(f"{case}: {name}: {e}", file=sys.stderr)
                    del found[name]
                    continue
                medians[name].append(statistics.median(times))
                disturbed = max(disturbed, others)
    return {name: {"ms": statistics.median(m), "rounds": m} for name, m in medians.items() if m}, disturbed


def anonymous(pid):
    """Bytes of anonymous memory that a process holds."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kilobytes = re.search(r"RssAnon:\s*(\d+)", status)
    return int(kilobytes[1]) << 10 if kilobytes else 0


@contextlib.contextmanager
def peak_memory(pid):
    """A list that holds the process's largest anonymous memory when the block is left."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def torch_memory(case, variant, args):
    """Peak anonymous memory of PyTorch's step above what importing it takes, that, and the steps' times."""
    with contextlib.closing(Worker("torch", case, args)) as worker:
        worker.wait_ready()
        imported = anonymous(worker.process.pid)
        with peak_memory(worker.process.pid) as whole:
            times = worker.times(variant, 3)
    return whole[0] - imported, imported, times


def memory(case, args):
    """Peak anonymous memory of a step: retune's whole process, PyTorch's above what importing it takes."""
    process = subprocess.Popen([str(c) for c in bench(case, args, 3)], env=args.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with peak_memory(process.pid) as own:
        process.wait()
    torch, imported, _ = torch_memory(case, "eager", args)
    return {"retune": own[0], "torch": torch, "torch_imported": imported}


def cold_start(args):
    """From exec to the end of the first training step at batch 1, if `retune bench` says."""
    with contextlib.suppress(Failed, KeyError):
        command = bench(Case("resnet20", "train", 1, 2), args, 1)
        return statistics.median(report(command, args)["cold_start_ms"] for _ in range(5))


def version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def output(*command):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output([str(c) for c in command], text=True, stderr=subprocess.DEVNULL).strip()


def machine(args):
    info = pathlib.Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*: (.*)$", info, re.M)
    wanted = ("avx2", "avx512f", "avx512_bf16")
    return {
        "cpu": (re.search(r"^model name\s*: (.*)$", info, re.M) or [None, platform.machine()])[1],
        "cores": os.cpu_count(),
        "flags": [f for f in flags[1].split() if f in wanted] if flags else [],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "forced": "avx2" if args.avx2 else None,
        "retune": f"{output(args.retune, '--version')} ({output('git', '-C', ROOT, 'rev-parse', '--short', 'HEAD')})",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "onnxruntime", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
    }


def cases(args):
    threads = args.threads or ([2, 1] if args.all else [2])
    for model, batches in (ALL_BATCHES if args.all else MAIN_BATCHES).items():
        for batch in batches:
            for mode in ("train", "forward", "icp"):
                if mode == "icp" and (model, batch) != ("resnet20", 32):
                    continue
                for t in threads:
                    if model in args.only and mode in args.modes:
                        yield Case(model, mode, batch, t)


def run(args):
    (args.models / "log.txt").unlink(missing_ok=True)
    results = {"machine": machine(args), "cases": [], "memory": []}
    write = lambda: args.output.write_text(json.dumps(results, indent=1) + "\n")  # noqa: E731
    for case in cases(args):
        start = time.monotonic()
        found, others = measure(case, args)
        results["cases"].append(dataclasses.asdict(case) | {"others": others, "peers": found})
        figures = ", ".join(f"{name} {p['ms']:.1f}" for name, p in found.items())
        print(f"{case}: {figures}   [{time.monotonic() - start:.0f} s, others {others:.0%}]", file=sys.stderr, flush=True)
        write()
    for model in args.only if "train" in args.modes else []:
        case = Case(model, "train", MAIN_BATCHES[model][0], 2)
        results["memory"].append(dataclasses.asdict(case) | memory(case, args))
    if "resnet20" in args.only:
        results["cold_start_ms"] = cold_start(args)
    write()
    return results


def training_python(folder):
    """The interpreter that has onnxruntime-training, if there is one."""
    python = folder / "venv-training" / "bin" / "python"
    if python.exists() and output(python, "-c", "import onnxruntime.training.api") is not None:
        return python
    print("onnxruntime-training: not installed", file=sys.stderr)
    return None


def tract_binary(args):
    """The program of tract/, if run.sh could build it."""
    binary = args.models / "tract" / "release" / "peer-tract"
    if binary.exists() and not args.avx2:
        return binary
    print("tract: not built" if not args.avx2 else "tract: cannot be held to AVX2", file=sys.stderr)
    return None


def scripts_parser(description):
    """Of a script's arguments, with those that all scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retune", type=pathlib.Path, default=ROOT / "target" / "release" / "retune")
    parser.add_argument("--models", type=pathlib.Path, default=ROOT / "target" / "peers", help="folder of models.py's files")
    return parser


def arguments():
    models = list(ALL_BATCHES)
    parser = scripts_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--quick", action="store_true", help="2 threads, the main batch of each model")
    which.add_argument("--all", action="store_true", help="2 threads and 1, all batches")
    which.add_argument("--from-json", type=pathlib.Path, help="only print what an earlier run measured")
    parser.add_argument("--avx2", action="store_true", help="hold every peer to AVX2")
    parser.add_argument("--only", nargs="+", choices=models, default=models, metavar="MODEL")
    parser.add_argument("--modes", nargs="+", choices=["train", "forward", "icp"], default=["train", "forward", "icp"])
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="as bf16, where a processor has no instructions for it")
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of steps in a turn (2 to 400 of them)")
    parser.add_argument("--patience", type=float, default=0, help="seconds a case may take to repeat turns that other programs disturbed")
    parser.add_argument("--output", type=pathlib.Path, help="default: results.json or results-avx2.json there")
    parser.add_argument("--markdown", type=pathlib.Path, help="file in which to replace the tables, between its marks")
    args = parser.parse_args()
    args.output = args.output or args.models / ("results-avx2.json" if args.avx2 else "results.json")
    args.env = dict(os.environ) | (AVX2 if args.avx2 else {})
    return args


def main():
    args = arguments()
    if args.from_json:
        results = json.loads(args.from_json.read_text())
    else:
        if output(args.retune, "--version") is None:
            sys.exit(f"{args.retune} does not run: cargo build --release, or --retune PATH")
        args.training_python, args.tract = training_python(args.models), tract_binary(args)
        if not all((args.models / f"{model}.{form}").exists() for model in args.only for form in ("onnx", "pt")):
            subprocess.run([sys.executable, HERE / "models.py", args.models], check=True)
        results = run(args)
    text = tables.render(results)
    print(text)
    if args.markdown:
        tables.replace(args.markdown, text, "peers avx2" if results["machine"]["forced"] else "peers")


if __name__ == "__main__":
    main()
