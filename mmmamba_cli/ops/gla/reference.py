"""Gated linear attention and its single step in plain PyTorch, on any device, with autograd.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N key dim, c chunks of
Q tokens each. Query head h reads key/value head h // (H / K).

All arithmetic is fp32, or fp64 if v is fp64; autocast is disabled inside.
"""

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import without_autocast
from mmmamba_cli.ops.channel_decay import DecayedBlock, decayed_heads
from mmmamba_cli.ops.chunks import by_kv_head, chunk_layout, in_chunks, scan_chunks
from mmmamba_cli.ops.recurrence import RecurrenceInputs, Tokens, initial_state, prepared_tokens
from mmmamba_cli.ops.recurrence_reference import Token, run_token, run_tokens


def step(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """One token; shapes as in `ops.gla_step`."""
    return run_token(inputs, _update)


def recurrent(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token (arXiv 2312.06635, section 4.1)."""
    return run_tokens(inputs, _update)


def _update(state: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """y_t (B, K, G, P) and S_t from S_{t-1} (B, K, G, P, N); other shapes as in `Token`."""
    written = token.v.unsqueeze(-1) * token.k.unsqueeze(-2)
    state = torch.addcmul(written.unsqueeze(2), state, token.decay.unsqueeze(-2))
    return (state @ token.q.unsqueeze(-1)).squeeze(-1), state


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
    k, q, log_decay = (
        in_chunks(part, num_chunks, size) for part in (tokens.k, tokens.q, tokens.log_decay)
    )
    rows = q.unflatten(2, (k.shape[2], -1)).unsqueeze(-2)
    return decayed_heads(rows, k, log_decay.contiguous())
