"""The students' own decoder as a subject: the gate, its memory, int8, and files of before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_model
from stand_ins import Bench, StandIn, subject_of
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.profiling import (
    Plan,
    Subject,
    WrongDecoder,
    int8_subjects,
    profile,
    random_subjects,
    read_profile,
    weight_store,
)
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.eager_decoder import EagerDecoder
from mmmamba_cli.profiling.fast_decoder import FastDecoder
from mmmamba_cli.profiling.interfaces import (
    AS_SHIPPED,
    GENERATOR,
    STATIC,
    STATIC_TEACHER,
    STUDENT,
    TUNED,
)
from mmmamba_cli.profiling.report import correctness_line, remarks, tables

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLAN = Plan(contexts=(16,), repeats=2, rounds=1, prefill=False, roofline=False, gpu_metrics=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_it_passes_the_gate_at_every_length(plan: str, dtype: torch.dtype) -> None:
    decoder = FastDecoder(small_model(plan).to(dtype))
    checked = check_decoder("one", decoder, lengths=(40, 300))
    in_fp32 = ["as measured, in fp32"] if dtype == torch.bfloat16 else []
    assert list(checked.distances) == [
        *in_fp32,
        "as measured",
        "as measured, after 40 tokens",
        "as measured, after 300 tokens",
    ]
    assert decoder.cache_bytes == 0


def test_in_fp32_every_operation_is_and_the_model_stays_as_it_was() -> None:
    model = small_model("am").bfloat16()
    decoder = FastDecoder(model)
    ids = decoder.random_prompt(2, 9, torch.Generator().manual_seed(0))
    before = decoder.forward_without_cache(ids, 3)
    found = decoder.in_fp32().forward_without_cache(ids, 3)
    wanted = small_model("am").bfloat16().float()(ids).logits[:, -3:]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    assert decoder.dtype == torch.bfloat16
    assert torch.equal(decoder.forward_without_cache(ids, 3), before)


class Forgetful(FastDecoder):
    """Loses what it knew of prompts longer than 100 columns."""

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        logits = super().prefill(ids, chunk)
        if ids.shape[1] > 100:
            sequence = self.generator._sequence
            assert sequence is not None
            for tensor in sequence.cache.tensors:
                tensor.zero_()
        return logits


@pytest.mark.parametrize("plan", ["aaaa", "mmmm"])
def test_a_decoder_that_is_wrong_only_far_on_is_found(plan: str) -> None:
    decoder = Forgetful(small_model(plan))
    check_decoder("one", decoder, lengths=(40,))
    with pytest.raises(WrongDecoder, match="one, as measured, after 300 tokens: logits are"):
        check_decoder("one", decoder, lengths=(40, 300))


@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_filled_it_goes_on_as_a_static_cache_does(plan: str) -> None:
    """Room, columns seen and the number of rows; contents are random."""
    decoder = FastDecoder(small_model(plan))
    rng = torch.Generator().manual_seed(0)
    decoder.start(3, 40)
    decoder.fill_random(3, 30, rng)
    sequence = decoder.generator._sequence
    assert sequence is not None
    assert sequence.length == 30
    last = decoder.decode(10)
    assert last.shape == (3, 1)
    # Ten different rows of random contents end in tokens, and none is cut short by an end.
    assert sequence.length == 40
    assert not sequence.cache.finished.any()
    assert decoder.cache_bytes > 0
    if "a" in plan:
        with pytest.raises(DataError, match="room for 40 columns"):
            decoder.decode(1)
    decoder.release()
    assert decoder.cache_bytes == 0


def test_tokens_are_the_likeliest_each_after_the_one_before() -> None:
    """Over the same contents, step by step and by the choosing graph."""
    decoder = FastDecoder(small_model("amam"))
    rng = torch.Generator().manual_seed(0)
    decoder.start(2, 40)
    decoder.fill_random(2, 30, rng)
    chosen = torch.cat([decoder.decode(1).clone() for _ in range(4)], dim=1)
    decoder.start(2, 40)
    decoder.fill_random(2, 30, rng)
    cache = decoder.generator._sequence.cache  # type: ignore[union-attr]
    suppressed = decoder.model.generation_config.suppress_tokens
    for column in range(4):
        decoder.generator._sequence.step()  # type: ignore[union-attr]
        logits = cache.logits.clone()
        logits[:, suppressed] = float("-inf")
        assert torch.equal(logits.argmax(-1), cache.ids)
        assert torch.equal(cache.ids, chosen[:, column])


def test_weights_of_two_decoders_of_one_model_are_held_once() -> None:
    store = weight_store("cpu")
    decoders = {one.name: one.build() for one in random_subjects(store, "hovle-8m")}
    shipped, tuned = (decoders[name].model for name in (AS_SHIPPED, TUNED))  # type: ignore[attr-defined]
    assert isinstance(decoders[AS_SHIPPED], EagerDecoder)
    ours, theirs = (dict(one.named_parameters()) for one in (tuned, shipped))
    assert all(ours[name] is value for name, value in theirs.items())
    # All that share them still compute what they did.
    for name, decoder in decoders.items():
        assert max(check_decoder(name, decoder).distances.values()) < 1e-5


def test_int8_twins() -> None:
    subjects = random_subjects(weight_store("cpu"), "hovle-8m")
    twins = int8_subjects(subjects)
    assert [one.name for one in twins] == ["linear int8", "hybrid-2 int8"]
    assert {(one.info.role, one.info.precision) for one in twins} == {(STUDENT, "int8")}
    wide, narrow = subjects[2].build(), twins[0].build()
    assert narrow.weight_bytes < 0.4 * wide.weight_bytes
    assert narrow.dtype == torch.float32
    assert narrow.cost(1, 100, False).bytes < 0.4 * wide.cost(1, 100, False).bytes
    check_decoder("narrow", narrow)
    ids = wide.random_prompt(1, 20, torch.Generator().manual_seed(1))
    apart = wide.forward_without_cache(ids, 1) - narrow.forward_without_cache(ids, 1)
    # Another model, but not far away: logits that have nothing in common are 1.4 apart.
    assert 1e-4 < float(apart.norm() / wide.forward_without_cache(ids, 1).norm()) < 0.3
    with pytest.raises(DataError, match="leave out --int8 or --eager"):
        int8_subjects(random_subjects(weight_store("cpu"), "hovle-8m", eager=True))


def test_who_is_decoded_how() -> None:
    def ways(**options: Any) -> dict[str, tuple[str, str]]:
        found = random_subjects(weight_store("cpu"), "hovle-8m", (0,), **options)
        return {one.name: (one.info.way, one.info.cache) for one in found}

    assert ways() == {
        AS_SHIPPED: ("eager", "growing"),
        TUNED: ("generator", "static"),
        "linear": ("generator", "static"),
    }
    assert ways(eager=True) == {
        AS_SHIPPED: ("eager", "growing"),
        STATIC_TEACHER: ("eager", "static"),
        "linear": ("eager", "static"),
    }


def wrong_and_right() -> list[Subject]:
    bench = Bench()
    wrong = subject_of(StandIn("wrong", bench, error=0.5))
    return [subject_of(StandIn("right", bench)), wrong]


def test_a_wrong_decoder_is_left_out_or_measured_but_always_told() -> None:
    with pytest.raises(WrongDecoder, match="wrong, as measured: logits are"):
        profile(wrong_and_right(), PLAN, timer=Bench())
    left = profile(wrong_and_right(), PLAN, timer=Bench(), on_wrong="leave out")
    assert [one.name for one in left.subjects] == ["right"]
    assert {one.subject for one in left.measurements} == {"right"}
    measured = profile(wrong_and_right(), PLAN, timer=Bench(), on_wrong="measure")
    assert {one.subject for one in measured.measurements} == {"right", "wrong"}
    for found in (left, measured):
        assert not found.gate.green
        assert list(found.gate.wrong) == ["wrong"]
        assert found.gate.distances["wrong"]["as measured"] > found.gate.tolerance
        assert correctness_line(found).endswith("WRONG, believe no number of: wrong.")
        assert remarks(found)[0].startswith("WRONG: wrong, as measured: logits are")
    with pytest.raises(WrongDecoder):
        profile(wrong_and_right()[1:], PLAN, timer=Bench(), on_wrong="leave out")


def test_only_decoders_that_are_not_eager_read_long_prompts_in_the_gate() -> None:
    bench = Bench()
    subjects = [
        subject_of(StandIn("eager", bench)),
        subject_of(StandIn("graph", bench), cache=STATIC, way=GENERATOR),
    ]
    found = profile(subjects, replace(PLAN, check_lengths=(77,)), timer=bench)
    assert {name: list(ways) for name, ways in found.gate.distances.items()} == {
        "eager": ["as measured"],
        "graph": ["as measured", "as measured, after 77 tokens"],
    }
    assert "a prompt of 24 tokens, and of 77, and 4 more" in correctness_line(found)


def test_a_deadline_leaves_no_budget() -> None:
    found = profile(wrong_and_right()[:1], PLAN, deadline=0.0, timer=Bench())
    assert found.plan.budget == 0
    # Nothing was foreseen to take time, so the first row of it is still measured.
    assert {one.status for one in found.measurements} == {"measured"}


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
