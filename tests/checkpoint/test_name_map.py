"""Wrapper prefixes of DDP, torch.compile and FSDP in state dicts, and adapter weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmmamba_cli.checkpoint.tensor_source import open_source
from mmmamba_cli.errors import CheckpointError

TENSORS = {
    "embed.weight": torch.arange(6.0).view(2, 3),
    "layers.0.attn.weight": torch.arange(4.0).view(2, 2),
    "layers.0.norm.weight": torch.ones(2),
}
FRONTS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "_orig_mod._fsdp_wrapped_module.",
)


def write(folder: Path, state: dict[str, Tensor], kind: str) -> Path:
    """Write one file, or two and an index; return the path to open."""
    folder.mkdir(exist_ok=True)
    state = {name: tensor.clone() for name, tensor in state.items()}
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif kind == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        suffix = ".safetensors" if kind == "sharded safetensors" else ".bin"
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        weight_map = {}
        for number, (name, tensor) in enumerate(state.items()):
            file = folder / f"{stem}-{number}{suffix}"
            (save_file if stem == "model" else torch.save)({name: tensor}, file)
            weight_map[name] = file.name
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "kind", ["safetensors", "pickle", "sharded safetensors", "sharded pickles"]
)
@pytest.mark.parametrize("front", FRONTS)
def test_a_wrapped_model_is_read(tmp_path: Path, kind: str, front: str) -> None:
    plain = open_source(write(tmp_path / "plain", TENSORS, "safetensors"))
    state = {front + name: tensor for name, tensor in TENSORS.items()}
    with open_source(write(tmp_path / "wrapped", state, kind)) as source:
        assert sorted(source.names) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(source.read(name), tensor)
            assert source.info(name).shape == tuple(tensor.shape)
        assert source.content_hash() == plain.content_hash()


def test_wrapped_layers_are_read(tmp_path: Path) -> None:
    """torch.compile, FSDP and activation checkpointing of single layers."""
    state = {
        "embed.weight": TENSORS["embed.weight"],
        "layers.0._orig_mod.attn._fsdp_wrapped_module.weight": TENSORS["layers.0.attn.weight"],
        "layers.0._orig_mod._checkpoint_wrapped_module.norm.weight": torch.ones(2),
    }
    with open_source(write(tmp_path / "x", state, "safetensors")) as source:
        assert sorted(source.names) == sorted(TENSORS)


def test_state_dicts_saved_by_torch_wrappers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    names = sorted(model.state_dict())
    compiled = torch.compile(torch.nn.DataParallel(model))
    model[1] = torch.compile(model[1])
    assert {name.split(".")[0] for name in compiled.state_dict()} == {"_orig_mod"}
    torch.save(compiled.state_dict(), tmp_path / "x.pt")
    with open_source(tmp_path / "x.pt") as source:
        assert sorted(source.names) == names


def test_a_submodule_called_module_keeps_its_name(tmp_path: Path) -> None:
    state = {"layers.module.weight": torch.ones(1), "embed.weight": torch.ones(1)}
    with open_source(write(tmp_path / "x", state, "safetensors")) as source:
        assert sorted(source.names) == sorted(state)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("module.", "", "the wrapper prefix 'module.', as 'module.a', and others with none, as"),
        ("_orig_mod.", "", "the wrapper prefix '_orig_mod.', as '_orig_mod.a', and others with"),
        ("module.", "_orig_mod.", "prefix 'module.', as 'module.a', and others with '_orig_mod.'"),
    ],
)
def test_mixed_prefixes_are_named(
    tmp_path: Path, kind: str, one: str, other: str, said: str
) -> None:
    state = {f"{one}a": torch.zeros(1), f"{other}b": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="the model inside the wrapper") as raised:
        open_source(write(tmp_path / "x", state, kind))
    assert said in str(raised.value)


def test_two_tensors_of_one_name_are_named(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(1), "a._orig_mod.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"are both 'a\.weight'"):
        open_source(write(tmp_path / "x", state, "safetensors"))


ADAPTERS = {
    "an adapter": ["base_model.model.layers.0.attn.lora_A.weight"],
    "a wrapped model": ["base_model.model.embed.weight"],
    "injected": ["layers.0.attn.base_layer.weight", "layers.0.attn.lora_A.default.weight"],
    "compiled": ["_orig_mod.base_model.model.embed.weight"],
}


@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_adapters_are_refused_with_a_hint(tmp_path: Path, kind: str, names: list[str]) -> None:
    state = {name: torch.zeros(1) for name in names}
    with pytest.raises(CheckpointError, match=r"holds a peft adapter: .*merge_and_unload"):
        open_source(write(tmp_path / "x", state, kind))


def test_an_adapter_folder_is_refused_with_a_hint(tmp_path: Path) -> None:
    save_file({"base_model.model.a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a peft adapter: .*merge_and_unload"):
        open_source(tmp_path)
