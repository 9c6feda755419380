"""Memory of one model alone, launch overhead and energy, with simulated decoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.profiling import Plan, Subject, measure, profile
from mmmamba_cli.profiling.benchmark import LoadedDecoders
from mmmamba_cli.profiling.gpu_metrics import isolated_memory, measure_energy, measure_launches
from mmmamba_cli.profiling.interfaces import GENERATOR
from mmmamba_cli.profiling.report import launch_overhead_lines, tables
from mmmamba_cli.profiling.timers import energy_counter

PLAN = Plan(contexts=(10, 20, 40), repeats=2, rounds=1, warm_up=1, prefill=False, roofline=False)


class Weighty(StandIn):
    """Holds the memory of its weights while it exists."""

    def __init__(self, name: str, bench: Bench, **options: Any):
        super().__init__(name, bench, **options)
        self.bench.take(self.weight_bytes)

    def __del__(self) -> None:
        self.bench.held -= self.weight_bytes


def subject(name: str, bench: Bench, **options: Any) -> Subject:
    info = subject_of(StandIn(name, bench)).info
    return Subject(name, info, lambda: Weighty(name, bench, **options))


def test_other_models_are_freed_before_memory_is_measured() -> None:
    bench = Bench(held=50)
    loaded = LoadedDecoders()
    large, small = subject("large", bench, weight_bytes=10**6), subject("small", bench)
    loaded.get(large)
    loaded.get(small)
    found = isolated_memory(small, PLAN, loaded, bench)
    assert list(loaded.decoders) == ["small"]
    assert sorted(found) == [10, 20, 40]
    # All memory of the device, including 50 bytes of other data.
    assert found[20].model_dump() == {
        "weights": 1000,
        "cache": 200,
        "peak": 50 + 1000 + 200 + 7,
        "apart": True,
    }


def test_memory_ends_at_the_first_context_that_does_not_fit() -> None:
    bench = Bench()
    loaded = LoadedDecoders()
    found = isolated_memory(subject("one", bench, too_long=20), PLAN, loaded, bench)
    assert (sorted(found), list(loaded.decoders)) == ([10], ["one"])
    assert bench.held == 1000
    blind = Bench(counts_memory=False)
    assert isolated_memory(subject("one", blind), PLAN, LoadedDecoders(), blind) == {}


def test_profile_contains_the_memory_of_each_model_alone() -> None:
    bench = Bench()
    subjects = [subject("a", bench), subject("b", bench, weight_bytes=5000)]
    found = profile(subjects, PLAN, timer=bench)
    for name, weights in (("a", 1000), ("b", 5000)):
        one = found.find(name, "decode", 40)
        assert one is not None and one.memory is not None
        assert one.memory.apart
        assert one.memory.total == weights + 400 + 7
    bare = profile(subjects, replace(PLAN, gpu_metrics=False), timer=bench)
    assert not any(one.memory.apart for one in bare.measurements if one.memory)


def test_launch_overhead_is_the_time_without_kernels() -> None:
    bench = Bench(kernel_share=0.25)
    eager = subject_of(StandIn("eager", bench, lambda n: 0.1 * n))
    graph = subject_of(StandIn("graph", bench), way=GENERATOR)
    subjects, loaded = [eager, graph], LoadedDecoders()
    measured = measure(subjects, PLAN, bench, loaded=loaded)
    found = measure_launches(subjects, measured, PLAN, loaded, bench)
    assert [(one.subject, one.context) for one in found] == [("eager", 10), ("eager", 40)]
    assert found[1].wall == pytest.approx(4.0)
    assert found[1].kernels == pytest.approx(1.0)
    assert found[1].share == pytest.approx(0.75)
    told = profile(subjects, replace(PLAN, gpu_metrics=False), timer=bench)
    line = launch_overhead_lines(told.model_copy(update={"launches": tuple(found)}))[1]
    assert line.startswith("eager at 40: its kernels take 1,000 of 4,000 ms, so 75% is launches")


def test_energy_is_measured_over_one_second_of_tokens() -> None:
    bench = Bench(watts=300.0)
    subjects, loaded = [subject_of(StandIn("one", bench, lambda n: 0.125))], LoadedDecoders()
    measured = measure(subjects, PLAN, bench, loaded=loaded)
    (found,) = measure_energy(subjects, measured, PLAN, loaded, bench)
    assert (found.context, found.tokens) == (40, 8)
    assert found.seconds == pytest.approx(1.0)
    assert found.joules == pytest.approx(300)
    (asked,) = measure_energy(subjects, measured, replace(PLAN, throughput=(20,)), loaded, bench)
    assert asked.context == 20
    told = profile(subjects, replace(PLAN, gpu_metrics=False), timer=bench)
    rows = tables(told.model_copy(update={"energy": (found,)}))[-1][2]
    assert rows == [("one", "40", "37.5", "300")]
    bench.watts = None
    assert measure_energy(subjects, measured, PLAN, loaded, bench) == []


def test_a_cpu_has_no_energy_counter() -> None:
    assert energy_counter(torch.device("cpu")) is None
