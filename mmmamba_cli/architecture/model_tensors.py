"""Tensors of a model by its shape: parameters, which of them stay fp32, and bytes of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from mmmamba_cli.architecture.mixer_spec import SHARED_FP32_PARAMETERS, mixer_spec, mixer_specs
from mmmamba_cli.architecture.model_shape import ModelShape, layer_options
from mmmamba_cli.architecture.sizes import CacheBytes, VisionConfig


def parameter_shapes(model: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in `state_dict` order, without a tied head."""
    hidden = model.hidden_size
    found: dict[str, tuple[int, ...]] = {"model.text_embedding.weight": (model.vocab_size, hidden)}
    if model.vision_config is not None:
        found |= _named("model.vision", _vision_shapes(model.vision_config, hidden))
    for layer, name in enumerate(model.mixer_names):
        stack = model.stack_of(layer)
        mixer = mixer_spec(name).parameter_shapes(stack, layer_options(model, layer), hidden)
        inner = stack.intermediate_size
        block = {
            "mixer_norm.weight": (hidden,),
            **_named("mixer", mixer),
            "mlp_norm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        found |= _named(f"model.layers.{layer}", block)
    found["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        found["lm_head.weight"] = (model.vocab_size, hidden)
    return found


def _named(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _vision_shapes(vision: VisionConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    patch = (hidden, vision.num_channels, vision.patch_size, vision.patch_size)
    return {
        "position_embedding": (1, vision.grid**2 + 1, hidden),
        "patch_embedding.weight": patch,
        "patch_embedding.bias": (hidden,),
        "projector.0.weight": (hidden, hidden * vision.merge**2),
        "projector.0.bias": (hidden,),
        "projector.2.weight": (hidden, hidden),
        "projector.2.bias": (hidden,),
    }


def cache_bytes(model: ModelShape, batch: int, columns: int, itemsize: int) -> CacheBytes:
    """Bytes of a cache after `columns` columns; `itemsize` is that of the model's dtype."""
    return sum(layer_cache_bytes(model, batch, columns, itemsize), CacheBytes())


def layer_cache_bytes(
    model: ModelShape, batch: int, columns: int, itemsize: int
) -> tuple[CacheBytes, ...]:
    """Bytes of the cache of each layer; see `cache_bytes`."""
    options = model.mixer_config
    return tuple(
        mixer_spec(name).cache_bytes(model.stack_of(layer), options, batch, columns, itemsize)
        for layer, name in enumerate(model.mixer_names)
    )


@cache
def fp32_parameters() -> frozenset[str]:
    """Parts of names of the small parameters kept in fp32: bf16 would round their updates away."""
    return SHARED_FP32_PARAMETERS.union(*(spec.fp32_parameters for spec in mixer_specs().values()))


def is_fp32_parameter(name: str) -> bool:
    """Whether a parameter stays fp32 in a model of a narrower dtype."""
    return not fp32_parameters().isdisjoint(name.split("."))
