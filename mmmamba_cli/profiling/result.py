"""A profile as it is written: typed, with every repeat of every measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.errors import RunError
from mmmamba_cli.profiling.interfaces import BASELINES, EAGER
from mmmamba_cli.runs.manifest import parse_model

PROFILE, PICTURE, DRAWING = "profile.json", "profile.png", "profile.svg"
# 2 added floors, throughput, energy and launches; a file of format 1 has none of them.
FORMAT = 2
FORMATS = (1, FORMAT)

Task = Literal["decode", "prefill"]
DECODE: Task = "decode"
PREFILL: Task = "prefill"

Status = Literal[
    "measured", "out of memory", "skipped: a shorter one was out of memory", "skipped: over budget"
]
MEASURED: Status = "measured"
OUT_OF_MEMORY: Status = "out of memory"
TOO_LONG: Status = "skipped: a shorter one was out of memory"
OVER_BUDGET: Status = "skipped: over budget"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memory(_Part):
    """Bytes. `weights` and `cache` are counted, tensor by tensor.

    `peak` is the most that the device's allocator held, None on a CPU, where only the peak of the
    whole process could be read. If `apart`, no other model was in memory meanwhile; else what the
    allocator held before this cache was made is taken off, and `weights` added.
    """

    weights: int
    cache: int
    peak: int | None = None
    apart: bool = False

    @property
    def total(self) -> int:
        """The peak where there is one, else weights and cache, which leave out activations."""
        return self.weights + self.cache if self.peak is None else self.peak


class Measurement(_Part):
    """One subject, task and context. `rounds` holds the seconds of each repeat, by round.

    `alone` says that the other models had to leave the device's memory for it.
    """

    subject: str
    task: Task
    context: int
    status: Status
    rounds: tuple[tuple[float, ...], ...] = ()
    memory: Memory | None = None
    alone: bool = False
    note: str = ""
    # Of all repeats, in seconds: the median, and the quartiles around it.
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    # Seconds by `Cost` and `Profile.ceilings`; None where there are none, or nothing was measured.
    floor: float | None = None

    @property
    def share(self) -> float | None:
        """How much of the time the floor explains: 1 is as fast as the device allows."""
        return None if self.floor is None or self.median is None else self.floor / self.median

    @property
    def repeats(self) -> tuple[float, ...]:
        return tuple(seconds for one in self.rounds for seconds in one)


class SubjectPart(_Part):
    """As `contract.About`; `weight_bytes` is None if the model was never loaded."""

    name: str
    role: str
    cache: str
    kind: str
    attention_layers: tuple[int, ...]
    num_layers: int
    weights: str
    content_hash: str | None = None
    final: bool | None = None
    way: str = EAGER
    precision: str | None = None
    weight_bytes: int | None = None


class DevicePart(_Part):
    """`threads` are torch's, and mean something on a CPU; `memory` is a GPU's, in bytes."""

    type: str
    name: str
    threads: int
    memory: int | None = None


class PlanPart(_Part):
    """How often, in what order and how long it was allowed to take; see `measuring.Plan`."""

    contexts: tuple[int, ...]
    batch: int
    repeats: int
    rounds: int
    warm_up: int
    prefill: bool
    prefill_chunk: int | None
    budget: float | None
    burst: int = 1
    # None is `contexts`.
    prefill_contexts: tuple[int, ...] | None = None
    throughput: tuple[int, ...] = ()

    def lengths(self, task: Task) -> list[int]:
        """Contexts at which a task was measured, ascending."""
        own = self.prefill_contexts if task == PREFILL else None
        return sorted(self.contexts if own is None else own)


class GatePart(_Part):
    """What was compared before anything was timed: relative distances of logits, by way.

    `allowed` is that of each subject, `tolerance` the largest. `wrong` are subjects that failed,
    and why.
    """

    green: bool
    tolerance: float
    allowed: dict[str, float] = {}
    distances: dict[str, dict[str, float]]
    unchecked: tuple[str, ...] = ()
    wrong: dict[str, str] = {}
    what: str


class CeilingsPart(_Part):
    """Bytes a second, read and written ones, of copying `size` bytes; operations a second of
    multiplying two square matrices of `side` in the profile's dtype, a product and a sum being two.
    """

    copy_rate: float
    matmul_rate: float
    size: int
    side: int


class Throughput(_Part):
    """Tokens a second of all rows together, at one batch. `best` marks a subject's highest."""

    subject: str
    context: int
    batch: int
    status: Status
    # Median seconds of a token of every row.
    seconds: float | None = None
    floor: float | None = None
    # Bytes, as `Memory.peak`.
    peak: int | None = None
    best: bool = False
    note: str = ""

    @property
    def rate(self) -> float | None:
        return None if self.seconds is None else self.batch / self.seconds


