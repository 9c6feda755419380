"""Cheaper functions in the place of some of transformers' modules, while a model is distilled.

The host queues a kernel for each operator of eager PyTorch, and small models leave a GPU waiting
for it. Legend: B batch, T columns, D hidden size, N image tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from mmmamba_cli.ops import rms_norm
from mmmamba_cli.ops.backends import supports_triton
from mmmamba_cli.teachers import MixerInPlace
from mmmamba_cli.teachers.anatomy import QK_NORMS, text_decoder

# Norms that compute `ops.rms_norm`. A subclass may compute something else, so names are exact.
RMS_NORMS = frozenset(
    {
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Ministral3RMSNorm",
        "MixtralRMSNorm",
        "Qwen2RMSNorm",
        "Qwen2MoeRMSNorm",
        "Qwen2_5_VLRMSNorm",
        "Qwen3RMSNorm",
        "Qwen3MoeRMSNorm",
        "Qwen3VLTextRMSNorm",
        "Qwen3VLMoeTextRMSNorm",
    }
)


def override_modules(model: Any) -> None:
    """Override the norms and the deepstack of a model's text decoder. Idempotent."""
    decoder = text_decoder(model)
    for module in decoder.modules():
        if isinstance(module, MixerInPlace):
            for name in QK_NORMS:
                # The mixer rounds the result to the dtype of q or k.
                _override_norm(getattr(module, name, None), keeps_dtype=True)
    for module in decoder.modules():
        _override_norm(module, keeps_dtype=False)
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = add_to_columns


def _override_norm(norm: Any, keeps_dtype: bool) -> None:
    """Let a norm in `RMS_NORMS` run as one kernel forward and one backward, where there is one."""
    if type(norm).__name__ not in RMS_NORMS or "forward" in vars(norm):
        return
    norm.forward = partial(_norm, norm, keeps_dtype)


def _norm(norm: nn.Module, keeps_dtype: bool, hidden_states: Tensor) -> Tensor:
    weight: Any = norm.weight
    same = keeps_dtype or hidden_states.dtype == weight.dtype
    if not same or not supports_triton(hidden_states, weight):
        original: Tensor = type(norm).forward(norm, hidden_states)
        return original
    return rms_norm(hidden_states, weight, norm.variance_epsilon)  # type: ignore[arg-type]


def add_to_columns(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor
) -> Tensor:
    """Add the features of a tower's inner layer to the image tokens (deepstack of Qwen3-VL).

    The class selects columns by their mask, which waits for a GPU, three more times in the
    backward pass.

    Args:
        hidden_states: (B, T, D).
        visual_pos_masks: (B, T) bool, True at the image tokens, N in all.
        visual_embeds: (N, D).
    """
    mask = visual_pos_masks.to(hidden_states.device).flatten()
    features = visual_embeds.to(hidden_states.device, hidden_states.dtype)
    places = (mask.cumsum(0) - 1).clamp(min=0)
    added = features.index_select(0, places).masked_fill(~mask.unsqueeze(1), 0)
    return hidden_states + added.view_as(hidden_states)
