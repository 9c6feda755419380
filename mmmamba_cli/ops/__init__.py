"""The arithmetic of a mixer: one public function per op, a plain PyTorch reference behind each.

Every function takes `backend="auto"`; callers never ask which device or kernel they run on.
"""

from mmmamba_cli.ops.conv import causal_conv, causal_conv_step
from mmmamba_cli.ops.norm import gated_rms_norm, rms_norm
from mmmamba_cli.ops.ssd import ssd, ssd_step

__all__ = [
    "causal_conv",
    "causal_conv_step",
    "gated_rms_norm",
    "rms_norm",
    "ssd",
    "ssd_step",
]
