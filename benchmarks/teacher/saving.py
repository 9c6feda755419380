"""Training states, and the teacher as a HoVLE folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import mmmamba_cli
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.checkpoint.name_map import foreign_tensors
from mmmamba_cli.model import HolisticVLM

STATE = "state.pt"


def save_state(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Write the state atomically."""
    beside = folder / f"{STATE}.new"
    state = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state, beside)
    beside.replace(folder / STATE)


def load_state(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load the state, if there is one; returns the next step."""
    file = folder / STATE
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def read_teacher(folder: Path, model: HolisticVLM) -> None:
    """Load the weights of a written teacher into `model`."""
    state = mmmamba_cli.load(folder, dtype=torch.float32).state_dict()
    model.load_state_dict(state)


def write_teacher(folder: Path, raw: Mapping[str, Any], model: HolisticVLM) -> None:
    """Write `config.json` and `model.safetensors` in bf16, with HoVLE's tensor names."""
    hidden, rows = model.config.hidden_size, int(raw["llm_config"]["vocab_size"])
    # HoVLE has a class embedding and a second token table; no forward uses them.
    unused = {
        "unused.class_embedding": torch.zeros(1, 1, hidden),
        "unused.language_token_embedding.weight": torch.zeros(rows, hidden),
    }
    ours = {**{name: value.cpu() for name, value in model.state_dict().items()}, **unused}
    name_map = hovle.name_map(raw, model.config)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous().clone()
        for name, tensor in foreign_tensors(name_map, ours.__getitem__)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
