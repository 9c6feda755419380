"""Spans, the slope over the length, spikes, texts and sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmmamba_cli.stability.divergence import (
    Divergence,
    count_spikes,
    join_divergences,
    length_slope,
    spans,
)
from mmmamba_cli.stability.findings import find_sentences, format_tokens, half_life
from mmmamba_cli.stability.perturbation import log_places, rounded_randomly
from mmmamba_cli.stability.stability_record import (
    DeviationRecord,
    HeadDecay,
    LayerStability,
    PrecisionRecord,
    SlopeRecord,
    SpanDivergence,
    StabilityRecord,
    TangentRecord,
)
from mmmamba_cli.stability.texts import (
    DEFAULT_TOKENS,
    conversation_text,
    encode_text,
    sample_text,
)


def noisy_kl(tokens: int, exponent: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, generator=generator, dtype=torch.float64)
    positions = torch.arange(1, tokens + 1, dtype=torch.float64)
    return 1e-4 * positions**exponent * torch.exp(noise)


def test_spans_cover_a_text() -> None:
    assert spans(100) == [(0, 64), (64, 100)]
    assert spans(4096)[-2:] == [(1024, 2048), (2048, 4096)]
    assert spans(5000)[-1] == (4096, 5000)
    for tokens in (1, 64, 65, 2048, 2049, 40_000):
        found = spans(tokens)
        assert [begin for begin, _ in found[1:]] == [end for _, end in found[:-1]]
        assert (found[0][0], found[-1][1]) == (0, tokens)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.7])
def test_slope_over_the_length(exponent: float) -> None:
    found = length_slope(noisy_kl(8192, exponent))
    assert found is not None
    assert found.blocks == 128
    assert found.low < exponent < found.high
    assert abs(found.value - exponent) < 0.1
    assert found.low > 0 or exponent <= 0
    assert found.high < 0 or exponent >= 0


def test_interval_of_the_slope_covers_as_often_as_it_says() -> None:
    """Of 100 texts without a slope, about 95 intervals hold 0."""
    found = [length_slope(noisy_kl(2048, 0.0, seed)) for seed in range(100)]
    covered = sum(one is not None and one.low <= 0 <= one.high for one in found)
    assert 86 <= covered <= 100


def test_no_slope_of_a_short_text_or_without_a_difference() -> None:
    assert length_slope(noisy_kl(511, 0.0)) is None
    assert length_slope(torch.zeros(4096, dtype=torch.float64)) is None


def test_spikes_and_changes() -> None:
    kl = torch.full((40,), 1e-4, dtype=torch.float64)
    kl[[3, 9]] = 0.5
    same = torch.ones(40, dtype=torch.bool)
    same[[9, 20, 21]] = False
    parts = [Divergence(kl[part], kl[part], same[part]) for part in (slice(10), slice(10, 40))]
    found = count_spikes(join_divergences(parts))
    assert (found.positions, found.changes, found.changes_at_spikes) == (2, 3, 1)


def test_places_are_ascending_and_end_with_the_text() -> None:
    assert log_places(1) == (1,)
    assert log_places(10) == (1, 2, 3, 4, 6, 8, 10)
    assert log_places(64) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def test_rounding_errors_are_as_large_as_those_of_the_dtype() -> None:
    values = torch.randn(4000, dtype=torch.float32)
    found = (rounded_randomly(values, torch.bfloat16, 0) / values - 1).abs()
    rounding = (values.bfloat16().float() / values - 1).abs()
    assert 2**-9 < found.max() <= 2**-8 * 1.001
    assert float(found.max()) == pytest.approx(float(rounding.max()), rel=0.05)


class Letters:
    """A processor whose tokens are characters."""

    def text_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_the_installed_text_is_long_enough_for_words_of_four_letters() -> None:
    assert len(sample_text()) > 4 * DEFAULT_TOKENS
    ids = encode_text(Letters(), sample_text(), "text", None)  # type: ignore[arg-type]
    assert len(ids) == DEFAULT_TOKENS


def test_conversations_are_read_without_pictures(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nhow many?"}, {"from": "gpt", "value": "seven"}]
    data = tmp_path / "rows.jsonl"
    rows = ({"conversations": turns}, {"text": "plain"}, {"text": "x" * 3000}, {"text": "late"})
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    begin = "how many?\nseven\n\nplain\n\n"
    assert conversation_text(data, None) == f"{begin}{'x' * 3000}\n\nlate"
    # Enough for so few tokens.
    assert conversation_text(data, 64) == begin + "x" * 3000


def head(exponent: float, certified: float = -1e-6, **marks: bool) -> HeadDecay:
    return HeadDecay(
        exponent=exponent,
        certified=certified,
        gain=None if marks.get("is_accumulator") else 100.0,
        state_bound=1.0,
        read_out_median=0.5,
        read_out_smallest=0.01,
        **marks,
    )


def record(*layers: LayerStability, slope: tuple[float, float] = (-0.1, 0.1)) -> StabilityRecord:
    low, high = slope
    span = SpanDivergence(
        begin=0, end=1000, mean_kl=1e-4, largest_kl=1.0, largest_difference=0.3, same_top1=0.99
    )
    precision = PrecisionRecord(
        dtype="bf16",
        spans=(span,),
        slope=SlopeRecord(value=(low + high) / 2, low=low, high=high, blocks=15),
        median_kl=1e-5,
        spikes=4,
        top1_changes=10,
        top1_changes_at_spikes=3,
        block_kl=(1e-4,) * 15,
    )
    return StabilityRecord(
        name="x",
        content_hash=None,
        text="a text",
        tokens=1000,
        created="2026-11-30",
        device="cpu",
        versions={},
        seed=0,
        layers=layers,
        low_read_out=0.03,
        precision=precision,
    )


def test_sentences_on_memory() -> None:
    layers = (
        LayerStability(layer=0, mixer="A", decay="exact", heads=(head(-1.0), head(-0.1))),
        LayerStability(layer=1, mixer="B", decay="bound", heads=(head(-0.0005), head(-0.2))),
        LayerStability(layer=2, mixer="C", decay=None, forgetting="keeps everything"),
    )
    text = " ".join(find_sentences(record(*layers)))
    assert "Layer 1 remembers longest: half of a state is left after 1,386 tokens" in text
    assert "50% of 4 heads have a half-life below 4 tokens, 25% of at least 1,024." in text
    assert "Every head forgets, whatever the prompt: log gamma is at most -1.0e-06" in text
    assert "The bound is loose." in text
    tight = LayerStability(layer=0, mixer="A", decay="exact", heads=(head(-0.1, certified=-0.1),))
    assert "The bound is loose." not in " ".join(find_sentences(record(tight)))
    assert "1 head loses more than half of the state at each token." in text
    assert "Exponents of 1 layer (B) are upper bounds" in text
    assert "1 of 3 layers has C, which keeps everything" in text


def test_sentences_on_heads_that_never_forget() -> None:
    heads = (head(-1e-9, certified=-0.0, is_accumulator=True), head(-0.1, is_constant=True))
    layer = LayerStability(layer=0, mixer="A", decay="exact", heads=heads)
    text = " ".join(find_sentences(record(layer)))
    assert "The weights alone do not certify that every head forgets" in text
    assert "1 head never forgets in fp32" in text
    assert "1 head has a decay that does not depend on the input." in text
    assert "add up to at most all times one" not in text


@pytest.mark.parametrize(
    ("slope", "verdict"),
    [((-0.1, 0.1), "does not depend on"), ((0.1, 0.2), "grows with"), ((-0.2, -0.1), "falls with")],
)
def test_sentences_on_precision(slope: tuple[float, float], verdict: str) -> None:
    text = " ".join(find_sentences(record(slope=slope)))
    assert f"That error {verdict} the length" in text
    assert "keeps 99.0% of the likeliest tokens; 3 of 10 changes are at the 4 positions" in text


def test_sentences_on_deviations_and_tangents() -> None:
    deviation = DeviationRecord(
        what="state",
        size=1e-3,
        tokens=(1, 2, 4),
        layers={0: (1e-3, 5e-4, 1e-9)},
        logits=(0.5, 0.1, 0.0),
        predicted=(1e-3, 4e-4, 1e-12),
    )
    tangents = TangentRecord(
        vectors=8,
        tokens=1000,
        halves=(-0.1, 0.02),
        head_exponents=(-0.1, -0.01),
        largest_growth=20.0,
    )
    found = record().model_copy(update={"deviations": (deviation,), "tangents": tangents})
    text = " ".join(find_sentences(found))
    assert "States off once by 0.001 of their norm move the logits by 0.5 at the next token" in text
    # The last place is below the rounding of fp32 states.
    assert "by at most 2.5e-01 of it" in text
    assert "grows at most 20-fold before it dies" in text
    assert "It is positive" in text


def test_half_lives() -> None:
    assert half_life(0.0) == float("inf")
    assert half_life(-0.6931471805599453) == pytest.approx(1.0)
    assert [format_tokens(value) for value in (0.5, 9.96, 1386.3, float("inf"))] == [
        *("0.5", "10", "1,386", "infinitely many")
    ]
