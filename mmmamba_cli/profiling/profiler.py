"""One profile: the gate, the measurements, and the files they are written to."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import atomic_write_bytes, atomic_write_text
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.profiling.benchmark import Loaded, Plan, Watch, measure
from mmmamba_cli.profiling.correctness import RAISE, Gate, OnWrong, check_all
from mmmamba_cli.profiling.gpu_metrics import energy, launches
from mmmamba_cli.profiling.interfaces import OutOfMemory, Subject
from mmmamba_cli.profiling.plot import picture
from mmmamba_cli.profiling.report import comparison, notes
from mmmamba_cli.profiling.result import (
    DECODE,
    DRAWING,
    PICTURE,
    PROFILE,
    CeilingsPart,
    DevicePart,
    Energy,
    Launches,
    Measurement,
    PlanPart,
    Profile,
    SubjectPart,
    Throughput,
    ratios,
)
from mmmamba_cli.profiling.roofline import measure_ceilings
from mmmamba_cli.profiling.subjects import check_names
from mmmamba_cli.profiling.throughput import search
from mmmamba_cli.profiling.timers import Instruments, device_name, instruments_of
from mmmamba_cli.runs.manifest import command_line, now, versions

CPU_CONTEXTS = (1024, 2048, 4096, 8192)
# The published comparison's length is the last but one.
PUBLISHED = 103424
CUDA_CONTEXTS = (1024, 4096, 16384, 65536, PUBLISHED, 1048576)
CPU_BUDGET = 35.0
CPU_REPEATS, CUDA_REPEATS = 18, 15
CUDA_BURST = 8
# Share of the budget that single rows may have, if batches are to be tried too.
MEASURE_SHARE = 0.7


def default_plan(device: torch.device) -> Plan:
    """What is measured if nothing else is asked for: on a CPU, less than a minute's worth."""
    if device.type == "cuda":
        return Plan(
            CUDA_CONTEXTS,
            repeats=CUDA_REPEATS,
            burst=CUDA_BURST,
            warm_up=5,
            warm_prefill=True,
            prefill_contexts=CUDA_CONTEXTS[:-1],
            gate_at=(CUDA_CONTEXTS[1],),
            throughput=(PUBLISHED,),
        )
    return Plan(CPU_CONTEXTS, repeats=CPU_REPEATS, budget=CPU_BUDGET)


def profile(
    subjects: Sequence[Subject],
    plan: Plan | None = None,
    *,
    instruments: Instruments | None = None,
    watch: Watch | None = None,
    on_wrong: OnWrong = RAISE,
    deadline: float | None = None,
) -> Profile:
    """Check and measure subjects, which share a device and a dtype.

    `on_wrong`: what becomes of a decoder that is not what it should be; it is told. `deadline`, on
    `time.monotonic()`, leaves the plan as much budget as there is behind the gate. Raises
    `DataError` if there is nothing to measure or no model fits at all, `WrongDecoder` if a decoder
    is wrong, or all are.
    """
    if not subjects:
        raise DataError("there is no model to profile", "name a run, --model PATH or --random NAME")
    check_names(subjects)
    watch = watch or Watch()
    began = time.monotonic()
    loaded = Loaded()
    plan = plan or default_plan(_device_of(subjects, loaded))
    gate = check_all(subjects, plan, loaded, instruments, watch, on_wrong)
    meter = instruments or instruments_of(gate.device)
    subjects = [one for one in subjects if one.name not in gate.left_out]
    if deadline is not None:
        plan = replace(plan, budget=max(0.0, deadline - time.monotonic()))
    found = _measure(subjects, plan, meter, watch, loaded, gate)
    parts = tuple(
        SubjectPart(
            name=one.name, weight_bytes=loaded.weight_bytes.get(one.name), **asdict(one.about)
        )
        for one in subjects
    )
    return Profile(
        command=command_line(),
        created=now(),
        compared=comparison(parts),
        device=_device_part(gate.device),
        dtype=str(gate.dtype).removeprefix("torch."),
        seed=plan.seed,
        versions=versions(),
        plan=_plan_part(plan),
        notes=tuple(notes(subjects, plan, gate.device)),
        gate=gate.part(plan.gate_at),
        subjects=parts,
        measurements=tuple(found.measurements),
        ratios=ratios(found.measurements, {one.name: one.about.role for one in subjects}),
        ceilings=found.ceilings,
        throughput=tuple(found.throughput),
        launches=tuple(found.launches),
        energy=tuple(found.energy),
        seconds=round(time.monotonic() - began, 3),
    )


