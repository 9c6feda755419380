"""The order of measurements, the budget and out-of-memory errors, with simulated decoders."""

from __future__ import annotations

import pytest
import torch
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.profiling import Measurement, Plan, Subject, measure
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GROWING, TUNED
from mmmamba_cli.profiling.result import (
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    TOO_LONG,
    median_and_quartiles,
    ratios,
)

# The clock of a stand-in does not advance while real memory is copied, so no roofline is measured.
PLAN = Plan(
    contexts=(10, 20, 40), repeats=6, rounds=3, warm_up=1, roofline=False, gpu_metrics=False
)


def by_place(found: list[Measurement]) -> dict[tuple[str, str, int], Measurement]:
    return {(one.subject, one.task, one.context): one for one in found}


def test_every_subject_task_and_context_is_measured() -> None:
    bench = Bench(held=500)
    fast = StandIn("fast", bench, lambda context: 0.5, lambda columns: 0.25)
    slow = StandIn("slow", bench, lambda context: 2.0 * context, weight_bytes=3000)
    found = by_place(measure([subject_of(fast), subject_of(slow)], PLAN, bench))
    assert len(found) == 12
    assert {one.status for one in found.values()} == {MEASURED}
    one = found["slow", "decode", 20]
    assert one.rounds == ((40.0, 40.0),) * 3
    assert (one.median, one.quartiles) == (40.0, (40.0, 40.0))
    # Ten bytes a column, seven while a step runs; what else is held counts for nothing.
    assert one.memory is not None
    assert one.memory.model_dump() == {
        "weights": 3000,
        "cache": 200,
        "peak": 3207,
        "apart": False,
    }
    assert one.memory.total == 3207
    read = found["fast", "prefill", 40]
    assert read.rounds == ((0.25,) * 2,) * 3


def test_without_a_memory_counter_memory_is_weights_and_cache() -> None:
    bench = Bench(counts_memory=False)
    found = by_place(measure([subject_of(StandIn("only", bench))], PLAN, bench))
    memory = found["only", "decode", 40].memory
    assert memory is not None
    assert (memory.peak, memory.total) == (None, 1400)


def test_rounds_are_outermost_and_another_subject_begins_each_round_and_context() -> None:
    bench = Bench()
    subjects = [subject_of(StandIn(name, bench)) for name in "abc"]
    plan = Plan(contexts=(20, 10), repeats=2, rounds=2, prefill=False)
    measure(subjects, plan, bench)
    assert bench.calls == [
        (name, "decode", context)
        for context, names in ((10, "abc"), (20, "bca"), (10, "bca"), (20, "cab"))
        for name in names
    ]


def test_warm_up_is_not_timed() -> None:
    bench = Bench()
    costs = iter([100.0, 100.0, 1.0, 1.0])
    decoder = StandIn("cold", bench, lambda context: next(costs))
    plan = Plan(contexts=(10,), repeats=2, rounds=1, warm_up=2, prefill=False)
    assert measure([subject_of(decoder)], plan, bench)[0].rounds == ((1.0, 1.0),)


def test_warm_prefill_reads_the_prompt_twice_untimed() -> None:
    bench = Bench()
    decoder = StandIn("reader", bench)
    plan = Plan(contexts=(10,), repeats=2, rounds=2, warm_prefill=True)
    measure([subject_of(decoder)], plan, bench)
    assert bench.calls.count(("reader", "prefill", 10)) == 6


def test_a_short_prefill_is_repeated() -> None:
    bench = Bench()
    costs = iter([0.125, 0.1, 3.0, 0.1, 0.1, 9.0])
    decoder = StandIn("reader", bench, read_seconds=lambda n: next(costs) if n == 10 else 1.0)
    plan = Plan(contexts=(10,), repeats=1, rounds=1, warm_up=0)
    found = by_place(measure([subject_of(decoder)], plan, bench))["reader", "prefill", 10]
    assert found.rounds == (pytest.approx((0.125, 0.1, 3.0, 0.1, 0.1)),)
    assert found.median == pytest.approx(0.1)


def test_a_slow_first_prefill_gets_a_second_try() -> None:
    for costs, expected in (
        ([0.3, 0.1, 0.1, 0.1, 0.1], 5),
        ([0.3, 0.3], 2),
        ([0.6], 1),
    ):
        bench, left = Bench(), iter(costs)
        decoder = StandIn("reader", bench, read_seconds=lambda n, c=left: next(c) if n == 10 else 1)
        plan = Plan(contexts=(10,), repeats=1, rounds=1, warm_up=0)
        found = by_place(measure([subject_of(decoder)], plan, bench))["reader", "prefill", 10]
        assert len(found.repeats) == expected


