"""Model loading from any supported checkpoint, and its generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import llama_family
from mmmamba_cli.checkpoint.checkpoint import (
    DTYPE_TENSOR,
    NATIVE_MODEL_TYPE,
    Checkpoint,
    open_checkpoint,
    stored_dtype,
)
from mmmamba_cli.checkpoint.config_fields import token_ids
from mmmamba_cli.checkpoint.gguf_file import is_gguf
from mmmamba_cli.checkpoint.hovle import CHAT_STOP_IDS
from mmmamba_cli.checkpoint.tensor_info import parse_dtype_name, torch_dtype
from mmmamba_cli.checkpoint.tensor_io import cast
from mmmamba_cli.devices import check_device
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.processing import as_id_set

GENERATION_CONFIG = "generation_config.json"
# Generation settings that a student with the same vocabulary inherits from its teacher.
INHERITED_SETTINGS = frozenset(
    {
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size"),
        *("num_beams", "length_penalty", "early_stopping", "renormalize_logits"),
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
        *("exponential_decay_length_penalty", "remove_invalid_values"),
        *("forced_bos_token_id", "forced_eos_token_id", "stop_strings"),
    }
)
TOKEN_AND_FILE_FIELDS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("transformers_version", "_from_model_config"),
    }
)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    frozen: bool = False,
    checkpoint: Checkpoint | None = None,
) -> HolisticVLM:
    """Load the model of a checkpoint in eval mode. See `mmmamba_cli.load`."""
    device = check_device(device)
    if checkpoint is None:
        checkpoint = open_checkpoint(path)
    wanted = checkpoint.dtype(DTYPE_TENSOR)
    if dtype != "auto":
        wanted = parse_dtype(dtype)
    with torch.device("meta"):
        model = HolisticVLM(checkpoint.config)
    state = {}
    for name in parameter_shapes(checkpoint.config):
        tensor = checkpoint.read(name)
        # `cast` always copies, so that the model does not depend on the memory-mapped file.
        state[name] = cast(tensor, stored_dtype(name, wanted), name, device)
    model.load_state_dict(state, strict=not checkpoint.config.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.config.dtype = wanted
    model.generation_config = generation_config(checkpoint)
    # As `from_pretrained` sets it; adapters name their base model by it.
    model.name_or_path = model.config.name_or_path = str(path)
    return model.requires_grad_(not frozen).eval()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Parse a dtype; "auto" is bf16 on CUDA and fp32 elsewhere. Raises `CheckpointError`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return parse_dtype(name)


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Parse a floating dtype: torch's name, bf16, fp16 or fp32. Raises `CheckpointError`."""
    if isinstance(name, torch.dtype):
        return name
    return torch_dtype(parse_dtype_name(name))


def generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The generation config: stop tokens and sampling settings.

    A native folder keeps its own. Other checkpoints get the chat template's stop tokens and the
    `recommended_settings` of their `generation_config.json`.
    """
    if (
        checkpoint.model_type == NATIVE_MODEL_TYPE
        and (checkpoint.folder / GENERATION_CONFIG).is_file()
    ):
        return _read_generation_config(checkpoint.folder)
    found = default_generation_config(checkpoint.config)
    carried, _ = recommended_settings(checkpoint)
    suppressed = {*(found.suppress_tokens or ()), *carried.pop("suppress_tokens", ())}
    found.suppress_tokens = sorted(suppressed) or None
    found.update(**carried)
    if checkpoint.model_type in llama_family.MODEL_TYPES and _has_generation_config(checkpoint):
        # A chat model ends its turn with more tokens than its config lists.
        ends = token_ids(
            {"eos_token_id": _read_generation_config(checkpoint.folder).eos_token_id},
            "eos_token_id",
            str(checkpoint.folder / GENERATION_CONFIG),
        )
        found.eos_token_id = sorted(as_id_set(found.eos_token_id) | as_id_set(ends)) or None
    return found


def recommended_settings(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Settings of a teacher's `generation_config.json`: those a student inherits, and other names.

    A student inherits the fields of `INHERITED_SETTINGS`. Token ids are in neither result: the
    config and the tokenizer give them. Raises `CheckpointError` for a file that cannot be read.
    """
    if checkpoint.model_type == NATIVE_MODEL_TYPE or not _has_generation_config(checkpoint):
        return {}, []
    saved, plain = (
        _read_generation_config(checkpoint.folder).to_dict(),
        GenerationConfig().to_dict(),
    )
    stated = {
        key: value
        for key, value in saved.items()
        if key not in TOKEN_AND_FILE_FIELDS and value is not None and value != plain.get(key)
    }
    carried = {key: value for key, value in stated.items() if key in INHERITED_SETTINGS}
    return carried, sorted(set(stated) - set(carried))


def _has_generation_config(checkpoint: Checkpoint) -> bool:
    return not is_gguf(checkpoint.path) and (checkpoint.folder / GENERATION_CONFIG).is_file()


def _read_generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / GENERATION_CONFIG} cannot be read as settings of a generation",
            "remove it, or take it from where the model came from",
        ) from error


def default_generation_config(config: HolisticVLMConfig) -> GenerationConfig:
    """Greedy, with the chat template's stop tokens; the image context token is suppressed."""
    ends, vision = as_id_set(config.eos_token_id), config.vision_config
    if vision is not None and config.vocab_size > max(CHAT_STOP_IDS):
        ends |= set(CHAT_STOP_IDS)
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=config.pad_token_id,
        suppress_tokens=None if vision is None else [vision.image_token_id],
    )
