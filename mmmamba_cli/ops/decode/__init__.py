"""One token through what a mixer does between its projections, states and caches changed in place.

Nothing here waits for the device or has a shape that depends on the position, so that a whole
decoding step can be captured as one CUDA graph. Legend: B batch, H query heads, K key/value heads,
P value dim, N state dim, Ch channels of [v, k, q], W convolution taps, S columns of a cache.
"""

from mmmamba_cli.ops.decode.argmax import LIKELIEST_BACKENDS, likeliest
from mmmamba_cli.ops.decode.attention_step import ATTENTION_STEP_BACKENDS, attention_step
from mmmamba_cli.ops.decode.mamba_step import (
    MIXER_STEP_BACKENDS,
    MixerWeights,
    conv_state_of,
    mixer_step,
    ring_of,
)

__all__ = [
    "ATTENTION_STEP_BACKENDS",
    "LIKELIEST_BACKENDS",
    "MIXER_STEP_BACKENDS",
    "MixerWeights",
    "attention_step",
    "conv_state_of",
    "likeliest",
    "mixer_step",
    "ring_of",
]
