"""One token of grouped-query softmax attention over a cache: rotate, store, attend.

Split over the columns of the cache as in Flash-Decoding (Dao et al., 2023).
"""

from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import (
    check_shape,
    fits_grid,
    kernel_backends,
    pick_backend,
    suits_triton,
)
from mmmamba_cli.ops.decode import reference


class AttentionStepBackend(Protocol):
    """What `attention_step` hands to a backend: its own arguments, checked."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        starts: Tensor | None,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor: ...


ATTENTION_STEP_BACKENDS: dict[str, AttentionStepBackend] = {
    "reference": reference.attention_step,
    **kernel_backends("decode", "attention_step"),
}
# A program holds a tile of as many columns as it has registers for.
MOST_TRITON_DIM = 256


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(q K^T / sqrt(P)) V over the columns starts[b] to `position` of a cache.

    q and k are turned by their angle (halves rotated, as in Llama) first, and k and v stored in
    column `position`; query head h looks at key/value head h // (H / K).

    Args:
        q: (B, H, P); like k and v a slice of one wide projection, heads side by side in a row.
        k, v: (B, K, P).
        keys, values: the cache, (B, K, S, P); written in one column.
        position: (1,) integer below S, the token's column, read on the device.
        starts: (B,) integers, each row's first column that is no padding, at most `position`; 0
            if None.
        cos, sin: cosine and sine of the token's angles, (B, P) or (1, P), both halves the same.
        backend: "reference", "triton", which has no gradient, or "auto": triton on a GPU if it is
            installed, P is 256 at most, B is 65,535 at most, nothing is fp64 and no gradient is
            wanted.

    Returns:
        y (B, H * P) in q's dtype; scores and sums are fp32, or fp64 where q is fp64.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    _check(q, k, v, keys, values, position, starts, cos, sin)
    if backend == "auto":
        tensors = (q, k, v, keys, values)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        small = q.shape[2] <= MOST_TRITON_DIM and fits_grid(len(q))
        known = "triton" in ATTENTION_STEP_BACKENDS
        fused = known and small and not learns and suits_triton(*tensors)
        backend = "triton" if fused else "reference"
    step = pick_backend("attention_step", backend, ATTENTION_STEP_BACKENDS)
    return step(q, k, v, keys, values, position, starts, cos, sin)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> None:
    op = "attention_step"
    if q.dim() != 3 or keys.dim() != 4 or q.shape[1] % keys.shape[1] or q.shape[2] % 2:
        raise ValueError(
            f"{op}: q is {tuple(q.shape)} and keys {tuple(keys.shape)}, expected (B, H, P) and "
            "(B, K, S, P), P even and H a multiple of K"
        )
    (batch, _, dim), (_, kv_heads, capacity, _) = q.shape, keys.shape
    for name, tensor in (("keys", keys), ("values", values)):
        check_shape(op, name, tensor, (batch, kv_heads, capacity, dim))
    for name, tensor in (("k", k), ("v", v)):
        check_shape(op, name, tensor, (batch, kv_heads, dim))
    check_shape(op, "position", position, (1,))
    check_shape(op, "starts", starts, (batch,))
    rows = 1 if cos.shape[0] == 1 else batch
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_shape(op, name, tensor, (rows, dim))