def _device_of(subjects: Sequence[Subject], loaded: Loaded) -> torch.device:
    """Of the first that fits."""
    for subject in subjects:
        with contextlib.suppress(OutOfMemory):
            return loaded.get(subject).device
    # Checking is about to say that nothing fits.
    return torch.device("cpu")


@dataclass(frozen=True)
class _Found:
    measurements: list[Measurement]
    ceilings: CeilingsPart | None
    throughput: list[Throughput]
    launches: list[Launches]
    energy: list[Energy]


def _measure(
    subjects: Sequence[Subject],
    plan: Plan,
    meter: Instruments,
    watch: Watch,
    loaded: Loaded,
    gate: Gate,
) -> _Found:
    """Everything behind the gate, what was asked for most first."""
    began = meter.now()
    ceilings = None
    if plan.floors:
        watch.say("measuring how fast the device copies and multiplies")
        ceilings = measure_ceilings(gate.device, gate.dtype, meter, plan.seed)
    watch.say("measuring")
    own = plan
    if plan.budget is not None and plan.throughput:
        own = replace(plan, budget=MEASURE_SHARE * plan.budget)
    measured = [
        one.model_copy(update={"memory": gate.memory[one.subject, one.context]})
        if one.task == DECODE and (one.subject, one.context) in gate.memory and one.memory
        else one
        for one in measure(subjects, own, meter, watch, loaded, ceilings)
    ]
    host, taken = [], []
    if plan.gauges and gate.device.type == "cuda":
        watch.say("reading launches and energy")
        host = launches(subjects, measured, plan, loaded, meter)
        taken = energy(subjects, measured, plan, loaded, meter)
    tried = []
    if plan.throughput:
        watch.say("looking for the best batch")
        until = None if plan.budget is None else began + plan.budget
        tried = search(subjects, plan, loaded, meter, ceilings, until)
    return _Found(measured, ceilings, tried, host, taken)


def check_replaceable(folder: str | Path) -> None:
    """Raise `RunError` if a profile written into `folder` would replace what is no profile."""
    folder = Path(folder)
    file = folder / PROFILE
    there = [name for name in (PROFILE, PICTURE, DRAWING) if (folder / name).exists()]
    if not there:
        return
    try:
        json.loads(file.read_text(encoding="utf-8-sig"))["subjects"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder} holds {', '.join(there)} that mmmamba profile did not write",
            "choose another folder with --out",
        ) from error


def write_profile(found: Profile, folder: str | Path) -> list[Path]:
    """`profile.json`, and where matplotlib is installed its picture twice; the files written.

    An older picture does not stay beside newer numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / PROFILE]
    atomic_write_text(written[0], found.model_dump_json(indent=2) + "\n")
    for name in (PICTURE, DRAWING):
        drawn = picture(found, Path(name).suffix.removeprefix("."))
        if drawn is None:
            (folder / name).unlink(missing_ok=True)
        else:
            written.append(folder / name)
            atomic_write_bytes(written[-1], drawn)
    return written


def _plan_part(plan: Plan) -> PlanPart:
    return PlanPart(
        contexts=tuple(sorted(plan.contexts)),
        batch=plan.batch,
        repeats=plan.turns * plan.repeats_a_turn,
        rounds=plan.turns,
        warm_up=plan.warm_up,
        prefill=plan.prefill,
        prefill_chunk=plan.prefill_chunk,
        budget=plan.budget,
        burst=plan.burst,
        prefill_contexts=plan.prefill_contexts,
        throughput=tuple(sorted(plan.throughput)),
    )


def _device_part(device: torch.device) -> DevicePart:
    is_cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if is_cuda else None
    return DevicePart(
        type=device.type,
        name=device_name(device),
        threads=torch.get_num_threads(),
        memory=memory,
    )
