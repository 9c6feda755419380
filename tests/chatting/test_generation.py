"""Our own loop over tokens takes those that transformers' `generate` takes."""

from __future__ import annotations

import pytest
import torch
from small import IMAGE_ID, prompt, small_model

from mmmamba_cli.chatting import Settings, generate_ids

TOKENS = 12


@pytest.mark.parametrize("plan", ["amam", "mmmm", "aaaa"])
@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("tiles", [0, 2])
def test_greedy_tokens_are_those_of_generate(plan: str, shuffle: str, tiles: int) -> None:
    # A short base length, so that dynamic RoPE has something to fix at the prompt.
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    model = small_model(plan, shuffle, **scaled)
    ids, pixels = prompt(tiles, text=9)
    found = list(generate_ids(model, ids, pixels, Settings(TOKENS), frozenset()))
    inputs = {} if pixels is None else {"pixel_values": pixels}
    expected = model.generate(
        ids, **inputs, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
    )
    assert found == expected[0, ids.shape[1] :].tolist()


def test_a_stop_token_ends_an_answer_and_is_not_handed_on() -> None:
    model = small_model("amam")
    ids, _ = prompt(0, text=9)
    whole = list(generate_ids(model, ids, None, Settings(TOKENS), frozenset()))
    first = whole.index(whole[5])
    stopped = list(generate_ids(model, ids, None, Settings(TOKENS), frozenset({whole[5]})))
    assert stopped == whole[:first]


def draw(temperature: float, seed: int = 0, turn: int = 0) -> list[int]:
    model = small_model("amam")
    settings = Settings(40, temperature, seed)
    return list(generate_ids(model, prompt(0, text=9)[0], None, settings, frozenset(), turn))


def test_drawing_is_a_function_of_seed_and_turn() -> None:
    assert draw(1.0, seed=1) == draw(1.0, seed=1)
    assert draw(1.0, seed=1) != draw(1.0, seed=2)
    assert draw(1.0, seed=1) != draw(1.0, seed=1, turn=1)


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    assert draw(1e-30) == draw(0)
    assert draw(3.0) != draw(0)


def test_image_context_is_never_said() -> None:
    model = small_model("amam")
    with torch.no_grad():
        # Every logit alike, but that of the image token far above them.
        model.lm_head.weight.zero_()
        model.lm_head.weight[IMAGE_ID] = 1e4 * model.model.norm.weight.sign()
    ids = prompt(0, text=9)[0]
    for temperature in (0.0, 1.0):
        said = list(generate_ids(model, ids, None, Settings(20, temperature), frozenset()))
        assert IMAGE_ID not in said