class Launches(_Part):
    """How much of a token's time the device waits for the host, at batch `PlanPart.batch`.

    `kernels` are seconds in which the device worked, summed over a token's kernels and copies;
    `wall` is the median of the same token, measured without the profiler.
    """

    subject: str
    context: int
    kernels: float
    wall: float

    @property
    def share(self) -> float:
        return max(0.0, 1 - self.kernels / self.wall)


class Energy(_Part):
    """Of the whole device, by its own counter, over a loop of `tokens` that took `seconds`."""

    subject: str
    context: int
    tokens: int
    joules: float
    seconds: float


class Ratio(_Part):
    """A subject against a baseline of the same profile, both measured at the same context.

    `times_faster` is the baseline's median over the subject's, `memory` the subject's total over
    the baseline's.
    """

    subject: str
    baseline: str
    task: Task
    context: int
    times_faster: float
    memory: float


class Profile(_Part):
    """The contents of `profile.json`."""

    format: int = FORMAT
    command: str
    created: str
    compared: str
    device: DevicePart
    dtype: str
    seed: int
    versions: dict[str, str]
    plan: PlanPart
    # What must be known to read the numbers, a sentence each.
    notes: tuple[str, ...]
    gate: GatePart
    subjects: tuple[SubjectPart, ...]
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]
    ceilings: CeilingsPart | None = None
    throughput: tuple[Throughput, ...] = ()
    launches: tuple[Launches, ...] = ()
    energy: tuple[Energy, ...] = ()
    seconds: float

    def find(self, subject: str, task: Task, context: int) -> Measurement | None:
        wanted = (subject, task, context)
        return next(
            (m for m in self.measurements if (m.subject, m.task, m.context) == wanted), None
        )


def summarised(rounds: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of all repeats; a single one is all three."""
    values = [seconds for one in rounds for seconds in one]
    if len(values) == 1:
        return values[0], (values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (low, high)


def ratios(measurements: Sequence[Measurement], roles: dict[str, str]) -> tuple[Ratio, ...]:
    """Every student against each baseline that was measured at the same task and context.

    `roles` gives the role of each subject by its name.
    """
    done = {(m.subject, m.task, m.context): m for m in measurements if m.median is not None}
    found = []
    for (subject, task, context), ours in done.items():
        if roles[subject] in BASELINES:
            continue
        for name, role in roles.items():
            theirs = done.get((name, task, context))
            if role not in BASELINES or theirs is None:
                continue
            assert ours.median is not None and theirs.median is not None
            assert ours.memory is not None and theirs.memory is not None
            found.append(
                Ratio(
                    subject=subject,
                    baseline=name,
                    task=task,
                    context=context,
                    times_faster=theirs.median / ours.median,
                    memory=ours.memory.total / theirs.memory.total,
                )
            )
    return tuple(found)


def read_profile(file: Path) -> Profile:
    """Raises `RunError` if the file is not there or no profile."""
    if not file.is_file():
        raise RunError(f"{file} is not there", "run mmmamba profile first")
    return parse_model(file, Profile, FORMATS)
