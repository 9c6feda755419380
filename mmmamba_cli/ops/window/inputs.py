"""The validated arguments of `window_attention` and `window_matrix`, for their backends."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mmmamba_cli.ops.window.state import WindowState


@dataclass(frozen=True)
class WindowInputs:
    """Shapes as in `ops.window_attention`, T >= 1; `past` belongs to a row's first sequence.

    For `window_matrix`, `past` is None and `v` is not read.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window: int
    sinks: int
    sink_logits: Tensor | None
    past: WindowState | None
    mask: Tensor | None
    seq_idx: Tensor | None
    block_size: int


class WindowBackend(Protocol):
    """A backend of `window_attention`, y (B, H, T, P), or of `window_matrix`, (B, H, T, T)."""

    def __call__(self, inputs: WindowInputs) -> Tensor: ...