def test_out_of_memory_skips_longer_contexts() -> None:
    bench = Bench()
    small, large = StandIn("small", bench, too_long=20), StandIn("large", bench)
    found = by_place(measure([subject_of(small), subject_of(large)], PLAN, bench))
    assert found["small", "decode", 10].status == MEASURED
    refused = found["small", "decode", 20]
    assert (refused.status, refused.median, refused.memory) == (OUT_OF_MEMORY, None, None)
    assert refused.note == "20 columns are too many"
    assert found["small", "decode", 40].status == TOO_LONG
    assert ("small", "decode", 40) not in bench.calls
    assert found["large", "decode", 40].status == MEASURED
    assert bench.held == 0


def test_a_model_that_fits_only_alone_is_measured_alone() -> None:
    bench = Bench()
    alive: set[str] = set()

    class Crowded(StandIn):
        """Its longest context fits while no other model is loaded."""

        def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
            if columns == 40 and len(alive) > 1:
                raise OutOfMemory("crowded")
            super().fill_random(batch, columns, rng)

        def __del__(self) -> None:
            alive.discard(self.name)

    def subject(name: str) -> Subject:
        def build() -> StandIn:
            alive.add(name)
            return Crowded(name, bench)

        return Subject(name, subject_of(StandIn(name, bench)).info, build)

    plan = Plan(contexts=(10, 40), repeats=1, rounds=1, prefill=False)
    found = by_place(measure([subject("a"), subject("b")], plan, bench))
    assert {one.status for one in found.values()} == {MEASURED}
    assert not found["a", "decode", 10].alone
    assert found["b", "decode", 40].alone


def test_over_budget_is_recorded_and_decoding_leaves_half_to_prefill() -> None:
    bench = Bench()
    decoder = StandIn("slow", bench, lambda context: context / 10, lambda columns: columns / 100)
    # Turns cost 3, 6 and 12 s: 12 s more would pass half of 40 s.
    plan = Plan(contexts=(10, 20, 40), repeats=2, rounds=1, warm_up=1, budget=40)
    found = by_place(measure([subject_of(decoder)], plan, bench))
    assert [found["slow", "decode", n].status for n in (10, 20, 40)] == [
        MEASURED,
        MEASURED,
        OVER_BUDGET,
    ]
    assert found["slow", "decode", 40].note.startswith("about 12")
    assert [found["slow", "prefill", n].status for n in (10, 20, 40)] == [MEASURED] * 3


def test_first_prefill_is_predicted_from_a_short_one() -> None:
    bench = Bench()
    decoder = StandIn("slow", bench, lambda context: 0, lambda columns: columns / 10)
    plan = Plan(contexts=(1000,), repeats=1, rounds=1, budget=90)
    found = by_place(measure([subject_of(decoder)], plan, bench))
    assert found["slow", "prefill", 1000].status == OVER_BUDGET
    assert ("slow", "prefill", 1000) not in bench.calls


def test_earlier_rounds_are_kept_if_the_budget_ends() -> None:
    bench = Bench()
    decoder = StandIn("slow", bench)
    plan = Plan(contexts=(10,), repeats=3, rounds=3, warm_up=1, budget=5, prefill=False)
    found = measure([subject_of(decoder)], plan, bench)[0]
    assert (found.status, found.rounds) == (MEASURED, ((1.0,), (1.0,)))


def test_other_errors_are_raised() -> None:
    class Broken(StandIn):
        def step(self, ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure([subject_of(Broken("broken", Bench()))], PLAN, Bench())


def test_ratios_are_baseline_over_student() -> None:
    bench = Bench()
    shipped = StandIn("shipped", bench, lambda context: 0.9 * context, weight_bytes=800)
    tuned = StandIn("tuned", bench, lambda context: 0.3 * context, weight_bytes=200)
    student = StandIn("student", bench, lambda context: 3.0, weight_bytes=100, too_long=40)
    subjects = [subject_of(shipped, AS_SHIPPED, cache=GROWING), subject_of(tuned, TUNED)]
    subjects.append(subject_of(student))
    roles = {one.name: one.info.role for one in subjects}
    plan = Plan(contexts=(10, 20, 40), repeats=3, rounds=1, prefill=False)
    found = ratios(measure(subjects, plan, bench), roles)
    assert {(one.subject, one.baseline, one.context) for one in found} == {
        ("student", teacher, context) for teacher in ("shipped", "tuned") for context in (10, 20)
    }
    times = {(one.baseline, one.context): one.times_faster for one in found}
    assert times == pytest.approx(
        {("shipped", 10): 3, ("shipped", 20): 6, ("tuned", 10): 1, ("tuned", 20): 2}
    )
    memory = {(one.baseline, one.context): one.memory for one in found}
    assert memory["shipped", 10] == pytest.approx(207 / 907)
    assert memory["tuned", 20] == pytest.approx(307 / 407)


def test_median_and_quartiles_are_of_all_repeats() -> None:
    assert median_and_quartiles([(1.0, 2.0), (3.0, 4.0), (100.0,)]) == (3.0, (2.0, 4.0))
    assert median_and_quartiles([(5.0,)]) == (5.0, (5.0, 5.0))
