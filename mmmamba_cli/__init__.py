"""Turn trained quadratic vision-language models into linear and hybrid state-space models.

Importing this package imports neither torch nor transformers. `mmmamba_cli.model` imports both and
registers the model classes; `mmmamba_cli.load(path)` and `load_processor(path)` import it.
"""

from __future__ import annotations

# Type checkers treat it as `typing.TYPE_CHECKING`; importing `typing` would dominate this import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from transformers import PreTrainedModel

__version__ = "0.2.0"


def load(
    path: str, *, device: Any = "cpu", dtype: Any = "auto", frozen: bool = False
) -> PreTrainedModel:
    """Load a model in eval mode from any checkpoint that `mmmamba` reads.

    `path` is a folder written by mmmamba, a published mmMamba, a teacher (HoVLE, a plain language
    model, or the folder of another model of transformers), or the name of such a repository on the
    Hub. `device` and `dtype` are torch objects or their names; dtype "auto" keeps the stored dtype.
    Parameters require gradients, as after `from_pretrained`, unless `frozen`. The model is a
    `HolisticVLM`, or for a student in the place of its teacher's attention a subclass of the
    teacher's class.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        MmmambaError: the device is not available.
    """
    from mmmamba_cli.checkpoint import (
        Checkpoint,
        load_in_place_model,
        load_model,
        open_any_checkpoint,
    )

    checkpoint = open_any_checkpoint(path)
    if isinstance(checkpoint, Checkpoint):
        return load_model(path, device=device, dtype=dtype, frozen=frozen, checkpoint=checkpoint)
    return load_in_place_model(checkpoint, device=device, dtype=dtype, frozen=frozen)


def load_processor(path: str) -> Any:
    """Load the processor of a checkpoint: tokenizer, chat template and, with vision, tiling.

    `path` is that of `load`. For a student in the place of its teacher's attention it is the
    teacher's own processor, or its tokenizer if it reads text only.

    Raises:
        CheckpointError: the checkpoint cannot be read or has no tokenizer.
    """
    from mmmamba_cli.checkpoint import Checkpoint, load_in_place_processor, open_any_checkpoint
    from mmmamba_cli.errors import CheckpointError
    from mmmamba_cli.runs import open_processor

    checkpoint = open_any_checkpoint(path)
    processor = (
        open_processor(checkpoint)
        if isinstance(checkpoint, Checkpoint)
        else load_in_place_processor(checkpoint)
    )
    if processor is None:
        raise CheckpointError(
            f"{path} has no tokenizer, so text cannot be read",
            "put the teacher's tokenizer beside it, or seed again with --tokenizer FILE",
        )
    return processor
