"""Golden students as complete checkpoints in the published mmMamba layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = ("linear", "hybrid", "training")


def kept_layers(case: Path, kind: str) -> list[int]:
    """Attention layers, counted through both stacks."""
    if kind != "hybrid":
        return []
    golden = load_file(case / "golden.safetensors")
    kept: list[int] = golden["stage3.hybrid.softmax_layers"].tolist()
    return kept


def released_tensors(case: Path, kind: str) -> dict[str, Tensor]:
    """The teacher's tensors with the golden mixers of `kind` instead of its attention.

    `training` is the linear student under the names of the training code.
    """
    teacher = load_file(case / "model.safetensors")
    file = "student_mixers" if kind == "training" else f"released_{kind}_mixers"
    frame = {name: t for name, t in teacher.items() if ".attention." not in name}
    return frame | load_file(case / f"{file}.safetensors")


def mmmamba_hf_config(case: Path, kind: str) -> dict[str, Any]:
    """The teacher's config in the form of the published models."""
    raw: dict[str, Any] = json.loads((case / "config.json").read_text())
    embedding, language = raw["embedding_config"], raw["llm_config"]
    first, kept = embedding["num_hidden_layers"], kept_layers(case, kind)
    kinds = ["mha" if i in kept else "mamba2" for i in range(first + language["num_hidden_layers"])]
    embedding |= {"model_type": "mmMamba_embedding", "layers_block_type": kinds[:first]}
    language |= {
        "model_type": "mmMamba",
        "architectures": "mmMambaForCausalLM",
        "layers_block_type": kinds[first:],
    }
    return raw | {"model_type": "mmMamba_chat", "architectures": "mmMambaChatModel"}


def write_released(folder: Path, case: Path, kind: str, **changes: Any) -> Path:
    """Write the checkpoint folder; `changes` replace fields of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(mmmamba_hf_config(case, kind) | changes))
    tensors = {name: tensor.contiguous() for name, tensor in released_tensors(case, kind).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
