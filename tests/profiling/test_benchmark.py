"""What is measured, in what order, and what becomes of what does not fit; all times are planted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.devices import require_memory, translate_out_of_memory
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.profiling import Measurement, OutOfMemory, Plan, Subject, WrongDecoder, measure
from mmmamba_cli.profiling import profiler as one_profile
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GROWING, TUNED
from mmmamba_cli.profiling.result import (
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    TOO_LONG,
    median_and_quartiles,
    ratios,
)

# The clock of a stand-in stands still while real memory is copied: no floors.
PLAN = Plan(
    contexts=(10, 20, 40), repeats=6, rounds=3, warm_up=1, roofline=False, gpu_metrics=False
)


def by_place(found: list[Measurement]) -> dict[tuple[str, str, int], Measurement]:
    return {(one.subject, one.task, one.context): one for one in found}


def test_every_subject_task_and_context_has_its_planted_numbers() -> None:
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
    assert bench.turns == [
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


def test_a_prompt_is_read_twice_before_it_is_timed_where_the_device_wants_it() -> None:
    bench = Bench()
    decoder = StandIn("reader", bench)
    plan = Plan(contexts=(10,), repeats=2, rounds=2, warm_prefill=True)
    measure([subject_of(decoder)], plan, bench)
    assert bench.turns.count(("reader", "prefill", 10)) == 6


def test_a_short_prompt_is_read_a_few_times() -> None:
    bench = Bench()
    costs = iter([0.125, 0.1, 3.0, 0.1, 0.1, 9.0])
    decoder = StandIn("reader", bench, read_seconds=lambda n: next(costs) if n == 10 else 1.0)
    plan = Plan(contexts=(10,), repeats=1, rounds=1, warm_up=0)
    found = by_place(measure([subject_of(decoder)], plan, bench))["reader", "prefill", 10]
    assert found.rounds == (pytest.approx((0.125, 0.1, 3.0, 0.1, 0.1)),)
    assert found.median == pytest.approx(0.1)


def test_a_hiccup_at_first_does_not_make_a_prompt_long() -> None:
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


def test_out_of_memory_is_a_row_and_longer_contexts_are_not_tried() -> None:
    bench = Bench()
    small, large = StandIn("small", bench, too_long=20), StandIn("large", bench)
    found = by_place(measure([subject_of(small), subject_of(large)], PLAN, bench))
    assert found["small", "decode", 10].status == MEASURED
    refused = found["small", "decode", 20]
    assert (refused.status, refused.median, refused.memory) == (OUT_OF_MEMORY, None, None)
    assert refused.note == "20 columns are too many"
    assert found["small", "decode", 40].status == TOO_LONG
    assert ("small", "decode", 40) not in bench.turns
    assert found["large", "decode", 40].status == MEASURED
    assert bench.held == 0


def test_what_fits_only_alone_is_measured_alone() -> None:
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


def test_over_budget_is_a_row_and_decoding_leaves_half_to_prefill() -> None:
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


def test_the_first_prefill_is_foreseen_from_a_short_one() -> None:
    bench = Bench()
    decoder = StandIn("slow", bench, lambda context: 0, lambda columns: columns / 10)
    plan = Plan(contexts=(1000,), repeats=1, rounds=1, budget=90)
    found = by_place(measure([subject_of(decoder)], plan, bench))
    assert found["slow", "prefill", 1000].status == OVER_BUDGET
    assert ("slow", "prefill", 1000) not in bench.turns


def test_a_budget_that_ends_between_rounds_keeps_what_was_measured() -> None:
    bench = Bench()
    decoder = StandIn("slow", bench)
    plan = Plan(contexts=(10,), repeats=3, rounds=3, warm_up=1, budget=5, prefill=False)
    found = measure([subject_of(decoder)], plan, bench)[0]
    assert (found.status, found.rounds) == (MEASURED, ((1.0,), (1.0,)))


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    class Broken(StandIn):
        def step(self, ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure([subject_of(Broken("broken", Bench()))], PLAN, Bench())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_every_refusal_of_memory_is_one(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(OutOfMemory) as caught:
        translate_out_of_memory(work)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_cpu_is_asked_before_it_promises() -> None:
    with pytest.raises(OutOfMemory, match=r"a cache of 9 columns needs 1048576\.0 GiB"):
        require_memory(torch.device("cpu"), 2**50, "a cache of 9 columns")
    require_memory(torch.device("cpu"), 2**10, "little")


def test_ratios_are_the_baselines_over_the_students() -> None:
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


def test_the_gate_lets_right_decoders_pass_and_no_others() -> None:
    bench = Bench()
    assert check_decoder("right", StandIn("right", bench)).distances == {"as measured": 0.0}
    with pytest.raises(WrongDecoder, match="wrong, as measured: logits are"):
        check_decoder("wrong", StandIn("wrong", bench, error=0.01))
    behind = StandIn("front", bench, others={"graph": StandIn("graph", bench, error=0.01)})
    with pytest.raises(WrongDecoder, match="front, graph: logits are"):
        check_decoder("front", behind)
    with pytest.raises(WrongDecoder, match="logits are nan"):
        check_decoder("nan", StandIn("nan", bench, error=float("nan")))


class Rounding(StandIn):
    """Its logits are bf16, and `rounding` from those of `wide`, which there is no room for if None.

    Times sqrt(16), an error in each of 16 logits, one of them 1, is as large beside them.
    """

    rounding = 0.0
    wide: StandIn | None = None

    def forward_without_cache(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        return super().forward_without_cache(ids, last).bfloat16() * (1 + self.rounding)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return super()._logits(ids) * (1 + self.rounding)

    def in_fp32(self) -> StandIn:
        return super().in_fp32() if self.wide is None else self.wide


@pytest.mark.parametrize(
    ("rounding", "allowed"), [(0.0, 0.05), (0.02, 0.05), (0.04, 0.08), (None, 0.05)]
)
def test_halves_are_allowed_twice_what_the_reference_itself_rounds(rounding, allowed) -> None:
    bench = Bench()
    right, wrong = (Rounding("one", bench, error=share * allowed / 4) for share in (0.9, 1.1))
    for one in (right, wrong):
        one.wide = None if rounding is None else StandIn("one", bench)
        one.rounding = rounding or 0.0
    checked = check_decoder("one", right)
    # bf16 has 8 bits for it.
    assert checked.tolerance == pytest.approx(allowed, rel=0.1)
    assert ("as measured, in fp32" in checked.distances) == (rounding is not None)
    with pytest.raises(WrongDecoder, match="one, as measured: logits are") as error:
        check_decoder("one", wrong)
    assert error.value.tolerance == checked.tolerance


def test_a_fault_that_16_bits_would_hide_is_found_in_fp32() -> None:
    bench = Bench()
    one = Rounding("one", bench)
    one.wide = StandIn("one", bench, error=0.001)
    with pytest.raises(WrongDecoder, match=r"one, as measured, in fp32: logits are 0\.004"):
        check_decoder("one", one)


@pytest.mark.parametrize(("error", "passes"), [(0.00018, True), (0.00022, False)])
def test_fp32_is_allowed_a_thousandth_of_what_halves_round(error: float, passes: bool) -> None:
    bench = Bench()
    one = Rounding("one", bench)
    one.rounding = 0.1
    one.wide = StandIn("one", bench, error=error / 4)
    if passes:
        assert check_decoder("one", one).distances["as measured, in fp32"] > 0.0001
    else:
        with pytest.raises(WrongDecoder, match="in fp32: logits are"):
            check_decoder("one", one)


def test_a_wrong_decoder_is_measured_without_the_copy_that_showed_it() -> None:
    alive: list[bool] = []

    class Watched(Rounding):
        def in_fp32(self) -> StandIn:
            copy = StandIn("copy", self.bench, error=0.01)
            self.copy = weakref.ref(copy)
            return copy

        def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
            gc.collect()
            alive.append(self.copy() is not None)
            super().fill_random(batch, columns, rng)

    subject = subject_of(Watched("one", Bench()))
    plan = Plan(contexts=(10,), repeats=1, rounds=1, prefill=False, roofline=False)
    found = one_profile.profile([subject], plan, timer=Bench(), on_wrong="measure")
    assert list(found.gate.wrong) == ["one"]
    assert alive
    assert not any(alive)


def test_weights_without_sense_are_the_users() -> None:
    class Senseless(StandIn):
        def forward_without_cache(self, ids: torch.Tensor, last: int) -> torch.Tensor:
            return super().forward_without_cache(ids, last) * float("inf")

    with pytest.raises(CheckpointError, match="mine gives logits that are not finite"):
        check_decoder("mine", Senseless("mine", Bench()))


def test_nothing_is_measured_behind_a_red_gate() -> None:
    bench = Bench()
    subjects = [subject_of(StandIn("right", bench)), subject_of(StandIn("wrong", bench, error=1))]
    with pytest.raises(WrongDecoder):
        one_profile.profile(subjects, PLAN, timer=bench)
    assert not any(task == "decode" for _, task, _ in bench.turns)


def test_a_model_that_never_fits_is_said_and_the_others_are_measured() -> None:
    def refuse() -> StandIn:
        raise OutOfMemory("weights of 9 TiB")

    bench = Bench()
    fits = subject_of(StandIn("fits", bench))
    large = Subject("large", fits.info, refuse)
    found = one_profile.profile([large, fits], PLAN, timer=bench)
    assert (found.gate.green, found.gate.unchecked) == (False, ("large",))
    first = found.find("large", "decode", 10)
    assert first is not None
    assert (first.status, first.note) == (OUT_OF_MEMORY, "weights of 9 TiB")
    with pytest.raises(DataError, match="no model fits the device's memory: weights of 9 TiB"):
        one_profile.profile([large], PLAN, timer=bench)


def test_two_models_of_one_name_are_refused() -> None:
    subjects = [subject_of(StandIn("same", Bench())) for _ in range(2)]
    with pytest.raises(DataError, match="more than one model is called same"):
        one_profile.profile(subjects, PLAN)
    with pytest.raises(DataError, match="no model to profile"):
        one_profile.profile([], PLAN)
