"""The SSD scan and its single step in plain PyTorch: any device, autograd.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, P value dim, N state dim,
c chunks of Q tokens each. Query head h reads key/value head h // G, so H is split into (K, G)
wherever x and B meet it; neither is ever repeated to H heads.

Everything is computed in fp32, or in fp64 when x is fp64, whatever autocast says.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import compute_dtype, segment_ordinals


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


def recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    D: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one token after the other; `chunk_size` has no meaning."""
    dtype, heads = compute_dtype(x), (x.shape[2], -1)
    with without_autocast(x):
        x, dt, B, C = blank_padding(mask, x, dt, B, C)
        step_sizes = real_step_sizes(dt.to(dtype), dt_bias, dt_softplus, mask)
        decay = (step_sizes * A.to(dtype)).exp()
        if seq_idx is not None:
            begins = segment_ordinals(seq_idx, mask).diff(dim=1).bool()
            decay = decay.masked_fill(F.pad(begins, (1, 0)).unsqueeze(-1), 0)
        state = _first_state(initial_state, x, C).unflatten(1, heads)
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
        y = _add_skip(torch.stack(outputs, dim=1), x, D)
    return y.to(x.dtype), state.flatten(1, 2)


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    D: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The block decomposition of Mamba-2 (arXiv 2405.21060, section 6), memory O(T chunk_size).

    Within a chunk, y_i = sum_{j <= i} exp(sum_{j < k <= i} dt_k A) (C_i . B_j) dt_j x_j, a masked
    attention; across chunks, the recurrence over one state per chunk.
    """
    length, kv_heads = x.shape[1], x.shape[2]
    num_chunks = (length + chunk_size - 1) // chunk_size
    # Chunks of equal length waste less on filling up the last one; matmuls like multiples of 8.
    needed = (length + num_chunks - 1) // num_chunks
    size = min(chunk_size, length, needed + -needed % 8)
    dtype = compute_dtype(x)
    with without_autocast(x):
        x, dt, B, C = blank_padding(mask, x, dt, B, C)
        step_sizes = real_step_sizes(dt.to(dtype), dt_bias, dt_softplus, mask)
        # A step size of 0, as filling up gives, leaves the state alone: decay 1 and no input.
        dt_cHQ = _in_chunks(step_sizes, num_chunks, size)
        log_decay = _log_decays(dt_cHQ * A.to(dtype).unsqueeze(-1))
        if seq_idx is not None:
            log_decay = _cut(log_decay, segment_ordinals(seq_idx, mask), num_chunks, size)
        x_cKPQ = _in_chunks(x, num_chunks, size).mT.to(dtype).contiguous()
        B_cKQN = _in_chunks(B, num_chunks, size).to(dtype).contiguous()
        C_cHQN = _in_chunks(C, num_chunks, size).to(dtype).contiguous()

        scores = (_by_kv_head(C_cHQN, kv_heads) @ B_cKQN.mT).view(log_decay.within.shape)
        weights = scores * log_decay.within.exp_() * dt_cHQ.unsqueeze(-2)
        y_within = (_by_kv_head(weights, kv_heads) @ x_cKPQ.mT).view(*C_cHQN.shape[:-1], -1)

        to_end = (log_decay.to_end.exp() * dt_cHQ).unflatten(2, (kv_heads, -1)).unsqueeze(-2)
        inputs = (x_cKPQ.unsqueeze(3) * to_end).flatten(2, 3)
        added = (_by_kv_head(inputs, kv_heads) @ B_cKQN).view(*inputs.shape[:-1], -1)

        from_start = log_decay.from_start.exp().unsqueeze(-1)
        first = _first_state(initial_state, x, C)
        entering, final_state = _scan_chunks(first, from_start[..., -1:, :], added)
        y_cHQP = torch.baddbmm(
            y_within.flatten(0, 2),
            (C_cHQN * from_start).flatten(0, 2),
            entering.flatten(0, 2).mT,
        ).view(y_within.shape)
        y = y_cHQP.transpose(2, 3).flatten(1, 2)[:, :length]
        y = _add_skip(y.unflatten(2, (kv_heads, -1)), x, D)
    return y.to(x.dtype), final_state


class _LogDecays(NamedTuple):
    """Sums of dt_k A along chunks; -inf where nothing may pass."""

    from_start: Tensor  # (B, c, H, Q): over k <= i
    within: Tensor  # (B, c, H, Q, Q): over j < k <= i at [i, j], -inf for j > i
    to_end: Tensor  # (B, c, H, Q): over k > j


def _log_decays(log_decay: Tensor) -> _LogDecays:
    """Sums over parts of chunks from dt A, (B, c, H, Q).

    Each is added up by itself. As the difference of two sums from the chunk's start it would keep
    few digits after a strong decay, and its gradient fewer still.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    after = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    within = after.masked_fill(ones.triu(), 0).cumsum(-2)
    # Masked before exp: the exponential of what no token sees must not reach the gradient.
    within = within.masked_fill_(ones.triu(1), -math.inf)
    to_end = F.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return _LogDecays(log_decay.cumsum(-1), within, to_end)


