"""The gated delta rule and its single step in plain PyTorch, on any device, with autograd.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, P value dim, N key dim,
c chunks of Q tokens each. Query head h reads key/value head h // G.

All arithmetic is fp32, or fp64 if v is fp64; autocast is disabled inside.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmmamba_cli.ops.backends import without_autocast
from mmmamba_cli.ops.channel_decay import decayed_heads
from mmmamba_cli.ops.chunks import by_kv_head, chunk_layout, in_chunks, log_decays
from mmmamba_cli.ops.recurrence import RecurrenceInputs, Tokens, initial_state, prepared_tokens
from mmmamba_cli.ops.recurrence_reference import Token, run_token, run_tokens


def step(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """One token; shapes as in `ops.delta_rule_step`."""
    return run_token(inputs, _update)


def recurrent(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token (arXiv 2412.06464, equation 10)."""
    return run_tokens(inputs, _update)


def _update(state: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """y_t (B, K, G, P) and S_t from S_{t-1} (B, K, G, P, N); other shapes as in `Token`."""
    assert token.beta is not None
    state = state * token.decay.unsqueeze(-2)
    key = token.k[:, :, None, :, None]
    held = (state @ key).squeeze(-1)
    correction = token.beta.unsqueeze(-1) * (token.v.unsqueeze(2) - held)
    state = torch.addcmul(state, correction.unsqueeze(-1), key.mT)
    return (state @ token.q.unsqueeze(-1)).squeeze(-1), state


def chunked(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Run the chunked form (arXiv 2412.06464, section 3.3; arXiv 2406.06484 without decays).

    Within a chunk, the corrections u_i = beta_i (v_i - S~_i k_i) that the tokens write solve a
    triangular system: (I + L) U = diag(beta) (V - K_in S^T), where L_ij = beta_i k_i . k_j under
    the decay between j and i, j < i, and K_in are the keys under the decay from the chunk's start.
    U is affine in S, so a chunk maps the state S to S (diag(decay) - W^T K_out) + U_0^T K_out with
    the keys K_out under the decay to its end. Across chunks this is a recurrence with one matmul
    per chunk, since the launches of many small ones would take most of the time on a GPU. Memory is
    O(T (chunk_size + N^2 / chunk_size)).
    """
    v, length, kv_heads = inputs.v, inputs.v.shape[1], inputs.v.shape[2]
    num_chunks, size = chunk_layout(length, inputs.chunk_size)
    with without_autocast(v):
        tokens = prepared_tokens(inputs)
        chunks = _chunks(tokens, num_chunks, size)
        v_cKQP = _in_chunks(tokens.v, num_chunks, size)
        written = (by_kv_head(chunks.solution, kv_heads) @ v_cKQP).view(*chunks.k_in.shape[:-1], -1)
        # The corrections are written + read S^T, with S the state before the chunk.
        read = (-chunks.solution) @ chunks.k_in
        kept = torch.diag_embed(chunks.decay.expand_as(read[..., :1, :]).squeeze(-2))
        entering, final_state = _scan_chunks(
            initial_state(inputs),
            _add_product(kept, read.mT, chunks.k_out),
            written.mT @ chunks.k_out,
        )
        corrections = _add_product(written, read, entering.mT)
        y_cHQP = _add_product(chunks.attention @ corrections, chunks.q_in, entering.mT)
        y = y_cHQP.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return y.to(v.dtype), final_state


def matrix(inputs: RecurrenceInputs) -> Tensor:
    """The mixing matrix (B, H, T, T), by the chunked form with all tokens in one chunk."""
    with without_autocast(inputs.k):
        chunks = _chunks(prepared_tokens(inputs), num_chunks=1, size=inputs.q.shape[1])
        return (chunks.attention @ chunks.solution).squeeze(0)


class _Chunks(NamedTuple):
    """Parts of all chunks that depend on neither the values nor the states.

    attention: (c, B, H, Q, Q), q_i . k_j under the decay between j <= i, else 0.
    solution: (c, B, H, Q, Q), (I + L)^-1 diag(beta).
    q_in, k_in: (c, B, H, Q, N), queries and keys under the decay from the chunk's start.
    k_out: (c, B, H, Q, N), keys under the decay to the chunk's end.
    decay: (c, B, H, 1, 1 or N), over the whole chunk.
    """

    attention: Tensor
    solution: Tensor
    q_in: Tensor
    k_in: Tensor
    k_out: Tensor
    decay: Tensor


def _chunks(tokens: Tokens, num_chunks: int, size: int) -> _Chunks:
    assert tokens.beta is not None
    k = _in_chunks(tokens.k, num_chunks, size)
    q = _in_chunks(tokens.q, num_chunks, size)
    log_decay = _in_chunks(tokens.log_decay, num_chunks, size)
    beta = _in_chunks(tokens.beta, num_chunks, size)
    per_channel = log_decay.shape[-1] > 1
    products = _per_channel_products if per_channel else _per_head_products
    attention, key_products, q_in, k_in, k_out, decay = products(q, k, log_decay)
    solution = _solve(key_products * beta.unsqueeze(-1)) * beta.unsqueeze(-2)
    return _Chunks(attention, solution, q_in, k_in, k_out, decay)


def _per_head_products(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """`attention`, k_i . k_j under the decay, `q_in`, `k_in`, `k_out` and `decay` of `_Chunks`.

    q (c, B, H, Q, N), k (c, B, K, Q, N), log_decay (c, B, H, Q, 1).
    """
    grouped = (k.shape[2], -1)
    sums = log_decays(log_decay.squeeze(-1))
    within = sums.within.exp_()
    attention = (by_kv_head(q, k.shape[2]) @ k.mT).view(within.shape) * within
    key_products = ((k @ k.mT).unsqueeze(3) * within.unflatten(2, grouped)).flatten(2, 3)
    decay_in, decay_out = sums.from_start.exp().unsqueeze(-1), sums.to_end.exp().unsqueeze(-1)
    k_in, k_out = (
        (k.unsqueeze(3) * decay.unflatten(2, grouped)).flatten(2, 3)
        for decay in (decay_in, decay_out)
    )
    return attention, key_products, q * decay_in, k_in, k_out, decay_in[..., -1:, :]


def _per_channel_products(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """The same for log_decay (c, B, H, Q, N)."""
    q = q.unflatten(2, (k.shape[2], -1))
    rows = torch.stack((q, k.unsqueeze(3).expand_as(q)), dim=-2)
    block = decayed_heads(rows, k, log_decay)
    attention, key_products = block.products.unbind(-2)
    q_in, k_in = block.rows.unbind(-2)
    decay = block.log_decay.exp().unsqueeze(-2)
    return attention, key_products, q_in, k_in, block.keys, decay


def _solve(lower: Tensor) -> Tensor:
    """(I + L)^-1, where L is the part of `lower` (..., Q, Q) below the diagonal."""
    one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(
        lower, one.expand_as(lower), upper=False, unitriangular=True
    )


def _scan_chunks(state: Tensor, transition: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """States before all chunks (c, B, H, P, N), and the final state (B, H, P, N).

    A chunk multiplies the state by `transition` (c, B, H, N, N) and adds `added` (c, B, H, P, N).
    """
    entering, final = _ChunkScan.apply(
        state.flatten(0, 1), transition.flatten(1, 2), added.flatten(1, 2)
    )
    return entering.unflatten(1, state.shape[:2]), final.view(state.shape)


class _ChunkScan(torch.autograd.Function):
    """The recurrence of `_scan_chunks` for (B H, P, N), (c, B H, N, N) and (c, B H, P, N).

    Autograd would keep each state twice. Here both passes launch one kernel per chunk, and the
    gradients of all transitions are one product. It is differentiable once.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, state: Tensor, transition: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = torch.cat((state.unsqueeze(0), added))
        for chunk, transition_c in enumerate(transition.unbind(0)):
            states[chunk + 1].baddbmm_(states[chunk], transition_c)
        ctx.save_for_backward(states, transition)
        # Copy: a view in a cache would keep the states of all chunks alive.
        return states[:-1], states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entering: Tensor, d_final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, transition = ctx.saved_tensors
        with without_autocast(d_final):
            d_states = torch.cat((d_entering, d_final.unsqueeze(0)))
            for chunk in reversed(range(len(transition))):
                d_states[chunk].baddbmm_(d_states[chunk + 1], transition[chunk].mT)
            return d_states[0], states[:-1].mT @ d_states[1:], d_states[1:]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, for three leading dimensions, without the product in memory."""
    return torch.baddbmm(total.flatten(0, 2), a.flatten(0, 2), b.flatten(0, 2)).view(total.shape)


def _in_chunks(tokens: Tensor, num_chunks: int, size: int) -> Tensor:
    """(B, T, heads, ...) -> (c, B, heads, Q, ...): chunks first, as the loop reads them."""
    return in_chunks(tokens, num_chunks, size).transpose(0, 1).contiguous()
