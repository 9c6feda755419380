"""Equalities: prefill + decode = full, row in a batch = row alone, packed = separate, chunked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import distance, join_pixels, pad_batch
from small import prompt as fp32_prompt
from small import small_model as fp32_model
from torch import Tensor

from mmmamba_cli.model import HolisticVLM, new_cache

# fp64, since these random weights amplify fp32 rounding differently on each processor.
CLOSE = 1e-10
PLANS = ["aaaa", "mmmm", "amam", "maam"]
SHUFFLES = ["pre", "post"]


def small_model(*arguments: Any, **options: Any) -> HolisticVLM:
    return fp32_model(*arguments, **options).double()


def prompt(tiles: int, words: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    ids, pixels = fp32_prompt(tiles, words, seed)
    return ids, None if pixels is None else pixels.double()


rows_of_prompts = st.lists(st.tuples(st.integers(0, 2), st.integers(3, 9)), min_size=1, max_size=3)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=12, deadline=None)
@given(rows=rows_of_prompts, plan=st.sampled_from(PLANS))
def test_a_row_in_a_batch_equals_the_row_alone(
    shuffle: str, side: str, rows: list[tuple[int, int]], plan: str
) -> None:
    model = small_model(plan, shuffle)
    inputs = [prompt(*row, seed=i) for i, row in enumerate(rows)]
    ids, mask = pad_batch([row for row, _ in inputs], side)
    together = model(ids, join_pixels([p for _, p in inputs]), mask).logits
    for i, (row, pixels) in enumerate(inputs):
        alone = model(row, pixels).logits
        assert distance(together[i][mask[i].bool()], alone[0]) < CLOSE


@pytest.mark.parametrize("shuffle", SHUFFLES)
@settings(max_examples=12, deadline=None)
@given(rows=rows_of_prompts, plan=st.sampled_from(PLANS))
def test_packed_sequences_equal_separate_ones(
    shuffle: str, rows: list[tuple[int, int]], plan: str
) -> None:
    model = small_model(plan, shuffle)
    inputs = [prompt(*row, seed=i) for i, row in enumerate(rows)]
    ids = torch.cat([row for row, _ in inputs], dim=1)
    owners = [torch.full_like(row, i) for i, (row, _) in enumerate(inputs)]
    seq_idx = torch.cat(owners, dim=1)
    packed = model(ids, join_pixels([p for _, p in inputs]), seq_idx=seq_idx).logits
    for i, (row, pixels) in enumerate(inputs):
        alone = model(row, pixels).logits
        assert distance(packed[0][seq_idx[0] == i], alone[0]) < CLOSE


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("static", [False, True])
def test_prefill_and_decode_equal_the_full_forward(shuffle: str, plan: str, static: bool) -> None:
    model = small_model(plan, shuffle)
    inputs = [prompt(2, 5, 0), prompt(0, 9, 1), prompt(1, 4, 2)]
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    more = torch.randint(2, 80, (3, 6), generator=torch.Generator().manual_seed(5))
    full_ids, full_mask = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    full = model(full_ids, pixels, full_mask).logits
    width = ids.shape[1]
    cache = new_cache(model.config, max_length=width + 6 if static else None)
    parts = [model(ids, pixels, mask, past_key_values=cache).logits]
    for i in range(6):
        seen = full_mask[:, : width + i + 1]
        step = model(more[:, i : i + 1], attention_mask=seen, past_key_values=cache)
        parts.append(step.logits)
    real = full_mask.bool()
    assert distance(torch.cat(parts, 1)[real], full[real]) < CLOSE
    assert cache.get_seq_length() == width + 6


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_the_full_forward(shuffle: str, plan: str, chunk: int) -> None:
    model = small_model(plan, shuffle)
    inputs = [prompt(3, 11, 0), prompt(1, 6, 1)]
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    full = model(ids, pixels, mask).logits
    chunked = model(ids, pixels, mask, prefill_chunk_size=chunk).logits
    real = mask.bool()
    assert distance(chunked[real], full[real]) < CLOSE


@pytest.mark.parametrize("option", ["d_skip", "qk_norm", "rope"])
def test_every_mixer_option_holds_the_equalities(option: str) -> None:
    model, plain = small_model("mama", **{option: True}), small_model("mama")
    ids, pixels = prompt(1, 8)
    full = model(ids, pixels).logits
    assert distance(full, plain(ids, pixels).logits) > 1e-3, "the option changes nothing"
    assert distance(model(ids, pixels, prefill_chunk_size=3).logits, full) < CLOSE


@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv_widths_chunk_and_decode(width: int) -> None:
    model = small_model("mmmm", conv_width=width)
    ids, pixels = prompt(1, 9)
    full = model(ids, pixels).logits
    assert distance(model(ids, pixels, prefill_chunk_size=1).logits, full) < CLOSE


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_dynamic_ntk_is_fixed_by_the_prompt(shuffle: str) -> None:
    """Beyond the trained length, the base depends on the prompt length and then stays fixed."""
    scaling = {"type": "dynamic", "factor": 2.0}
    scaled = small_model("aaaa", shuffle, rope_scaling=scaling, max_position_embeddings=8)
    plain = small_model("aaaa", shuffle, max_position_embeddings=8)
    short, long = prompt(0, 6)[0], prompt(1, 14)
    assert distance(scaled(short).logits, plain(short).logits) == 0
    full = scaled(*long).logits
    assert distance(full, plain(*long).logits) > 1e-3
    for chunk in (1, 7):
        assert distance(scaled(*long, prefill_chunk_size=chunk).logits, full) < CLOSE
    batch, mask = pad_batch([long[0], short])
    together = scaled(batch, long[1], mask).logits
    assert distance(together[1][mask[1].bool()], plain(short).logits[0]) < CLOSE
    lengths = torch.tensor([long[0].shape[1]])
    cache = new_cache(scaled.config)
    first = scaled(*long, past_key_values=cache).logits
    more = torch.tensor([[5, 6]])
    rest = scaled(more, past_key_values=cache).logits
    whole = torch.cat((long[0], more), 1)
    expected = scaled(whole, long[1], prompt_lengths=lengths).logits
    assert distance(torch.cat((first, rest), 1), expected) < CLOSE
