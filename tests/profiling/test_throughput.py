"""Batches are doubled until memory ends or nothing is gained; all times are planted."""

from __future__ import annotations

from collections.abc import Callable

from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.profiling import OutOfMemory, Plan, profile
from mmmamba_cli.profiling.benchmark import LoadedDecoders
from mmmamba_cli.profiling.report import tables
from mmmamba_cli.profiling.result import RooflinePart, Throughput
from mmmamba_cli.profiling.throughput import search_batch_size

PLAN = Plan(contexts=(10,), throughput=(10,), roofline=False, gpu_metrics=False)


def found(
    decoder: StandIn, until: float | None = None, roofline: RooflinePart | None = None
) -> list[Throughput]:
    return search_batch_size(
        [subject_of(decoder)], PLAN, LoadedDecoders(), decoder.bench, roofline, until
    )


def planted(row_seconds: Callable[[int], float], too_large: int = 10**9) -> StandIn:
    return StandIn(
        "one", Bench(), lambda context: 0.0, row_seconds=row_seconds, too_large=too_large
    )


def test_batches_are_doubled_until_nothing_is_gained_twice() -> None:
    # Free up to 8 rows, a row a second from there on.
    tried = found(planted(lambda rows: max(1.0, rows / 8)))
    assert [one.batch for one in tried] == [1, 2, 4, 8, 16, 32]
    assert [one.rate for one in tried] == [1, 2, 4, 8, 8, 8]
    assert [one.batch for one in tried if one.best] == [8]


def test_a_gain_that_pauses_is_found() -> None:
    seconds = {1: 1.0, 2: 1.0, 4: 2.0, 8: 2.0, 16: 4.0, 32: 8.0}
    tried = found(planted(seconds.__getitem__))
    assert [one.batch for one in tried] == [1, 2, 4, 8, 16, 32]
    assert [one.batch for one in tried if one.best] == [8]


def test_the_end_of_memory_is_a_row_and_looked_for_more_closely() -> None:
    # 15 columns with warm-up and repeats: 6 rows fit, 7 do not.
    decoder = planted(lambda rows: 1.0, too_large=7 * 15)
    tried = found(decoder)
    assert [(one.batch, one.status) for one in tried] == [
        (1, "measured"),
        (2, "measured"),
        (4, "measured"),
        (8, "out of memory"),
        (6, "measured"),
        (7, "out of memory"),
    ]
    assert tried[3].note == "8 rows of 15 columns are too many"
    assert [one.batch for one in tried if one.best] == [6]
    assert tried[3].rate is None


def test_what_does_not_fit_once_has_no_best() -> None:
    tried = found(planted(lambda rows: 1.0, too_large=5))
    assert [(one.batch, one.status, one.best) for one in tried] == [(1, "out of memory", False)]


def test_over_budget_is_a_row() -> None:
    tried = found(planted(lambda rows: 1.0), until=12)
    # Five tokens of a second each for a batch.
    assert [one.status for one in tried] == ["measured"] * 3 + ["skipped: over budget"]
    assert [one.batch for one in tried if one.best] == [4]


def test_each_has_the_memory_to_itself_and_its_floor() -> None:
    bench = Bench()
    subjects = [subject_of(StandIn(name, bench, lambda n: 2.0, too_large=40)) for name in "ab"]
    loaded = LoadedDecoders()
    for subject in subjects:
        loaded.get(subject)
    rates = RooflinePart(copy_rate=100.0, matmul_rate=1.0, size=1, side=1)
    tried = search_batch_size(subjects, PLAN, loaded, bench, rates, None)
    assert list(loaded.decoders) == ["b"]
    assert {one.subject for one in tried} == {"a", "b"}
    # Ten columns of 100 bytes and one for each row.
    assert [one.floor for one in tried if one.status == "measured"][:2] == [10.01, 10.02]
    assert tried[0].peak == 100 + 7


def test_a_profile_tells_the_best_and_why_there_is_no_larger_one() -> None:
    bench = Bench()
    subjects = [
        subject_of(StandIn("full", bench, lambda n: 2.0, too_large=40)),
        subject_of(StandIn("left out", bench)),
    ]
    plan = Plan(
        contexts=(10,),
        repeats=1,
        prefill=False,
        roofline=False,
        gpu_metrics=False,
        throughput=(10,),
        throughput_subjects=("full",),
    )
    one = profile(subjects, plan, timer=bench)
    assert {row.subject for row in one.throughput} == {"full"}
    title, heading, rows = tables(one)[-1]
    assert title.startswith("most tokens a second")
    # 15 columns a row: two fit, three do not.
    shown = dict(zip(heading, rows[0], strict=True))
    assert (shown["batch"], shown["tokens/s"]) == ("2", "1")
    assert shown["larger ones"] == "out of memory at 3"


def test_an_empty_device_that_is_too_small_is_told_at_once() -> None:
    class Hopeless(StandIn):
        def start(self, batch: int, columns: int) -> None:
            raise OutOfMemory("no room for anything", hopeless=True)

    tried = found(Hopeless("one", Bench()))
    assert [(one.batch, one.note) for one in tried] == [(1, "no room for anything")]
