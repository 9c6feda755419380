"""The SSD scan and its single step in plain PyTorch, on any device, with autograd.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, P value dim, N state dim,
c chunks of Q tokens each. Query head h reads key/value head h // G. Products with x and B view H
as (K, G), so x and B are never repeated to H heads.

All arithmetic is fp32, or fp64 if x is fp64; autocast is disabled inside.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import (
    compute_dtype,
    needs_grad,
    segment_ordinals,
    without_autocast,
)
from mmmamba_cli.ops.chunks import (
    LogDecays,
    by_kv_head,
    chunk_layout,
    in_chunks,
    log_decays,
    scan_chunks,
)


class ScanInputs(NamedTuple):
    """The arguments of `ops.ssd`, checked, with T >= 1; shapes and meaning as there.

    A backend honours `mask` and `seq_idx` or refuses them. Only the chunked reference uses
    `chunk_size`.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    dt_softplus: bool
    D: Tensor | None
    initial_state: Tensor | None
    mask: Tensor | None
    seq_idx: Tensor | None
    chunk_size: int

    @property
    def float_tensors(self) -> tuple[Tensor | None, ...]:
        """The floating-point arguments, which are those that may require gradients."""
        return self.x, self.dt, self.A, self.B, self.C, self.dt_bias, self.D, self.initial_state

    @property
    def needs_grad(self) -> bool:
        return needs_grad(*self.float_tensors)

    @property
    def group_size(self) -> int:
        """G, the number of query heads that share a key/value head."""
        return self.C.shape[2] // self.x.shape[2]


# y (B, T, H, P) and the final state (B, H, P, N).
ScanBackend = Callable[[ScanInputs], tuple[Tensor, Tensor]]


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    D: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token; shapes as in `ops.ssd_step`."""
    dtype, heads = compute_dtype(x), (x.shape[1], -1)
    with without_autocast(x):
        dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus)
        y, state = _advance(
            state.to(dtype).unflatten(1, heads),
            (dt * A.to(dtype)).exp().unflatten(1, heads),
            dt.unflatten(1, heads),
            x.to(dtype),
            B.to(dtype),
            C.to(dtype).unflatten(1, heads),
        )
        y = _add_skip(y, x, D)
    return y.to(x.dtype), state.flatten(1, 2)


def recurrent(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token (arXiv 2405.21060, equation 1)."""
    x = inputs.x
    dtype, heads = compute_dtype(x), (x.shape[2], -1)
    with without_autocast(x):
        x, step_sizes, B, C = masked_tokens(inputs)
        decay = (step_sizes * inputs.A.to(dtype)).exp()
        if inputs.seq_idx is not None:
            begins = segment_ordinals(inputs.seq_idx, inputs.mask).diff(dim=1).bool()
            decay = decay.masked_fill(F.pad(begins, (1, 0)).unsqueeze(-1), 0)
        state = _initial_state(inputs).unflatten(1, heads)
        outputs = []
        for decay_t, dt_t, x_t, B_t, C_t in zip(
            decay.unflatten(2, heads).unbind(1),
            step_sizes.unflatten(2, heads).unbind(1),
            x.to(dtype).unbind(1),
            B.to(dtype).unbind(1),
            C.to(dtype).unflatten(2, heads).unbind(1),
            strict=True,
        ):
            y_t, state = _advance(state, decay_t, dt_t, x_t, B_t, C_t)
            outputs.append(y_t)
        y = _add_skip(torch.stack(outputs, dim=1), x, inputs.D)
    return y.to(x.dtype), state.flatten(1, 2)


