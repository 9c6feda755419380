"""Gradients of causal attention, computed over chunks of the keys.

Some kernels compute the gradients of a sequence and head in one block, so that a few long sequences
leave most of a GPU idle. This module splits the keys of a long sequence into chunks. The kernel
receives each chunk as a sequence, with the queries from the chunk's first position on. The gradient
of a query is the sum over the chunks, in a fixed order.

Legend: M columns of N sequences, C chunks, M' queries of all chunks,
H heads, P head dim, T the longest sequence.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Keys of a chunk. Chunks are longer for sequences of more than MAX_CHUNKS * CHUNK_SIZE columns,
# whose queries would otherwise be copied more than (MAX_CHUNKS + 1) / 2 times.
CHUNK_SIZE, MAX_CHUNKS = 512, 8
# The kernels read logsumexp in rows of a multiple of this length.
LOGSUMEXP_MULTIPLE = 32

# Gradients of q, k and v from (dy, q, k, v, y, chunks, logsumexp). q, dy and y are (M', H, P), k
# and v (M, H, P), logsumexp is (C, H, T).
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor]]


class KeyChunks(NamedTuple):
    """Chunks of the keys of N sequences.

    cu_queries, cu_keys: (C + 1,) int32, boundaries of the chunks' queries and keys.
    max_queries, max_keys: lengths of the longest.
    columns: (M',) int64, column of each query of each chunk.
    sequences, offsets: (C,) int64, sequence of each chunk and its first position in it.
    ranks: (rows, columns) for the first, second, ... chunk of all sequences: which of the M'
        queries belong to it, and their columns, ascending; (M'_i,) int64 each.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    columns: Tensor
    sequences: Tensor
    offsets: Tensor
    ranks: tuple[tuple[Tensor, Tensor], ...]


@lru_cache(maxsize=4)
def key_chunks(bounds: tuple[int, ...], device: torch.device) -> KeyChunks | None:
    """The chunks of sequences from `bounds[n]` to `bounds[n + 1]`; None if all are short."""
    lengths = torch.tensor(bounds).diff()
    if not (lengths > CHUNK_SIZE).any():
        return None
    # A multiple of 64, the columns of a block of the kernel.
    size = torch.clamp(-(-lengths // MAX_CHUNKS) + 63, min=CHUNK_SIZE) // 64 * 64
    count = torch.clamp(-(-lengths // size), min=1)
    sequences = torch.arange(len(lengths)).repeat_interleave(count)
    rank = _positions(count)
    offsets = rank * size[sequences]
    queries = lengths[sequences] - offsets
    keys = torch.minimum(queries, size[sequences])
    starts = torch.tensor(bounds)[sequences] + offsets
    columns = starts.repeat_interleave(queries) + _positions(queries)
    rank_of_query = rank.repeat_interleave(queries)
    ranks = []
    for number in range(int(count.max())):
        rows = (rank_of_query == number).nonzero().flatten()
        ranks.append((rows.to(device), columns[rows].to(device)))
    return KeyChunks(
        _boundaries(queries).to(device),
        _boundaries(keys).to(device),
        int(queries.max()),
        int(keys.max()),
        columns.to(device),
        sequences.to(device),
        offsets.to(device),
        tuple(ranks),
    )


def _positions(lengths: Tensor) -> Tensor:
    """0 to n - 1 for each n of lengths, one after the other."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def _boundaries(lengths: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()


def chunked_gradients(
    kernel: Kernel,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    chunks: KeyChunks,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v, all (M, H, P), with the kernel on each chunk.

    `logsumexp` (N, H, at least T) is that of the whole sequences.
    """
    dy, q, y = (x.index_select(0, chunks.columns) for x in (dy, q, y))
    partial, dk, dv = kernel(dy, q, k, v, y, chunks, chunk_logsumexp(logsumexp, chunks))
    return _sum_of_chunks(partial, chunks), dk, dv


def chunk_logsumexp(logsumexp: Tensor, chunks: KeyChunks) -> Tensor:
    """logsumexp (N, H, T) of sequences -> (C, H, T') of chunks, infinite after their queries."""
    width = -(-chunks.max_queries // LOGSUMEXP_MULTIPLE) * LOGSUMEXP_MULTIPLE
    positions = torch.arange(width, device=logsumexp.device)
    lengths = chunks.cu_queries.diff()
    columns = (positions + chunks.offsets[:, None]).clamp(max=logsumexp.shape[-1] - 1)
    columns = columns.unsqueeze(1).expand(-1, logsumexp.shape[1], -1)
    found = logsumexp.index_select(0, chunks.sequences).gather(2, columns)
    behind = positions >= lengths[:, None]
    return found.masked_fill_(behind.unsqueeze(1), torch.inf)


def _sum_of_chunks(partial: Tensor, chunks: KeyChunks) -> Tensor:
    """(M', H, P) -> (M, H, P). A rank contains a query at most once: the order is fixed."""
    # The first chunks of the sequences have every column.
    rows, _ = chunks.ranks[0]
    total = partial.index_select(0, rows)
    for rows, columns in chunks.ranks[1:]:
        total.index_add_(0, columns, partial.index_select(0, rows))
    return total
