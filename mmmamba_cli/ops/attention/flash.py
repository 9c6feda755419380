"""PyTorch's FlashAttention-2 over variable-length sequences, with deterministic gradients.

`F.scaled_dot_product_attention` uses this kernel only for rows of equal length, and selects other
kernels otherwise, whose gradients are sums in varying order. Legend: B batch, T columns, H query
heads, K key/value heads, P head dim.

Source: Dao, FlashAttention-2, arXiv 2307.08691.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmmamba_cli.ops.attention.varlen import VarlenMetadata

# Head dims are multiples of 8. Above 192 some GPUs have no backward kernel.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 192
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def supports_flash(q: Tensor) -> bool:
    """Whether the kernels support q (..., P): half precision on an NVIDIA GPU that has bf16."""
    dim = q.shape[-1]
    if not q.is_cuda or autocast_dtype(q) not in FLASH_DTYPES:
        return False
    if dim % HEAD_DIM_MULTIPLE or dim > MAX_HEAD_DIM:
        return False
    return torch.backends.cuda.flash_sdp_enabled() and _is_available(q.device)


def autocast_dtype(q: Tensor) -> torch.dtype:
    """Autocast's dtype if autocast is enabled and q is not fp64, else the dtype of q."""
    device_type = q.device.type
    if q.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return q.dtype
    return torch.get_autocast_dtype(device_type)


@cache
def _is_available(device: torch.device) -> bool:
    return (
        torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


# Held while PyTorch's deterministic mode is changed.
_DETERMINISM_LOCK = threading.Lock()


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    varlen: VarlenMetadata | None,
) -> Tensor:
    """Compute `ops.attention` for `is_causal` or `varlen`.

    Raises:
        NotImplementedError: a mask, or inputs for which `supports_flash` is False.
    """
    if mask is not None or not (is_causal or varlen is not None):
        raise NotImplementedError("flash attention takes causal sequences, not a mask")
    if not supports_flash(q):
        raise NotImplementedError(
            f"flash attention takes half precision on an NVIDIA GPU and head dims that are "
            f"multiples of 8 up to 192, not {autocast_dtype(q)} of {q.shape[-1]} on {q.device}"
        )
    dtype, (batch, _, length, _) = autocast_dtype(q), q.shape
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    if varlen is None:
        y: Tensor = _Flash.apply(q, k, v, None, length)
    else:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        y = _Flash.apply(*flat, varlen.cu_seqlens, varlen.max_seqlen)
        y = y.unflatten(0, (batch, length))
    return y.transpose(1, 2)


class _Flash(torch.autograd.Function):
    """Causal attention of q (B, T, H, P) and k, v (B, T, K, P).

    With `cu_seqlens` (N + 1,), B and T are flattened to B * T columns.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int
    ) -> Tensor:
        y, logsumexp, *random, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, y, logsumexp, cu_seqlens, *random)
        ctx.max_seqlen = max_seqlen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp, cu_seqlens, *random = ctx.saved_tensors
        max_seqlen = ctx.max_seqlen
        with deterministic_mode():
            gradients = torch.ops.aten._flash_attention_backward(
                dy.contiguous(), q, k, v, y, logsumexp, cu_seqlens, cu_seqlens,
                max_seqlen, max_seqlen, 0.0, True, *random,
            )  # fmt: skip
        return *gradients, None, None


@contextmanager
def deterministic_mode() -> Iterator[None]:
    """Enable PyTorch's deterministic algorithms, which the kernels read when they are launched.

    The mode is global to the process, and the kernels have no argument for it. It is enabled only
    during the launch and by one thread at a time (autograd runs one thread per device), stays
    untouched if it is already enabled, and is restored unless another thread changed it meanwhile.
    Other threads may see it enabled during the launch.
    """
    with _DETERMINISM_LOCK:
        before = _determinism()
        if before == ENABLED:
            yield
            return
        settings: Any = torch.utils.deterministic
        fill_before = settings.fill_uninitialized_memory
        # torch.use_deterministic_algorithms would also import and configure the compiler.
        torch._C._set_deterministic_algorithms(ENABLED.enabled, warn_only=ENABLED.warn_only)
        # Filling is not needed: the kernels write every element of their outputs.
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            if _determinism() == ENABLED:
                torch._C._set_deterministic_algorithms(before.enabled, warn_only=before.warn_only)
            settings.fill_uninitialized_memory = fill_before


class Determinism(NamedTuple):
    """PyTorch's global deterministic mode; with `warn_only` the kernels stay nondeterministic."""

    enabled: bool
    warn_only: bool


ENABLED = Determinism(enabled=True, warn_only=False)


def _determinism() -> Determinism:
    return Determinism(
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
