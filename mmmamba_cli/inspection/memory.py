"""Memory at a context length, computed from the config: weights, keys and values, states.

Legend: T tokens of context, H query heads, K key/value heads, P head dim, W conv width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from mmmamba_cli.architecture import ATTENTION, LINEAR, Architecture, ModelShape, parameter_shapes
from mmmamba_cli.checkpoint import stored_element
from mmmamba_cli.checkpoint.tensor_info import ITEMSIZES
from mmmamba_cli.errors import DataError

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


def memory_at(name: str, config: ModelShape, context: int, element: str) -> Memory:
    """What a model takes at `context` tokens if it is loaded in `element`, torch's name of a dtype.

    The embedding stack is taken to see as many columns as the language stack, which is short of
    the truth for pictures where the pixel shuffle lies behind it. Raises `DataError` for a context
    below 1.
    """
    if context < 1:
        raise DataError(f"--context is {context}, expected at least 1 token")
    width = ITEMSIZES[element]
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
        weight_bytes(config, element),
        kv,
        conv,
        ssm,
        list(config.layer_types).count(ATTENTION),
        list(config.layer_types).count(LINEAR),
    )


def weight_bytes(config: ModelShape, element: str) -> int:
    """Of all parameters of a model with this config, small ones in fp32; nothing is allocated."""
    return sum(
        prod(shape) * ITEMSIZES[stored_element(name, element)]
        for name, shape in parameter_shapes(config).items()
    )


def all_attention(config: Architecture) -> Architecture:
    """The config of the teacher that a student came from: attention in every layer."""
    return replace(config, layer_types=[ATTENTION] * config.num_hidden_layers)