def chunked(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run the block decomposition of Mamba-2 (arXiv 2405.21060, section 6).

    Within a chunk it is a masked attention, y_i = sum_{j <= i} exp(sum_{j < k <= i} dt_k A)
    (C_i . B_j) dt_j x_j; across chunks it is the recurrence with one state per chunk. Memory is
    O(T chunk_size).
    """
    x = inputs.x
    length, kv_heads = x.shape[1], x.shape[2]
    num_chunks, size = chunk_layout(length, inputs.chunk_size)
    dtype = compute_dtype(x)
    with without_autocast(x):
        x, step_sizes, B, C = masked_tokens(inputs)
        # The last chunk is padded with step size 0, which leaves the state unchanged.
        dt_cHQ = in_chunks(step_sizes, num_chunks, size)
        log_decay = log_decays(dt_cHQ * inputs.A.to(dtype).unsqueeze(-1))
        if inputs.seq_idx is not None:
            segments = segment_ordinals(inputs.seq_idx, inputs.mask)
            log_decay = _mask_segments(log_decay, segments, num_chunks, size)
        x_cKPQ = in_chunks(x, num_chunks, size).mT.to(dtype).contiguous()
        B_cKQN = in_chunks(B, num_chunks, size).to(dtype).contiguous()
        C_cHQN = in_chunks(C, num_chunks, size).to(dtype).contiguous()

        scores = (by_kv_head(C_cHQN, kv_heads) @ B_cKQN.mT).view(log_decay.within.shape)
        weights = scores * log_decay.within.exp_() * dt_cHQ.unsqueeze(-2)
        y_within = (by_kv_head(weights, kv_heads) @ x_cKPQ.mT).view(*C_cHQN.shape[:-1], -1)

        to_end = (log_decay.to_end.exp() * dt_cHQ).unflatten(2, (kv_heads, -1)).unsqueeze(-2)
        weighted_x = (x_cKPQ.unsqueeze(3) * to_end).flatten(2, 3)
        added = (by_kv_head(weighted_x, kv_heads) @ B_cKQN).view(*weighted_x.shape[:-1], -1)

        from_start = log_decay.from_start.exp().unsqueeze(-1)
        state = _initial_state(inputs)
        entering, final_state = scan_chunks(state, from_start[..., -1:, :], added)
        y_cHQP = torch.baddbmm(
            y_within.flatten(0, 2),
            (C_cHQN * from_start).flatten(0, 2),
            entering.flatten(0, 2).mT,
        ).view(y_within.shape)
        y = y_cHQP.transpose(2, 3).flatten(1, 2)[:, :length]
        y = _add_skip(y.unflatten(2, (kv_heads, -1)), x, inputs.D)
    return y.to(x.dtype), final_state


def _mask_segments(log_decay: LogDecays, segments: Tensor, num_chunks: int, size: int) -> LogDecays:
    """Mask decays between different packed sequences, which `segments` (B, T) numbers."""
    padding = segments[:, -1:].expand(-1, num_chunks * size - segments.shape[1])
    segments = torch.cat((segments, padding), dim=1).unflatten(1, (num_chunks, 1, size))
    last = segments[..., -1:]
    # The initial state belongs to sequence 0, hence the padding with 0.
    entering = F.pad(last[:, :-1], (0, 0, 0, 0, 1, 0))
    return LogDecays(
        log_decay.from_start.masked_fill(segments != entering, -math.inf),
        log_decay.within.masked_fill_(segments.unsqueeze(-1) != segments.unsqueeze(-2), -math.inf),
        log_decay.to_end.masked_fill(segments != last, -math.inf),
    )


def _advance(
    state: Tensor, decay: Tensor, dt: Tensor, x: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t and y_t (B, K, G, P) from S_{t-1} (B, K, G, P, N).

    decay and dt (B, K, G), x (B, K, P), B (B, K, N), C (B, K, G, N).
    """
    dt_x = dt.unsqueeze(-1) * x.unsqueeze(2)
    state = torch.addcmul(state * decay[..., None, None], dt_x.unsqueeze(-1), B[:, :, None, None])
    return (state @ C.unsqueeze(-1)).squeeze(-1), state


def _add_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y (..., K, G, P) + D (H,) x (..., K, P), as (..., H, P)."""
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype).view(*y.shape[-3:-1], 1), x.to(y.dtype).unsqueeze(-2))
    return y.flatten(-3, -2)


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


def masked_tokens(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, step sizes (B, T, H) in the compute dtype, B and C, all 0 at padding.

    A step size of exactly 0 leaves the state unchanged. x, B and C are zeroed as well, because
    0 * NaN is NaN.
    """
    x, dt, B, C = inputs.x, inputs.dt, inputs.B, inputs.C
    padding = None if inputs.mask is None else ~inputs.mask.bool()
    if padding is not None:
        per_head = padding[..., None, None]
        x, B, C = x.masked_fill(per_head, 0), B.masked_fill(per_head, 0), C.masked_fill(per_head, 0)
        dt = dt.masked_fill(padding.unsqueeze(-1), 0)
    step_sizes = _step_sizes(dt.to(compute_dtype(x)), inputs.dt_bias, inputs.dt_softplus)
    if padding is not None:
        # Bias and softplus have made the step sizes of padding nonzero.
        step_sizes = step_sizes.masked_fill(padding.unsqueeze(-1), 0)
    return x, step_sizes, B, C


def _initial_state(inputs: ScanInputs) -> Tensor:
    """`initial_state`, or zeros, (B, H, P, N) in the compute dtype."""
    x, C = inputs.x, inputs.C
    dtype = compute_dtype(x)
    if inputs.initial_state is not None:
        return inputs.initial_state.to(dtype)
    batch, _, heads, state_dim = C.shape
    return torch.zeros(batch, heads, x.shape[-1], state_dim, dtype=dtype, device=x.device)
