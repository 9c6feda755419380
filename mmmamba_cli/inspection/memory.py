"""Memory at a context length, computed from the config: weights, KV cache, conv and SSM states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from mmmamba_cli.architecture import (
    ATTENTION,
    LINEAR,
    Architecture,
    CacheBytes,
    ModelShape,
    layer_cache_bytes,
    parameter_shapes,
)
from mmmamba_cli.checkpoint import DTYPE_TENSOR, Checkpoint, parse_dtype_name, stored_dtype_name
from mmmamba_cli.checkpoint.tensor_info import ITEMSIZES
from mmmamba_cli.errors import DataError

DEFAULT_CONTEXT = 103_424


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at one context length for batch size 1; activations are not counted."""

    name: str
    weights: int
    kv_cache: int
    conv_state: int
    ssm_state: int
    attention_layers: int
    linear_layers: int
    # The cache of each layer.
    layers: tuple[CacheBytes, ...] = ()

    @property
    def state(self) -> int:
        """Bytes of the cache: keys and values, conv states and SSM states."""
        return self.kv_cache + self.conv_state + self.ssm_state

    @property
    def total(self) -> int:
        return self.weights + self.state


def memory_at(name: str, config: ModelShape, context: int, dtype_name: str) -> MemoryEstimate:
    """Estimate the memory of a model at `context` tokens, loaded in the torch dtype `dtype_name`.

    The embedding stack is assumed to see as many columns as the language stack. This is too low
    for images if the pixel shuffle follows the embedding stack.

    Raises:
        DataError: if `context` is below 1.
    """
    if context < 1:
        raise DataError(f"--context is {context}, expected at least 1 token")
    layers = layer_cache_bytes(config, 1, context, ITEMSIZES[dtype_name])
    cache = sum(layers, CacheBytes())
    return MemoryEstimate(
        name,
        weight_bytes(config, dtype_name),
        cache.kv_cache,
        cache.conv_state,
        cache.ssm_state,
        list(config.layer_types).count(ATTENTION),
        list(config.layer_types).count(LINEAR),
        layers,
    )


def memory_of_checkpoint(
    name: str, checkpoint: Checkpoint, context: int, dtype: str | None = None
) -> list[MemoryEstimate]:
    """Estimate the memory of a checkpoint and, unless it is all attention, of its teacher.

    `dtype` defaults to the dtype in which the token embedding is stored.

    Raises:
        CheckpointError: if `dtype` is not known.
    """
    config = checkpoint.architecture
    dtype_name = checkpoint.info(DTYPE_TENSOR).dtype_name
    if dtype is not None:
        dtype_name = parse_dtype_name(dtype)
    estimates = [memory_at(name, config, context, dtype_name)]
    if estimates[0].linear_layers:
        estimates.append(memory_at("all attention", all_attention(config), context, dtype_name))
    return estimates


def weight_bytes(config: ModelShape, dtype_name: str) -> int:
    """Bytes of all parameters of a model with this config; small parameters are fp32."""
    return sum(
        prod(shape) * ITEMSIZES[stored_dtype_name(name, dtype_name)]
        for name, shape in parameter_shapes(config).items()
    )


def all_attention(config: Architecture) -> Architecture:
    """The config of the teacher that a student came from: attention in every layer."""
    return replace(config, layer_types=[ATTENTION] * config.num_hidden_layers, mixers=None)
