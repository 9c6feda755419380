"""Students with transformers' caches: static and given ones, chunked prefill, and misuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_students import ALL_LINEAR, HYBRID, greedy, left_padded
from tiny_teachers import copied, prompt, student, teacher
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.model.cache import CACHE_NAME
from mmmamba_cli.teachers import StudentPlan, convert
from mmmamba_cli.teachers.cache_slot import RecurrentSlot, recurrent_slot

PLANS = [HYBRID, (1, 3), ALL_LINEAR]


@pytest.mark.parametrize("layers", PLANS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_a_static_cache_decodes_as_no_cache(family: str, layers: Any) -> None:
    model, inputs = student(family, layers, "gated_delta"), prompt(family, length=6)
    static = greedy(model, inputs, cache_implementation="static")
    assert isinstance(
        static.past_key_values if CACHE_NAME != "cache" else static.cache, StaticCache
    )
    plain = greedy(model, inputs, use_cache=False)
    assert torch.equal(static.sequences, plain.sequences)
    beams = greedy(model, inputs, cache_implementation="static", num_beams=2)
    plain_beams = greedy(model, inputs, use_cache=False, num_beams=2)
    assert torch.equal(beams.sequences, plain_beams.sequences)


def test_a_static_cache_decodes_a_left_padded_batch() -> None:
    model, short = student("qwen3", HYBRID), prompt("qwen3", length=5)
    padded, long = left_padded(short, 4), prompt("qwen3", length=9)
    together = {name: torch.cat((padded[name], long[name])) for name in padded}
    found = greedy(model, together, cache_implementation="static")
    assert torch.equal(found.sequences[0, -8:], greedy(model, short).sequences[0, -8:])


def test_generate_does_not_compile_a_student(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def call_of(model: Any) -> Any:
        monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled.append(1) or model)
        anywhere = CompileConfig()
        anywhere._compile_all_devices = True
        return greedy(
            model, prompt("qwen3"), cache_implementation="static", compile_config=anywhere
        )

    call_of(student("qwen3", HYBRID))
    assert not compiled
    call_of(student("qwen3", []))
    assert compiled


@pytest.mark.parametrize("layers", PLANS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_prefill_in_chunks_equals_prefill_at_once(layers: Any, options: dict[str, Any]) -> None:
    model, inputs = student("qwen3", layers, "window"), prompt("qwen3", length=11)
    chunked = greedy(model, inputs, prefill_chunk_size=4, **options)
    assert torch.equal(chunked.sequences, greedy(model, inputs, use_cache=False).sequences)


@pytest.mark.parametrize("layers", PLANS)
def test_a_given_cache_is_continued_and_counts_columns(layers: Any) -> None:
    model, ids = student("qwen3", layers), prompt("qwen3", rows=2, length=12)["input_ids"]
    whole = model(ids).logits
    # Without a config, a cache gets its layers one by one.
    for cache in (DynamicCache(config=model.config), DynamicCache(), static_cache(model, 12)):
        parts = [
            model(ids[:, begin:end], **{CACHE_NAME: cache}, use_cache=True).logits
            for begin, end in ((0, 5), (5, 6), (6, 12))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)
        assert int(cache.get_seq_length()) == 12
        cache.reset()
        assert recurrent_slot(cache, 3 if layers == (1, 3) else 0).get_seq_length() == 0
    again = model(ids[:, :5], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(again, whole[:, :5], rtol=0, atol=2e-5)


def static_cache(model: Any, columns: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=columns)


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_chosen_and_copied() -> None:
    model, ids = student("qwen3", ALL_LINEAR), prompt("qwen3", rows=2, length=8)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], **{CACHE_NAME: cache})
    whole = model(ids).logits[:, -1]

    def next_logits(changed: DynamicCache, rows: list[int]) -> Tensor:
        return model(ids[rows, 7:], **{CACHE_NAME: changed}).logits[:, -1]

    repeated, chosen, masked = (copy.deepcopy(cache) for _ in range(3))
    repeated.batch_repeat_interleave(2)
    chosen.batch_select_indices(torch.tensor([1]))
    masked.batch_select_indices(torch.tensor([False, True]))
    for changed, rows in ((repeated, [0, 0, 1, 1]), (chosen, [1]), (masked, [1]), (cache, [0, 1])):
        torch.testing.assert_close(next_logits(changed, rows), whole[rows], rtol=0, atol=2e-5)


def test_what_a_recurrent_state_cannot_do_is_refused() -> None:
    model, inputs = student("qwen3", HYBRID), prompt("qwen3")
    cache = DynamicCache(config=model.config)
    model(**inputs, **{CACHE_NAME: cache})
    assert not cache.is_croppable
    slot = recurrent_slot(cache, 0)
    assert isinstance(slot, RecurrentSlot)
    slot.crop(0)
    for change in (lambda: slot.crop(-1), slot.activate_past_recording):
        with pytest.raises(MmmambaError, match="cannot be taken back"):
            change()
    with pytest.raises(TypeError, match="no keys and values"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    small = static_cache(student("qwen3", ALL_LINEAR), 4)
    with pytest.raises(DataError, match="room for 4 columns, but 0 are taken and 9 more"):
        student("qwen3", ALL_LINEAR)(**inputs, **{CACHE_NAME: small})


def test_the_cache_of_another_model_is_refused() -> None:
    model, inputs = teacher("qwen3"), prompt("qwen3")
    cache = model(**inputs, use_cache=True)[CACHE_NAME]
    own = convert(copied(model), StudentPlan.of_layers(4, [2]))
    with pytest.raises(MmmambaError, match="layer 2 of the cache holds keys and values"):
        own(inputs["input_ids"][:, :1], **{CACHE_NAME: cache})
