"""Students of twelve families decode with every cache, batch and search as without a cache.

Inputs come from the families' own processors: a batch of one picture, two of unequal size and
Chinese text.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, left_padded, prompts
from family_students import (
    PLANS,
    double,
    greedy,
    has_padding_invariance,
    rows_of,
    student,
    text_rows,
)
from teacher_videos import video_prompt

# `generate` returns float32 scores of float64 models; logits have a standard deviation of about 1.
ATOL = 1e-6
# Whether transformers encodes pictures before it splits a prompt into chunks or repeats rows for
# beams. 5.17 does not: its own classes then fail, or give a row another row's pictures.
ENCODES_PICTURES_FIRST = hasattr(transformers.GenerationMixin, "_supports_mm_encoder_outputs")
BOTH_MIXERS = ["hybrid gated_delta", "all mamba2"]
WITH_VIDEO = [name for name, family in FAMILIES.items() if family.video]


def assert_close(found: Any, expected: Any) -> None:
    """Equal tokens and nearly equal scores."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=ATOL)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_and_a_batch_change_nothing(name: str, plan: str) -> None:
    family, model = FAMILIES[name], student(name, plan)
    rows = rows_of(family)
    batch = prompts(family, rows)
    tokens, scores = greedy(model, family, batch)
    assert_close((tokens, scores), greedy(model, family, batch, use_cache=False))
    if has_padding_invariance(family, plan):
        for index, row in enumerate(rows):
            alone = greedy(model, family, prompts(family, [row]))
            assert_close((tokens[index : index + 1], scores[index : index + 1]), alone)


@pytest.mark.parametrize("plan", BOTH_MIXERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_prefill_and_a_static_cache_change_nothing(name: str, plan: str) -> None:
    family, model = FAMILIES[name], student(name, plan)
    batch = prompts(family, rows_of(family))
    expected = greedy(model, family, batch)
    assert_close(greedy(model, family, batch, cache_implementation="static"), expected)
    # Chunks that end within pictures; Gemma 3's own attention is not right there, since a token of
    # an image does not see those that are in the next chunk.
    chunk = 14 if name == "gemma3" else 7
    if not ENCODES_PICTURES_FIRST and family.pictures:
        pytest.skip("this transformers cannot split a prompt with pictures into chunks")
    assert_close(greedy(model, family, batch, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("plan", BOTH_MIXERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_beams_with_a_cache_are_those_without(name: str, plan: str) -> None:
    family, model = FAMILIES[name], student(name, plan)
    rows = rows_of(family)[:2] if ENCODES_PICTURES_FIRST else text_rows()
    batch = double(prompts(family, rows))
    options = family.generation(new_tokens=4) | {"num_beams": 2}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("plan", BOTH_MIXERS)
@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_decodes_with_a_cache_and_behind_padding(name: str, plan: str) -> None:
    family, model = FAMILIES[name], student(name, plan)
    video = video_prompt(family, "What happens?")
    expected = greedy(model, family, video)
    assert_close(expected, greedy(model, family, video, use_cache=False))
    assert_close(greedy(model, family, left_padded(family, video, columns=5)), expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pictures])
def test_text_alone_decodes_as_in_any_batch(name: str) -> None:
    family, model = FAMILIES[name], student(name, "all gated_delta")
    tokens, scores = greedy(model, family, prompts(family, text_rows()))
    for index, row in enumerate(text_rows()):
        alone = greedy(model, family, prompts(family, [row]))
        assert_close((tokens[index : index + 1], scores[index : index + 1]), alone)
