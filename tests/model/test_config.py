"""The config in transformers, and `config.json` of older versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import small_model

from mmmamba_cli.checkpoint.native_config import to_architecture
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.model.config import HolisticVisionConfig

# Written before the vision part became a sub-config.
BEFORE: dict[str, Any] = {
    "architectures": ["HolisticVLM"],
    "bos_token_id": 1,
    "dtype": "float32",
    "embedding_stack": None,
    "eos_token_id": 2,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "language_stack": {
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 128,
    },
    "layer_types": ["full_attention", "linear_attention"],
    "mixer": {"conv_width": 2},
    "model_type": "mmmamba",
    "normalize_embedding_output": False,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vision": {
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "downsample_ratio": 0.5,
        "pixel_shuffle": "pre",
        "image_token_id": 90,
    },
    "vocab_size": 96,
}
DERIVED = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


def saved(config: HolisticVLMConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_an_older_config_is_rewritten_with_derived_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BEFORE))
    config = HolisticVLMConfig.from_pretrained(tmp_path)
    assert config.vision == BEFORE["vision"]
    written = saved(config, tmp_path / "again")
    written["transformers_version"] = BEFORE["transformers_version"]
    assert written == {**BEFORE, **DERIVED}
    again = HolisticVLMConfig.from_pretrained(tmp_path / "again")
    assert again.to_dict() == config.to_dict()
    assert to_architecture(written, "x") == to_architecture(BEFORE, "x")


def test_sizes_have_the_names_of_transformers() -> None:
    config = HolisticVLMConfig(**{k: v for k, v in BEFORE.items() if k != "model_type"})
    assert {name: getattr(config, name) for name in DERIVED} == DERIVED
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.image_token_id == 90


def test_the_vision_part_is_a_sub_config(tmp_path: Path) -> None:
    config = small_model().config
    vision = config.vision_config
    assert type(vision) is config.sub_configs["vision_config"] is HolisticVisionConfig
    assert (vision.grid, vision.merge, vision.patches_per_tile, vision.tokens_per_tile) == (
        (4, 2, 16, 4)
    )
    config.save_pretrained(tmp_path)
    alone = HolisticVisionConfig.from_pretrained(tmp_path)
    assert alone.typed == vision.typed
    config._attn_implementation = "eager"
    assert vision._attn_implementation == "eager"
    config.vision = {**config.vision, "image_token_id": 7}
    assert config.vision_config.image_token_id == 7
    by_object = HolisticVLMConfig(vision_config=vision)
    by_table = HolisticVLMConfig(vision_config=dict(BEFORE["vision"]))
    assert by_object.vision == by_table.vision == BEFORE["vision"]
    assert HolisticVLMConfig().vision is None and "vision" not in HolisticVLMConfig().to_dict()
    with pytest.raises(ValueError, match="the same section"):
        HolisticVLMConfig(vision=BEFORE["vision"], vision_config=vision)


@pytest.mark.parametrize("name", DERIVED)
def test_sizes_that_contradict_the_stacks_are_refused(name: str) -> None:
    wrong = {**BEFORE, **DERIVED, name: 7}
    with pytest.raises(ValueError, match=f"{name} is 7, but it follows from the stacks"):
        HolisticVLMConfig.from_dict(wrong)
    with pytest.raises(CheckpointError, match=f"{name} is 7, but its stacks give"):
        to_architecture(wrong, "config.json")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("window", 0, "a whole number from 1 to 1048576"),
        ("window", "8", "a whole number from 1 to 1048576"),
        ("sinks", -1, "a whole number from 0 to 65536"),
        ("sinks", True, "a whole number from 0 to 65536"),
        ("conv_width", 0, "a whole number from 1 to 16"),
        ("sink_logits", "no", "true or false"),
    ],
)
def test_invalid_options_are_refused(option: str, value: object, expected: str) -> None:
    wrong = {**BEFORE, "mixer": {option: value}}
    sentence = f"mixer.{option} is {value!r}, expected {expected}"
    with pytest.raises(ValueError, match=sentence):
        HolisticVLMConfig.from_dict(wrong)
    with pytest.raises(CheckpointError, match=sentence):
        to_architecture(wrong, "config.json")
