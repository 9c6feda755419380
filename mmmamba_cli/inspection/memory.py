"""Memory at a context length, computed from the config: weights, keys and values, states.

Legend: T tokens of context, H query heads, K key/value heads, P head dim, W conv width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from mmmamba_cli.checkpoint import expected_tensors, stored_dtype
from mmmamba_cli.errors import DataError
from mmmamba_cli.model import ATTENTION, LINEAR, HolisticVLMConfig

FP32_BYTES = 4
DEFAULT_CONTEXT = 103_424


@dataclass(frozen=True)
class Memory:
    """Bytes of one row of a batch at one context length; activations are not counted."""

    name: str
    weights: int
    kv_cache: int
    conv_state: int
    ssm_state: int
    attention_layers: int
    linear_layers: int

    @property
    def state(self) -> int:
        """All that decoding remembers."""
        return self.kv_cache + self.conv_state + self.ssm_state

    @property
    def total(self) -> int:
        return self.weights + self.state


def memory_at(name: str, config: HolisticVLMConfig, context: int, dtype: torch.dtype) -> Memory:
    """What a model takes at `context` tokens if it is loaded in `dtype`.

    The embedding stack is taken to see as many columns as the language stack, which is short of
    the truth for pictures where the pixel shuffle lies behind it. Raises `DataError` for a context
    below 1.
    """
    if context < 1:
        raise DataError(f"--context is {context}, expected at least 1 token")
    width = dtype.itemsize
    options = config.mixer_config
    kv = conv = ssm = 0
    for layer, kind in enumerate(config.layer_types):
        stack = config.stack_of(layer)
        if kind == ATTENTION:
            kv += 2 * stack.num_kv_heads * stack.head_dim * context * width
        else:
            channels = (stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim
            conv += channels * (options.conv_width - 1) * width
            ssm += stack.num_heads * stack.head_dim**2 * FP32_BYTES
    return Memory(
        name,
        weight_bytes(config, dtype),
        kv,
        conv,
        ssm,
        config.layer_types.count(ATTENTION),
        config.layer_types.count(LINEAR),
    )


def weight_bytes(config: HolisticVLMConfig, dtype: torch.dtype) -> int:
    """Of all parameters of a model with this config, small ones in fp32; nothing is allocated."""
    return sum(
        prod(shape) * stored_dtype(name, dtype).itemsize
        for name, shape in expected_tensors(config).items()
    )


def all_attention(config: HolisticVLMConfig) -> HolisticVLMConfig:
    """The config of the teacher that a student came from: attention in every layer."""
    values = config.to_dict()
    values["layer_types"] = [ATTENTION] * config.num_hidden_layers
    return HolisticVLMConfig.from_dict(values)
