"""Steps 2 to 4: distilling a student, stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.deferred import deferred_names
from mmmamba_cli.distill.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from mmmamba_cli.distill.learning import describe
    from mmmamba_cli.distill.loop import StepResult, Stopped
    from mmmamba_cli.distill.planning import choose_start, stages_to_run, wanted_stages
    from mmmamba_cli.distill.plots import PICTURE
    from mmmamba_cli.distill.running import Options, Watch
    from mmmamba_cli.distill.state import Progress
    from mmmamba_cli.distill.whole import distill

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

__getattr__ = deferred_names(
    __name__,
    {
        "learning": ("describe",),
        "loop": (
            "StepResult",
            "Stopped",
        ),
        "planning": (
            "choose_start",
            "stages_to_run",
            "wanted_stages",
        ),
        "plots": ("PICTURE",),
        "running": (
            "Options",
            "Watch",
        ),
        "state": ("Progress",),
        "whole": ("distill",),
    },
)
