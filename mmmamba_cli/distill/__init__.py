"""Steps 2 to 4: distilling a student, stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.distill.metrics import METRICS, read_metrics
from mmmamba_cli.lazy_imports import lazy_attributes

if TYPE_CHECKING:
    from mmmamba_cli.distill.metrics import PICTURE
    from mmmamba_cli.distill.pipeline import distill
    from mmmamba_cli.distill.stage_runner import Options, Watch
    from mmmamba_cli.distill.stages import choose_start, stages_to_run, wanted_stages
    from mmmamba_cli.distill.trainable import describe
    from mmmamba_cli.distill.trainer import StepResult, Stopped
    from mmmamba_cli.distill.training_state import Progress

__all__ = [
    "METRICS",
    "PICTURE",
    "Options",
    "Progress",
    "StepResult",
    "Stopped",
    "Watch",
    "choose_start",
    "describe",
    "distill",
    "read_metrics",
    "stages_to_run",
    "wanted_stages",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "trainable": ("describe",),
        "trainer": (
            "StepResult",
            "Stopped",
        ),
        "stages": (
            "choose_start",
            "stages_to_run",
            "wanted_stages",
        ),
        "metrics": ("PICTURE",),
        "stage_runner": (
            "Options",
            "Watch",
        ),
        "training_state": ("Progress",),
        "pipeline": ("distill",),
    },
)
