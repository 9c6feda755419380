"""Weights of layer losses that follow how dense the pictures are.

A hybrid of a vision-language model loses most at the few patches with text and edges, and a mean
over all tokens is mostly a mean over background. HEED (Liang and Jha, arXiv 2605.17093) weights its
alignment by a proxy that needs no training: how unlike its neighbours a patch is. The form of the
weight below is ours.

Legend: B batch, T columns, D hidden size, N grids, H rows and W columns of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import upcast

# Weight of a token that is like all of its neighbours; the mean over pictures is 1.
MIN_WEIGHT = 0.5


def patch_density(features: Tensor) -> Tensor:
    """How unlike its neighbours each token of a picture is, (N, H, W), from 0 to 2.

    The mean of 1 - cos over the tokens above, below, left and right within the grid; 0 for a token
    without neighbours.

    Args:
        features: (N, H, W, D), any floating dtype; computed in fp32 or wider.
    """
    unit = F.normalize(upcast(features), dim=-1)
    total = unit.new_zeros(unit.shape[:-1])
    count = torch.zeros_like(total)
    for dim in (1, 2):
        size = unit.shape[dim]
        pairs = 1 - (unit.narrow(dim, 0, size - 1) * unit.narrow(dim, 1, size - 1)).sum(-1)
        for side in (0, 1):
            total.narrow(dim, side, size - 1).add_(pairs)
            count.narrow(dim, side, size - 1).add_(1)
    return (total / count.clamp(min=1)).clamp(min=0)


def density_weights(hidden: Tensor, grids: Sequence[Tensor], seq_idx: Tensor | None) -> Tensor:
    """Weights (B, T) of the columns of a loss: 1 for text, and for a picture's token

        w = 1/2 + d / (2 m)

    with its density d and the mean m of the densities of all pictures of its conversation. So the
    mean weight of a conversation's picture tokens is 1, and weights do not depend on the batch. All
    are 1 where a conversation's pictures are of one colour.

    Args:
        hidden: (B, T, D), the input of the stack.
        grids: (N, H, W) int64 each, flat indices into the (B * T) columns.
        seq_idx: (B, T) int64, the conversation of each column of a packed row; None for one.
    """
    rows, length, _ = hidden.shape
    weights = torch.ones(rows * length, device=hidden.device, dtype=upcast(hidden[:1, :1]).dtype)
    if not grids:
        return weights.view(rows, length)
    flat = hidden.detach().flatten(0, 1)
    densities = [patch_density(flat[grid]) for grid in grids]
    first = torch.cat([grid[:, 0, 0] for grid in grids])
    group = first // length * length
    if seq_idx is not None:
        group = group + seq_idx.flatten()[first]
    sums = torch.cat([density.sum((1, 2)) for density in densities])
    tokens = torch.cat([one.new_full((len(one),), one[0].numel()) for one in densities])
    # A sum over pairs of pictures has the same bits in each run, unlike `index_add_` on a GPU.
    together = (group[:, None] == group).to(sums)
    mean = (together * sums).sum(1) / (together * tokens).sum(1)
    sizes = [len(grid) for grid in grids]
    for grid, density, of_grid in zip(grids, densities, mean.split(sizes), strict=True):
        average = of_grid[:, None, None]
        # Rounding gives equal tokens a density of about 1e-7.
        relative = torch.where(average < 1e-6, 1.0, density / average.clamp(min=1e-6))
        weights[grid] = MIN_WEIGHT + (1 - MIN_WEIGHT) * relative
    return weights.view(rows, length)
