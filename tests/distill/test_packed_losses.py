"""Losses and gradients of packed rows of transformers' models are those of single conversations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, picture, prompts, right_padded
from in_place_distillation import gradients, make_objective, make_stage

from mmmamba_cli.data import IGNORE_INDEX, ModelBatch
from mmmamba_cli.data.model_batch import pack_conversations

# One with multimodal RoPE and deepstack, two that count positions by columns.
NAMES = ("qwen3_vl", "internvl", "smolvlm")
ROWS = ((0, 1), (2,))


@cache
def conversations(name: str, chosen: Sequence[int] = (0, 1, 2)) -> ModelBatch:
    """Conversations of unequal length in rows of their own: a picture, two pictures, text."""
    family = FAMILIES[name]
    shown = [
        ("What is it?", [picture(24, 16, 1)]),
        ("Count the words of every line.", [picture(16, 24, 2), picture(40, 12, 3)]),
        ("Say yes.", []),
    ]
    inputs = right_padded(prompts(family, [shown[each] for each in chosen]))
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :5] = IGNORE_INDEX
    return ModelBatch(inputs, labels, len(chosen), int(mask.sum()), tuple(map(str, chosen)))


def packed(name: str) -> ModelBatch:
    return pack_conversations(conversations(name), ROWS, FAMILIES[name].tokenizer.pad_token_id)


def check(name: str, stage: Any, **options: Any) -> None:
    objective, pair = make_objective(name, stage, **options)
    alone = [conversations(name, (each,)) for each in range(3)]
    expected, plain = gradients(objective, pair, alone)
    found, together = gradients(objective, pair, [packed(name)])
    assert found == pytest.approx(expected, rel=1e-6)
    for key, gradient in plain.items():
        distance = (together[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert distance < 1e-5, (key, float(distance))


@pytest.mark.parametrize("loss", ["mixer-mse", "hidden-alignment", "matrix-orientation", "kl"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_have_the_gradients_of_single_conversations(name: str, loss: str) -> None:
    check(name, make_stage(loss))


@pytest.mark.parametrize("mixer", ["gated_delta", "gla", "window"])
def test_every_kind_of_mixer_begins_again(mixer: str) -> None:
    check("qwen3_vl", make_stage("mixer-mse"), mixer=mixer)
    check("qwen3_vl", make_stage("kl"), mixer=mixer, linear=range(4))


def test_pictures_are_weighted_within_their_own_conversation() -> None:
    check("qwen3_vl", make_stage("mixer-mse", loss_weights="density", inputs="student"))


def test_recomputed_layers_see_the_conversations_too() -> None:
    objective, pair = make_objective("qwen3_vl", make_stage("kl"))
    batch = packed("qwen3_vl")
    expected, plain = gradients(objective, pair, [batch])
    pair.checkpoint_layers(4)
    found, again = gradients(objective, pair, [batch])
    assert found == pytest.approx(expected, rel=1e-9)
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-9, atol=1e-12)
