"""Valid inputs to corrupt: a small teacher, a language model, their runs and products."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_checkpoint import CONFIG, write_hovle
from small_language_models import write_tokenizer

from mmmamba_cli.checkpoint import hovle, llama_family
from mmmamba_cli.checkpoint.name_map import TensorMapping
from mmmamba_cli.cli import main

STACK = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
HOVLE: dict[str, Any] = {
    **CONFIG,
    "embedding_config": {
        **CONFIG["embedding_config"],
        **STACK,
        "model_type": "holistic_embedding",
        "num_hidden_layers": 1,
        "llm_vocab_size": 535,
        "downsample_ratio": 0.5,
        "pixel_shuffle_loc": "pre",
        "special_token_maps": {},
    },
    "llm_config": {
        **CONFIG["llm_config"],
        **STACK,
        "num_hidden_layers": 2,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    },
    "normalize_encoder_output": False,
}
LLAMA: dict[str, Any] = {
    **STACK,
    "model_type": "llama",
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2}
INTERNLM2 = {**LLAMA, "model_type": "internlm2", "vocab_size": 535, "bias": False}


def tensors_of(table: list[TensorMapping]) -> dict[str, torch.Tensor]:
    """Random tensors under the foreign names of a name map."""
    rng = torch.Generator().manual_seed(0)
    shapes = {name: shape for mapping in table for name, shape in mapping.foreign.items()}
    return {name: torch.randn(shape, generator=rng) / 6 for name, shape in shapes.items()}


def write_teacher(folder: Path) -> Path:
    """Write a HoVLE of three layers with its tokenizer."""
    write_hovle(folder)
    (folder / "config.json").write_text(json.dumps(HOVLE))
    table = hovle.name_map(HOVLE, hovle.to_config(HOVLE))
    save_file(tensors_of(table), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_language_model(folder: Path, raw: dict[str, Any]) -> Path:
    """Write a language model of two layers with a tokenizer."""
    folder.mkdir()
    table = llama_family.name_map(raw, llama_family.to_config(raw))
    save_file(tensors_of(table), folder / "model.safetensors", {"format": "pt"})
    if raw["model_type"] == "internlm2":
        write_hovle(folder)
    else:
        write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def mmmamba(*words: object) -> None:
    """Run a command that must succeed."""
    before, sys.argv = sys.argv, ["mmmamba", *map(str, words)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main()
    except SystemExit as ended:
        assert not ended.code, words
    finally:
        sys.argv = before


class Materials:
    """Read-only folders by name."""

    def __init__(self, home: Path):
        self.hovle = write_teacher(home / "hovle")
        self.run = home / "run"
        mmmamba("seed", self.hovle, "--run", self.run, "--no-report", "--dtype", "fp32")
        mmmamba("hybridize", "--run", self.run, "--attn-layers", 1)
        self.released = home / "released"
        words = ("--run", self.run, "--format", "mmmamba-hf", "--out", self.released)
        mmmamba("export", *words)
        self.llama = write_language_model(home / "llama", LLAMA)
        self.qwen2 = write_language_model(home / "qwen2", QWEN2)
        self.internlm2 = write_language_model(home / "internlm2", INTERNLM2)

    @property
    def own(self) -> Path:
        return self.run / "products/hybrid-1"
