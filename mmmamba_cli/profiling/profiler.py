"""Entry point of profiling: correctness check, measurements, and the files of a profile."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import atomic_write_bytes, atomic_write_text
from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.profiling.benchmark import LoadedDecoders, Plan, ProfileProgress, measure
from mmmamba_cli.profiling.correctness import RAISE, CorrectnessCheck, OnWrong, check_subjects
from mmmamba_cli.profiling.gpu_metrics import measure_energy, measure_launches
from mmmamba_cli.profiling.interfaces import Subject
from mmmamba_cli.profiling.plot import render_plot
from mmmamba_cli.profiling.report import comparison, notes
from mmmamba_cli.profiling.result import (
    DECODE,
    PNG_FILE,
    PROFILE_FILE,
    SVG_FILE,
    DevicePart,
    Energy,
    Launches,
    Measurement,
    PlanPart,
    Profile,
    RooflinePart,
    SubjectPart,
    Throughput,
    ratios,
)
from mmmamba_cli.profiling.roofline import measure_roofline
from mmmamba_cli.profiling.shared_weights import WeightStore
from mmmamba_cli.profiling.subjects import (
    check_names,
    path_subjects,
    run_subjects,
    teacher_subjects,
)
from mmmamba_cli.profiling.throughput import search_batch_size
from mmmamba_cli.profiling.timers import DeviceTimer, device_name, device_timer
from mmmamba_cli.runs.manifest import command_line, package_versions, utc_timestamp

CPU_CONTEXTS = (1024, 2048, 4096, 8192)
# Context length of the comparison in the mmMamba paper.
PUBLISHED_CONTEXT = 103424
CUDA_CONTEXTS = (1024, 4096, 16384, 65536, PUBLISHED_CONTEXT, 1048576)
CPU_BUDGET_SECONDS = 35.0
CPU_REPEATS, CUDA_REPEATS = 18, 15
CUDA_BURST = 8
# Share of the budget for everything but the search for the best batch size, if there is one.
MEASURE_BUDGET_SHARE = 0.7


def default_plan(device: torch.device) -> Plan:
    """The default plan of a device; on a CPU it takes less than a minute."""
    if device.type == "cuda":
        return Plan(
            CUDA_CONTEXTS,
            repeats=CUDA_REPEATS,
            burst=CUDA_BURST,
            warm_up=5,
            warm_prefill=True,
            prefill_contexts=CUDA_CONTEXTS[:-1],
            check_lengths=(CUDA_CONTEXTS[1],),
            throughput=(PUBLISHED_CONTEXT,),
        )
    return Plan(CPU_CONTEXTS, repeats=CPU_REPEATS, budget=CPU_BUDGET_SECONDS)


def select_subjects(
    store: WeightStore,
    run: Path,
    products: Sequence[str] = (),
    models: Sequence[Path] = (),
    *,
    teacher: bool | None = None,
    teacher_path: Path | None = None,
    eager: bool = False,
) -> list[Subject]:
    """Products of a run, checkpoints at paths, or both, with the run's teacher.

    The run's products are left out if only `models` are given. `teacher` None adds the teacher
    unless `models` are given; `teacher_path` always adds it.
    """
    moved = teacher_path is not None
    found: list[Subject] = []
    if not models or products:
        wanted = True if moved else False if models and teacher is None else teacher
        found = run_subjects(
            store, run, products, teacher=wanted, teacher_path=teacher_path, eager=eager
        )
    elif teacher or moved:
        found = teacher_subjects(store, run, teacher_path, eager=eager)
    return [*found, *path_subjects(store, models, eager=eager)]


def profile(
    subjects: Sequence[Subject],
    plan: Plan | None = None,
    *,
    timer: DeviceTimer | None = None,
    progress: ProfileProgress | None = None,
    on_wrong: OnWrong = RAISE,
    deadline: float | None = None,
) -> Profile:
    """Check and measure subjects, which share a device and a dtype.

    `on_wrong`: what to do with a decoder that fails the correctness check; the profile names it.
    `deadline`, a time of `time.monotonic()`, replaces the budget by the time left after the check.

    Raises:
        DataError: if there is no subject or none fits into memory.
        WrongDecoder: if a decoder is wrong and `on_wrong` is "raise", or if all are wrong.
    """
    if not subjects:
        raise DataError("there is no model to profile", "name a run, --model PATH or --random NAME")
    check_names(subjects)
    progress = progress or ProfileProgress()
    began = time.monotonic()
    loaded = LoadedDecoders()
    plan = plan or default_plan(_device_of(subjects, loaded))
    checked = check_subjects(subjects, plan, loaded, timer, progress, on_wrong)
    timer = timer or device_timer(checked.device)
    subjects = [one for one in subjects if one.name not in checked.left_out]
    if deadline is not None:
        plan = replace(plan, budget=max(0.0, deadline - time.monotonic()))
    found = _measure(subjects, plan, timer, progress, loaded, checked)
    parts = tuple(
        SubjectPart(
            name=one.name, weight_bytes=loaded.weight_bytes.get(one.name), **asdict(one.info)
        )
        for one in subjects
    )
    return Profile(
        command=command_line(),
        created=utc_timestamp(),
        compared=comparison(parts),
        device=_device_part(checked.device),
        dtype=str(checked.dtype).removeprefix("torch."),
        seed=plan.seed,
        versions=package_versions(),
        plan=_plan_part(plan),
        notes=tuple(notes(subjects, plan, checked.device)),
        gate=checked.part(plan.check_lengths),
        subjects=parts,
        measurements=tuple(found.measurements),
        ratios=ratios(found.measurements, {one.name: one.info.role for one in subjects}),
        ceilings=found.roofline,
        throughput=tuple(found.throughput),
        launches=tuple(found.launches),
        energy=tuple(found.energy),
        seconds=round(time.monotonic() - began, 3),
    )


def _device_of(subjects: Sequence[Subject], loaded: LoadedDecoders) -> torch.device:
    """The device of the first subject that fits into memory."""
    for subject in subjects:
        with contextlib.suppress(OutOfMemory):
            return loaded.get(subject).device
    # The correctness check raises that nothing fits.
    return torch.device("cpu")


@dataclass(frozen=True)
class _Results:
    measurements: list[Measurement]
    roofline: RooflinePart | None
    throughput: list[Throughput]
    launches: list[Launches]
    energy: list[Energy]


def _measure(
    subjects: Sequence[Subject],
    plan: Plan,
    timer: DeviceTimer,
    progress: ProfileProgress,
    loaded: LoadedDecoders,
    checked: CorrectnessCheck,
) -> _Results:
    """Everything after the correctness check, the most important first."""
    began = timer.now()
    roofline = None
    if plan.roofline:
        progress.log("measuring how fast the device copies and multiplies")
        roofline = measure_roofline(checked.device, checked.dtype, timer, plan.seed)
    progress.log("measuring")
    single_rows = plan
    if plan.budget is not None and plan.throughput:
        single_rows = replace(plan, budget=MEASURE_BUDGET_SHARE * plan.budget)
    measured = [
        one.model_copy(update={"memory": checked.memory[one.subject, one.context]})
        if one.task == DECODE and (one.subject, one.context) in checked.memory and one.memory
        else one
        for one in measure(subjects, single_rows, timer, progress, loaded, roofline)
    ]
    launches, energy = [], []
    if plan.gpu_metrics and checked.device.type == "cuda":
        progress.log("reading launches and energy")
        launches = measure_launches(subjects, measured, plan, loaded, timer)
        energy = measure_energy(subjects, measured, plan, loaded, timer)
    throughput = []
    if plan.throughput:
        progress.log("looking for the best batch")
        until = None if plan.budget is None else began + plan.budget
        throughput = search_batch_size(subjects, plan, loaded, timer, roofline, until)
    return _Results(measured, roofline, throughput, launches, energy)


def check_replaceable(folder: str | Path) -> None:
    """Raise `RunError` if `folder` holds files of a profile's names that are not a profile."""
    folder = Path(folder)
    file = folder / PROFILE_FILE
    existing = [name for name in (PROFILE_FILE, PNG_FILE, SVG_FILE) if (folder / name).exists()]
    if not existing:
        return
    try:
        json.loads(file.read_text(encoding="utf-8-sig"))["subjects"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder} holds {', '.join(existing)} that mmmamba profile did not write",
            "choose another folder with --out",
        ) from error


def write_profile(found: Profile, folder: str | Path) -> list[Path]:
    """Write `profile.json`, and with matplotlib its plot as PNG and SVG; return the files.

    Without matplotlib an older plot is deleted, so that it does not stay beside newer numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / PROFILE_FILE]
    atomic_write_text(written[0], found.model_dump_json(indent=2) + "\n")
    for name in (PNG_FILE, SVG_FILE):
        plot = render_plot(found, Path(name).suffix.removeprefix("."))
        if plot is None:
            (folder / name).unlink(missing_ok=True)
        else:
            written.append(folder / name)
            atomic_write_bytes(written[-1], plot)
    return written


def _plan_part(plan: Plan) -> PlanPart:
    return PlanPart(
        contexts=tuple(sorted(plan.contexts)),
        batch=plan.batch,
        repeats=plan.num_rounds * plan.repeats_per_round,
        rounds=plan.num_rounds,
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
