"""The contents of `profile.json`, with every repeat of every measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.errors import RunError
from mmmamba_cli.profiling.interfaces import BASELINES, EAGER
from mmmamba_cli.runs.manifest import read_json_as

PROFILE_FILE, PNG_FILE, SVG_FILE = "profile.json", "profile.png", "profile.svg"
# Format 2 added floors, throughput, energy and launches.
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
    """Bytes. `weights` and `cache` are summed over their tensors.

    `peak` is the peak of the device's allocator, None on a CPU, which only reports the peak of the
    whole process. If `apart`, no other model was in memory; otherwise `peak` is the increase over
    the memory held before this cache was allocated, plus `weights`.
    """

    weights: int
    cache: int
    peak: int | None = None
    apart: bool = False

    @property
    def total(self) -> int:
        """The peak if measured, else weights and cache without activations."""
        return self.weights + self.cache if self.peak is None else self.peak


class Measurement(_Part):
    """One subject, task and context. `rounds` holds the seconds of each repeat, by round.

    `alone`: the other models had to be freed first.
    """

    subject: str
    task: Task
    context: int
    status: Status
    rounds: tuple[tuple[float, ...], ...] = ()
    memory: Memory | None = None
    alone: bool = False
    note: str = ""
    # Median and quartiles of all repeats, in seconds.
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    # Roofline bound in seconds; None without `Profile.ceilings` or without a measurement.
    floor: float | None = None

    @property
    def share(self) -> float | None:
        """Floor over median: 1 is as fast as the device allows."""
        return None if self.floor is None or self.median is None else self.floor / self.median

    @property
    def repeats(self) -> tuple[float, ...]:
        return tuple(seconds for one in self.rounds for seconds in one)


class SubjectPart(_Part):
    """As `interfaces.SubjectInfo`; `weight_bytes` is None if the model was never loaded."""

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
    mixers: tuple[str, ...] = ()
    eager_reason: str | None = None
    weight_bytes: int | None = None


class DevicePart(_Part):
    """`threads` is torch's number of CPU threads, `memory` the bytes of a GPU."""

    type: str
    name: str
    threads: int
    memory: int | None = None


class PlanPart(_Part):
    """The plan of the measurements, see `benchmark.Plan`."""

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
        """Contexts of a task, ascending."""
        own = self.prefill_contexts if task == PREFILL else None
        return sorted(self.contexts if own is None else own)


class CorrectnessPart(_Part):
    """Result of the correctness check: relative distances of logits by subject and decoder.

    `allowed` is the tolerance of each subject, `tolerance` the largest of them. `wrong` maps
    subjects that failed to the message.
    """

    green: bool
    tolerance: float
    allowed: dict[str, float] = {}
    distances: dict[str, dict[str, float]]
    unchecked: tuple[str, ...] = ()
    wrong: dict[str, str] = {}
    what: str


class RooflinePart(_Part):
    """Measured rates of the device.

    `copy_rate` is in bytes per second, read plus written, for a copy of `size` bytes. `matmul_rate`
    is in operations per second, two per multiply-add, for square matrices of side `side` in the
    profile's dtype.
    """

    copy_rate: float
    matmul_rate: float
    size: int
    side: int


class Throughput(_Part):
    """Decoding at one batch size. `best` marks the highest rate of a subject and context."""

    subject: str
    context: int
    batch: int
    status: Status
    # Median seconds of one decode step of all rows.
    seconds: float | None = None
    floor: float | None = None
    # Bytes, as `Memory.peak`.
    peak: int | None = None
    best: bool = False
    note: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens per second of all rows together."""
        return None if self.seconds is None else self.batch / self.seconds


class Launches(_Part):
    """Launch overhead of a token at batch size `PlanPart.batch`.

    `kernels` is the sum of the seconds of a token's kernels and copies, `wall` the median seconds
    of the token, measured without the profiler.
    """

    subject: str
    context: int
    kernels: float
    wall: float

    @property
    def share(self) -> float:
        """Share of the time in which the device waits for the host."""
        return max(0.0, 1 - self.kernels / self.wall)


class Energy(_Part):
    """Energy of the whole device by its own counter, while `tokens` were decoded in `seconds`."""

    subject: str
    context: int
    tokens: int
    joules: float
    seconds: float


class Ratio(_Part):
    """A subject relative to a baseline of the same profile at the same context.

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
    # What the numbers mean, one sentence each.
    notes: tuple[str, ...]
    gate: CorrectnessPart
    subjects: tuple[SubjectPart, ...]
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]
    # Named `ceilings` in the file format.
    ceilings: RooflinePart | None = None
    throughput: tuple[Throughput, ...] = ()
    launches: tuple[Launches, ...] = ()
    energy: tuple[Energy, ...] = ()
    seconds: float

    def find(self, subject: str, task: Task, context: int) -> Measurement | None:
        wanted = (subject, task, context)
        return next(
            (m for m in self.measurements if (m.subject, m.task, m.context) == wanted), None
        )


def median_and_quartiles(rounds: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of all repeats; a single repeat is all three."""
    values = [seconds for one in rounds for seconds in one]
    if len(values) == 1:
        return values[0], (values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (low, high)


def ratios(measurements: Sequence[Measurement], roles: dict[str, str]) -> tuple[Ratio, ...]:
    """Ratios of every student to each baseline measured at the same task and context.

    `roles` maps the name of each subject to its role.
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
    """Read `profile.json`. Raises `RunError` if it is missing or not a profile."""
    if not file.is_file():
        raise RunError(f"{file} is not there", "run mmmamba profile first")
    return read_json_as(file, Profile, FORMATS)
