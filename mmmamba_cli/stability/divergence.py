"""Difference of the logits of two models on the same tokens, over the length of the text.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Ends of the spans of positions; later ones double.
SPAN_EDGES = (0, 64, 256, 1024, 2048)
# Neighbouring tokens are alike, so a block of them is one observation of the slope.
BLOCK_TOKENS = 64
MIN_BLOCKS = 8
NUM_REPLICATES = 2000
BOOTSTRAP_SEED = 0
# A position is a spike above this multiple of the median divergence.
SPIKE_FACTOR = 10.0


@dataclass(frozen=True)
class Divergence:
    """Of logits `other` from `reference`, at each position; all are (T,).

    `kl` is KL(reference, other) in nats, `max_abs` the largest difference of a logit, `same_top1`
    whether both have the same argmax.
    """

    kl: Tensor
    max_abs: Tensor
    same_top1: Tensor


def divergence(reference: Tensor, other: Tensor) -> Divergence:
    """Compare logits (T, V) of any dtype; computed in fp64."""
    wide, narrow = reference.double(), other.double()
    log_p, log_q = wide.log_softmax(-1), narrow.log_softmax(-1)
    return Divergence(
        kl=(log_p.exp() * (log_p - log_q)).sum(-1),
        max_abs=(wide - narrow).abs().amax(-1),
        same_top1=wide.argmax(-1) == narrow.argmax(-1),
    )


def join_divergences(parts: Sequence[Divergence]) -> Divergence:
    """The divergences of consecutive parts of a text."""
    return Divergence(
        torch.cat([part.kl for part in parts]),
        torch.cat([part.max_abs for part in parts]),
        torch.cat([part.same_top1 for part in parts]),
    )


def spans(tokens: int) -> list[tuple[int, int]]:
    """Spans of positions (begin, end) that cover a text: 0 to 63, 64 to 255, ..."""
    edges = list(SPAN_EDGES)
    while edges[-1] < tokens:
        edges.append(edges[-1] * 2)
    found = [(begin, min(end, tokens)) for begin, end in pairwise(edges)]
    return [(begin, end) for begin, end in found if begin < end]


@dataclass(frozen=True)
class Slope:
    """The exponent b of kl ~ position^b, with its 95 % interval; 0 is no growth with length."""

    value: float
    low: float
    high: float
    blocks: int


def length_slope(kl: Tensor) -> Slope | None:
    """Least squares of log KL on log position, over means of blocks of 64 positions.

    The interval is that of a bootstrap over pairs (Efron and Tibshirani, An Introduction to the
    Bootstrap, section 9.5), with blocks as pairs, since neighbouring positions are not independent.
    None for a text of fewer than 8 blocks, or where a block has no divergence at all.
    """
    blocks = len(kl) // BLOCK_TOKENS
    if blocks < MIN_BLOCKS:
        return None
    means = kl[: blocks * BLOCK_TOKENS].view(blocks, BLOCK_TOKENS).mean(-1).numpy()
    if not (means > 0).all():
        return None
    x = np.log((np.arange(blocks) + 0.5) * BLOCK_TOKENS)
    y = np.log(means)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    weights = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=NUM_REPLICATES)
    drawn = _slopes(weights, x, y)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    whole = _slopes(np.ones((1, blocks)), x, y)
    return Slope(float(whole[0]), float(low), float(high), blocks)


def _slopes(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weighted least-squares slopes of y on x, a row of `weights` (R, N) each, (R,)."""
    total = weights.sum(-1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variance = weights @ (x * x) / total - mean_x**2
    return covariance / np.where(variance > 0, variance, math.nan)


@dataclass(frozen=True)
class Spikes:
    """Positions whose KL is above `SPIKE_FACTOR` times the median, and changes of the argmax."""

    positions: int
    changes: int
    changes_at_spikes: int


def count_spikes(found: Divergence) -> Spikes:
    """Count columns whose KL exceeds `SPIKE_FACTOR` times the median, and changed top tokens."""
    is_spike = found.kl > SPIKE_FACTOR * found.kl.median()
    changed = ~found.same_top1
    return Spikes(int(is_spike.sum()), int(changed.sum()), int((is_spike & changed).sum()))
