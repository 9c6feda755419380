"""One token of grouped-query softmax attention over a cache: rotate, store, attend.

Split over the columns of the cache as in Flash-Decoding (Dao et al., 2023).
"""

from typing import Protocol

from torch import Tensor

from mmmamba_cli.ops.backends import (
    check_shape,
    fits_grid,
    get_backend,
    needs_grad,
    optional_backend,
    supports_triton,
)
from mmmamba_cli.ops.decode import reference


class AttentionStepBackend(Protocol):
    """Signature of a backend: the validated arguments of `attention_step`."""

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
    **optional_backend("triton", f"{__package__}.fused", "attention_step"),
}
# A tile of keys with a larger head dim does not fit the registers of a program.
MAX_TRITON_HEAD_DIM = 256


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

    RoPE is applied to q and k first (rotated halves, as in Llama), and k and v are stored in column
    `position`. Query head h attends to key/value head h // (H / K).

    Args:
        q: (B, H, P); like k and v it may be a slice of a packed projection with contiguous heads.
        k, v: (B, K, P).
        keys, values: the KV cache, (B, K, S, P); one column is written in place.
        position: (1,) integer below S on the device, the token's column.
        starts: (B,) integers, the first column of each row that is not padding, at most `position`;
            None is 0.
        cos, sin: RoPE factors of the token, (B, P) or (1, P), both halves equal.
        backend: "reference", "triton" (no gradient), or "auto": triton on a GPU if it is installed,
            P is at most 256, B at most 65,535, no tensor is fp64 and none requires a gradient.

    Returns:
        y (B, H * P) in q's dtype; scores and sums are fp32, or fp64 where q is fp64.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    _check(q, k, v, keys, values, position, starts, cos, sin)
    if backend == "auto":
        tensors = (q, k, v, keys, values)
        fits = q.shape[2] <= MAX_TRITON_HEAD_DIM and fits_grid(len(q))
        has_triton = "triton" in ATTENTION_STEP_BACKENDS
        fused = has_triton and fits and not needs_grad(*tensors) and supports_triton(*tensors)
        backend = "triton" if fused else "reference"
    step = get_backend("attention_step", backend, ATTENTION_STEP_BACKENDS)
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
