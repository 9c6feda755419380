"""Distillation of a student, stage by stage (steps 2 to 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.distill.metrics import METRICS, read_metrics
from mmmamba_cli.lazy_imports import lazy_attributes

if TYPE_CHECKING:
    from mmmamba_cli.distill.dry_run_result import DryRun, StageForecast
    from mmmamba_cli.distill.dry_runner import DryRunOptions, dry_run
    from mmmamba_cli.distill.metrics import LOSS_PLOT
    from mmmamba_cli.distill.pipeline import (
        choose_start_product,
        distill,
        parse_stage_names,
        stages_to_run,
    )
    from mmmamba_cli.distill.stage_attempt import DistillOptions
    from mmmamba_cli.distill.stage_memory import HOW_COMPUTED
    from mmmamba_cli.distill.stage_runner import StageCallbacks
    from mmmamba_cli.distill.trainable import layers_per_parameter
    from mmmamba_cli.distill.trainer import StepResult, Stopped
    from mmmamba_cli.distill.training_state import Progress

__all__ = [
    "HOW_COMPUTED",
    "LOSS_PLOT",
    "METRICS",
    "DistillOptions",
    "DryRun",
    "DryRunOptions",
    "Progress",
    "StageCallbacks",
    "StageForecast",
    "StepResult",
    "Stopped",
    "choose_start_product",
    "distill",
    "dry_run",
    "layers_per_parameter",
    "parse_stage_names",
    "read_metrics",
    "stages_to_run",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "trainable": ("layers_per_parameter",),
        "trainer": ("StepResult", "Stopped"),
        "metrics": ("LOSS_PLOT",),
        "dry_runner": ("DryRunOptions", "dry_run"),
        "stage_attempt": ("DistillOptions",),
        "dry_run_result": ("DryRun", "StageForecast"),
        "stage_memory": ("HOW_COMPUTED",),
        "stage_runner": ("StageCallbacks",),
        "training_state": ("Progress",),
        "pipeline": ("choose_start_product", "distill", "parse_stage_names", "stages_to_run"),
    },
)
