"""Twelve families become students, are saved and loaded; others are refused by one sentence."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS, prompts, right_padded
from family_students import HYBRID, double, rows_of, student
from refused_families import REFUSED, known_to_transformers, refused_config
from teacher_videos import video_prompt

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.teachers import StudentPlan, anatomy_of, convert, expected_tensors, student_plan


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_in_all_layers_gives_the_teachers_bits(name: str) -> None:
    family = FAMILIES[name]
    teacher = family.model()
    own = convert(copy.deepcopy(teacher), StudentPlan.of_layers(LAYERS, []))
    inputs = [prompts(family, rows_of(family))]
    if family.video:
        inputs.append(video_prompt(family, "What happens?"))
    for each in inputs:
        assert torch.equal(own(**each).logits, teacher(**each).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_student_loads_with_every_tensor_and_bit(name: str, tmp_path: Path) -> None:
    # Gemma 3 computes the scale of its embeddings again in the dtype of the file.
    family, model = FAMILIES[name], copy.deepcopy(student(name, "hybrid gated_delta")).float()
    model.save_pretrained(tmp_path)
    auto = (
        transformers.AutoModelForImageTextToText
        if family.pictures
        else transformers.AutoModelForCausalLM
    )
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert student_plan(loaded.config) == student_plan(model.config)
    batch = prompts(family, rows_of(family))
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_has_the_teachers_tensors_and_those_of_its_mixers(name: str) -> None:
    family = FAMILIES[name]
    plan = StudentPlan.of_layers(LAYERS, HYBRID, "mamba2")
    expected = expected_tensors(family.config(), plan, allow_bidirectional=True)
    tied = family.model().all_tied_weights_keys
    kept = {key for key, tensor in expected.items() if tensor.mixer is None}
    assert kept == set(family.model().state_dict()) - set(tied)
    new = {tensor.layer for tensor in expected.values() if tensor.mixer is not None}
    assert new == set(HYBRID)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_padded_row_has_its_own_logits_as_in_training(name: str) -> None:
    family, model = FAMILIES[name], student(name, "hybrid mamba2")
    rows = rows_of(family)
    left = double(prompts(family, rows))
    right = right_padded(left)
    logits = model(**right).logits
    for index, row in enumerate(rows):
        alone = model(**double(prompts(family, [row]))).logits[0]
        torch.testing.assert_close(logits[index, : len(alone)], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter_of_the_mixers(name: str) -> None:
    family, model = FAMILIES[name], copy.deepcopy(student(name, "all gated_delta"))
    batch = double(prompts(family, rows_of(family)[:2]))
    model(**batch).logits[:, -4:].square().mean().backward()
    layers = anatomy_of(family.config()).layers_path
    mixers = {k: v for k, v in model.named_parameters() if k.startswith(f"{layers}.1.self_attn")}
    assert mixers
    for key, parameter in mixers.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def test_image_tokens_of_both_directions_need_a_flag() -> None:
    config = FAMILIES["gemma3"].config()
    plan = StudentPlan.of_layers(LAYERS, HYBRID)
    assert anatomy_of(config).warning is not None
    with pytest.raises(MmmambaError, match="image attend to each other in both directions"):
        convert(config, plan)
    for name in set(FAMILIES) - {"gemma3"}:
        assert anatomy_of(FAMILIES[name].config()).warning is None, name


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_a_sentence_with_the_field(name: str) -> None:
    if not known_to_transformers(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config, field = refused_config(name), REFUSED[name][1]
    with pytest.raises(MmmambaError, match=rf"^{name} cannot be converted: .*\b{field}\b") as error:
        convert(config, StudentPlan.of_layers(4))
    assert "\n" not in error.value.message
