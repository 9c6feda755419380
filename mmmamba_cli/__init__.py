"""Turn trained quadratic vision-language models into linear and hybrid state-space models.

Importing this package is light: no torch, no transformers. `mmmamba_cli.model` brings both and
registers the model classes; `mmmamba_cli.load(path)` does that for you.
"""

from __future__ import annotations

# As type checkers know it; importing `typing` takes longer than all else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mmmamba_cli.model import HolisticVLM

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
