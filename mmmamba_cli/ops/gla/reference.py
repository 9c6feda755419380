"""Gated linear attention and its single step in plain PyTorch, on any device, with autograd.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, P value dim, N key dim,
c chunks of Q tokens each. Query head h reads key/value head h // G.

All arithmetic is fp32, or fp64 if v is fp64; autocast is disabled inside.
"""

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import compute_dtype, without_autocast
from mmmamba_cli.ops.channel_decay import DecayedBlock, decayed_block
from mmmamba_cli.ops.chunks import by_kv_head, chunk_layout, in_chunks, scan_chunks
from mmmamba_cli.ops.recurrence import (
    RecurrenceInputs,
    Tokens,
    initial_state,
    prepared_tokens,
    scaled_qk,
)


def step(
    v: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None
) -> tuple[Tensor, Tensor]:
    """One token; shapes as in `ops.gla_step`."""
    dtype, heads = compute_dtype(v), (v.shape[1], -1)
    with without_autocast(v):
        scaled_q, wide_k = scaled_qk(q.to(dtype), k.to(dtype), scale, qk_l2_norm=False)
        y, state = _advance(
            state.to(dtype).unflatten(1, heads),
            log_decay.to(dtype).exp().unflatten(1, heads),
            v.to(dtype),
            wide_k,
            scaled_q.unflatten(1, heads),
        )
    return y.flatten(1, 2).to(v.dtype), state.flatten(1, 2)


def recurrent(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token (arXiv 2312.06635, section 4.1)."""
    v, heads = inputs.v, (inputs.v.shape[2], -1)
    with without_autocast(v):
        tokens = prepared_tokens(inputs)
        state = initial_state(inputs).unflatten(1, heads)
        outputs = []
        for decay_t, v_t, k_t, q_t in zip(
            tokens.log_decay.exp().unflatten(2, heads).unbind(1),
            tokens.v.unbind(1),
            tokens.k.unbind(1),
            tokens.q.unflatten(2, heads).unbind(1),
            strict=True,
        ):
            y_t, state = _advance(state, decay_t, v_t, k_t, q_t)
            outputs.append(y_t)
        y = torch.stack(outputs, dim=1).flatten(2, 3)
    return y.to(v.dtype), state.flatten(1, 2)


def _advance(
    state: Tensor, decay: Tensor, v: Tensor, k: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t (B, K, G, P) and S_t from S_{t-1} (B, K, G, P, N).

    decay and q (B, K, G, N), v (B, K, P), k (B, K, N).
    """
    written = v.unsqueeze(-1) * k.unsqueeze(-2)
    state = torch.addcmul(written.unsqueeze(2), state, decay.unsqueeze(-2))
    return (state @ q.unsqueeze(-1)).squeeze(-1), state


def chunked(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Run the chunked form (arXiv 2312.06635, section 4.2).

    Within a chunk it is a masked attention, across chunks the recurrence with one state per chunk.
    Memory is O(T (chunk_size + N log chunk_size)).
    """
    v, length, kv_heads = inputs.v, inputs.v.shape[1], inputs.v.shape[2]
    num_chunks, size = chunk_layout(length, inputs.chunk_size)
    with without_autocast(v):
        tokens = prepared_tokens(inputs)
        block = _block(tokens, num_chunks, size)
        v_cKQP = in_chunks(tokens.v, num_chunks, size).contiguous()
        attention = block.products.squeeze(-2)
        y_within = (by_kv_head(attention, kv_heads) @ v_cKQP).view(*attention.shape[:-1], -1)
        k_out = block.keys.unflatten(2, (kv_heads, -1))
        added = (v_cKQP.mT.unsqueeze(3) @ k_out).flatten(2, 3)
        decay = block.log_decay.exp().unsqueeze(-2)
        entering, final_state = scan_chunks(initial_state(inputs), decay, added)
        y_cHQP = torch.baddbmm(
            y_within.flatten(0, 2),
            block.rows.squeeze(-2).flatten(0, 2),
            entering.flatten(0, 2).mT,
        ).view(y_within.shape)
        y = y_cHQP.transpose(2, 3).flatten(1, 2)[:, :length]
    return y.to(v.dtype), final_state


def matrix(inputs: RecurrenceInputs) -> Tensor:
    """The mixing matrix (B, H, T, T): all tokens as one chunk."""
    with without_autocast(inputs.k):
        block = _block(prepared_tokens(inputs), num_chunks=1, size=inputs.q.shape[1])
        return block.products.squeeze(-2).squeeze(1)


def _block(tokens: Tokens, num_chunks: int, size: int) -> DecayedBlock:
    """Chunks with one row per token, the query; leading dimensions (B, c, H)."""
    k = in_chunks(tokens.k, num_chunks, size)
    grouped = (k.shape[2], -1)
    q = in_chunks(tokens.q, num_chunks, size).unflatten(2, grouped)
    log_decay = in_chunks(tokens.log_decay, num_chunks, size).contiguous().unflatten(2, grouped)
    block = decayed_block(q.unsqueeze(-2), k.unsqueeze(3), log_decay)
    return DecayedBlock(*(part.flatten(2, 3) for part in block))
