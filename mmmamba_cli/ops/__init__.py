"""The ops of a mixer: one public function per op, each with a reference in plain PyTorch.

Every function takes `backend="auto"`, so callers do not depend on the device or the kernels.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mmmamba_cli.ops.attention import ATTENTION_BACKENDS, attention
from mmmamba_cli.ops.conv import CONV_BACKENDS, CONV_STEP_BACKENDS, causal_conv, causal_conv_step
from mmmamba_cli.ops.decode import (
    ATTENTION_STEP_BACKENDS,
    DELTA_MIXER_STEP_BACKENDS,
    GREEDY_ARGMAX_BACKENDS,
    MIXER_STEP_BACKENDS,
    attention_step,
    delta_mixer_step,
    greedy_argmax,
    mixer_step,
)
from mmmamba_cli.ops.delta import (
    DELTA_BACKENDS,
    DELTA_MATRIX_BACKENDS,
    DELTA_STEP_BACKENDS,
    delta_rule,
    delta_rule_matrix,
    delta_rule_step,
)
from mmmamba_cli.ops.gla import (
    GLA_BACKENDS,
    GLA_MATRIX_BACKENDS,
    GLA_STEP_BACKENDS,
    gla,
    gla_matrix,
    gla_step,
)
from mmmamba_cli.ops.norm import (
    GATED_RMS_NORM_BACKENDS,
    RMS_NORM_BACKENDS,
    gated_rms_norm,
    rms_norm,
)
from mmmamba_cli.ops.projection import PROJECT_BACKENDS, project
from mmmamba_cli.ops.ssd import SCAN_BACKENDS, SCAN_STEP_BACKENDS, ssd, ssd_step
from mmmamba_cli.ops.window import (
    WINDOW_ATTENTION_BACKENDS,
    WINDOW_MATRIX_BACKENDS,
    WINDOW_STEP_BACKENDS,
    window_attention,
    window_matrix,
    window_step,
)

# The registry of each public function. Functions look backends up at each call, so the registries
# include those added after import.
BACKENDS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "attention": ATTENTION_BACKENDS,
    "attention_step": ATTENTION_STEP_BACKENDS,
    "causal_conv": CONV_BACKENDS,
    "causal_conv_step": CONV_STEP_BACKENDS,
    "delta_mixer_step": DELTA_MIXER_STEP_BACKENDS,
    "delta_rule": DELTA_BACKENDS,
    "delta_rule_matrix": DELTA_MATRIX_BACKENDS,
    "delta_rule_step": DELTA_STEP_BACKENDS,
    "gated_rms_norm": GATED_RMS_NORM_BACKENDS,
    "gla": GLA_BACKENDS,
    "gla_matrix": GLA_MATRIX_BACKENDS,
    "gla_step": GLA_STEP_BACKENDS,
    "greedy_argmax": GREEDY_ARGMAX_BACKENDS,
    "mixer_step": MIXER_STEP_BACKENDS,
    "project": PROJECT_BACKENDS,
    "rms_norm": RMS_NORM_BACKENDS,
    "ssd": SCAN_BACKENDS,
    "ssd_step": SCAN_STEP_BACKENDS,
    "window_attention": WINDOW_ATTENTION_BACKENDS,
    "window_matrix": WINDOW_MATRIX_BACKENDS,
    "window_step": WINDOW_STEP_BACKENDS,
}

__all__ = [
    "BACKENDS",
    "attention",
    "attention_step",
    "causal_conv",
    "causal_conv_step",
    "delta_mixer_step",
    "delta_rule",
    "delta_rule_matrix",
    "delta_rule_step",
    "gated_rms_norm",
    "gla",
    "gla_matrix",
    "gla_step",
    "greedy_argmax",
    "mixer_step",
    "project",
    "rms_norm",
    "ssd",
    "ssd_step",
    "window_attention",
    "window_matrix",
    "window_step",
]
