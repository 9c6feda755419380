"""Autotuning of the scan's launch configurations, called by `kernels.py --tune`.

Coordinate descent in the order states of long and of few spans, chunk and forward launch, backward
launch, spans. Other processes compile ahead of the one that measures. CUDA graphs are timed, which
excludes the host.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from kernel_problems import Place, Problem, scan
from kernel_processes import start, wait
from kernels import (
    TOLERANCE,
    both,
    forward,
    gate,
    milliseconds,
    replayed,
    sets,
)
from triton.runtime.errors import OutOfResources

from mmmamba_cli.ops.ssd.launch_config import TUNING, Launch, Tuning

CHUNKS = (64, 128)
LAUNCHES = tuple(
    Launch(tile, warps, stages)
    for tile, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
    for stages in (1, 2, 3)
)
SPANS = tuple((programs, most) for programs in (132, 264, 528) for most in (8, 16, 32, 64))
GATE_LENGTH = 1008
# Fields of `Tuning`.
LAUNCHED = ("states", "few_states", "forward", "backward")

# Milliseconds by problem, or an error.
Found = dict[str, float] | str


@contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    plain = dict(TUNING)
    TUNING.update(dict.fromkeys(TUNING, tuning))
    try:
        yield
    finally:
        TUNING.update(plain)


def scans(place: Place) -> list[Problem]:
    return [problem for problem in place.problems() if problem.op == "ssd"]


def timed(place: Place, tuning: Tuning, kind: str) -> Found:
    """Milliseconds of the forward pass, of forward and backward, or of all problems."""
    problems = scans(place)
    small = replace(problems[0], length=min(problems[0].length, GATE_LENGTH))
    try:
        with using(tuning):
            worst = max(gate(small, scan("triton"), "triton").values())
            if not worst <= TOLERANCE[place.dtype]:
                return f"wrong by {worst:.1e}"
            return {
                problem.name: _milliseconds(problem)
                for problem in problems
                if kind not in ("forward", "backward") or problem.trains == (kind == "backward")
            }
    except OutOfResources as error:
        return f"does not fit: {error}"


def _milliseconds(problem: Problem) -> float:
    inputs = sets(problem, "triton", problem.trains)
    run = both(scan("triton")) if problem.trains else forward(scan("triton"))
    found = replayed(run, inputs)
    return statistics.median(milliseconds(run, inputs)) if found is None else found


def alternatives(kind: str, best: Tuning) -> list[Tuning]:
    if kind == "forward":
        made = [best._replace(chunk=c, forward=launch) for c in CHUNKS for launch in LAUNCHES]
    elif kind == "spans":
        made = [best._replace(programs=p, most_chunks=m) for p, m in SPANS]
    else:
        made = [best._replace(**{kind: launch}) for launch in LAUNCHES]
    return [best, *(other for other in made if other != best)]


def tune(place: Place, seconds: float) -> dict[str, Any]:
    """The best tuning, and the times of every alternative."""
    end = time.monotonic() + seconds
    best = TUNING[tl.float32 if place.small else tl.bfloat16]
    tried: list[dict[str, Any]] = []
    for kind in (*LAUNCHED, "spans"):
        _compile_ahead(place, kind, best, end)
        results: list[tuple[Tuning, Found]] = []
        for tuning in alternatives(kind, best):
            if time.monotonic() > end:
                print(f"no time left for all of {kind}", flush=True)
                break
            results.append((tuning, timed(place, tuning, kind)))
            tried.append({"kind": kind, "tuning": _named(tuning), "result": results[-1][1]})
            print(kind, _named(tuning), results[-1][1], flush=True)
        best = _best(results, best)
        print(f"best of {kind}: {best}", flush=True)
    return {"best": _named(best), "tried": tried}


def _named(tuning: Tuning) -> dict[str, Any]:
    launches = {name: getattr(tuning, name)._asdict() for name in LAUNCHED}
    return tuning._asdict() | launches


def _best(results: list[tuple[Tuning, Found]], otherwise: Tuning) -> Tuning:
    """The alternative with the smallest mean of times relative to the best per problem."""
    right = [(tuning, found) for tuning, found in results if not isinstance(found, str)]
    if not right:
        return otherwise
    least = {name: min(found[name] for _, found in right) for name in right[0][1]}
    return min(
        right, key=lambda one: statistics.fmean(ms / least[name] for name, ms in one[1].items())
    )[0]


def _compile_ahead(place: Place, kind: str, best: Tuning, end: float) -> None:
    """Fill Triton's cache with several processes; spans need no other kernels."""
    if place.device.type != "cuda" or kind == "spans":
        return
    count = max(1, min(8, (os.cpu_count() or 2) // 2))
    text = ",".join(map(str, (best.chunk, *(n for name in LAUNCHED for n in getattr(best, name)))))
    helpers = [start("--warm-tunings", f"{kind}:{text}:{i}:{count}") for i in range(count)]
    for helper in helpers:
        wait(helper, end)


def warm(place: Place, text: str) -> None:
    """In a helper process: run its share of the alternatives once, on little data."""
    kind, numbers, share, step = text.split(":")
    chunk, *rest = map(int, numbers.split(","))
    best = Tuning(chunk, *(Launch(*rest[first : first + 3]) for first in range(0, len(rest), 3)))
    made = sets(scans(place)[0], "triton", True)[0]
    for tuning in alternatives(kind, best)[int(share) :: int(step)]:
        # Spans of one chunk and of several are different kernels.
        for most in (1, 2):
            with using(tuning._replace(programs=1, most_chunks=most)):
                try:
                    both(scan("triton"))(made)
                except OutOfResources as error:
                    print(f"{tuning} does not fit: {error}", flush=True)
    if place.device.type == "cuda":
        torch.cuda.synchronize()
