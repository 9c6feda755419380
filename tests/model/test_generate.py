"""Greedy generation gives the same tokens with every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import IMAGE_ID, join_pixels, pad_batch, prompt, small_model
from transformers import DynamicCache

from mmmamba_cli.errors import DataError

NEW = 8


def greedy(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    tokens = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **kwargs)
    return tokens[:, ids.shape[1] :]


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
@pytest.mark.parametrize("scaled", [False, True])
def test_caches_agree(shuffle: str, plan: str, scaled: bool) -> None:
    options: dict[str, Any] = {}
    if scaled:
        options = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    model = small_model(plan, shuffle, **options)
    inputs = [prompt(2, 6, 0), prompt(0, 5, 1), prompt(1, 9, 2)]
    alone = [greedy(model, ids, pixel_values=pixels, use_cache=False) for ids, pixels in inputs]
    expected = torch.cat(alone)
    ids, mask = pad_batch([row for row, _ in inputs])
    batch = {"pixel_values": join_pixels([p for _, p in inputs]), "attention_mask": mask}
    assert torch.equal(greedy(model, ids, **batch, use_cache=False), expected)
    assert torch.equal(greedy(model, ids, **batch), expected)
    assert torch.equal(greedy(model, ids, **batch, cache_implementation="static"), expected)
    assert torch.equal(greedy(model, ids, **batch, prefill_chunk_size=5), expected)
    own = DynamicCache(config=model.config)
    assert torch.equal(greedy(model, ids, **batch, past_key_values=own), expected)
    for i, (row, pixels) in enumerate(inputs):
        single = greedy(model, row, pixel_values=pixels, cache_implementation="static")
        assert torch.equal(single, expected[i : i + 1])


@pytest.mark.parametrize("plan", ["mmmm", "amam"])
def test_beams_with_images_match_beams_without_a_cache(plan: str) -> None:
    model = small_model(plan, "post")
    inputs = [prompt(2, 6, 0), prompt(1, 9, 2)]
    ids, mask = pad_batch([row for row, _ in inputs])
    kwargs = {
        "pixel_values": join_pixels([p for _, p in inputs]),
        "attention_mask": mask,
        "num_beams": 3,
    }
    assert torch.equal(greedy(model, ids, **kwargs), greedy(model, ids, **kwargs, use_cache=False))


def test_sampling_is_repeatable() -> None:
    model = small_model("amam")
    ids, pixels = prompt(1, 6)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(
            model.generate(ids, pixel_values=pixels, do_sample=True, max_new_tokens=NEW, top_k=20)
        )
    assert torch.equal(*outputs)


def test_images_and_context_tokens_must_match() -> None:
    model = small_model("amam")
    ids, pixels = prompt(2, 6)
    with pytest.raises(DataError, match="8 image context tokens, but 1 tiles"):
        model(ids, pixels[:1])
    with pytest.raises(DataError, match="no pixel_values were given"):
        model(ids)
    moved = torch.cat((ids, torch.full((1, ids.shape[1]), 3)))
    moved[0, 2], moved[1, 2] = 3, IMAGE_ID
    with pytest.raises(DataError, match="a fraction of a tile"):
        model(moved, pixels)
