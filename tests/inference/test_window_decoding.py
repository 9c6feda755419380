"""A Generator decodes sliding-window layers as the model does, from a state of fixed size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import distance, join_pixels, pad_batch, prompt, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from mmmamba_cli.architecture import cache_bytes
from mmmamba_cli.inference import Generator, quantize
from mmmamba_cli.inference.decode_step import decode_step
from mmmamba_cli.inference.graph_prefill import supports_chunk_graphs, supports_prompt_graphs
from mmmamba_cli.model import new_cache

EXACT = 1e-10
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 6},
    "first columns": {"window": 3, "sinks": 2},
    "sink logits": {"window": 5, "sink_logits": True},
    "both, beside a convolution": {"window": 4, "sinks": 1, "sink_logits": True, "conv_width": 3},
}
options = pytest.mark.parametrize("name", OPTIONS)


def model_of(name: str, shuffle: str = "post", **more: Any) -> Any:
    return small_model(
        "wmaw" if name.startswith("both") else "wwaw", shuffle, **OPTIONS[name], **more
    )


def batch(seed: int, *rows: tuple[int, int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows of (tiles, text), padded on the left."""
    inputs = [prompt(*row, seed=seed + i) for i, row in enumerate(rows)]
    ids, mask = pad_batch([row for row, _ in inputs])
    return ids, {"pixel_values": join_pixels([p for _, p in inputs]), "attention_mask": mask}


@options
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_logits_equal_the_model(name: str, chunk: int | None) -> None:
    """After prompts shorter and longer than the window, until the window has passed them."""
    model = model_of(name).double()
    ids, inputs = batch(0, (2, 6), (0, 3), (1, 9))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    cache, mask = new_cache(model.config), inputs["attention_mask"]
    expected = model(ids, **inputs, past_key_values=cache).logits[:, -1]
    generator = Generator(model)
    found = generator.prefill(ids, **inputs, chunk=chunk)
    for _ in range(12):
        assert distance(found, expected) < EXACT
        token = expected.argmax(-1, keepdim=True)
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        expected = model(token, attention_mask=mask, past_key_values=cache).logits[:, -1]
        found = generator.step(token)


def test_the_cache_has_the_bytes_that_inspect_states() -> None:
    model = model_of("first columns").bfloat16()
    generator = Generator(model)
    generator.start(2, 300)
    # Capacities are multiples of 256 columns.
    assert vars(cache_bytes(model.config, 2, 512, 2)) == {
        "kv_cache": generator.cache_bytes,
        "conv_state": 0,
        "ssm_state": 0,
    }


def test_a_linear_model_has_a_cache_of_one_size() -> None:
    generator = Generator(small_model("wwmw", window=6))
    generator.prefill(prompt(0, 6)[0], capacity=6)
    size = generator.cache_bytes
    for _ in range(40):
        generator.step(torch.tensor([[4]]))
    assert generator.cache_bytes == size


def test_the_state_moves_into_a_larger_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("first columns").double()
    ids, inputs = batch(0, (1, 4), (0, 9))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = Generator(model).generate(ids, **inputs, max_new_tokens=30, capacity=60, eos=())
    monkeypatch.setattr("mmmamba_cli.inference.cache_pool.PAD_CAPACITY_TO", 4)
    monkeypatch.setattr("mmmamba_cli.inference.generator.ANSWER_COLUMNS", 2)
    generator = Generator(model)
    for _ in range(2):
        # The second time, the caches hold the states of the first.
        assert torch.equal(generator.generate(ids, **inputs, max_new_tokens=30, eos=()), expected)


def test_random_contents_are_read_as_a_full_window() -> None:
    generator = Generator(model_of("sink logits"))
    generator.fill_random(2, 20, capacity=24)
    token = torch.tensor([[4], [7]])
    first = generator.step(token).clone()
    assert first.isfinite().all()
    generator.fill_random(2, 20, capacity=24)
    newest = generator._sequence.cache.stacks[0].layers[0]
    # The slot of the next token is overwritten, all others are read.
    newest.keys[:, :, 20 % 5].fill_(9)
    assert torch.equal(generator.step(token), first)
    generator.fill_random(2, 20, capacity=24)
    newest.values[:, :, 21 % 5].fill_(9)
    assert not torch.equal(generator.step(token), first)


class NoSynchronization(TorchDispatchMode):
    """Raises where a value of a tensor is read, which a CUDA graph cannot capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_a_step_neither_synchronizes_nor_moves_the_state() -> None:
    generator = Generator(model_of("both, beside a convolution"))
    ids, inputs = batch(0, (0, 3), (0, 9))
    generator.prefill(ids, attention_mask=inputs["attention_mask"])
    cache = generator._sequence.cache
    before = [(t.data_ptr(), t.shape) for t in cache.tensors]
    with NoSynchronization():
        for _ in range(6):
            decode_step(cache)
    assert [(t.data_ptr(), t.shape) for t in cache.tensors] == before


def test_prompts_are_not_padded_on_the_right() -> None:
    for plan, is_supported in (("mmam", True), ("mwam", False)):
        packed = Generator(small_model(plan, **({} if is_supported else {"window": 4})))._packed
        assert supports_prompt_graphs(packed) is is_supported
        assert supports_chunk_graphs(packed) is False


@options
def test_int8_weights_give_the_tokens_of_the_quantized_model(name: str) -> None:
    model = model_of(name, "pre")
    before = model(prompt(0, 9)[0]).logits
    quantize(model)
    ids, inputs = batch(3, (1, 6), (0, 12))
    assert 1e-4 < distance(model(prompt(0, 9)[0]).logits, before) < 0.2
    found = Generator(model).generate(ids, **inputs, max_new_tokens=10, eos=())
    expected = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, **inputs)
    assert torch.equal(found, expected[:, ids.shape[1] :])
