"""FlashAttention-2 as PyTorch has it, over sequences laid end to end, gradients in a fixed order.

`scaled_dot_product_attention` has the same kernels for rows of one length only, and elsewhere
takes others, whose gradients are added up in whatever order they come. Legend: B batch, T columns,
H query heads, K key/value heads, P head dim, N sequences.

Source: Dao, FlashAttention-2, arXiv 2307.08691.

What FlashAttention, as PyTorch has it, can do here.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmmamba_cli.ops.attention.varlen import Segments

# Beyond 192 some GPUs have no gradients.
MULTIPLE, MOST = 8, 192
DTYPES = (torch.float16, torch.bfloat16)


def suits_flash(q: Tensor) -> bool:
    """Whether the kernels run for queries (..., P): an NVIDIA GPU with bf16, half precision."""
    dim = q.shape[-1]
    if not q.is_cuda or computed_in(q) not in DTYPES or dim % MULTIPLE or dim > MOST:
        return False
    return torch.backends.cuda.flash_sdp_enabled() and _is_there(q.device)


def computed_in(q: Tensor) -> torch.dtype:
    """The dtype that autocast asks for, or the tensor's own; fp64 stays."""
    kind = q.device.type
    if q.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return q.dtype
    return torch.get_autocast_dtype(kind)


@cache
def _is_there(device: torch.device) -> bool:
    return (
        torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


_SWITCH = threading.Lock()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """As `ops.attention`; NotImplementedError for a mask, and where the kernels do not run."""
    if mask is not None or not (is_causal or segments is not None):
        raise NotImplementedError("flash attention takes causal sequences, not a mask")
    if not suits_flash(q):
        raise NotImplementedError(
            f"flash attention takes half precision on an NVIDIA GPU and head dims that are "
            f"multiples of 8 up to 192, not {computed_in(q)} of {q.shape[-1]} on {q.device}"
        )
    dtype, (batch, _, length, _) = computed_in(q), q.shape
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    if segments is None:
        y: Tensor = _Flash.apply(q, k, v, None, length)
    else:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        y = _Flash.apply(*flat, segments.bounds, segments.longest)
        y = y.unflatten(0, (batch, length))
    return y.transpose(1, 2)


class _Flash(torch.autograd.Function):
    """q (B, T, H, P) and k, v (B, T, K, P) without `bounds`; with, the same without B."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int
    ) -> Tensor:
        y, logsumexp, *random, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, y, logsumexp, bounds, *random)
        ctx.longest = longest
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp, bounds, *random = ctx.saved_tensors
        longest = ctx.longest
        with fixed_order():
            gradients = torch.ops.aten._flash_attention_backward(
                dy.contiguous(), q, k, v, y, logsumexp, bounds, bounds, longest, longest, 0.0, True,
                *random,
            )  # fmt: skip
        return *gradients, None, None


@contextmanager
def fixed_order() -> Iterator[None]:
    """Within it, kernels that read PyTorch's switch for deterministic algorithms sum in one order.

    PyTorch has this switch once for a process, and the kernels take no argument in its place. So it
    is on only while they are launched, one thread at a time (gradients of several devices are
    computed by a thread each), is not touched where the process has it on already, and is set back
    unless someone else changed it meanwhile. Other threads may see it on for that moment.
    """
    with _SWITCH:
        before = _switch()
        if before == ON:
            yield
            return
        filling: Any = torch.utils.deterministic
        fills = filling.fill_uninitialized_memory
        # Not torch.use_deterministic_algorithms, which imports and changes the compiler as well.
        torch._C._set_deterministic_algorithms(ON.enabled, warn_only=ON.warn_only)
        # All of what the kernels leave is written.
        filling.fill_uninitialized_memory = False
        try:
            yield
        finally:
            if _switch() == ON:
                torch._C._set_deterministic_algorithms(before.enabled, warn_only=before.warn_only)
            filling.fill_uninitialized_memory = fills


class Switch(NamedTuple):
    """PyTorch's switch for deterministic algorithms; `warn_only` keeps the kernels' own order."""

    enabled: bool
    warn_only: bool


ON = Switch(enabled=True, warn_only=False)


def _switch() -> Switch:
    return Switch(
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
