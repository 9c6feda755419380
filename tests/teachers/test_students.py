"""Students of transformers' own classes: equal to the teacher, cached, padded, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teachers import (
    FAMILIES,
    VOCABULARY,
    WITH_PICTURES,
    copied,
    prompt,
    student,
    teacher,
    teacher_config,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mmmamba_cli.errors import CheckpointError, MmmambaError
from mmmamba_cli.teachers import (
    StudentPlan,
    convert,
    expected_tensors,
    mixers_of,
    register_model_type,
    student_config,
    student_plan,
)

HYBRID, ALL_LINEAR = (0, 2), None
PLAN = StudentPlan.of_layers(4, [1])
# Those of `test_families_decoding` are decoded by every family there.
PLANS = [(HYBRID, "kda"), (ALL_LINEAR, "gla"), (ALL_LINEAR, "window")]
SOME = ("qwen2_5_vl", "internvl", "qwen3")


def auto_class(family: str) -> Any:
    return AutoModelForImageTextToText if family in WITH_PICTURES else AutoModelForCausalLM


def greedy(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Eight tokens, none of which marks a picture, and their scores."""
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    return model.generate(
        **inputs,
        suppress_tokens=list(range(85, VOCABULARY)),
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


def left_padded(inputs: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """The tokens and the mask with padding before them."""
    found = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            found[name] = torch.nn.functional.pad(inputs[name], (columns, 0))
    return found


def test_a_student_with_attention_in_all_layers_has_the_teachers_bits() -> None:
    for family in FAMILIES:
        model, inputs = teacher(family), prompt(family)
        own = convert(copied(model), StudentPlan.of_layers(4, []))
        assert own.config.model_type == f"mmmamba_{family}"
        assert torch.equal(own(**inputs).logits, model(**inputs).logits), family


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(("layers", "mixer"), PLANS)
def test_decoding_with_a_cache_equals_decoding_without(
    family: str, layers: Any, mixer: str
) -> None:
    model, inputs = student(family, layers, mixer), prompt(family, length=6)
    cached, plain = greedy(model, inputs), greedy(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", SOME)
def test_a_left_padded_row_decodes_as_it_does_alone(family: str) -> None:
    model = student(family, HYBRID, "window")
    short, long = prompt(family, length=5), prompt(family, length=9)
    padded = left_padded(short, 4)
    together = {name: torch.cat((padded[name], long[name])) for name in padded}
    both = greedy(model, together)
    for row, inputs in enumerate((short, long)):
        alone = greedy(model, inputs)
        assert torch.equal(both.sequences[row, -8:], alone.sequences[0, -8:])
        for one, other in zip(both.scores, alone.scores, strict=True):
            torch.testing.assert_close(one[row], other[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layers", [HYBRID, ALL_LINEAR])
def test_beams_follow_their_rows(layers: Any) -> None:
    for family in ("qwen3", "qwen3_vl"):
        model, inputs = student(family, layers), prompt(family, length=6)
        cached = greedy(model, inputs, num_beams=3)
        plain = greedy(model, inputs, num_beams=3, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.parametrize("family", SOME)
def test_a_saved_student_loads_with_all_its_tensors_and_bits(family: str, tmp_path: Path) -> None:
    model, inputs = student(family, (1, 3), "gated_delta"), prompt(family)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    assert student_plan(AutoConfig.from_pretrained(tmp_path)) == student_plan(model.config)


def test_a_student_of_any_registered_type_is_found_by_its_folder(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "smollm3", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    convert(config, StudentPlan.of_layers(2, [1])).save_pretrained(tmp_path)
    register_model_type("mmmamba_smollm3")
    assert len(list(mixers_of(AutoModelForCausalLM.from_pretrained(tmp_path)))) == 1
    with pytest.raises(CheckpointError, match="model_type is llama, expected mmmamba_"):
        register_model_type("llama")
    with pytest.raises(CheckpointError, match="update transformers"):
        register_model_type("mmmamba_never_heard_of")


@pytest.mark.parametrize("family", SOME)
def test_expected_tensors_are_those_of_the_student(family: str) -> None:
    plan = StudentPlan.of_layers(4, [1, 2], "mamba2")
    expected = expected_tensors(teacher_config(family), plan)
    model = convert(teacher(family), plan)
    found = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        k: v.shape for k, v in expected.items()
    }
    new = {name for name, tensor in expected.items() if tensor.mixer is not None}
    assert new == set(expected) - set(teacher(family).state_dict())
    assert len(new) == 2 * 7
    assert {expected[name].layer for name in new} == {1, 2}


def test_small_parameters_of_mixers_stay_fp32_and_others_do_not(tmp_path: Path) -> None:
    model = student("qwen3", HYBRID).bfloat16()
    plan = StudentPlan.of_layers(4, HYBRID)
    config = teacher_config("qwen3")
    config.dtype = "bfloat16"
    expected = {name: one.dtype for name, one in expected_tensors(config, plan).items()}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    for own in (model, loaded):
        assert {name: expected[name] for name, _ in own.named_parameters()} == {
            name: value.dtype for name, value in own.named_parameters()
        }
    assert expected["model.layers.0.self_attn.A_log"] == torch.float32
    assert expected["model.layers.0.self_attn.q_norm.weight"] == torch.bfloat16


def test_conversion_keeps_the_teachers_objects_and_names() -> None:
    model = teacher("llama")
    weights = dict(model.named_parameters())
    own = convert(model, StudentPlan.of_layers(4, [3]))
    kept = dict(own.named_parameters())
    assert all(kept[name] is weight for name, weight in weights.items())
    assert own.model.layers[3].self_attn is next(mixers_of(own))


def test_a_student_of_a_config_begins_with_the_values_of_conversion() -> None:
    config = student_config(teacher_config("smolvlm"), StudentPlan.of_layers(4, [1]))
    models = [AutoModelForImageTextToText.from_config(config), convert(teacher("smolvlm"), PLAN)]
    first, second = ({n: v for _, n, v in next(mixers_of(one)).new_parameters()} for one in models)
    assert first.keys() == second.keys() and len(first) == 7
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_compute_the_same_and_share_nothing(copied_by: Any) -> None:
    model = student("qwen2_5_vl", HYBRID, "kda")
    inputs = left_padded(prompt("qwen2_5_vl"), 2)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = copied_by(model)
        assert type(found) is type(model) and type(found.config) is type(model.config)
        assert torch.equal(found(**inputs).logits, expected)
    contexts = {id(mixer.context) for mixer in mixers_of(found)}
    assert len(contexts) == 1 and contexts.isdisjoint(id(one.context) for one in mixers_of(model))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in found.parameters())


def test_attention_is_computed_as_the_teacher_does() -> None:
    for attention in ("eager", "sdpa"):
        for family in ("qwen3", "qwen3_vl"):
            own = convert(teacher(family, attention), PLAN).config
            parts = (own, own.get_text_config(), getattr(own, "vision_config", own))
            assert {part._attn_implementation for part in parts} == {attention}


def test_values_of_new_parameters_depend_on_the_seed_alone() -> None:
    def gate(seed: int) -> Tensor:
        own = convert(teacher("llama"), StudentPlan.of_layers(4, [3]), seed=seed)
        return own.model.layers[3].self_attn.g_proj.weight

    torch.manual_seed(5)
    first = gate(0)
    assert torch.equal(first, gate(0)) and not torch.equal(first, gate(1))


def test_plans_that_do_not_fit_are_refused() -> None:
    config = teacher_config("qwen3")
    with pytest.raises(MmmambaError, match="layer 4 does not exist: the text decoder has 4 layers"):
        StudentPlan.of_layers(4, [4])
    with pytest.raises(MmmambaError, match="known are attention, gated_delta"):
        StudentPlan.of_layers(4, [0], "s4")
    with pytest.raises(
        MmmambaError, match="mixers of 3 layers, but the text decoder of qwen3 has 4"
    ):
        convert(config, StudentPlan.of_layers(3))
    own = convert(config, StudentPlan.of_layers(4))
    with pytest.raises(MmmambaError, match="mmmamba_qwen3 is a student already"):
        convert(own, StudentPlan.of_layers(4))
    with pytest.raises(MmmambaError, match="unknown field layers"):
        StudentPlan.from_json({"mixers": ["mamba2"], "layers": [0]})
