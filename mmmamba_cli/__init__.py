"""Turn trained quadratic vision-language models into linear and hybrid state-space models.

Importing this package imports neither torch nor transformers. `mmmamba_cli.model` imports both and
registers the model classes; `mmmamba_cli.load(path)` and `load_processor(path)` import it.
"""

from __future__ import annotations

# Type checkers treat it as `typing.TYPE_CHECKING`; importing `typing` would dominate this import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mmmamba_cli.model import HolisticVLM
    from mmmamba_cli.processing import HolisticTextProcessor, HolisticVLMProcessor

__version__ = "0.2.0"


def load(
    path: str, *, device: Any = "cpu", dtype: Any = "auto", frozen: bool = False
) -> HolisticVLM:
    """Load a model in eval mode from any checkpoint that `mmmamba` reads.

    `path` is a folder written by mmmamba, a published mmMamba, a teacher (HoVLE, or a plain
    language model), or the name of such a repository on the Hub. `device` and `dtype` are torch
    objects or their names; dtype "auto" keeps the stored dtype. Parameters require gradients, as
    after `from_pretrained`, unless `frozen`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        MmmambaError: the device is not available.
    """
    from mmmamba_cli.checkpoint import load_model

    return load_model(path, device=device, dtype=dtype, frozen=frozen)


def load_processor(path: str) -> HolisticVLMProcessor | HolisticTextProcessor:
    """Load the processor of a checkpoint: tokenizer, chat template and, with vision, tiling.

    `path` is that of `load`.

    Raises:
        CheckpointError: the checkpoint cannot be read or has no tokenizer.
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
