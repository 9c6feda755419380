"""Correctness and speed of the kernels at HoVLE-2.6B size on one GPU.

    python benchmarks/kernels.py [--out FILE] [--seconds S] [--no-mamba] [--only OP]
    python benchmarks/kernels.py --tune [--out FILE] [--seconds S]

Every row is first checked against the plain PyTorch reference in fp64: at its shape with a few
tokens less (an odd length), on separate inputs, with every buffer poisoned with NaN; forward, and
all gradients if they are timed. Then the median of many calls over rotating inputs, which together
exceed the L2 cache, is taken with CUDA events; `graph_ms` is the same as a CUDA graph, without the
host's launch overhead. mamba_ssm's `mamba_chunk_scan_combined` (chunk 128) is measured in the same
run if it is installed; its keys and values are repeated beforehand, which is not timed.

`--tune` times the launch configurations of the scan instead, and prints the best of each direction.
`--small` uses tiny fp32 shapes on any device, to test the script. Prints a line per row, and writes
one JSON object to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kernel_problems import (
    Call,
    Place,
    Problem,
    Tensors,
    candidates,
    mamba_scan,
    repeated,
)
from kernel_processes import keep_share_of_tilings, start_warming, wait
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.ssd.mamba_ssm import library_kernels as mamba_kernels

# Relative errors by 2-norm, those of `mmmamba doctor`.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5}
# Minimum size of the rotating inputs: twice an H100's L2 cache.
ROTATED_BYTES = 100 * 2**20
REPEATS = 31


@dataclass
class Row:
    """Milliseconds of one backend; None if not measured, with the reason in `note`."""

    op: str
    batch: int
    length: int
    direction: str
    backend: str
    errors: dict[str, float] = field(default_factory=dict)
    correct: bool = False
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    graph_ms: float | None = None
    note: str = ""


# --- Correctness ----------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the results of `torch.empty` with NaN."""
    plain = torch.empty

    def spoilt(*shape: Any, **options: Any) -> Tensor:
        made = plain(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.empty = spoilt
    try:
        yield
    finally:
        torch.empty = plain


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def gate(problem: Problem, call: Call, backend: str) -> dict[str, float]:
    """Relative errors of outputs and, if it trains, of gradients; keys and values unrepeated."""
    made = problem.make(problem.batch, problem.length - 5, 17)
    found = _traced(call, made, problem.trains, backend)
    wanted = _traced(problem.wanted, {n: t.double() for n, t in made.items()}, problem.trains, "")
    return {name: distance(found[name], wanted[name]) for name in wanted}


def _traced(call: Call, made: Tensors, trains: bool, backend: str) -> Tensors:
    leaves = {n: t.clone().requires_grad_(trains) for n, t in made.items()}
    given = repeated(leaves) if backend == "mamba_ssm" else leaves
    with poisoned() if backend == "triton" else torch.set_grad_enabled(trains):
        outputs = call(given)
        found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        if trains:
            loss = sum((o * _weights(o)).sum() for o in outputs)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            found |= {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return found


def _weights(output: Tensor) -> Tensor:
    """Random values of few bits, exact in every dtype."""
    places = torch.arange(output.numel(), device=output.device) * 7919 % 101
    return (places % 13 - 6).to(output.dtype).view(output.shape) / 4


# --- Time -----------------------------------------------------------------------------------------


def forward(call: Call) -> Callable[[Tensors], object]:
    def run(made: Tensors) -> object:
        with torch.no_grad():
            return call(made)

    return run


def both(call: Call) -> Callable[[Tensors], object]:
    def run(made: Tensors) -> object:
        leaves = [t for n, t in made.items() if n != "dy"]
        y = call({n: t for n, t in made.items() if n != "dy"})[0]
        return torch.autograd.grad(y, leaves, made["dy"])

    return run


def sets(problem: Problem, backend: str, trains: bool) -> list[Tensors]:
    """The rotating inputs."""
    found: list[Tensors] = []
    size = 0
    while size < ROTATED_BYTES and len(found) < 8:
        made = problem.make(problem.batch, problem.length, len(found))
        made = repeated(made) if backend == "mamba_ssm" else made
        made = {n: t.requires_grad_(trains) for n, t in made.items()}
        if trains:
            made["dy"] = _like_output(problem, made)
        found.append(made)
        size += sum(t.numel() * t.element_size() for t in made.values())
    return found


def _like_output(problem: Problem, made: Tensors) -> Tensor:
    name = {"ssd": "C", "gated_rms_norm": "y"}.get(problem.op, "q" if "q" in made else "x")
    like = made[name]
    # Not the default generator: a failed capture may have made it unusable.
    rng = torch.Generator(like.device).manual_seed(0)
    return torch.randn(like.shape, generator=rng, device=like.device, dtype=like.dtype)


def milliseconds(run: Callable[[Tensors], object], inputs: list[Tensors]) -> list[float]:
    """Milliseconds of each call after warm-up, without host synchronization in between."""
    cuda = inputs[0][next(iter(inputs[0]))].is_cuda
    for i in range(5 if cuda else 1):
        run(inputs[i % len(inputs)])
    if not cuda:
        start = time.perf_counter()
        run(inputs[0])
        return [(time.perf_counter() - start) * 1e3]
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for i in range(REPEATS):
        run(inputs[i % len(inputs)])
        marks[i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def replayed(run: Callable[[Tensors], object], inputs: list[Tensors]) -> float | None:
    """Median of one call in a CUDA graph with one call per input."""
    if not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for made in inputs:
            run(made)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for made in inputs:
            run(made)
    times = milliseconds(lambda _: graph.replay(), inputs[:1])
    return statistics.median(times) / len(inputs)


def measure(problem: Problem, backend: str, call: Call) -> Iterator[Row]:
    """Rows of forward and, if the problem trains, forward with backward, after one gate."""
    errors = gate(problem, call, backend)
    dtype = next(iter(problem.make(1, 1, 0).values())).dtype
    for direction in ("forward", "forward+backward")[: 1 + problem.trains]:
        row = Row(problem.op, problem.batch, problem.length, direction, backend, errors)
        # NaN fails this comparison.
        row.correct = all(error <= TOLERANCE[dtype] for error in errors.values())
        trains = direction != "forward"
        inputs = sets(problem, backend, trains)
        asked = partial(mamba_scan, state=False) if backend == "mamba_ssm" else call
        run = both(asked) if trains else forward(asked)
        times = milliseconds(run, inputs)
        row.median_ms = statistics.median(times)
        if len(times) > 2:
            low, _, high = statistics.quantiles(times, n=4)
            row.quartiles_ms = (low, high)
        try:
            row.graph_ms = replayed(run, inputs)
        except RuntimeError as error:
            row.note = f"no graph: {str(error).splitlines()[0]}"
        yield row


def copy_rate(device: torch.device) -> float | None:
    """Bytes per second read and written by a copy of 1 GiB."""
    if device.type != "cuda":
        return None
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times = milliseconds(lambda _: target.copy_(source), [{"x": source}])
    return 2 * 2**30 / (statistics.median(times) / 1e3)


# --- Runs -----------------------------------------------------------------------------------------


def mamba_importable() -> bool:
    try:
        mamba_kernels()
    except MmmambaError as error:
        print(f"mamba_ssm is not measured: {error}", flush=True)
        return False
    return True


def compare(
    place: Place, seconds: float, mamba: bool, only: str | None, keep: Callable[[Any], object]
) -> dict[str, Any]:
    """All rows; mamba_ssm's come last because its autotuning takes time.

    Calls `keep` with the rows so far after each problem.
    """
    end = time.monotonic() + seconds
    rows: list[Row] = []
    problems = [problem for problem in place.problems() if problem.op.startswith(only or "")]
    order = [(p, b) for p in problems for b in candidates(p, False)]
    if mamba:
        order += [(p, "mamba_ssm") for p in problems if p.op == "ssd"]
    is_cold = place.device.type == "cuda"
    for problem, backend in order:
        if backend == "mamba_ssm" and is_cold:
            # Wait for the helpers: no other work may run during a measurement.
            for process in start_warming():
                wait(process, end)
            is_cold = False
        if time.monotonic() > end:
            rows.append(Row(problem.op, problem.batch, problem.length, "", backend, note="no time"))
            continue
        for row in measure(problem, backend, candidates(problem, mamba)[backend]):
            rows.append(row)
            print(line(row), flush=True)
        keep({"rows": [asdict(row) for row in rows]})
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"rows": [asdict(row) for row in rows], "marks": marks(rows)}


def line(row: Row) -> str:
    graph = "-" if row.graph_ms is None else f"{row.graph_ms:.3f}"
    worst = max(row.errors, key=lambda name: row.errors[name])
    right = "correct" if row.correct else "WRONG"
    return (
        f"{row.op:15} {row.batch} x {row.length:<7} {row.direction:17} {row.backend:10} "
        f"{row.median_ms:9.3f} ms, as a graph {graph:>8}; {right}, worst {worst} "
        f"{row.errors[worst]:.1e} {row.note}"
    )


def marks(rows: list[Row]) -> list[dict[str, Any]]:
    """Speed-up over mamba_ssm by host time and by GPU time."""
    found = []
    known = {(r.op, r.batch, r.length, r.direction, r.backend): r for r in rows if r.median_ms}
    for (*shape, backend), row in known.items():
        other = known.get((*shape, "mamba_ssm"))
        if backend != "triton" or other is None or row.median_ms is None:
            continue
        mark = {"row": shape, "faster": other.median_ms / row.median_ms}
        if row.graph_ms and other.graph_ms:
            mark["faster_as_graph"] = other.graph_ms / row.graph_ms
        print("faster than mamba_ssm:", mark, flush=True)
        found.append(mark)
    return found


def warm_mamba(place: Place, share: str) -> None:
    """Compile share "i/n" of mamba_ssm's tilings, with and without the final state."""
    mamba_importable()
    keep_share_of_tilings(*map(int, share.split("/")))
    problem = next(p for p in place.problems() if p.op == "ssd" and p.trains)
    for state in (False, True):
        both(partial(mamba_scan, state=state))(sets(problem, "mamba_ssm", True)[0])


def packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "mamba-ssm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument(
        "--only", metavar="OP", help="prefix of the ops to measure, for example ssd"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-mamba", action="store_true")
    parser.add_argument("--warm-mamba", help=argparse.SUPPRESS)
    parser.add_argument("--warm-tunings", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    place = Place(chosen.small)
    if chosen.warm_mamba:
        warm_mamba(place, chosen.warm_mamba)
        return
    if chosen.warm_tunings:
        from kernel_tunings import warm

        warm(place, chosen.warm_tunings)
        return
    told = heading(place)

    def keep(found: dict[str, Any]) -> None:
        if chosen.out:
            chosen.out.write_text(json.dumps({**told, **found}, indent=1) + "\n")

    if chosen.tune:
        from kernel_tunings import tune

        keep(tune(place, chosen.seconds))
    else:
        mamba = not chosen.no_mamba and mamba_importable()
        keep(compare(place, chosen.seconds, mamba, chosen.only, keep))


def heading(place: Place) -> dict[str, Any]:
    """Description, device, date and copy bandwidth."""
    cuda = place.device.type == "cuda"
    return {
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "versions": packages(),
        "copy_bytes_per_second": copy_rate(place.device),
        "seed": 0,
        "tolerance": TOLERANCE[place.dtype],
    }


if __name__ == "__main__":
    main()
