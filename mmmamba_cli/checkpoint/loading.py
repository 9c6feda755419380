"""A model in memory from any checkpoint we read, with every parameter accounted for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from mmmamba_cli.checkpoint import language_models
from mmmamba_cli.checkpoint.gguf_header import is_gguf
from mmmamba_cli.checkpoint.hovle import CHAT_STOP_IDS
from mmmamba_cli.checkpoint.opened import (
    OWN,
    Checkpoint,
    expected_tensors,
    open_checkpoint,
    stored_dtype,
)
from mmmamba_cli.checkpoint.tensor_info import parse_element, torch_dtype
from mmmamba_cli.devices import check_device
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.processing import as_ids


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    checkpoint: Checkpoint | None = None,
) -> HolisticVLM:
    """The model of a checkpoint, in eval mode. See `mmmamba_cli.load`."""
    device = check_device(device)
    opened = open_checkpoint(path) if checkpoint is None else checkpoint
    wanted = opened.dtype("model.text_embedding.weight")
    if dtype != "auto":
        wanted = parse_dtype(dtype)
    with torch.device("meta"):
        model = HolisticVLM(opened.config)
    state = {}
    for name in expected_tensors(opened.config):
        tensor = opened.read(name)
        # A tensor that needs no cast is copied, so that the model does not hang on the file.
        state[name] = tensor.to(device, stored_dtype(name, wanted), copy=True)
    model.load_state_dict(state, strict=not opened.config.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.config.dtype = wanted
    model.generation_config = generation_config(opened)
    model.requires_grad_(False)
    return model.eval()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 on CUDA, else fp32. Raises `CheckpointError`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return parse_dtype(name)


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """A floating dtype from torch's name or ours (bf16, fp16, fp32). Raises `CheckpointError`."""
    if isinstance(name, torch.dtype):
        return name
    return torch_dtype(parse_element(name))


def generation_config(opened: Checkpoint) -> GenerationConfig:
    """What stops a generation: the folder's own, or the chat template's stop tokens."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    has_own = (folder / "generation_config.json").is_file()
    if opened.model_type == OWN and has_own:
        return _saved(folder)
    found = default_generation_config(opened.config)
    if opened.model_type in language_models.MODEL_TYPES and has_own and not is_gguf(opened.path):
        # A chat model ends its turn with more tokens than its config names.
        ends = _saved(folder).eos_token_id
        found.eos_token_id = sorted(as_ids(found.eos_token_id) | as_ids(ends)) or None
    return found


def _saved(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'generation_config.json'} cannot be read as settings of a generation",
            "remove it, or take it from where the model came from",
        ) from error


def default_generation_config(config: HolisticVLMConfig) -> GenerationConfig:
    """Greedy, stopping at the chat template's stop tokens; image context is never generated."""
    ends, vision = as_ids(config.eos_token_id), config.vision_config
    if vision is not None and config.vocab_size > max(CHAT_STOP_IDS):
        ends |= set(CHAT_STOP_IDS)
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=config.pad_token_id,
        suppress_tokens=None if vision is None else [vision.image_token_id],
    )
