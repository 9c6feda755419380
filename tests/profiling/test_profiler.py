"""A whole profile: correctness check, numbers, and the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.profiling import (
    Plan,
    Profile,
    Subject,
    WrongDecoder,
    profile,
    random_subjects,
    read_profile,
    weight_store,
    write_profile,
)
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GENERATOR, STATIC, STATIC_TEACHER, TUNED
from mmmamba_cli.profiling.report import correctness_line, remarks, tables
from mmmamba_cli.profiling.result import OUT_OF_MEMORY

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLAN = Plan(
    contexts=(10, 20, 40), repeats=6, rounds=3, warm_up=1, roofline=False, gpu_metrics=False
)
SHORT_PLAN = Plan(
    contexts=(16,), repeats=2, rounds=1, prefill=False, roofline=False, gpu_metrics=False
)


@pytest.fixture(scope="module")
def found() -> Profile:
    """The small architecture, as it is profiled."""
    plan = Plan(contexts=(32, 64), repeats=2, rounds=2, warm_up=1)
    return profile(random_subjects(weight_store("cpu"), "hovle-8m"), plan)


def wrong_and_right() -> list[Subject]:
    bench = Bench()
    wrong = subject_of(StandIn("wrong", bench, error=0.5))
    return [subject_of(StandIn("right", bench)), wrong]


def test_all_numbers_are_present_and_positive(found: Profile) -> None:
    names = [AS_SHIPPED, TUNED, "linear", "hybrid-2"]
    assert [one.name for one in found.subjects] == names
    assert len(found.measurements) == len(names) * 2 * 2
    for one in found.measurements:
        assert one.status == "measured"
        assert [len(part) for part in one.rounds] == [5 if one.task == "prefill" else 1] * 2
        assert all(seconds > 0 for seconds in one.repeats)
        assert one.memory is not None
        assert one.memory.weights > 2**20
        assert one.memory.peak is None
    assert found.gate.green
    assert set(found.gate.distances) == set(names)
    assert all(0 < max(ways.values()) < 1e-4 for ways in found.gate.distances.values())
    assert len(found.ratios) == 2 * 2 * 2 * 2
    assert found.device.type == "cpu"
    assert found.dtype == "float32"
    assert set(found.versions) >= {"mmmamba", "torch", "transformers", "python"}


def test_cache_bytes_are_those_of_the_layers(found: Profile) -> None:
    def cache(name: str, context: int) -> int:
        one = found.find(name, "decode", context)
        assert one is not None
        assert one.memory is not None
        return one.memory.cache

    # 8 layers, keys and values, 2 heads of 64, fp32; one warm-up and one timed token on top. The
    # tuned teacher makes room 256 columns at a time.
    assert cache(AS_SHIPPED, 32) == 8 * 2 * 2 * 64 * 4 * 34
    assert cache(TUNED, 32) == cache(TUNED, 64) == 8 * 2 * 2 * 64 * 4 * 256
    # Conv inputs of 512 channels: one as a prompt leaves it, and two in a ring.
    assert cache("linear", 32) == cache("linear", 64) == 8 * (4 * 64 * 64 + 3 * 512) * 4
    assert cache("hybrid-2", 64) == 2 * cache(TUNED, 64) // 8 + 6 * cache("linear", 64) // 8
    parts = {one.name: one for one in found.subjects}
    assert parts[AS_SHIPPED].weight_bytes == parts[TUNED].weight_bytes


def test_nothing_is_measured_after_a_failed_check() -> None:
    bench = Bench()
    subjects = [subject_of(StandIn("right", bench)), subject_of(StandIn("wrong", bench, error=1))]
    with pytest.raises(WrongDecoder):
        profile(subjects, PLAN, timer=bench)
    assert not any(task == "decode" for _, task, _ in bench.calls)


def test_a_model_that_never_fits_is_named_and_the_others_are_measured() -> None:
    def refuse() -> StandIn:
        raise OutOfMemory("weights of 9 TiB")

    bench = Bench()
    fits = subject_of(StandIn("fits", bench))
    large = Subject("large", fits.info, refuse)
    found = profile([large, fits], PLAN, timer=bench)
    assert (found.gate.green, found.gate.unchecked) == (False, ("large",))
    first = found.find("large", "decode", 10)
    assert first is not None
    assert (first.status, first.note) == (OUT_OF_MEMORY, "weights of 9 TiB")
    with pytest.raises(DataError, match="no model fits the device's memory: weights of 9 TiB"):
        profile([large], PLAN, timer=bench)


def test_two_models_of_one_name_are_refused() -> None:
    subjects = [subject_of(StandIn("same", Bench())) for _ in range(2)]
    with pytest.raises(DataError, match="more than one model is called same"):
        profile(subjects, PLAN)
    with pytest.raises(DataError, match="no model to profile"):
        profile([], PLAN)


def test_a_wrong_decoder_is_left_out_or_measured_and_always_named() -> None:
    with pytest.raises(WrongDecoder, match="wrong, as measured: logits are"):
        profile(wrong_and_right(), SHORT_PLAN, timer=Bench())
    left = profile(wrong_and_right(), SHORT_PLAN, timer=Bench(), on_wrong="leave out")
    assert [one.name for one in left.subjects] == ["right"]
    assert {one.subject for one in left.measurements} == {"right"}
    measured = profile(wrong_and_right(), SHORT_PLAN, timer=Bench(), on_wrong="measure")
    assert {one.subject for one in measured.measurements} == {"right", "wrong"}
    for found in (left, measured):
        assert not found.gate.green
        assert list(found.gate.wrong) == ["wrong"]
        assert found.gate.distances["wrong"]["as measured"] > found.gate.tolerance
        assert correctness_line(found).endswith("WRONG, believe no number of: wrong.")
        assert remarks(found)[0].startswith("WRONG: wrong, as measured: logits are")
    with pytest.raises(WrongDecoder):
        profile(wrong_and_right()[1:], SHORT_PLAN, timer=Bench(), on_wrong="leave out")


def test_long_prompts_are_checked_for_fast_decoders_only() -> None:
    bench = Bench()
    subjects = [
        subject_of(StandIn("eager", bench)),
        subject_of(StandIn("graph", bench), cache=STATIC, way=GENERATOR),
    ]
    found = profile(subjects, replace(SHORT_PLAN, check_lengths=(77,)), timer=bench)
    assert {name: list(ways) for name, ways in found.gate.distances.items()} == {
        "eager": ["as measured"],
        "graph": ["as measured", "as measured, after 77 tokens"],
    }
    assert "a prompt of 24 tokens, and of 77, and 4 more" in correctness_line(found)


def test_a_past_deadline_leaves_no_budget() -> None:
    found = profile(wrong_and_right()[:1], SHORT_PLAN, deadline=0.0, timer=Bench())
    assert found.plan.budget == 0
    # Nothing was foreseen to take time, so the first row of it is still measured.
    assert {one.status for one in found.measurements} == {"measured"}


def test_profile_file_round_trip(found: Profile, tmp_path: Path) -> None:
    files = write_profile(found, tmp_path / "a" / "b")
    assert [file.name for file in files] == ["profile.json", "profile.png", "profile.svg"]
    assert read_profile(files[0]) == found
    raw = json.loads(files[0].read_text())
    assert raw["format"] == 2
    assert len(raw["measurements"][0]["rounds"]) == 2
    (tmp_path / "later.json").write_text(json.dumps({**raw, "format": 3}))
    with pytest.raises(RunError, match="has format 3, this version knows 1 and 2"):
        read_profile(tmp_path / "later.json")
    (tmp_path / "more.json").write_text(json.dumps({**raw, "colour": "red"}))
    with pytest.raises(RunError, match="is damaged: colour"):
        read_profile(tmp_path / "more.json")
    with pytest.raises(RunError, match="run mmmamba profile first"):
        read_profile(tmp_path / "none.json")


def test_a_profile_of_the_first_format_is_read() -> None:
    found = read_profile(RESULTS / "profile_hovle_8m_cpu.json")
    assert found.format == 1
    assert [one.role for one in found.subjects][:2] == [AS_SHIPPED, STATIC_TEACHER]
    assert (found.ceilings, found.throughput) == (None, ())
    heads = [heading for _, heading, _ in tables(found)]
    assert "linear / static cache" in heads[1]
    assert not any("floor" in title for title, _, _ in tables(found))
    raw = json.loads((RESULTS / "profile_hovle_8m_cpu.json").read_text())
    assert len(found.ratios) == len(raw["ratios"])
