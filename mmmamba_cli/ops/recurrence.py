"""Arguments of recurrences with decays and values, keys and queries: delta rules and GLA.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, P value dim, N key dim.
Query head h reads key/value head h // G and has its own state (P, N).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, compute_dtype, needs_grad, segment_ordinals

# Added to the sum of squares of a query or key before it is divided by the square root.
L2_NORM_EPS = 1e-6


class RecurrenceInputs(NamedTuple):
    """Arguments of `delta_rule` or, without `beta`, of `gla`; shapes as there.

    Also those of their single steps, whose tokens have no dimension T and whose state is
    `initial_state`, and of their matrices, where v has no columns. `op` is the name of the public
    function. Backends get checked inputs with T >= 1; they honour `mask` and `seq_idx` or refuse
    them. Only chunked references use `chunk_size`.
    """

    op: str
    v: Tensor
    k: Tensor
    q: Tensor
    log_decay: Tensor
    beta: Tensor | None = None
    scale: float | None = None
    qk_l2_norm: bool = False
    initial_state: Tensor | None = None
    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    chunk_size: int = 64

    @property
    def float_tensors(self) -> tuple[Tensor | None, ...]:
        """The floating-point arguments, which are those that may require gradients."""
        return self.v, self.k, self.q, self.log_decay, self.beta, self.initial_state

    @property
    def needs_grad(self) -> bool:
        return needs_grad(*self.float_tensors)


# Of a scan: y (B, T, H, P) and the final state (B, H, P, N). Of a step: y (B, H, P) and the state.
RecurrenceBackend = Callable[[RecurrenceInputs], tuple[Tensor, Tensor]]
# The mixing matrix (B, H, T, T).
MatrixBackend = Callable[[RecurrenceInputs], Tensor]


class Tokens(NamedTuple):
    """Tokens that change no state at padding, in the compute dtype.

    log_decay is (B, T, H, N), or (B, T, H, 1) for one decay per head; -inf where a packed sequence
    starts. q is scaled; q and k are normalized if that was asked for.
    """

    v: Tensor
    k: Tensor
    q: Tensor
    log_decay: Tensor
    beta: Tensor | None


def prepared_tokens(inputs: RecurrenceInputs) -> Tokens:
    """The tokens of `inputs` with padding, scale, norms and packing applied."""
    dtype = compute_dtype(inputs.v)

    def real(tokens: Tensor) -> Tensor:
        if inputs.mask is None:
            return tokens.to(dtype)
        padding = ~inputs.mask.bool()
        return tokens.masked_fill(padding.view(*padding.shape, *(1,) * (tokens.dim() - 2)), 0).to(
            dtype
        )

    q, k = scaled_qk(real(inputs.q), real(inputs.k), inputs.scale, inputs.qk_l2_norm)
    log_decay = by_channel(real(inputs.log_decay), inputs.q)
    if inputs.seq_idx is not None:
        starts = segment_ordinals(inputs.seq_idx, inputs.mask).diff(dim=1).bool()
        log_decay = log_decay.masked_fill(F.pad(starts, (1, 0))[..., None, None], -math.inf)
    beta = None if inputs.beta is None else real(inputs.beta)
    return Tokens(real(inputs.v), k, q, log_decay, beta)


def scaled_qk(q: Tensor, k: Tensor, scale: float | None, qk_l2_norm: bool) -> tuple[Tensor, Tensor]:
    """q times `scale` or N^-0.5, and k; both divided by their 2-norm before if `qk_l2_norm`."""
    if qk_l2_norm:
        q, k = _l2_normalized(q), _l2_normalized(k)
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k


def _l2_normalized(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt()


def by_channel(log_decay: Tensor, q: Tensor) -> Tensor:
    """`log_decay` with a dimension of channels, of size 1 if there is one decay per head."""
    return log_decay if log_decay.dim() == q.dim() else log_decay.unsqueeze(-1)


def initial_state(inputs: RecurrenceInputs) -> Tensor:
    """`inputs.initial_state`, or zeros, (B, H, P, N) in the compute dtype."""
    v, q = inputs.v, inputs.q
    dtype = compute_dtype(v)
    if inputs.initial_state is not None:
        return inputs.initial_state.to(dtype)
    batch, _, heads, key_dim = q.shape
    return torch.zeros(batch, heads, v.shape[-1], key_dim, dtype=dtype, device=v.device)


def empty_result(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """The result for T = 0: an empty y and the initial state."""
    batch, _, heads, _ = inputs.q.shape
    return inputs.v.new_zeros(batch, 0, heads, inputs.v.shape[-1]), initial_state(inputs)


def check_inputs(inputs: RecurrenceInputs) -> None:
    """Raise ValueError for inconsistent shapes or a chunk size below 1."""
    op = inputs.op
    _check_tokens(inputs, time_dims=1)
    check_shape(op, "initial_state", inputs.initial_state, _state_shape(inputs))
    check_shape(op, "mask", inputs.mask, tuple(inputs.q.shape[:2]))
    check_shape(op, "seq_idx", inputs.seq_idx, tuple(inputs.q.shape[:2]))
    if inputs.chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {inputs.chunk_size}, expected at least 1")


def check_step_inputs(inputs: RecurrenceInputs) -> None:
    """Raise ValueError for inconsistent shapes of a single step."""
    _check_tokens(inputs, time_dims=0)
    check_shape(inputs.op, "state", inputs.initial_state, _state_shape(inputs))


def _state_shape(inputs: RecurrenceInputs) -> tuple[int, ...]:
    q = inputs.q
    return len(q), q.shape[-2], inputs.v.shape[-1], q.shape[-1]


def _check_tokens(inputs: RecurrenceInputs, time_dims: int) -> None:
    """Check all shapes against those of v and q, whose tensors have `time_dims` dimensions T."""
    op, v, q, log_decay = inputs.op, inputs.v, inputs.q, inputs.log_decay
    if v.dim() != 3 + time_dims or q.dim() != 3 + time_dims:
        raise ValueError(
            f"{op}: v is {tuple(v.shape)} and q {tuple(q.shape)}, "
            f"expected {3 + time_dims} dimensions each"
        )
    leading, kv_heads, heads, key_dim = tuple(v.shape[:-2]), v.shape[-2], *q.shape[-2:]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: {heads} query heads in q are no multiple of {kv_heads} key/value heads in v"
        )
    check_shape(op, "q", q, (*leading, heads, key_dim))
    check_shape(op, "k", inputs.k, (*leading, kv_heads, key_dim))
    per_head, per_channel = (*leading, heads), (*leading, heads, key_dim)
    check_shape(op, "beta", inputs.beta, per_head)
    if inputs.beta is None:
        check_shape(op, "log_decay", log_decay, per_channel)
    elif tuple(log_decay.shape) not in (per_head, per_channel):
        # Delta rules also have a form with one decay per head.
        raise ValueError(
            f"{op}: log_decay is {tuple(log_decay.shape)}, expected {per_head} or {per_channel}"
        )
