"""Sliding-window attention: equal to attention while all columns fit, and its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import distance, join_pixels, pad_batch, prompt, small_model
from torch import Tensor

from mmmamba_cli.architecture import CacheBytes, mixer_spec
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.inspection import memory_at
from mmmamba_cli.model import new_cache
from mmmamba_cli.seed import initial_value

CLOSE = 1e-10
MORE = torch.randint(2, 80, (3, 6), generator=torch.Generator().manual_seed(5))


def pair(shuffle: str, sinks: int) -> tuple[Any, Any]:
    """A teacher, and the same weights with a window wider than any text here."""
    teacher = small_model("aaaa", shuffle)
    student = small_model("wwww", shuffle, window=200, sinks=sinks)
    student.load_state_dict(teacher.state_dict())
    return teacher, student


def batch(side: str) -> tuple[Tensor, Tensor | None, Tensor]:
    rows = [prompt(2, 5), prompt(0, 9, 1), prompt(1, 3, 2)]
    ids, mask = pad_batch([row for row, _ in rows], side)
    return ids, join_pixels([pixels for _, pixels in rows]), mask


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_window_wider_than_the_text_equals_attention_bit_for_bit(
    shuffle: str, side: str | None, chunk: int | None
) -> None:
    """Prefill, also in chunks, and decoding; without padding and with any."""
    ids, pixels, mask = batch(side or "left")
    if side is None:
        # The first row has no padding.
        ids, pixels, mask = ids[:1], pixels[:2], mask[:1]  # type: ignore[index]
    more = MORE[: len(ids)]
    seen = torch.cat((mask, torch.ones_like(more)), dim=1)
    found = []
    for model in pair(shuffle, sinks=3):
        cache, first = new_cache(model.config), None if side is None else mask
        inputs = {"past_key_values": cache, "prefill_chunk_size": chunk}
        parts = [model(ids, pixels, first, **inputs).logits]
        for i in range(more.shape[1]):
            columns = None if side is None else seen[:, : ids.shape[1] + i + 1]
            step = {"attention_mask": columns, "past_key_values": cache}
            parts.append(model(more[:, i : i + 1], **step).logits)
        found.append(torch.cat(parts, dim=1)[seen.bool()])
    assert torch.equal(*found)


def test_packed_rows_and_mixing_matrices_equal_those_of_attention_bit_for_bit() -> None:
    teacher, student = pair("pre", sinks=0)
    ids, _ = prompt(0, 14)
    seq_idx = torch.tensor([[0] * 5 + [1] * 9])
    assert torch.equal(*(m(ids, seq_idx=seq_idx).logits for m in (teacher, student)))
    decoder = teacher.model
    layout = decoder.prepare(ids, seq_idx=seq_idx).language_layout
    hidden, layer = decoder.text_embedding(ids), -1
    matrices = [
        m.model.blocks[layer].mixer.mixing_matrix(hidden, layout) for m in (teacher, student)
    ]
    assert torch.equal(*matrices)


def test_a_narrow_window_differs_from_attention() -> None:
    teacher = small_model("aaaa")
    ids, _ = prompt(0, 14)
    for options, is_equal in (
        ({"window": 14}, True),
        ({"window": 13}, False),
        ({"window": 13, "sinks": 1}, True),
        ({"window": 14, "sink_logits": True}, False),
    ):
        student = small_model("wwww", **options)
        student.load_state_dict(teacher.state_dict(), strict=False)
        error = distance(student(ids).logits, teacher(ids).logits)
        assert (error < 1e-5) is is_equal, options


@pytest.mark.parametrize("options", [{"window": 4, "sinks": 2}, {"window": 3, "sink_logits": True}])
def test_rows_padded_within_a_conversation_equal_rows_alone(options: dict[str, Any]) -> None:
    """Both turns are padded on the left, so that padding lies between the tokens of a row."""
    model = small_model("wwww", **options).double()
    turns = [[prompt(0, n, n)[0] for n in lengths] for lengths in ((5, 9), (7, 3), (2, 6))]
    cache, seen = new_cache(model.config), torch.zeros(2, 0, dtype=torch.long)
    before = [row[:, :0] for row in turns[0]]
    for rows in turns:
        ids, mask = pad_batch(rows)
        seen = torch.cat((seen, mask), dim=1)
        found = model(ids, attention_mask=seen, past_key_values=cache).logits
        before = [torch.cat(parts, dim=1) for parts in zip(before, rows, strict=True)]
        for i, row in enumerate(before):
            alone = model(row, use_cache=False).logits[0, -rows[i].shape[1] :]
            assert distance(found[i][mask[i].bool()], alone) < CLOSE


def test_eager_attention_gives_the_same_logits() -> None:
    model = small_model("wwww", window=4, sinks=2).double()
    ids, pixels, mask = batch("left")
    found = model(ids, pixels.double(), mask).logits  # type: ignore[union-attr]
    model.set_attn_implementation("eager")
    expected = model(ids, pixels.double(), mask).logits  # type: ignore[union-attr]
    assert 0 < distance(found[mask.bool()], expected[mask.bool()]) < CLOSE


def test_a_cache_cannot_be_cropped() -> None:
    model = small_model("awaw", window=8)
    cache = new_cache(model.config)
    model(prompt(0, 5)[0], past_key_values=cache)
    with pytest.raises(MmmambaError, match="cannot be taken back to an earlier one"):
        cache.crop(-1)
    assert cache.get_seq_length() == 5


def test_empty_states_have_the_shapes_of_the_cache_and_the_bytes_of_inspect() -> None:
    model = small_model("wwww", window=7, sinks=2).bfloat16()
    cache = new_cache(model.config)
    model(prompt(0, 5)[0], past_key_values=cache)
    empty = [b.mixer.empty_states(1, model.lm_head.weight) for b in model.model.blocks]
    held = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers]
    for states, layer in zip(empty, held, strict=True):
        assert not any(state.any() for state in states)
        assert [(x.shape, x.dtype) for x in states] == [(x.shape, x.dtype) for x in layer]
    found = memory_at("it", model.config, 5, "bfloat16")
    assert found.state == sum(x.nbytes for states in empty for x in states)
    assert found == memory_at("it", model.config, 10**6, "bfloat16")
    assert found.state == found.kv_cache


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("context", [1, 6, 20])
def test_operations_are_the_pairs_that_queries_see(sinks: int, context: int) -> None:
    config = small_model("wwww", window=4, sinks=sinks).config
    spec, stack, options = mixer_spec("window"), config.language, config.mixer_config
    i, j = torch.arange(context)[:, None], torch.arange(context)
    seen = (j <= i) & ((i - j < 4) | (j < sinks))
    for columns in (1, context):
        pairs = int(seen[-columns:].sum())
        assert spec.operations(stack, options, columns, context) == 2 * pairs * 4 * 8
    size = spec.cache_bytes(stack, options, 3, context, 2)
    assert size == CacheBytes(kv_cache=2 * 3 * 2 * (4 + sinks) * 8 * 2)


def test_sink_logits_begin_negligible_and_get_a_gradient() -> None:
    name = "model.layers.0.mixer.sink_logits"
    values = {
        init: initial_value(name, (4,), "window", init, 0)
        for init in ("scratch", "inherit", "inherit+mimic")
    }
    assert not values["scratch"].any() and not values["inherit"].any()
    with pytest.raises(KeyError, match="A_log"):
        initial_value("model.layers.0.mixer.A_log", (4,), "window", "inherit", 0)
    teacher = small_model("aaaa")
    student = small_model("wwww", window=200, sink_logits=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    ids, _ = prompt(0, 12)
    errors = []
    for init in ("inherit+mimic", "inherit"):
        for block in student.model.blocks:
            block.mixer.sink_logits.requires_grad_(True).data.copy_(values[init])
        logits = student(ids, use_cache=False).logits
        errors.append(distance(logits.detach(), teacher(ids).logits))
        logits.square().sum().backward()
        for block in student.model.blocks:
            assert block.mixer.sink_logits.grad.all()
            block.mixer.sink_logits.grad = None
    assert errors[0] < 0.05 < 0.2 < errors[1], errors
