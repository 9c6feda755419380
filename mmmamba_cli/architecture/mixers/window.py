"""Attention to a sliding window and to attention sinks, which keeps the teacher's projections.

Sinks are the first columns (arXiv 2309.17453) or a learned logit per head (arXiv 2508.10925).
"""

from __future__ import annotations

from mmmamba_cli.architecture.mixer_spec import MixerSpec, register_spec
from mmmamba_cli.architecture.projections import projection_shapes, qk_norm_shapes
from mmmamba_cli.architecture.sizes import (
    LINEAR,
    CacheBytes,
    MixerConfig,
    StackConfig,
    kv_cache_bytes,
)


def parameter_shapes(
    stack: StackConfig, options: MixerConfig, hidden: int
) -> dict[str, tuple[int, ...]]:
    logits = {"sink_logits": (stack.num_heads,)} if options.sink_logits else {}
    norms = qk_norm_shapes(stack.head_dim) if stack.qk_norm else {}
    return {**logits, **projection_shapes(stack, hidden), **norms}


def cache_bytes(
    stack: StackConfig, options: MixerConfig, batch: int, columns: int, itemsize: int
) -> CacheBytes:
    """Keys and values of the first columns and of the window, whatever the length of the text."""
    slots = options.sinks + options.window
    return CacheBytes(kv_cache=kv_cache_bytes(stack, batch, slots, itemsize))


def operations(stack: StackConfig, options: MixerConfig, columns: int, context: int) -> int:
    """Scores and weighted values of the pairs that the last `columns` columns see."""
    seen = options.sinks + options.window
    pairs = _pairs(context, seen) - _pairs(context - columns, seen)
    return 2 * pairs * stack.num_heads * stack.head_dim


def _pairs(columns: int, seen: int) -> int:
    """Pairs of the first `columns` queries, each with at most `seen` keys."""
    short = min(columns, seen)
    return short * (short + 1) // 2 + (columns - short) * seen


def forgetting(options: MixerConfig) -> str:
    kept = f", except for the first {options.sinks}" if options.sinks else ""
    return f"drops a key and its value after {options.window} tokens{kept}"


SPEC = register_spec(
    MixerSpec(
        name="window",
        title="sliding-window attention",
        # The state has a fixed size and cannot be cropped, as that of a recurrent mixer.
        layer_type=LINEAR,
        parameter_shapes=parameter_shapes,
        cache_bytes=cache_bytes,
        operations=operations,
        options=("window", "sinks", "sink_logits"),
        matrix_parameters=("q_proj", "k_proj", "sink_logits", "q_norm", "k_norm"),
        fp32_parameters=frozenset({"sink_logits"}),
        is_packed=lambda options: True,
        forgetting=forgetting,
    )
)
