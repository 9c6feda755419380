"""A student's file may be its teacher's file with the mixers' tensors added."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS
from safetensors.torch import load_file, save_file

from mmmamba_cli.export.remote_code import bundle_files
from mmmamba_cli.teachers import (
    StudentPlan,
    convert,
    expected_tensors,
    model_names,
    new_value,
    student_config,
    unexpected_tensors,
)

PLAN = StudentPlan.of_layers(LAYERS, (0, 2))
# Families whose files have the names of an older model, another one, and one with a tied head.
STORED_OTHERWISE = ("qwen2_5_vl", "internvl", "llava_onevision", "mistral3", "gemma3")
NAMES = (*STORED_OTHERWISE, "qwen3_vl", "qwen3")


@pytest.mark.parametrize("name", NAMES)
def test_new_tensors_beside_the_teachers_stored_ones_make_a_student(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    teacher, file = family.model(), tmp_path / "model.safetensors"
    teacher.save_pretrained(tmp_path)
    tensors, config = load_file(file), teacher.config
    expected = expected_tensors(config, PLAN, allow_bidirectional=True)
    kept = {key for key, tensor in expected.items() if tensor.mixer is None}
    assert (set(tensors) == kept) == (name not in STORED_OTHERWISE)
    assert set(model_names(config, tensors).values()) == kept
    for key, one in expected.items():
        if one.mixer is not None and one.layer is not None and one.part is not None:
            value = new_value(one.mixer, one.layer, one.part, one.shape, mimic=True, seed=0)
            tensors[key] = value.to(one.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    own = student_config(config, PLAN, allow_bidirectional=True)
    own.save_pretrained(tmp_path)
    auto = (
        transformers.AutoModelForImageTextToText
        if family.pictures
        else transformers.AutoModelForCausalLM
    )
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    converted = convert(teacher, PLAN, allow_bidirectional=True).state_dict()
    assert converted.keys() == loaded.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in loaded.state_dict().items())
    # Under the teacher's model_type, transformers would drop the mixers' tensors.
    assert not unexpected_tensors(own, tensors)
    new = sorted(set(expected) - kept)
    assert sorted(unexpected_tensors(config, tensors)) == new and new


def test_a_folder_that_names_no_class_has_the_teachers_processor(tmp_path: Path) -> None:
    family = FAMILIES["idefics3"]
    student_config(family.config(), PLAN).save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        values = json.loads(file.read_text())
        values.pop("processor_class", None)
        file.write_text(json.dumps(values))
    found = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(found) is transformers.Idefics3Processor


def test_the_room_is_bundled_into_flat_files() -> None:
    files = bundle_files(["mmmamba_cli.teachers.auto_class", "mmmamba_cli.teachers.config_class"])
    text = files["mmmamba_teachers.py"]
    assert "class MixerInPlace" in text and "def student_config_class" in text
    assert not any(re.search("(import|from) mmmamba_cli", one) for one in files.values())


def test_experts_that_the_model_joins_have_one_name() -> None:
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = transformers.AutoConfig.for_model("qwen3_moe", num_hidden_layers=1, **sizes)
    stored = [f"model.layers.0.mlp.experts.{i}.gate_proj.weight" for i in range(2)]
    joined = "model.layers.0.mlp.experts.gate_up_proj"
    assert model_names(config, stored) == dict.fromkeys(stored, joined)
    assert unexpected_tensors(config, [*stored, "model.what"]) == ["model.what"]
