"""The eager decoder: random caches are like prefilled ones, and sizes are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small_model
from torch import Tensor

from mmmamba_cli.profiling.eager_decoder import EagerDecoder, expected_cache_bytes
from mmmamba_cli.profiling.interfaces import GROWING, STATIC

NTK = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}


@pytest.mark.parametrize("kind", [GROWING, STATIC])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
@pytest.mark.parametrize("options", [{}, NTK])
def test_random_cache_equals_a_prefilled_one_except_its_contents(
    kind: str, plan: str, options: dict[str, Any]
) -> None:
    decoder = EagerDecoder(small_model(plan, **options), kind)
    rng = torch.Generator().manual_seed(0)

    def seen(fill: bool) -> tuple[Any, ...]:
        decoder.start(2, 40)
        if fill:
            decoder.fill_random(2, 30, rng)
        else:
            decoder.prefill(decoder.random_prompt(2, 30, rng))
        cache = decoder.cache
        assert cache is not None
        held = [
            (name, tuple(value.shape), value.dtype)
            for layer in cache.layers
            for name, value in sorted(vars(layer).items())
            if isinstance(value, Tensor)
        ]
        state = cache.decoding_state
        lengths = (state.embedding.length, state.language.length, decoder.cache_bytes)
        frequencies = (state.embedding.inv_freq, state.language.inv_freq)
        logits = decoder.step(decoder.random_prompt(2, 1, rng))
        assert logits.isfinite().all()
        assert (cache.decoding_state.language.length, logits.shape[0]) == (31, 2)
        return held, lengths, frequencies

    held, lengths, frequencies = seen(fill=True)
    held_read, lengths_read, frequencies_read = seen(fill=False)
    assert (held, lengths) == (held_read, lengths_read)
    for ours, theirs in zip(frequencies, frequencies_read, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_growing_cache_is_copied_with_every_token_and_static_one_is_not() -> None:
    for kind, lengths, moves in ((GROWING, (30, 31), True), (STATIC, (40, 40), False)):
        decoder = EagerDecoder(small_model("aaaa"), kind)
        rng = torch.Generator().manual_seed(0)
        decoder.start(1, 40)
        decoder.fill_random(1, 30, rng)
        assert decoder.cache is not None
        before = decoder.cache.layers[0].keys
        decoder.step(decoder.random_prompt(1, 1, rng))
        after = decoder.cache.layers[0].keys
        assert (before.shape[2], after.shape[2]) == lengths
        assert (before.data_ptr() != after.data_ptr()) is moves


def test_expected_cache_bytes_are_allocated() -> None:
    decoder = EagerDecoder(small_model("amam"), STATIC)
    decoder.start(3, 50)
    decoder.fill_random(3, 50, torch.Generator().manual_seed(0))
    conv_states = 2 * 3 * 64 * 4
    expected = expected_cache_bytes(decoder.model.config, 3, 50, torch.float32) + conv_states
    assert decoder.cache_bytes == expected


def test_repeated_random_contents_have_the_requested_length() -> None:
    decoder = EagerDecoder(small_model("aa"), GROWING)
    decoder.start(1, 2500)
    decoder.fill_random(1, 2500, torch.Generator().manual_seed(0))
    assert decoder.cache is not None
    keys = decoder.cache.layers[0].keys
    assert keys.shape == (1, 2, 2500, 8)
    torch.testing.assert_close(keys[:, :, :1024], keys[:, :, 1024:2048], rtol=0, atol=0)
    assert keys[:, :, :1024].std() == pytest.approx(1, abs=0.05)


def test_prefill_chunk_size_does_not_change_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mmmm")
    decoder = EagerDecoder(model, STATIC)
    ids = decoder.random_prompt(1, 30, torch.Generator().manual_seed(0))
    chunks = []
    forward = model.forward

    def watched(*args: Any, **options: Any) -> Any:
        chunks.append(options["prefill_chunk_size"])
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", watched)
    logits = []
    for chunk in (None, 8):
        decoder.start(1, 30)
        logits.append(decoder.prefill(ids, chunk))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert chunks == [None, 8]
    monkeypatch.setattr("mmmamba_cli.profiling.eager_decoder.PREFILL_CHUNK", 16)
    decoder.start(1, 30)
    decoder.prefill(ids)
    assert chunks[-1] == 16
