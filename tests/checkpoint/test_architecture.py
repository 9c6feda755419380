"""Parameter shapes computed from an architecture, compared with those of a real model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_model

from mmmamba_cli.architecture import Architecture, parameter_shapes
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.checkpoint.safetensors_file import DTYPES
from mmmamba_cli.checkpoint.tensor_info import ITEMSIZES, TensorInfo, parse_dtype_name, torch_dtype
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig

BASE = Architecture.from_config(small_model("amam").config)
STACK = dict(BASE.language_stack)
PLAIN: dict[str, Any] = {
    "embedding_stack": None,
    "vision": None,
    "layer_types": BASE.layer_types[2:],
}
VARIANTS = {
    "pictures": {},
    "all attention": {"layer_types": ["full_attention"] * 4},
    "linear": {"layer_types": ["linear_attention"] * 4},
    "mixers": {"layer_types": ["linear_attention"] * 4, "mixers": ["kda", "gla", "kda", "mamba2"]},
    "mixer options": {"mixer": {"conv_width": 4, "d_skip": True, "qk_norm": True, "rope": True}},
    "language model": PLAIN,
    "tied": {**PLAIN, "tie_word_embeddings": True},
    "biases": {**PLAIN, "language_stack": {**STACK, "qkv_bias": True, "output_bias": True}},
    "qwen2": {**PLAIN, "language_stack": {**STACK, "qkv_bias": True}},
    "norms": {**PLAIN, "language_stack": {**STACK, "qk_norm": True}},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameter_shapes_match_the_model_in_order(variant: dict[str, Any]) -> None:
    architecture = replace(BASE, **variant)
    config = HolisticVLMConfig(**architecture.values)
    with torch.device("meta"):
        model = HolisticVLM(config)
    made = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del made["lm_head.weight"]
    assert list(parameter_shapes(architecture).items()) == list(made.items())
    assert parameter_shapes(config) == parameter_shapes(architecture)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_architecture_and_config_agree(variant: dict[str, Any]) -> None:
    architecture = replace(BASE, **variant)
    config = HolisticVLMConfig(**architecture.values)
    for name in (
        "embedding",
        "language",
        "mixer_config",
        "mixer_names",
        "num_embedding_layers",
        "num_hidden_layers",
        "attention_layers",
    ):
        assert getattr(architecture, name) == getattr(config, name), name
    vision = config.vision_config
    assert architecture.vision_config == (None if vision is None else vision.typed)
    for layer in range(architecture.num_hidden_layers):
        assert architecture.stack_of(layer) == config.stack_of(layer)


def test_native_checkpoint_keeps_every_config_field(tmp_path: Path) -> None:
    model = small_model("amam", d_skip=True)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    found = open_checkpoint(tmp_path)
    assert found.config.to_dict() == HolisticVLMConfig.from_pretrained(tmp_path).to_dict()
    assert found.architecture == Architecture.from_config(found.config)


def test_default_mixers_are_not_stored(tmp_path: Path) -> None:
    """A config without other mixers is that of releases that know none."""
    small_model("amam").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "mixers" not in raw
    raw["mixers"] = ["attention", "mamba2", "attention", "mamba2"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(tmp_path).config.mixers is None


FAULTS = {
    "no list": ("gated_delta", "mixers is 'gated_delta', expected a list of names"),
    "no names": ([1, 2, 3, 4], r"mixers is \[1, 2, 3, 4\], expected a list of names"),
    "too few": (["mamba2"], "mixers has 1 entries, but there are 4 layers"),
    "unknown": (["attention", "rwkv", "attention", "mamba2"], r"mixers\[1\] is 'rwkv', known are "),
    "attention in a linear layer": (
        ["attention"] * 4,
        r"mixers\[1\] is attention, which is no mixer of a linear_attention layer",
    ),
    "a recurrent mixer in an attention layer": (
        ["kda", "kda", "attention", "kda"],
        r"mixers\[0\] is kda, which is no mixer of a full_attention layer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_mixers_in_a_config(tmp_path: Path, fault: str) -> None:
    value, message = FAULTS[fault]
    small_model("amam").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "mixers": value}))
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        open_checkpoint(tmp_path)


def test_an_option_that_may_be_zero(tmp_path: Path) -> None:
    small_model("wwww", window=5, sinks=0).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["mixer"]["sinks"] == 0
    assert open_checkpoint(tmp_path).config.mixer_config.sinks == 0
    for option, value in (("sinks", False), ("sinks", -1), ("window", 0)):
        wrong = {**raw, "mixer": {**raw["mixer"], option: value}}
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=rf"mixer\.{option} is {value}, expected a whole"):
            open_checkpoint(tmp_path)


def test_an_option_that_no_layer_reads(tmp_path: Path) -> None:
    small_model("dddd").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["mixer"]["d_skip"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = r"mixer.d_skip is True, but no layer reads it \(Gated DeltaNet\)"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("element", DTYPES.values())
def test_dtype_names_and_sizes_match_torch(element: str) -> None:
    dtype = torch_dtype(element)
    assert ITEMSIZES[element] == dtype.itemsize
    info = TensorInfo.of(dtype, (3, 5))
    assert (info.dtype_name, info.dtype, info.nbytes) == (element, dtype, 15 * dtype.itemsize)


@pytest.mark.parametrize(
    ("name", "element"),
    [("bf16", "bfloat16"), ("float16", "float16"), ("double", "float64"), ("fp32", "float32")],
)
def test_parse_dtype_name(name: str, element: str) -> None:
    assert parse_dtype_name(name) == element


@pytest.mark.parametrize("name", ["int8", "bool", "", "torch", "fp4", "nn"])
def test_unknown_dtype_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="known are: bf16, fp16, fp32"):
        parse_dtype_name(name)
