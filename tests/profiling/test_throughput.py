"""The search for the best batch size, with simulated decoders."""

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


def test_batch_size_is_doubled_until_two_doublings_gain_nothing() -> None:
    # Up to 8 rows cost the same, each further row costs time.
    tried = found(planted(lambda rows: max(1.0, rows / 8)))
    assert [one.batch for one in tried] == [1, 2, 4, 8, 16, 32]
    assert [one.rate for one in tried] == [1, 2, 4, 8, 8, 8]
    assert [one.batch for one in tried if one.best] == [8]


def test_search_continues_after_one_doubling_without_gain() -> None:
    seconds = {1: 1.0, 2: 1.0, 4: 2.0, 8: 2.0, 16: 4.0, 32: 8.0}
    tried = found(planted(seconds.__getitem__))
    assert [one.batch for one in tried] == [1, 2, 4, 8, 16, 32]
    assert [one.batch for one in tried if one.best] == [8]


def test_out_of_memory_is_recorded_and_bisected() -> None:
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


def test_no_batch_is_best_if_none_fits() -> None:
    tried = found(planted(lambda rows: 1.0, too_large=5))
    assert [(one.batch, one.status, one.best) for one in tried] == [(1, "out of memory", False)]


def test_over_budget_is_recorded() -> None:
    tried = found(planted(lambda rows: 1.0), until=12)
    # Five tokens of a second each for a batch.
    assert [one.status for one in tried] == ["measured"] * 3 + ["skipped: over budget"]
    assert [one.batch for one in tried if one.best] == [4]


def test_one_model_is_in_memory_and_has_its_roofline() -> None:
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


def test_table_shows_the_best_batch_and_why_no_larger_one() -> None:
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


def test_search_ends_if_an_empty_device_is_too_small() -> None:
    class Hopeless(StandIn):
        def start(self, batch: int, columns: int) -> None:
            raise OutOfMemory("no room for anything", hopeless=True)

    tried = found(Hopeless("one", Bench()))
    assert [(one.batch, one.note) for one in tried] == [(1, "no room for anything")]
