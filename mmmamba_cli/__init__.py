"""Turn trained quadratic vision-language models into linear and hybrid state-space models.

Importing this package is light: no torch, no transformers. `mmmamba_cli.model` brings both and
registers the model classes; `mmmamba_cli.load(path)` and `load_processor(path)` do that for you.
"""

from __future__ import annotations

# As type checkers know it; importing `typing` takes longer than all else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mmmamba_cli.model import HolisticVLM
    from mmmamba_cli.processing import HolisticTextProcessor, HolisticVLMProcessor

__version__ = "0.1.0"


def load(
    path: str, *, device: Any = "cpu", dtype: Any = "auto", frozen: bool = False
) -> HolisticVLM:
    """Load a model, in eval mode, from any checkpoint `mmmamba` reads.

    `path` is one of our own folders, a published mmMamba, a teacher (HoVLE, or a plain language
    model), or the name of such a repository on the Hub. `device` and `dtype` are what torch
    takes for them, as objects or names; dtype "auto" keeps what is stored. Parameters require
    gradients, as after `from_pretrained`, unless `frozen`. Raises
    `CheckpointError` for what cannot be read, `MmmambaError` for a device that is not there.
    """
    from mmmamba_cli.checkpoint import load_model

    return load_model(path, device=device, dtype=dtype, frozen=frozen)


def load_processor(path: str) -> HolisticVLMProcessor | HolisticTextProcessor:
    """Load the processor of a checkpoint: tokenizer, chat template and, with vision, tiling.

    `path` is what `load` takes. Raises `CheckpointError` for what cannot be read, or has no
    tokenizer.
    """
    from mmmamba_cli.checkpoint import open_checkpoint
    from mmmamba_cli.errors import CheckpointError
    from mmmamba_cli.runs import open_processor

    checkpoint = open_checkpoint(path)
    processor = open_processor(checkpoint)
    if processor is None:
        raise CheckpointError(
            f"{path} has no tokenizer, so text cannot be read",
            "put the teacher's tokenizer beside it, or seed again with --tokenizer FILE",
        )
    return processor
