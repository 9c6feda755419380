"""Rotary position embedding (Su et al., arXiv 2104.09864) of rotated halves, and its scalings.

Legend: B batch, T tokens, P head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.model.config import StackConfig


def inverse_frequencies(stack: StackConfig, lengths: Tensor | int, device: torch.device) -> Tensor:
    """Inverse frequencies in fp32 for sequences of `lengths` tokens.

    `lengths` is an int or an integer tensor of any shape. The result is (*lengths.shape, P/2) for
    dynamic NTK, else (P/2,). Dynamic NTK replaces the base by
    base * (f T / M - (f - 1)) ** (P / (P - 2)) if the length T exceeds the trained maximum M.
    """
    dim = stack.head_dim
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    scaling = stack.rope_scaling or {}
    if scaling.get("type") == "llama3":
        return _llama3_frequencies(stack.rope_theta**-exponents, scaling)
    factor = float(scaling.get("factor", 1.0))
    maximum = stack.max_position_embeddings
    if scaling.get("type") == "linear":
        return stack.rope_theta**-exponents / factor
    if scaling.get("type") != "dynamic":
        return stack.rope_theta**-exponents
    if isinstance(lengths, int):
        # A fill: a copy of the number would wait for a GPU.
        lengths = torch.full((), lengths, device=device)
    longest = lengths.to(device, torch.float32).clamp(min=maximum)
    growth = factor * longest / maximum - (factor - 1)
    base = stack.rope_theta * growth ** (dim / (dim - 2))
    return base.unsqueeze(-1) ** -exponents


def _llama3_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1 scaling (arXiv 2407.21783): divide low frequencies by `factor`, keep high ones.

    Between wavelengths M / high_freq_factor and M / low_freq_factor, where M is the original
    maximum length, the share of the unscaled frequency is linear in M / wavelength.
    """
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / float(scaling["factor"]))


def depends_on_length(stack: StackConfig) -> bool:
    """Whether RoPE frequencies depend on the prompt length (dynamic NTK)."""
    return (stack.rope_scaling or {}).get("type") == "dynamic"


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, P) for `positions` (B, T); angles are computed in fp32."""
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, P) by the angles with cosine and sine (B, T, P)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)
