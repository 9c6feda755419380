"""Steps 2 to 4: distilling a student, stage by stage."""

from mmmamba_cli.distill.learning import describe
from mmmamba_cli.distill.loop import StepResult, Stopped
from mmmamba_cli.distill.metrics import METRICS, read_metrics
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
