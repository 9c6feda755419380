"""One profile: the gate, the measurements, and the files they are written to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import atomic_write_bytes, atomic_write_text
from mmmamba_cli.errors import DataError
from mmmamba_cli.profiling.contract import AS_SHIPPED, TUNED, OutOfMemory, Subject
from mmmamba_cli.profiling.gate import PREFILL as GATE_PREFILL
from mmmamba_cli.profiling.gate import STEPS, Checked, check_decoder
from mmmamba_cli.profiling.instruments import Instruments, device_name, or_out_of_memory
from mmmamba_cli.profiling.measuring import Loaded, Plan, Watch, measure
from mmmamba_cli.profiling.opening import check_names
from mmmamba_cli.profiling.picture import picture
from mmmamba_cli.profiling.report import comparison
from mmmamba_cli.profiling.result import (
    PICTURE,
    PROFILE,
    DevicePart,
    GatePart,
    PlanPart,
    Profile,
    SubjectPart,
    ratios,
)
from mmmamba_cli.runs.manifest import command_line, now, versions

CPU_CONTEXTS = (1024, 2048, 4096, 8192)
# The last one is the published comparison's.
CUDA_CONTEXTS = (1024, 4096, 16384, 65536, 103424)
CPU_BUDGET = 35.0
CPU_REPEATS, CUDA_REPEATS = 18, 30


def default_plan(device: torch.device) -> Plan:
    """What is measured if nothing else is asked for: on a CPU, less than a minute's worth."""
    if device.type == "cuda":
        return Plan(CUDA_CONTEXTS, repeats=CUDA_REPEATS, warm_up=5, warm_prefill=True)
    return Plan(CPU_CONTEXTS, repeats=CPU_REPEATS, budget=CPU_BUDGET)


def profile(
    subjects: Sequence[Subject],
    plan: Plan | None = None,
    *,
    instruments: Instruments | None = None,
    watch: Watch | None = None,
) -> Profile:
    """Check and measure subjects, which share a device and a dtype.

    Raises `DataError` if there is nothing to measure or no model fits at all, `WrongDecoder` if a
    cache is not what it should be.
    """
    if not subjects:
        raise DataError("there is no model to profile", "name a run, --model PATH or --random NAME")
    check_names(subjects)
    watch = watch or Watch()
    began = time.monotonic()
    loaded = Loaded()
    gate, device, dtype = _check_all(subjects, loaded, plan.seed if plan else 0, watch)
    plan = plan or default_plan(device)
    found = measure(subjects, plan, instruments, watch, loaded)
    parts = tuple(
        SubjectPart(
            name=one.name, weight_bytes=loaded.weight_bytes.get(one.name), **asdict(one.about)
        )
        for one in subjects
    )
    roles = {one.name: one.about.role for one in subjects}
    return Profile(
        command=command_line(),
        created=now(),
        compared=comparison(parts),
        device=_device_part(device),
        dtype=str(dtype).removeprefix("torch."),
        seed=plan.seed,
        versions=versions(),
        plan=_plan_part(plan),
        notes=tuple(_notes(subjects, plan, device)),
        gate=gate,
        subjects=parts,
        measurements=tuple(found),
        ratios=ratios(found, roles),
        seconds=round(time.monotonic() - began, 3),
    )


def write_profile(found: Profile, folder: str | Path) -> list[Path]:
    """`profile.json`, and `profile.png` where matplotlib is installed; the files written.

    An older picture does not stay beside newer numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = picture(found)
    written = [folder / PROFILE]
    atomic_write_text(written[0], found.model_dump_json(indent=2) + "\n")
    if drawn is None:
        (folder / PICTURE).unlink(missing_ok=True)
    else:
        written.append(folder / PICTURE)
        atomic_write_bytes(written[1], drawn)
    return written


def _check_all(
    subjects: Sequence[Subject], loaded: Loaded, seed: int, watch: Watch
) -> tuple[GatePart, torch.device, torch.dtype]:
    """The gate for every subject that can be loaded; the others' memory is told by `measure`."""
    distances: dict[str, dict[str, float]] = {}
    unchecked, tolerance = [], 0.0
    where: tuple[torch.device, torch.dtype] | None = None
    refused = ""
    for subject in subjects:
        watch.say(f"loading and checking {subject.name}")
        try:
            checked, device, dtype = _check(subject, loaded, seed)
        except OutOfMemory as error:
            unchecked.append(subject.name)
            refused = str(error)
            continue
        distances[subject.name], tolerance = dict(checked.distances), checked.tolerance
        where = (device, dtype)
    if where is None:
        raise DataError(f"no model fits the device's memory: {refused}", "try --dtype bf16")
    what = (
        f"logits of a prompt of {GATE_PREFILL} tokens and {STEPS} more, one by one, with growing "
        "and with static cache, against a forward pass without a cache: relative distance"
    )
    gate = GatePart(
        green=not unchecked,
        tolerance=tolerance,
        distances=distances,
        unchecked=tuple(unchecked),
        what=what,
    )
    return gate, *where


def _check(
    subject: Subject, loaded: Loaded, seed: int
) -> tuple[Checked, torch.device, torch.dtype]:
    """The gate for one subject, without the others in memory if it does not fit beside them."""

    def check() -> tuple[Checked, torch.device, torch.dtype]:
        decoder = loaded.get(subject)
        checked = check_decoder(subject.name, decoder, seed)
        return checked, decoder.device, decoder.dtype

    try:
        return or_out_of_memory(check)
    except OutOfMemory as error:
        refused = str(error)
    if not loaded.keep_only(subject):
        raise OutOfMemory(refused)
    return or_out_of_memory(check)


def _notes(subjects: Sequence[Subject], plan: Plan, device: torch.device) -> list[str]:
    found = [
        "decoding begins from a cache filled with random numbers, as long as the context: the time "
        "does not depend on what is in it",
        "a next token is one forward pass and the greedy choice, text only; weights shared by "
        "models are held once, and counted for each",
        "tensors that no forward uses, as a second token table, are loaded on neither side",
    ]
    if any(one.about.role == AS_SHIPPED for one in subjects):
        found.append(
            f"{AS_SHIPPED}: this project's model with transformers' DynamicCache, which copies "
            "all keys and values with every token, as HoVLE's own code does; not that code itself"
        )
    if any(one.about.role == TUNED for one in subjects):
        found.append(f"{TUNED}: neither compiled nor replayed as a graph")
    if device.type == "cpu":
        found.append(
            "memory is counted, weights and cache: a CPU tells the peak of the whole process only"
        )
    if plan.prefill:
        found.append(
            "prefill: models with attention read the whole prompt at once, linear ones 8192 "
            "columns at a time, unless prefill_chunk says otherwise; static caches have just the "
            "prompt's room"
        )
    undone = [one.name for one in subjects if one.about.final is False]
    if undone:
        found.append(
            f"never distilled end to end: {', '.join(undone)}; speed does not depend on it"
        )
    return found


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
