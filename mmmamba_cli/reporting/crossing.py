"""Where a student becomes faster than its teacher: the context at which their times cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmmamba_cli.profiling import Measurement, Profile
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, STATIC_TEACHER, TUNED
from mmmamba_cli.profiling.report import is_noisy
from mmmamba_cli.profiling.result import SubjectPart, Task

# The fastest way to decode a teacher first: a student is compared with that one.
BASELINE_ORDER = (TUNED, STATIC_TEACHER, AS_SHIPPED)


@dataclass(frozen=True)
class Pair:
    """A student and its baseline at one context, both measured."""

    context: int
    student: Measurement
    baseline: Measurement

    @property
    def is_noisy(self) -> bool:
        return is_noisy(self.student) or is_noisy(self.baseline)

    @property
    def times_faster(self) -> float:
        """The baseline's median over the student's."""
        assert self.student.median is not None and self.baseline.median is not None
        return self.baseline.median / self.student.median


@dataclass(frozen=True)
class Crossing:
    """A student's times against its baseline's over the contexts that both reached.

    `at` is the context from which on the student is faster, interpolated between two measured ones
    (both times being powers of the context there); None unless `state` is "crosses". `pairs` are
    ordered by context.
    """

    student: str
    task: Task
    state: Literal["faster", "slower", "crosses"]
    at: float | None
    pairs: tuple[Pair, ...]
    # Whether a measurement that decides `state` and `at` is noisy.
    is_noisy: bool

    @property
    def longest_quiet(self) -> Pair | None:
        """The longest context at which neither measurement is noisy."""
        return next((one for one in reversed(self.pairs) if not one.is_noisy), None)


def baseline_of(profile: Profile) -> SubjectPart | None:
    """The teacher to compare with, decoded as fast as was measured; None without a teacher."""
    for role in BASELINE_ORDER:
        for subject in profile.subjects:
            if subject.role == role:
                return subject
    return next((one for one in profile.subjects if is_attention_only(one)), None)


def is_attention_only(subject: SubjectPart) -> bool:
    return len(subject.attention_layers) == subject.num_layers


def students_of(profile: Profile) -> list[SubjectPart]:
    """The subjects in which a mixer replaces attention."""
    return [
        one
        for one in profile.subjects
        if one.role not in BASELINE_ORDER and not is_attention_only(one)
    ]


def crossings(profile: Profile, task: Task) -> list[Crossing]:
    """Each student against the baseline, where two or more contexts were measured of both."""
    baseline = baseline_of(profile)
    if baseline is None:
        return []
    found = []
    for student in students_of(profile):
        pairs = _pairs(profile, student.name, baseline.name, task)
        if len(pairs) > 1:
            found.append(_crossing(student.name, task, pairs))
    return found


def _pairs(profile: Profile, student: str, baseline: str, task: Task) -> list[Pair]:
    found = []
    for context in profile.plan.lengths(task):
        ours, theirs = (profile.find(name, task, context) for name in (student, baseline))
        if ours is not None and theirs is not None and ours.median and theirs.median:
            found.append(Pair(context, ours, theirs))
    return found


def _crossing(student: str, task: Task, pairs: Sequence[Pair]) -> Crossing:
    """The last context from which on the student stays faster counts."""
    slower = [i for i, pair in enumerate(pairs) if pair.times_faster <= 1]
    if not slower:
        deciding, state, at = pairs[:1], "faster", None
    elif slower[-1] == len(pairs) - 1:
        deciding, state, at = pairs[-1:], "slower", None
    else:
        deciding, state = pairs[slower[-1] : slower[-1] + 2], "crosses"
        at = _interpolate(*deciding)
    noisy = any(pair.is_noisy for pair in deciding)
    return Crossing(student, task, state, at, tuple(pairs), noisy)  # type: ignore[arg-type]


def _interpolate(before: Pair, after: Pair) -> float:
    """The context at which the ratio of both times is 1, linear in the logarithms."""
    low, high = math.log(before.times_faster), math.log(after.times_faster)
    share = -low / (high - low)
    return float(
        math.exp(math.log(before.context) + share * math.log(after.context / before.context))
    )


def round_context(value: float) -> str:
    """A context with two significant digits, as "2,100"."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.0f}"
