"""Causal attention of transformers' text decoders through `ops.attention`, in distillation.

transformers gives attention of padded and packed rows a mask of all pairs of columns. Kernels that
take a mask compute all pairs, and their gradients may differ from run to run. The kernels of
`ops.attention` compute the pairs of each sequence alone, with deterministic gradients.
Legend: B batch, T columns, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmmamba_cli.ops.attention import VarlenMetadata, attention, supports_varlen
from mmmamba_cli.teachers.anatomy import text_decoder
from mmmamba_cli.teachers.packed_rows import packing_problem

# The name of this attention in `config._attn_implementation`.
IMPLEMENTATION = "mmmamba_varlen"
# Arguments of attention in transformers that `ops.attention` does not have.
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "cache")

_sequences: ContextVar[VarlenMetadata | None] = ContextVar("sequences", default=None)
# The sequences of each mask. A layer that is recomputed for its gradients gets the same mask again.
_sequences_of_mask: Any = WeakIdKeyDictionary()


def override_attention(model: Any) -> None:
    """Let a model's text decoder compute attention by `ops.attention` where the result is the same.

    It changes models of families whose rows can be packed: their masks are causal within sequences.
    Idempotent.
    """
    config = text_decoder(model).config
    if config._attn_implementation == "sdpa" and packing_problem(model.config) is None:
        config._attn_implementation = IMPLEMENTATION


@contextmanager
def row_sequences(sequences: VarlenMetadata | None) -> Iterator[None]:
    """Set the sequences of the rows of forward passes in this context; None if not known."""
    token = _sequences.set(sequences)
    try:
        yield
    finally:
        _sequences.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for PyTorch's attention, (B, 1, T, T) bool; None if rows are one sequence each.

    Remembers the sequences of the mask if they are known.
    """
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    sequences = _sequences.get()
    if mask is not None and sequences is not None and _is_mask_of(sequences, mask, kwargs):
        _sequences_of_mask[mask] = sequences
    return mask


def _is_mask_of(sequences: VarlenMetadata, mask: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a mask (B, 1, T, T) is causal within `sequences`.

    `kwargs` are those of `sdpa_mask`. transformers sets `use_vmap` for masks that a family combines
    with others.
    """
    window, rows, columns = kwargs.get("local_size"), mask.shape[0], mask.shape[-1]
    has_all_pairs = window is None or window >= columns
    return has_all_pairs and not kwargs.get("use_vmap") and sequences.bounds[-1] == rows * columns


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, H, T, P), key and value (B, K, T, P), as transformers calls it.

    Computes PyTorch's attention where the kernels do not support the arguments.

    Returns (B, T, H, P), and None in place of the attention weights.
    """
    varlen = None if attention_mask is None else _sequences_of_mask.get(attention_mask)
    is_known = attention_mask is None or varlen is not None
    if not (is_known and _is_plain(module, query, key, value, kwargs) and supports_varlen(query)):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    y = attention(query, key, value, is_causal=varlen is None, varlen=varlen)
    return y.transpose(1, 2).contiguous(), None


def _is_plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> bool:
    """Whether attention is causal, and has no arguments that `ops.attention` does not support."""
    length, dim = query.shape[2:]
    window, is_causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return (
        bool(is_causal)
        and key.shape[2:] == value.shape[2:] == query.shape[2:]
        and (window is None or window >= length)
        and not kwargs.get("dropout")
        and math.isclose(kwargs.get("scaling") or dim**-0.5, dim**-0.5, rel_tol=1e-6)
        and all(kwargs.get(name) is None for name in UNSUPPORTED_ARGUMENTS)
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
