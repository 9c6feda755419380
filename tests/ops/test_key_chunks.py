"""Chunks of keys: the gradients of causal attention computed chunk by chunk, against autograd."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmmamba_cli.ops.attention import key_chunks as module
from mmmamba_cli.ops.attention.key_chunks import KeyChunks, chunked_gradients, key_chunks

CPU = torch.device("cpu")


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Causal scores (H, T, S) of q (T, H, P) and k (S, H, P), aligned at the upper left."""
    found = torch.einsum("thp,shp->hts", q, k) / math.sqrt(q.shape[-1])
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril()
    return found.masked_fill(~seen, -torch.inf)


def kernel(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, chunks: KeyChunks, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of each chunk by the formulas of FlashAttention's backward pass."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    queries, keys = chunks.cu_queries.tolist(), chunks.cu_keys.tolist()
    for chunk, (a, b) in enumerate(pairwise(queries)):
        rows, cols = slice(a, b), slice(keys[chunk], keys[chunk + 1])
        assert b - a <= chunks.max_queries
        assert keys[chunk + 1] - keys[chunk] <= chunks.max_keys
        assert torch.isinf(lse[chunk, :, b - a :]).all()
        p = (scores(q[rows], k[cols]) - lse[chunk, :, : b - a, None]).exp()
        delta = (dy[rows] * y[rows]).sum(-1).T
        dp = torch.einsum("thp,shp->hts", dy[rows], v[cols])
        ds = p * (dp - delta[..., None]) / math.sqrt(q.shape[-1])
        dq[rows] = torch.einsum("hts,shp->thp", ds, k[cols])
        dk[cols] = torch.einsum("hts,thp->shp", ds, q[rows])
        dv[cols] = torch.einsum("hts,thp->shp", p, dy[rows])
    return dq, dk, dv


@pytest.mark.parametrize("lengths", [(130, 3, 64, 1, 700), (65,), (64, 129)])
def test_gradients_equal_autograd(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SIZE", 64)
    monkeypatch.setattr(module, "MAX_CHUNKS", 3)
    bounds = tuple(torch.tensor((0, *lengths)).cumsum(0).tolist())
    key_chunks.cache_clear()
    chunks = key_chunks(bounds, CPU)
    key_chunks.cache_clear()
    assert chunks is not None
    assert len(chunks.ranks) <= 3
    rng = torch.Generator().manual_seed(0)
    shape = (bounds[-1], 2, 4)
    q, k, v = (torch.randn(shape, generator=rng).double().requires_grad_() for _ in range(3))
    dy = torch.randn(shape, generator=rng).double()
    ys, lses = [], torch.full((len(lengths), 2, max(lengths)), torch.nan).double()
    for n, (a, b) in enumerate(pairwise(bounds)):
        weights = scores(q[a:b], k[a:b])
        ys.append(torch.einsum("hts,shp->thp", weights.softmax(-1), v[a:b]))
        lses[n, :, : b - a] = weights.detach().logsumexp(-1)
    y = torch.cat(ys)
    expected = torch.autograd.grad(y, (q, k, v), dy)
    inputs = (x.detach() for x in (dy, q, k, v, y))
    found = chunked_gradients(kernel, *inputs, chunks, lses)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


def test_short_sequences_have_no_chunks() -> None:
    for bounds in ((0, 512, 700), (0, 0), (0,)):
        assert key_chunks(bounds, CPU) is None
    chunks = key_chunks((0, 513, 700), CPU)
    assert chunks is not None
    assert chunks.cu_keys.tolist() == [0, 512, 513, 700]
    assert chunks.cu_queries.tolist() == [0, 513, 514, 701]


def test_number_of_chunks_is_bounded() -> None:
    for length in (4096, 4097, 8192, 100_000):
        chunks = key_chunks((0, length), CPU)
        assert chunks is not None
        assert len(chunks.offsets) <= 8
        assert len(chunks.columns) <= 4.6 * length
