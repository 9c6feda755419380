"""Softmax attention, the mixer of the teacher and of the attention layers of a hybrid."""

from __future__ import annotations

from mmmamba_cli.architecture.mixer_spec import MixerSpec, register_spec
from mmmamba_cli.architecture.projections import projection_shapes, qk_norm_shapes
from mmmamba_cli.architecture.sizes import (
    ATTENTION,
    CacheBytes,
    MixerConfig,
    StackConfig,
    kv_cache_bytes,
)

ALL_OPTIONS = tuple(MixerConfig.__dataclass_fields__)


def parameter_shapes(
    stack: StackConfig, options: MixerConfig, hidden: int
) -> dict[str, tuple[int, ...]]:
    norms = qk_norm_shapes(stack.head_dim) if stack.qk_norm else {}
    return {**projection_shapes(stack, hidden), **norms}


def cache_bytes(
    stack: StackConfig, options: MixerConfig, batch: int, columns: int, itemsize: int
) -> CacheBytes:
    """Keys and values (B, K, `columns`, P) each."""
    return CacheBytes(kv_cache=kv_cache_bytes(stack, batch, columns, itemsize))


def operations(stack: StackConfig, options: MixerConfig, columns: int, context: int) -> int:
    """Scores and weighted values of the causal pairs of the last `columns` columns."""
    pairs = columns * context - columns * (columns - 1) // 2
    return 2 * pairs * stack.num_heads * stack.head_dim


SPEC = register_spec(
    MixerSpec(
        name="attention",
        title="attention",
        layer_type=ATTENTION,
        parameter_shapes=parameter_shapes,
        cache_bytes=cache_bytes,
        operations=operations,
        # The options are those of the other layers.
        options=ALL_OPTIONS,
        matrix_parameters=("q_proj", "k_proj", "q_norm", "k_norm"),
        is_default=True,
        is_packed=lambda options: True,
        forgetting=lambda options: "keeps the key and value of every token",
    )
)
