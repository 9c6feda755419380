"""Estimate of how long the demo takes on this machine, and of the time left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from demo_steps import LANE_GROUPS, LANES, Sizes, Step, Work, steps

# A loop of Python, as most of the work on so small models is, and its CPU seconds on the core that
# `Work` was measured on.
SPEED_TEST = """
import time
began = time.perf_counter()
total = 0
for i in range({loops}):
    total += i * i % 7
print(time.perf_counter() - began)
"""
SPEED_TEST_LOOPS, SPEED_TEST_SECONDS = 4_000_000, 0.48
# The measured slowdown counts as much as this many seconds of finished work.
PRIOR_SECONDS = 10.0
# A step that runs beyond its time is expected to take this share of it more.
OVERTIME_SHARE = 0.1
# Shares of the default work that --minutes chooses from.
SHARES = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def measure_slowdown() -> float:
    """How many times as long work takes here, two processes at once, as on idle reference cores.

    Other programs that run on the machine are part of it.
    """
    code = SPEED_TEST.format(loops=SPEED_TEST_LOOPS)
    tests = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    seconds = [float(test.communicate()[0]) for test in tests]
    return sum(seconds) / len(seconds) / SPEED_TEST_SECONDS


def seconds_of(work: Work, slowdown: float) -> float:
    return work.fixed + slowdown * work.cpu


@dataclass
class TimeEstimate:
    """Time left of the demo, from a measured slowdown and the steps that have ended.

    `todo` maps numbers of steps to those that are not done. A finished step replaces its estimate,
    and all finished ones correct the slowdown of those to come.
    """

    todo: Mapping[int, Step]
    slowdown: float
    clock: Callable[[], float] = time.monotonic
    _begun: dict[int, float] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)

    def begin(self, number: int) -> None:
        self._begun[number] = self.clock()

    def end(self, number: int) -> float:
        """The seconds that the step took."""
        self._seconds[number] = self.clock() - self._begun.pop(number)
        return self._seconds[number]

    def seconds_left(self) -> float:
        """The longest lane of each group that is not finished; groups follow one another."""
        slowdown = self._current_slowdown()
        left = dict.fromkeys(LANES, 0.0)
        for number, step in self.todo.items():
            if number not in self._seconds:
                passed = self.clock() - self._begun[number] if number in self._begun else 0.0
                expected = seconds_of(step.work, slowdown) - passed
                left[step.lane] += max(expected, OVERTIME_SHARE * passed)
        return sum(max(left[lane] for lane in group) for group in LANE_GROUPS)

    def _current_slowdown(self) -> float:
        seconds, work = PRIOR_SECONDS * self.slowdown, PRIOR_SECONDS
        for number, passed in self._seconds.items():
            if number in self.todo:
                step_work = self.todo[number].work
                seconds += max(0.0, passed - step_work.fixed)
                work += step_work.cpu
        expected = seconds / work
        # A running step that is beyond its time says that the machine has become slower.
        for number, begun in self._begun.items():
            step, passed = self.todo.get(number), self.clock() - begun
            if step is not None and passed > seconds_of(step.work, expected):
                seconds += passed - step.work.fixed
                work += step.work.cpu
        return seconds / work


def total_seconds(listed: Sequence[Step], slowdown: float) -> float:
    return TimeEstimate(dict(enumerate(listed)), slowdown).seconds_left()


def fitting_sizes(minutes: float, slowdown: float) -> Sizes:
    """The largest sizes whose estimate is within `minutes`, else the smallest ones."""
    choices = [Sizes(), *map(Sizes.reduced, SHARES)]

    def seconds(sizes: Sizes) -> float:
        return total_seconds(list(steps(sizes, slowdown)), slowdown)

    return next((sizes for sizes in choices if seconds(sizes) <= 60 * minutes), choices[-1])