def _cut(log_decay: _LogDecays, segments: Tensor, num_chunks: int, size: int) -> _LogDecays:
    """Let nothing pass from one packed sequence into the next; `segments` (B, T) numbers them."""
    filling = segments[:, -1:].expand(-1, num_chunks * size - segments.shape[1])
    segments = torch.cat((segments, filling), dim=1).unflatten(1, (num_chunks, 1, size))
    last = segments[..., -1:]
    # The initial state belongs to sequence 0.
    entering = F.pad(last[:, :-1], (0, 0, 0, 0, 1, 0))
    return _LogDecays(
        log_decay.from_start.masked_fill(segments != entering, -math.inf),
        log_decay.within.masked_fill_(segments.unsqueeze(-1) != segments.unsqueeze(-2), -math.inf),
        log_decay.to_end.masked_fill(segments != last, -math.inf),
    )


def _scan_chunks(state: Tensor, decay: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """States entering each chunk, (B, c, H, P, N), and the one after the last, (B, H, P, N).

    `decay` (B, c, H, 1, 1) is that of a whole chunk, `added` (B, c, H, P, N) what its tokens leave
    at its end.
    """
    entering = []
    for decay_c, added_c in zip(decay.unbind(1), added.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(added_c, decay_c, state)
    return torch.stack(entering, dim=1), state


def _in_chunks(tokens: Tensor, num_chunks: int, size: int) -> Tensor:
    """(B, T, heads, ...) -> (B, c, heads, Q, ...), filled up with zeros at the end."""
    missing = num_chunks * size - tokens.shape[1]
    if missing:
        tokens = F.pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, missing))
    return tokens.unflatten(1, (num_chunks, size)).transpose(2, 3)


def _by_kv_head(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, c, H, rows, columns) -> (B, c, K, G * rows, columns), one matrix per key/value head."""
    return rows.unflatten(2, (kv_heads, -1)).flatten(3, 4)


def _advance(
    state: Tensor, decay: Tensor, dt: Tensor, x: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t and y_t (B, K, G, P) from S_{t-1} (B, K, G, P, N).

    decay and dt (B, K, G), x (B, K, P), B (B, K, N), C (B, K, G, N).
    """
    inputs = dt.unsqueeze(-1) * x.unsqueeze(2)
    state = torch.addcmul(state * decay[..., None, None], inputs.unsqueeze(-1), B[:, :, None, None])
    return (state @ C.unsqueeze(-1)).squeeze(-1), state


def _add_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y (..., K, G, P) + D (K * G,) x (..., K, P) of the same key/value head, as (..., H, P)."""
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype).view(*y.shape[-3:-1], 1), x.to(y.dtype).unsqueeze(-2))
    return y.flatten(-3, -2)


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


def real_step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, mask: Tensor | None
) -> Tensor:
    """Step sizes (B, T, H), 0 at padding."""
    dt = _step_sizes(dt, dt_bias, dt_softplus)
    return dt if mask is None else dt.masked_fill(~mask.bool().unsqueeze(-1), 0)


def blank_padding(
    mask: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros where `mask` (B, T) is 0, so that even a NaN in the padding reaches nothing."""
    if mask is None:
        return x, dt, B, C
    padding = ~mask.bool()
    wide = padding[..., None, None]
    return (
        x.masked_fill(wide, 0),
        dt.masked_fill(padding.unsqueeze(-1), 0),
        B.masked_fill(wide, 0),
        C.masked_fill(wide, 0),
    )


def _first_state(initial_state: Tensor | None, x: Tensor, C: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    if initial_state is not None:
        return initial_state.to(dtype)
    batch, _, heads, state_dim = C.shape
    return torch.zeros(batch, heads, x.shape[-1], state_dim, dtype=dtype, device=x.device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


# Older compilers, as of torch 2.11, cannot look into it.
@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
