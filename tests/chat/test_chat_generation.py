"""`generate_ids`, with a Generator or by the model's forward, equals transformers' `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import IMAGE_ID, prompt, small_model

from mmmamba_cli.chat import Settings, generate_ids
from mmmamba_cli.inference import Generator

TOKENS = 12


def answer(model: Any, fast: bool, settings: Settings, tiles: int = 0, turn: int = 0) -> list[int]:
    ids, pixels = prompt(tiles, text=9)
    generator = Generator(model) if fast else None
    return list(generate_ids(model, ids, pixels, settings, turn, generator))


@pytest.mark.parametrize("plan", ["amam", "mmmm", "aaaa"])
@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("tiles", [0, 2])
@pytest.mark.parametrize("fast", [False, True])
def test_greedy_tokens_equal_generate(plan: str, shuffle: str, tiles: int, fast: bool) -> None:
    # A base length shorter than the prompt, so that dynamic RoPE applies.
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    model = small_model(plan, shuffle, **scaled)
    ids, pixels = prompt(tiles, text=9)
    found = answer(model, fast, Settings(TOKENS, eos=()), tiles)
    inputs = {} if pixels is None else {"pixel_values": pixels}
    expected = model.generate(
        ids, **inputs, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
    )
    assert found == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("fast", [False, True])
def test_a_stop_token_ends_an_answer_and_is_not_yielded(fast: bool) -> None:
    model = small_model("amam")
    whole = answer(model, fast, Settings(TOKENS, eos=()))
    first = whole.index(whole[5])
    assert answer(model, fast, Settings(TOKENS, eos={whole[5]})) == whole[:first]
    # Without `eos` the stop tokens come from the generation config.
    model.generation_config.eos_token_id = whole[5]
    assert answer(model, fast, Settings(TOKENS)) == whole[:first]


def draw(temperature: float, seed: int = 0, turn: int = 0, fast: bool = True) -> list[int]:
    settings = Settings(40, temperature, eos=(), seed=seed)
    return answer(small_model("amam"), fast, settings, turn=turn)


@pytest.mark.parametrize("fast", [False, True])
def test_sampling_depends_on_seed_and_turn(fast: bool) -> None:
    assert draw(1.0, 1, fast=fast) == draw(1.0, 1, fast=fast)
    assert draw(1.0, 1, fast=fast) != draw(1.0, 2, fast=fast)
    assert draw(1.0, 1, fast=fast) != draw(1.0, 1, turn=1, fast=fast)
    assert draw(1.0, 2**63 - 1, turn=1, fast=fast) == draw(1.0, 0, fast=fast)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.7}],
)
def test_the_forward_samples_the_same_tokens_as_a_generator(options: dict[str, Any]) -> None:
    settings = Settings(40, 1.5, eos=(), seed=3, **options)
    slow, fast = (answer(small_model("amam").double(), fast, settings) for fast in (False, True))
    assert slow == fast
    if options:
        assert slow != answer(
            small_model("amam").double(), False, Settings(40, 1.5, eos=(), seed=3)
        )


def test_a_tiny_temperature_is_greedy() -> None:
    assert draw(1e-30) == draw(0)
    assert draw(3.0) != draw(0)


@pytest.mark.parametrize("fast", [False, True])
def test_image_context_is_never_generated(fast: bool) -> None:
    model = small_model("amam")
    with torch.no_grad():
        # All logits are equal except that of the image token, which is much larger.
        model.lm_head.weight.zero_()
        model.lm_head.weight[IMAGE_ID] = 1e4 * model.model.norm.weight.sign()
    for temperature in (0.0, 1.0):
        assert IMAGE_ID not in answer(model, fast, Settings(20, temperature, eos=()))


@pytest.mark.parametrize("plan", ["amam", "mmmm"])
def test_a_closed_answer_does_not_affect_the_next(plan: str) -> None:
    model = small_model(plan)
    generator = Generator(model)
    ids, _ = prompt(0, text=9)
    settings = Settings(TOKENS, 1.0, eos=(), seed=5)
    expected = list(generate_ids(model, ids, None, settings, generator=generator))
    begun = generate_ids(model, *prompt(2, text=14), Settings(TOKENS, eos=()), generator=generator)
    next(begun)
    next(begun)
    begun.close()
    assert list(generate_ids(model, ids, None, settings, generator=generator)) == expected
