"""Random weights of a Gated DeltaNet mixer for tests of its decoding step."""

from __future__ import annotations

import torch
from decode_cases import Sizes, random

from mmmamba_cli.ops.decode import DeltaWeights


def delta_weights(
    sizes: Sizes, dtype: torch.dtype = torch.float64, *, bias: bool = True
) -> DeltaWeights:
    """Weights of a model in `dtype`; parameters of heads stay in fp32, or fp64."""
    normal = random(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return DeltaWeights(
        normal(sizes.channels, sizes.taps).to(dtype),
        normal(sizes.channels).to(dtype) if bias else None,
        -normal(sizes.heads).exp().to(wide),
        normal(sizes.heads).to(wide),
        normal(sizes.heads).to(wide),
    )
