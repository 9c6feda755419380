"""Teachers with faults: values, tensors and configs that `seed` refuses or does without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_seed_and_hybridize import seed

from mmmamba_cli.errors import CheckpointError, RecipeError


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights(hovle_folder: Path, tmp_path: Path, value: float) -> None:
    state = load_file(hovle_folder / "model.safetensors")
    state["language_model.model.layers.1.feed_forward.w2.weight"][3, 3] = value
    save_file(state, hovle_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w2\.weight"):
        seed(hovle_folder, tmp_path / "run")
    assert not (tmp_path / "run" / "products" / "seed").exists()


def test_attention_layers_that_do_not_fit_are_refused_first(
    hovle_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"layers\.attention: is 99, must be from 0 to \d"):
        seed(hovle_folder, tmp_path / "run", "--set", "layers.attention=99")
    assert not (tmp_path / "run").exists()


def test_missing_extra_and_misshaped_tensors(hovle_folder: Path, tmp_path: Path) -> None:
    state = load_file(hovle_folder / "model.safetensors")
    state.pop("language_model.model.norm.weight")
    state["surprise"] = torch.zeros(1)
    state["language_model.output.weight"] = torch.zeros(299, 64)
    save_file(state, hovle_folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        seed(hovle_folder, tmp_path / "run")
    for part in ("missing 1 tensors: language_model.model.norm.weight", "surprise", "[299, 64]"):
        assert part in str(caught.value)


CONFIG_FAULTS = {
    "not json": (None, "is not valid JSON"),
    "unknown type": ({"model_type": "llava"}, "is not a complete llava checkpoint: missing"),
    "no section": ({"llm_config": None}, "llm_config is missing"),
    "text for a size": ({"llm_config": {"hidden_size": "64"}}, "llm_config.hidden_size is '64'"),
    "odd heads": ({"llm_config": {"num_key_value_heads": 3}}, "num_key_value_heads 3"),
    "bias": ({"llm_config": {"bias": True}}, "llm_config.bias is True"),
    "shuffle": ({"embedding_config": {"pixel_shuffle_loc": "mid"}}, "pixel_shuffle_loc is 'mid'"),
    "scaling": ({"llm_config": {"rope_scaling": {"type": "yarn"}}}, "of type 'yarn'"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_broken_configs(hovle_folder: Path, tmp_path: Path, fault: str) -> None:
    change, message = CONFIG_FAULTS[fault]
    file = hovle_folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in (change or {}).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    file.write_text("{" if change is None else json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        seed(hovle_folder, tmp_path / "run")


@pytest.mark.parametrize("architectures", [None, "InternVLChatModel", ["Another"]])
def test_architectures_do_not_matter(
    hovle_folder: Path, tmp_path: Path, architectures: object
) -> None:
    file = hovle_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": architectures}))
    seed(hovle_folder, tmp_path / "run")


def test_state_dict_without_config(hovle_ckpt: Path, tmp_path: Path) -> None:
    config = (hovle_ckpt.parent / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"comes without a config.*--config.*--arch"):
        seed(hovle_ckpt, tmp_path / "run")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        seed(hovle_ckpt, tmp_path / "run", "--arch", "hovle-2.6b")
    seed(hovle_ckpt, tmp_path / "run", "--config", config)
