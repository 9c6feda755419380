"""Arguments computed on the CPU, and pictures that both models share, change no bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from in_place_distillation import gradients, make_batch, make_objective, make_pair, make_stage
from teacher_videos import video_prompt
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_window_index

from mmmamba_cli.data import ModelBatch
from mmmamba_cli.distill.in_place_pair import share_equal_parameters
from mmmamba_cli.teachers.call_arguments import call_arguments, tower_arguments


def video_batch(name: str) -> ModelBatch:
    inputs = dict(video_prompt(FAMILIES[name], "What moves?"))
    return ModelBatch(inputs, inputs["input_ids"], 1, inputs["input_ids"].numel())


def text_batch(name: str) -> ModelBatch:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return ModelBatch(inputs, ids, 2, ids.numel())


def single_row(name: str) -> ModelBatch:
    return make_batch(name, dtype=torch.float32, rows=(0,))


def padded_rows(name: str) -> ModelBatch:
    return make_batch(name, dtype=torch.float32)


@pytest.mark.parametrize("make", [padded_rows, single_row, text_batch, video_batch])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_arguments_of_the_cpu_change_no_bit(name: str, make: Any) -> None:
    pair, _, _ = make_pair(name, make_stage("kl"), dtype=torch.float32)
    batch = make(name)
    prepared = pair.prepare(batch)
    assert "position_ids" in prepared.inputs
    assert ("attention_mask" in prepared.inputs) == (not batch.token_mask.all())
    for model in (pair.teacher, pair.student):
        found = pair.last_hidden(model, prepared)
        expected = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        assert torch.equal(found, expected)


def test_flash_attention_gets_lengths_on_its_device_and_the_longest() -> None:
    teacher: Any = FAMILIES["qwen2_5_vl"].model()
    visual, grids = teacher.base_model.visual, torch.tensor([[1, 4, 6], [2, 8, 4]])
    _, lengths = tower_arguments(teacher, grids)
    assert lengths.keys() == {"cu_seqlens", "cu_window_seqlens"}
    visual.config._attn_implementation = "flash_attention_2"
    copied, numbers = tower_arguments(teacher, grids)
    longest = {
        "max_seqlen": 32,
        "max_window_seqlen": int(lengths["cu_window_seqlens"].diff().max()),
    }
    assert numbers == longest and copied.keys() > lengths.keys()
    # The names are those that transformers reads.
    given = {**copied, **numbers}
    assert get_vision_attention_seqlens(grids, visual.config, kwargs=given) == (
        copied["cu_seqlens"],
        32,
    )
    window = get_vision_window_index(grids, 2, visual.window_size, visual.patch_size, kwargs=given)
    assert window[0] is copied["window_index"] and given.keys() == {
        "position_ids",
        "max_window_seqlen",
    }


def test_other_families_get_no_arguments() -> None:
    model: Any = FAMILIES["internvl"].model()
    found = call_arguments(model, padded_rows("internvl").inputs)
    assert found.needs_mask and not found.to_copy and not found.on_host


def tower_calls(pair: Any) -> list[Any]:
    """A list that gets the tower of each call."""
    calls: list[Any] = []
    for model in (pair.teacher, pair.student):
        for part in model.base_model.children():
            if part is not model.get_decoder():
                part.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_a_frozen_tower_runs_once_for_both_models(name: str) -> None:
    batch = make_batch(name)
    objective, pair = make_objective(name, make_stage("kl"))
    assert not pair.shares_pictures
    calls = tower_calls(pair)
    loss, expected = gradients(objective, pair, [batch])
    twice, _ = len(calls), calls.clear()
    share_equal_parameters(pair, pair.trainable)
    pair = replace(pair)
    assert pair.shares_pictures
    for _ in range(2):
        found = gradients(objective, pair, [batch])
        assert found[0] == loss
        assert all(torch.equal(found[1][each], expected[each]) for each in expected)
    assert len(calls) == twice
    assert "get_image_features" not in vars(pair.student.base_model)


def test_a_tower_that_learns_runs_for_each_model() -> None:
    stage = make_stage("kl", learns=["*.visual.merger.*", "*.q_proj.weight"])
    _, pair = make_objective("qwen3_vl", stage)
    share_equal_parameters(pair, pair.trainable)
    assert not replace(pair).shares_pictures
